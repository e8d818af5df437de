"""The answer benchmark: recordings whose truth is known, the real pipeline, every question scored exactly.

    python -m tools.bench_answers --folder DIR --out DIR [--seed 1] [--length 3600] [--questions 60]
        [--rows captions,kv,both,...] [--codecs int4,raw] [--set retrieve.blocks=32] [--cold] [--json]
    python -m tools.bench_answers --folder DIR --out DIR --quick

Test recordings are planned from seeds, rendered to H.264 (kept in --folder), ingested (recipe hybrid, one frame a
second) and asked through Client.ask. Rows beside the product's modes put other blocks, or none, into its context
just before they are read (tools/answers/tap.py); they search the whole recording also where a question names a span.
Into --out go table.md, summary.json, outcomes.jsonl (a line for each question in each row) and two plots.

--paint takes the pictures as they are painted, without a film: for machines without a decoder. --reuse asks a
recording that an earlier run ingested.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tools.answers.asking import run
from tools.answers.job import Job, Tell
from tools.answers.plots import plots
from tools.answers.rows import ROWS
from tools.answers.table import document, markdown, write

QUICK_ROWS = ("captions", "kv", "both", "last4", "uniform")


def quick(folder: Path, *, seed: int = 1, model: str | None = None) -> Job:
    """Four minutes, a few questions, a sixteenth of the frames in the context: under 3 minutes on 2 cores."""
    return Job(
        folder=folder,
        seeds=(seed,),
        length_s=240,
        per_kind=6,
        rows=QUICK_ROWS,
        settings=("retrieve.blocks=16", "retrieve.caption_tokens=200", "answer.tokens_max=16"),
        model=model,
        film_fps=5,
        film_size=(320, 180),
    )


def main() -> int:
    args = _arguments()
    job = quick(args.folder, seed=args.seed[0], model=args.model) if args.quick else _job(args)
    began_s = time.monotonic()
    with progress() as tell:
        outcomes, ingested = run(job, tell)
    write(args.out, job, outcomes, ingested)
    plots(args.out, outcomes, job.codecs[0])
    print(document(job, outcomes, ingested) if args.json else markdown(job, outcomes, ingested))
    print(f"{time.monotonic() - began_s:.0f} s in all; files in {args.out}", file=sys.stderr)
    return 0


def _job(args: argparse.Namespace) -> Job:
    return Job(
        folder=args.folder,
        seeds=args.seed,
        length_s=args.length,
        per_kind=args.questions,
        rows=args.rows,
        codecs=args.codecs,
        settings=tuple(args.settings),
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        film_fps=args.film_fps,
        paint=args.paint,
        cold=args.cold,
        reuse=args.reuse,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="films and stores")
    parser.add_argument("--out", type=Path, required=True, help="table, data and plots")
    parser.add_argument("--seed", type=_numbers, default=(1,), help="one, or several: 1,2,3")
    parser.add_argument("--length", type=int, default=600, help="seconds of each recording")
    parser.add_argument("--questions", type=int, default=60, help="of each kind and seed")
    parser.add_argument("--rows", type=_rows, default=tuple(ROWS), help=", ".join(ROWS))
    parser.add_argument("--codecs", type=lambda text: tuple(text.split(",")), default=("int4",))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="STAGE.PARAM=VALUE")
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--film-fps", type=int)
    parser.add_argument("--paint", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _rows(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := sorted(set(names) - set(ROWS)):
        raise argparse.ArgumentTypeError(f"no row {unknown[0]!r}: choose of {', '.join(ROWS)}")
    return names


@contextmanager
def progress() -> Iterator[Tell]:
    """A bar for what is in hand, on a terminal's stderr; nothing in a pipe."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
    )
    console = Console(stderr=True)
    bar = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    with bar:
        tasks = {}

        def tell(what: str, done: float, whole: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=whole)
            bar.update(tasks[what], completed=done)

        yield tell


if __name__ == "__main__":
    sys.exit(main())
