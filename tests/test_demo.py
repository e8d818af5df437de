"""What the demo says of answers that are right, wrong, and of a process that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memdb import demo
from memdb.schemas.errors import MemdbError
from memdb.world import films
from memdb.world.questions import Asker
from memdb.world.scenes import plan

EVIDENCE = [
    {"tier": "captions", "score": 0.2, "start_s": 8.0, "end_s": 16.0},
    {"tier": "captions", "score": 0.7, "start_s": 0.0, "end_s": 8.0},
    {"tier": "kv", "score": 1.0, "start_s": 3.0, "end_s": 5.0},
]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_answers_are_held_against_the_truth(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that knows everything but the place: all questions of the film are right but this one."""
    asker = Asker(plan(seed, demo.FILM_S), seed)
    truth = {question.text: question for kind in demo.KINDS if (question := asker.ask(kind)) is not None}
    said: list[str] = []

    def oracle(module: str, *words: str, given: str = "") -> dict[str, Any]:
        if module == "memdb":
            return {"units": 15, "watermark_s": 120.0, "timings_ms": {"total": 6000.0}}
        asked = json.loads(given)
        assert asked["questions"] == list(truth)
        answers = [
            {
                "text": "somewhere" if truth[text].kind == "place" else truth[text].answer,
                "ms": 100.0,
                "warnings": ["late"] if truth[text].kind == "gist" else [],
                "evidence": EVIDENCE,
            }
            for text in asked["questions"]
        ]
        return {"answers": answers, "hits": [], "checked_bytes": 10, "problems": 0}

    def blank(path: Path, scenes: object) -> None:
        path.write_bytes(b"film")

    monkeypatch.setattr(demo, "_process", oracle)
    monkeypatch.setattr(demo, "_prove", lambda *_: None)
    monkeypatch.setattr(films, "render", blank)
    demo.demo(seed, tmp_path, said.append)
    assert [line.split(":")[0].strip() for line in said if line.startswith("  ") and line[2] != " "] == list(
        demo.KINDS
    )
    wrong = [line for line in said if line.strip().startswith("WRONG")]
    place = next(question for question in truth.values() if question.kind == "place")
    assert wrong == [f"    WRONG: somewhere (it is {place.answer})"]
    assert f"right: {len(demo.KINDS) - 1} of {len(demo.KINDS)}" in said
    assert said.count("    warning: late") == 1
    shown = [
        line
        for line in said
        if line.startswith("    evidence: 00:00:00 - 00:00:08 (captions), 00:00:03 - 00:00:05")
    ]
    assert len(shown) == len(demo.KINDS)
    assert sum("; not on film; " in line for line in shown) == 1
    assert any(line.endswith("20 times real time") for line in said)


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(MemdbError, match=r"memdb.demo .*failed with exit code 1: (.|\n)*no-store"):
        demo._process("memdb.demo", str(tmp_path / "no-store"), given='{"questions": [], "search": "x"}')
