"""What stages 2 (reduce), 5 (retain) and 6 (index) cost beside the encoding of the same frames.

    python -m tools.bench_stages [--size 7b] [--recipe NAME ...] [--frames 50] [--device D] [--out FILE.json]

A random LLaVA-OneVision, by default of the 7B shape (16 GB in bf16), made once on the device; random frames; the
encoder that an ingest runs, batch after batch. Each recipe is fed until what it holds (window, memory, queue of
clips) grows no more, and then timed over at least `--frames` frames and three batches. CUDA events stand around the
calls below; on a CPU it is the clock. Every moment is counted once, to the innermost of the calls that are running:

vision   the tower and the projector
encode   stage 3: the language model over visual tokens, without what follows
caption  stage 3 as well, where a recipe has captions: what is left of them, mostly decoding
reduce   stage 2: merging; CTR and the saliency of the vision tower; recurrent tokens with their attention probe
retain   stage 5: rows of a probe and their attention, the guidance prompt's forward, scores, choice, gathering,
         prototypes, keep sets
index    stage 6: mean keys, vectors of captions

A figure is the median over the timed frames of a batch's time by its frames, in ms. `%` is reduce + retain + index by
vision + encode + caption of a batch (median, lowest and highest batch); `no captions %` leaves captions out of what it
is divided by. The mark is 5 %, the goal 2. Rows of the chat template ride in the forward that encodes: their share of
its rows is taken out of `encode` and counted as `retain`.

Not in it: packing (`rest`), and what the writer's thread does with keys later, without a GPU; so nothing is compressed,
and no zstandard needed. No frame merges, and a segment of `streamkv` is 16 frames, so that random weights decide
nothing. Its guidance prompt costs about as much for a segment of any length: the worst case, a film that cuts every
four frames (`unit.frames_min`), costs nearly four times the share. KV is packed as int4 where a recipe may be, captions
have at most 64 tokens, their vectors are of input embeddings.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memdb.models.protocol import VideoModel
from memdb.recipes import RECIPES
from tools.stages.ground import SHARES, build, uncompressed
from tools.stages.measure import GOAL, MARK, Row, measure

HEAD = (
    f"{'recipe':<13} {'frames':>6} {'held':>6}  {'vision':>7} {'encode':>7} {'caption':>7}  "
    f"{'reduce':>7} {'retain':>7} {'index':>7} {'rest':>7}  {'% (low-high)':>20} {'no captions %':>13}  mark"
)


def line(found: Row) -> str:
    def cell(ms: float | None) -> str:
        return f"{'-':>7}" if ms is None else f"{ms:>7.2f}"

    reached = "goal met" if found.percent <= GOAL else "met" if found.is_met else "MISSED"
    spread = f"{found.percent:.2f} ({found.percent_low:.2f}-{found.percent_high:.2f})"
    encoding = " ".join(map(cell, (found.vision_ms, found.encode_ms, found.caption_ms)))
    own = " ".join(map(cell, (found.reduce_ms, found.retain_ms, found.index_ms, found.rest_ms)))
    return (
        f"{found.recipe:<13} {found.frames:>6} {found.held_tokens:>6}  {encoding}  {own}  {spread:>20} "
        f"{found.percent_without_captions:>13.2f}  <= {MARK:g}: {reached}"
    )


def machine(model: VideoModel, size: str, build_s: float) -> dict[str, object]:
    on_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "shape": asdict(model.shape),
        "build_s": build_s,
    }


def bench(
    names: Sequence[str], frames: int, size: str, device: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every recipe on one model. One that fails is told of and stops none that follows."""
    started = time.perf_counter()
    model = build(size, device)
    notes = machine(model, size, time.perf_counter() - started)
    say(f"{notes}\nms a frame, medians\n{HEAD}")
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            with uncompressed():
                found = measure(name, model, frames, SHARES[size])
        except Exception as error:  # of any kind: the machine is lent for minutes
            failed[name] = f"{type(error).__name__}: {error}"
            say(f"{name:<13} failed: {failed[name]}")
            continue
        say(line(found))
        rows.append(asdict(found))
    for found_row in rows:
        for stage, reason in found_row["idle"].items():
            say(f"{found_row['recipe']}: no {stage}: {reason}")
    say(f"{time.perf_counter() - started:.0f} s in all")
    return {"machine": notes, "rows": rows, "failed": failed, "mark": MARK, "goal": GOAL}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--frames", type=int, default=50, help="at least so many are timed")
    parser.add_argument("--size", default="7b", choices=list(SHARES))
    parser.add_argument("--device", help="cpu, cuda or cuda:0; by default a GPU where there is one")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    args = parser.parse_args()
    found = bench(args.recipe, args.frames, args.size, args.device, functools.partial(print, flush=True))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
