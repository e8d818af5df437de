"""`memdb demo`: a film goes into a store, and another process answers from it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memdb.films import Scene, render_film
from memdb.schemas.errors import MemdbError
from memdb.schemas.times import format_time

FILM_S = 48.0
BLOCKS = 16  # of 48 that are stored: each layer has to choose
QUESTION = "Where was the {colour} {shape}?"


def demo(seed: int, keep: Path | None, say: Callable[[str], object]) -> None:
    """Render, ingest, ask from a new process, print answer, plan and evidence, compare with the uncut forward.

    Raises MemdbError where a step fails or the rebuilt context is not the uncut one.
    """
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        _demo(seed, keep, say)
        return
    with tempfile.TemporaryDirectory(prefix="memdb-demo-") as folder:
        _demo(seed, Path(folder), say)


def _demo(seed: int, folder: Path, say: Callable[[str], object]) -> None:
    film, store = folder / f"shapes-{seed}.mp4", folder / "demo.memdb"
    scenes = render_film(film, seconds=FILM_S, seed=seed)
    say(f"rendered {film.name}: {FILM_S:g} s of H.264, {len(scenes)} scenes, {film.stat().st_size:,} bytes")
    say(
        "note: the embedded model is random here (seed 0), so its words mean nothing; the path is what is shown"
    )
    made = ("--recording", "shapes", "--sample-fps", "1", "--set", f"retrieve.blocks={BLOCKS}")
    report = _memdb("ingest", str(film), "--store", str(store), *made)
    say(
        f"ingested by one process: {report['units']} units up to {format_time(report['watermark_s'])}, "
        "recipe hybrid, codec int4"
    )
    scene = scenes[len(scenes) // 2]
    question = QUESTION.format(colour=scene.colour, shape=scene.shape)
    answer = _memdb("ask", question, "--store", str(store), "--mode", "both", "--latency-ms-max", "20000")
    _show(question, scene, answer, say)
    found = _memdb("search", f"{scene.colour} {scene.shape}", "--store", str(store), "--limit", "3")
    say(f"search finds {len(found['hits'])} captions")
    whole = _memdb("verify", "--store", str(store))
    say(f"verify: {whole['checked_bytes']:,} bytes checked, {len(whole['problems'])} problems")
    _prove(film, folder, say)


def _show(question: str, scene: Scene, answer: dict[str, Any], say: Callable[[str], object]) -> None:
    say(f"asked by another process: {question}")
    say(f"  (on film: {scene}, {format_time(scene.start_s)} - {format_time(scene.end_s)})")
    say(f"  answer: {answer['text']}")
    plan = answer["plan"]
    sizes = plan["sizes"]
    say(
        f"  plan: {plan['mode']}, {sizes['blocks']} blocks a layer, {sizes['caption_tokens']} caption tokens; "
        f"predicted {plan['predicted_ms']:.0f} ms, took {answer['timings_ms']['total']:.0f} ms"
    )
    for item in answer["evidence"][:4]:
        span = f"{format_time(item['start_s'])} - {format_time(item['end_s'])}"
        say(f"  evidence: {item['recording']} {span}, {item['tier']}, score {item['score']:.2f}")


def _prove(film: Path, folder: Path, say: Callable[[str], object]) -> None:
    """The same film with nothing dropped and codec raw: logits through the store against one uncut forward."""
    from memdb.client import connect

    store = folder / "proof.memdb"
    _memdb(
        "ingest",
        str(film),
        "--store",
        str(store),
        "--recording",
        "proof",
        "--sample-fps",
        "1",
        "--codec",
        "raw",
    )
    with connect(store, create=False) as db:
        report = db.compare_uncut(film, "proof", "What happens?")
    say(
        f"proof: {report.frames} frames through store, close, reopen and rebuild against one uncut forward: logits "
        f"differ by {report.relative:.1e} of the largest"
    )
    if not report.relative < 1e-4:
        raise MemdbError(f"the rebuilt context is not the uncut one: logits differ by {report.relative:.1e}")


def _memdb(*words: str) -> dict[str, Any]:
    """Run one command in a process of its own; its JSON."""
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "memdb", *words, "--json"], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise MemdbError(
            f"memdb {words[0]} failed with exit code {run.returncode}: {run.stderr.strip()[-500:]}"
        )
    document: dict[str, Any] = json.loads(run.stdout)
    return document
