"""The whole path at full size on a GPU, with random weights: speed, bytes and the ladder, never accuracy.

    python -m tools.gpu_check [--model random] [--size 7b] [--frames 192]

It needs neither lancedb, FAISS, PyAV nor a film: frames come from memory. What is ingested at speed is int4, which no
zstandard compresses; without zstandard the ladder's bf16 slices are stored as they are, with the same values. Prints
one line a figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from memdb.client import connect
from memdb.schemas.frames import Image
from tools.stages.ground import uncompressed

MODEL = "{family}:0:{config}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random", choices=["random", "random-qwen"])
    parser.add_argument("--size", default="7b")
    parser.add_argument("--frames", type=int, default=192)
    parser.add_argument("--ladder-frames", type=int, default=24)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, {args.model} {args.size}, {args.frames} frames")
    with tempfile.TemporaryDirectory(prefix="memdb-gpu-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"size": args.size}))
        spec = MODEL.format(family=args.model, config=config)
        with nullcontext() if find_spec("zstandard") else uncompressed():
            speed(Path(folder), spec, args.frames)
            ladder(Path(folder), spec, args.ladder_frames)
    return 0


def pictures(count: int) -> list[Image]:
    """Smooth pictures that differ, at the size of the published vision tower."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[0:384, 0:384] / 384
    made = []
    for _ in range(count):
        a, b, c = draw.uniform(0, 6, 3)
        waves = [np.sin(a * rows + b * columns + c + turn) for turn in (0.0, 2.0, 4.0)]
        made.append(((np.stack(waves, -1) + 1) * 127).astype(np.uint8))
    return made


def speed(folder: Path, spec: str, count: int) -> None:
    frames = pictures(count)
    with connect(folder / "speed.memdb", model=spec) as db:
        started = time.perf_counter()
        model = db.loaded.model()
        print(f"model built in {time.perf_counter() - started:.1f} s, {model.shape}")
        runs = {
            "rekv": ["encode.chunk_frames=16"],
            "hybrid": ["caption.encoder='input-embeddings'", "caption.tokens_max=32"],
        }
        for recipe, settings in runs.items():
            for attempt in ("warm-up", "timed"):
                part = frames[:32] if attempt == "warm-up" else frames
                started = time.perf_counter()
                report = db.ingest(
                    part,
                    fps=1,
                    recording=f"{recipe} {attempt}",
                    recipe=recipe,
                    codec="int4",
                    settings=settings,
                    sample_fps=1,
                )
                wall = time.perf_counter() - started
            laps = ", ".join(f"{stage} {ms / count:.2f}" for stage, ms in report.timings_ms.items())
            print(f"ingest {recipe} int4: {count / wall:.1f} frames/s; ms a frame: {laps}")
            print(f"  {report.written_bytes / count:,.0f} bytes a frame")
        for mode in ("kv", "both", "recent", "captions"):
            for _ in range(3):
                answer = db.ask("What colour was the star?", recording="hybrid timed", mode=mode)
            laps = ", ".join(f"{stage} {ms:.1f}" for stage, ms in answer.timings_ms.items())
            print(
                f"ask {mode}: {laps} ms; predicted {answer.plan.predicted_ms:.0f}; {answer.used.context_tokens} tokens"
            )
        if torch.cuda.is_available():
            print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def ladder(folder: Path, spec: str, count: int) -> None:
    """The ladder in the dtype of the device: differences are those of its rounding and of the codec."""
    frames = pictures(count)
    for codec in ("bf16", "int4"):
        for window in (1 << 24, 1500):
            store = folder / f"ladder-{codec}-{window}.memdb"
            settings = [f"encode.window_tokens={window}", "encode.chunk_frames=8", "rebuild.time_text_s=0"]
            with connect(store, model=spec) as db:
                db.ingest(
                    frames,
                    fps=1,
                    recording="film",
                    recipe="rekv",
                    codec=codec,
                    settings=settings,
                    sample_fps=1,
                )
                report = db.compare_uncut(frames, "film", "What happens here?", fps=1)
            print(
                f"ladder {codec}, window {window}: {report.context_tokens} tokens, largest difference "
                f"{report.largest_difference:.3f} of {report.largest_logit:.3f} ({report.relative:.1e}), same next "
                f"token: {report.same_next_token}"
            )


if __name__ == "__main__":
    sys.exit(main())
