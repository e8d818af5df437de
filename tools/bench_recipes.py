"""All eight recipes on the answer benchmark: one recording, the same questions, one table.

    python -m tools.bench_recipes --folder DIR --out DIR [--seed 1] [--length 3600] [--questions 20]
        [--recipes rekv,infinipot-v] [--film] [--json]

Each recipe ingests the recording in a process of its own, with the settings that fit the embedded model, and answers
in the mode that its paper has: rlivs from captions, hybrid from both, the others from KV. Beside each stands
`uniform`: whole frames at even distances over all that was seen, of the KV that rekv stored, with times between them
like its own, as many as take the tokens that the recipe's context took (the median). Memory is what the process took
at most during ingest above what it had with the model loaded; it counts everything, buffers of the decoder too.
Pictures are taken as they are painted; with --film they go through H.264.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from memdb.loaded import DEFAULT_MODEL
from memdb.models.load import load_model
from memdb.recipes import RECIPES
from memdb.world.questions import KINDS
from tools.answers.asking import run
from tools.answers.job import OWN, Ingested, Job, Outcome
from tools.answers.score import Line, chances, line

MODES = {"rlivs": "captions", "hybrid": "both"}  # the others: kv
PLACE, BESIDE = "rekv", "uniform"  # whose KV the control reads


@dataclass(frozen=True)
class Ran:
    """One recipe's questions, and the same questions to uniform sampling at as many tokens."""

    recipe: str
    mode: str
    outcomes: list[Outcome]
    ingested: Ingested | None
    memory_bytes: int
    uniform: list[Outcome]

    @property
    def line(self) -> Line:
        return line(self.outcomes)


def main() -> int:
    args = _arguments()
    ran = [Ran(name, MODES.get(name, "kv"), *_alone(_job(args, name)), []) for name in args.recipes]
    stamped = stamped_tokens(args.model)
    beside: dict[int, list[Outcome]] = {}
    rows = []
    for one in ran:
        frames = max(1, round(one.line.context_tokens / stamped))
        if frames not in beside:
            beside[frames] = _alone(_job(args, PLACE, rows=(BESIDE,), blocks=frames, reuse=True))[0]
        rows.append(Ran(**{**vars(one), "uniform": beside[frames]}))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "recipes.md").write_text(table(rows), encoding="utf-8")
    told = [asdict(found) | {"recipe": one.recipe} for one in rows for found in (*one.outcomes, *one.uniform)]
    (args.out / "outcomes.jsonl").write_text("".join(json.dumps(found) + "\n" for found in told))
    print(json.dumps([asdict(one.line) for one in rows]) if args.json else table(rows))
    return 0


def stamped_tokens(model: str | None) -> int:
    """Tokens of a frame that stands alone, with the time behind it."""
    loaded = load_model(model or DEFAULT_MODEL, device="cpu")
    return loaded.shape.frame_tokens + len(loaded.encode_text("[00:00:00]"))


def table(rows: Sequence[Ran]) -> str:
    head = ["recipe", "mode", "macro", "uniform", *KINDS, "recall", "tokens", "MiB an hour", "ingest MiB"]
    head += ["times real time", "p50 ms", "p95 ms"]
    chance = chances(rows[0].outcomes)
    cells = [["chance", "", "", "", *(_share(chance.get(kind)) for kind in KINDS), *[""] * 7]]
    cells += [_cells(one) for one in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(own) + " |" for own in lines) + "\n"


def _cells(one: Ran) -> list[str]:
    own, beside, ingested = one.line, line(one.uniform), one.ingested
    return [
        one.recipe,
        one.mode,
        f"{_share(own.macro)} ± {_share(own.macro_error)}",
        f"{_share(beside.macro)} ± {_share(beside.macro_error)}",
        *(_share(own.by_kind.get(kind)) for kind in KINDS),
        _share(own.recall),
        f"{own.context_tokens:.0f}",
        "" if ingested is None else f"{ingested.bytes_per_hour / 2**20:.1f}",
        f"{one.memory_bytes / 2**20:.0f}",
        "" if ingested is None else f"{ingested.times_real_time:.1f}",
        f"{own.p50_ms:.0f}",
        f"{own.p95_ms:.0f}",
    ]


def _line(one: Ran) -> str:
    return f"{one.recipe}: {_share(one.line.macro)}, uniform {_share(line(one.uniform).macro)}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _job(
    args: argparse.Namespace,
    recipe: str,
    *,
    rows: tuple[str, ...] = (),
    blocks: int | None = None,
    reuse: bool = False,
) -> Job:
    return Job(
        folder=args.folder,
        seeds=(args.seed,),
        length_s=args.length,
        per_kind=args.questions,
        rows=rows or (MODES.get(recipe, "kv"),),
        codecs=(OWN,),
        recipe=recipe,
        blocks=blocks,
        model=args.model,
        paint=not args.film,
        reuse=reuse,
    )


def _alone(job: Job) -> tuple[list[Outcome], Ingested | None, int]:
    """A run in a process of its own: what it found, and the memory that it took at most."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, job).result()


def _measured(job: Job) -> tuple[list[Outcome], Ingested | None, int]:
    peaks: list[int] = []  # at each step of the ingest; at the first one the model is loaded

    def tell(what: str, done: float, whole: float) -> None:
        if what.startswith("ingest"):
            peaks.append(_peak())

    outcomes, ingested = run(job, tell)
    took = peaks[-1] - peaks[0] if peaks else 0
    return outcomes, ingested[0] if ingested and ingested[0].ingest_s else None, took


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="films and stores")
    parser.add_argument("--out", type=Path, required=True, help="table and data")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--length", type=int, default=3600, help="seconds of the recording")
    parser.add_argument("--questions", type=int, default=20, help="of each kind")
    parser.add_argument("--recipes", type=_recipes, default=tuple(RECIPES), help=", ".join(RECIPES))
    parser.add_argument("--model")
    parser.add_argument("--film", action="store_true", help="through H.264")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _recipes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := sorted(set(names) - set(RECIPES)):
        raise argparse.ArgumentTypeError(f"no recipe {unknown[0]!r}: choose of {', '.join(RECIPES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
