"""The equality ladder by hand: logits through store, close, reopen and rebuild against one uncut forward.

    python -m tools.ladder --model DIR --film FILE --recipe rekv --codec raw

Each row is an ingest into a store of its own, read back by another connection. Nothing is dropped and everything
is retrieved. Half of the rows have a window that is shorter than the film; their truth is the plain loop with
that mask. With a lossless codec every row must stay below 1e-4; with others the difference is the codec's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from memdb.client import connect
from memdb.ladder import LadderReport
from memdb.schemas.errors import MemdbError

CHUNKS = (1, 3, 64)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", help="embedded, random:SEED, a folder or a Hub id")
    parser.add_argument("--film", required=True)
    parser.add_argument("--recipe", default="rekv", help="rekv, hybrid or a FILE.toml")
    parser.add_argument("--codec", default="raw", help="raw, fp16, bf16, int8, int4, oqm or oqm2")
    parser.add_argument("--sample-fps", type=float, default=1.0)
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS), help="frames fed at a time")
    parser.add_argument("--window-tokens", type=int, help="the short window; by default a third of the film")
    parser.add_argument("--question", default="What happens in this video?")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        rows = list(_ladder(args))
    except MemdbError as error:
        sys.stderr.write(f"ladder: {error}\n")
        return error.exit_code
    if args.json:
        print(json.dumps([{"chunk_frames": chunk, **report.as_json()} for chunk, report in rows]))
    return 0


def _ladder(args: argparse.Namespace) -> list[tuple[int, LadderReport]]:
    rows: list[tuple[int, LadderReport]] = []
    wide = init = 0
    for short in (False, True):
        for chunk in args.chunks:
            report = run(args, chunk, (args.window_tokens or max(init + 1, wide // 3)) if short else None)
            wide, init = max(wide, report.context_tokens), report.init_tokens
            rows.append((chunk, report))
            if not args.json:
                _print(chunk, report, first=len(rows) == 1)
    return rows


def run(args: argparse.Namespace, chunk: int, window: int | None) -> LadderReport:
    """One rung: ingest, close, reopen, compare."""
    settings = [f"encode.chunk_frames={chunk}", "rebuild.time_text_s=0"]
    # A window of None is one that no film of this ladder fills.
    settings.append(f"encode.window_tokens={window if window is not None else 1 << 24}")
    with tempfile.TemporaryDirectory(prefix="memdb-ladder-") as folder:
        store = Path(folder) / "ladder.memdb"
        with connect(store, model=args.model, device=args.device, dtype=args.dtype) as db:
            db.ingest(
                args.film,
                recording="film",
                recipe=args.recipe,
                codec=args.codec,
                settings=settings,
                sample_fps=args.sample_fps,
            )
        with connect(store, device=args.device, dtype=args.dtype, create=False) as db:
            return db.compare_uncut(args.film, "film", args.question)


def _print(chunk: int, report: LadderReport, *, first: bool) -> None:
    if first:
        print(
            f"recipe {report.recipe}, codec {report.codec}, {report.frames} frames, {report.context_tokens} tokens"
        )
        print(
            f"{'frames fed':>10} {'window':>9} {'binds':>6} {'largest diff':>13} {'of largest':>11} {'same next':>10}"
        )
    print(
        f"{chunk:>10} {report.window_tokens:>9} {report.window_binds!s:>6} {report.largest_difference:>13.3e} "
        f"{report.relative:>11.2e} {report.same_next_token!s:>10}"
    )


if __name__ == "__main__":
    sys.exit(main())
