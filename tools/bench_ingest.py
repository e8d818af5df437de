"""What the store costs an ingest, where the time goes, and what an hour takes on disk.

    python -m tools.bench_ingest [--minutes 10] [--rounds 3] [--sample-fps 0.5] [--out FILE.json]

Three parts, on a random LLaVA-OneVision of about 20 million parameters, recipe hybrid, a rendered 360p film:
1. the same decode and forwards with and without the store (pack, commit, state, index), alternating, as a ratio;
2. where the time of an ingest and of a question goes, stage by stage;
3. bytes an hour by tier and codec, against the closed form of the slice layout.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from memdb.client import Client, connect
from memdb.codecs import NAMES, codec
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame, thumbnail
from memdb.ingest.queues import Stream
from memdb.ingest.sampling import sample
from memdb.ingest.sources import open_source
from memdb.ingest.stages import compose
from memdb.recipes import recipe
from memdb.schemas.fingerprint import ModelShape
from memdb.timing import Laps
from tools.films import render_film

QUESTIONS = (
    ("captions", "What happened?"),
    ("kv", "What colour was the star?"),
    ("both", "When was it?"),
    ("recent", "Now?"),
)
TIERS = ("kv", "closed_form", "keys", "captions", "keyframes", "overhead")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample-fps", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memdb-bench-") as folder:
        figures = bench(Path(folder), args.minutes * 60, args.rounds, args.sample_fps)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def bench(folder: Path, seconds: float, rounds: int, sample_fps: float) -> dict[str, Any]:
    film = folder / "film.mp4"
    render_film(film, seconds=seconds, width=640, height=360, seed=1)
    config = folder / "20m.json"
    config.write_text(json.dumps({"size": "20m"}))
    spec = f"random:0:{config}"
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{seconds:g} s of 360p film"
    )
    figures: dict[str, Any] = {"overhead": overhead(folder, film, spec, rounds, sample_fps)}
    with connect(folder / "round-0.memdb", create=False) as db:
        figures["question"] = questions(db)
    figures["bytes_per_hour"] = sizes(folder, film, spec, sample_fps)
    return figures


# 1. With and without the store


def overhead(folder: Path, film: Path, spec: str, rounds: int, sample_fps: float) -> dict[str, Any]:
    """Median ratio of an ingest to the same decode and forwards, pair by pair in one process."""
    pairs: list[tuple[float, float]] = []
    stages: dict[str, float] = {}
    with connect(folder / "plain.memdb", model=spec) as plain:
        forwards(plain, film, sample_fps, limit=16)  # warm up
        for index in range(rounds):
            with connect(folder / f"round-{index}.memdb", model=spec) as db:
                db.loaded._model = plain.loaded.model()  # the same weights, loaded once
                db.loaded._encoders = plain.loaded._encoders
                started = time.perf_counter()
                report = db.ingest(film, recording="film", sample_fps=sample_fps)
                whole = time.perf_counter() - started
            started = time.perf_counter()
            forwards(plain, film, sample_fps)
            bare = time.perf_counter() - started
            pairs.append((whole, bare))
            stages = report.timings_ms
            print(
                f"round {index + 1}: with the store {whole:.1f} s, without {bare:.1f} s, ratio {whole / bare:.3f}"
            )
    ratios = sorted(whole / bare for whole, bare in pairs)
    print(f"ratio: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")
    print("stages of the last ingest (writer and model overlap):")
    for stage, ms in stages.items():
        print(f"  {stage:<8} {ms:>12.0f} ms")
    return {"ratios": ratios, "seconds": pairs, "stages_ms": stages}


def forwards(db: Client, film: Path, sample_fps: float, limit: int | None = None) -> int:
    """Decode, see, encode and caption as an ingest does, with the same queue ahead, and keep nothing."""
    model = db.loaded.model()
    stages = replace(compose(recipe("hybrid")), codec=None)
    encoder = StreamEncoder(
        model,
        stages,
        model.init_ids("You are a helpful assistant."),
        db.loaded.vectors(stages.captioner.encoder),
        Laps(),
    )
    size, count = stages.encode.chunk_frames, 0
    with open_source(film) as source:
        ready = Stream(
            (
                ReadyFrame(f.number, f.start_ns, f.end_ns, model.prepare(f.image), thumbnail(f))
                for f in islice(sample(source.frames(), sample_fps), limit)
            ),
            ahead=2 * size,
            name="decode",
        )
        frames = iter(ready)
        while batch := list(islice(frames, size)):
            count += len(encoder.step(batch))
        return count + len(encoder.finish())


# 2. A question, stage by stage


def questions(db: Client) -> dict[str, dict[str, float]]:
    found = {}
    for mode, text in QUESTIONS:
        db.ask(text, mode=mode)
        rows = [db.ask(text, mode=mode) for _ in range(5)]
        answer = sorted(rows, key=lambda row: row.timings_ms["total"])[len(rows) // 2]
        found[mode] = answer.timings_ms
        laps = ", ".join(f"{stage} {ms:.1f}" for stage, ms in answer.timings_ms.items())
        print(
            f"{mode:<9} {laps} ms; predicted {answer.plan.predicted_ms:.0f}; {answer.used.context_tokens} tokens, "
            f"{answer.used.read_bytes:,} bytes read"
        )
    return found


# 3. Bytes


def sizes(folder: Path, film: Path, spec: str, sample_fps: float) -> dict[str, dict[str, float]]:
    """Each codec in a store of its own, one minute of the film; KV beside the closed form of the layout."""
    minute = folder / "minute.mp4"
    render_film(minute, seconds=min(60.0, 64 / sample_fps), width=640, height=360, seed=2)
    found: dict[str, dict[str, float]] = {}
    print("MiB an hour: " + " ".join(f"{tier:>12}" for tier in ("codec", *TIERS)))
    for name in NAMES:
        with connect(folder / f"{name}.memdb", model=spec) as db:
            db.ingest(
                minute,
                recording="minute",
                codec=name,
                sample_fps=sample_fps,
                settings=["caption.tokens_max=8"],
            )
            row = db.stats().recordings[0]
            units = db.store.units(db.store.recording("minute").id)
            frames = sum(len(unit.blocks) for unit in units)
            hourly = {tier: size / frames * sample_fps * 3600 / 2**20 for tier, size in row.bytes.items()}
            hourly["closed_form"] = closed_form(db.loaded.model().shape, name) * sample_fps * 3600 / 2**20
        found[name] = hourly
        print(f"{name:>25} " + " ".join(f"{hourly[tier]:>12.2f}" for tier in TIERS))
    return found


def closed_form(shape: ModelShape, name: str) -> int:
    """Bytes of a frame's KV before byte planes: the layout's sizes alone."""
    layout = codec(name).layout(torch.float32, 2, shape.kv_heads, shape.frame_tokens, shape.head_size)
    return shape.layers * layout.slice_bytes


if __name__ == "__main__":
    sys.exit(main())
