"""`memdb demo`: a recording with known answers goes into a store, and another process answers from it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdb.schemas.errors import MemdbError
from memdb.schemas.times import format_time

if TYPE_CHECKING:
    from memdb.world.questions import Question
    from memdb.world.scenes import Scene

FILM_S = 120
KINDS = ("gist", "detail", "place", "motion", "when", "absent")  # of questions, one each
PROOF_FPS = 0.4  # the uncut forward is a plain one, which takes long over many frames
DIFFERENCE_MAX = 1e-4  # of the largest logit


def demo(seed: int, keep: Path | None, say: Callable[[str], object]) -> None:
    """Render, ingest, ask from a new process, compare with the truth, prove the path against an uncut forward.

    Raises MemdbError where a step fails or the rebuilt context is not the uncut one.
    """
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        _demo(seed, keep, say)
        return
    with tempfile.TemporaryDirectory(prefix="memdb-demo-") as folder:
        _demo(seed, Path(folder), say)


def _demo(seed: int, folder: Path, say: Callable[[str], object]) -> None:
    from memdb.world.films import render
    from memdb.world.questions import Asker
    from memdb.world.scenes import plan

    film, store = folder / f"world-{seed}.mp4", folder / "demo.memdb"
    scenes = plan(seed, FILM_S)
    render(film, scenes)
    say(f"rendered {film.name}: {FILM_S} s of H.264, {len(scenes)} scenes, {film.stat().st_size:,} bytes")
    words = ("--store", str(store), "--recording", "world", "--sample-fps", "1")
    report = _process("memdb", "ingest", str(film), *words, "--json")
    say(
        f"ingested by one process: {report['units']} units up to {format_time(report['watermark_s'])}, recipe hybrid, "
        f"codec int4, {FILM_S / report['timings_ms']['total'] * 1000:.0f} times real time"
    )
    asker = Asker(scenes, seed)
    questions = [question for kind in KINDS if (question := asker.ask(kind)) is not None]
    asked = {"questions": [question.text for question in questions], "search": _words(scenes)}
    replies = _process("memdb.demo", str(store), given=json.dumps(asked))
    say("asked by another process:")
    right = sum(_show(*pair, say) for pair in zip(questions, replies["answers"], strict=True))
    say(f"right: {right} of {len(questions)}")
    hits = [f"{format_time(hit['start_s'])} {hit['caption']}" for hit in replies["hits"]]
    say(f"search {asked['search']!r}: {'; '.join(hits) or 'nothing'}")
    say(f"verify: {replies['checked_bytes']:,} bytes checked, {replies['problems']} problems")
    _prove(film, folder / "proof.memdb", say)


def _words(scenes: Sequence[Scene]) -> str:
    """What is searched for: something in the middle of the film."""
    seen = [scene for scene in scenes if not scene.empty]
    return f"{seen[len(seen) // 2].colour} {seen[len(seen) // 2].shape}"


def _show(question: Question, answer: dict[str, Any], say: Callable[[str], object]) -> bool:
    """One question with its answer, what is true, and where the evidence lies. Returns whether it is right."""
    right = question.is_right(answer["text"])
    true = ", ".join(_span(*span) for span in question.spans)
    say(f"  {question.kind}: {question.text}")
    say(
        f"    {'right' if right else 'WRONG'}: {answer['text']}"
        + ("" if right else f" (it is {question.answer})")
    )
    best = [max(part, key=lambda item: item["score"]) for part in _by_tier(answer["evidence"]) if part]
    found = ", ".join(f"{_span(item['start_s'], item['end_s'])} ({item['tier']})" for item in best)
    say(f"    evidence: {found}; {f'on film: {true}' if true else 'not on film'}; {answer['ms']:.0f} ms")
    for warning in answer["warnings"]:
        say(f"    warning: {warning}")
    return right


def _by_tier(evidence: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[item for item in evidence if item["tier"] == tier] for tier in ("captions", "kv")]


def _span(start_s: float, end_s: float) -> str:
    return f"{format_time(start_s)} - {format_time(end_s)}"


def _prove(film: Path, store: Path, say: Callable[[str], object]) -> None:
    """The same film with nothing dropped and codec raw: logits through the store against one uncut forward."""
    from memdb.client import connect

    with connect(store) as db:
        db.ingest(film, recording="proof", recipe="rekv", codec="raw", sample_fps=PROOF_FPS)
    with connect(store, create=False) as db:
        report = db.compare_uncut(film, "proof", "what is seen?")
    say(
        f"proof: {report.frames} frames through store, close, reopen and rebuild against one uncut forward: logits "
        f"differ by {report.relative:.1e} of the largest"
    )
    if not report.relative < DIFFERENCE_MAX:
        raise MemdbError(f"the rebuilt context is not the uncut one: logits differ by {report.relative:.1e}")


def reply(store: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What the other process does: every question, a search, and a look at every byte."""
    from memdb.client import connect

    with connect(store, create=False) as db:
        answers = [db.ask(text, mode="both") for text in asked["questions"]]
        hits = db.search(asked["search"], limit=2)
        whole = db.verify()
    return {
        "answers": [
            {
                "text": answer.text,
                "ms": answer.timings_ms["total"],
                "warnings": answer.warnings,
                "evidence": [item.as_json() for item in answer.evidence],
            }
            for answer in answers
        ],
        "hits": [hit.as_json() for hit in hits],
        "checked_bytes": whole.checked_bytes,
        "problems": len(whole.problems),
    }


def _process(module: str, *words: str, given: str = "") -> dict[str, Any]:
    """Run a module in a process of its own; the JSON that it prints."""
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-m", module, *words], input=given, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        told = f"{module} {words[0]} failed with exit code {run.returncode}: {run.stderr.strip()[-500:]}"
        raise MemdbError(told)
    document: dict[str, Any] = json.loads(run.stdout)
    return document


if __name__ == "__main__":
    sys.stdout.write(json.dumps(reply(sys.argv[1], json.load(sys.stdin))))
