"""Tools that only a larger machine runs in earnest still run: on the tiny model, briefly."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdb.world import films
from memdb.world.scenes import plan
from tests.question_cases import MODEL
from tools import bench_ingest, gpu_check


def test_the_check_of_a_gpu_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_check.speed(tmp_path, MODEL, 4)
    gpu_check.ladder(tmp_path, MODEL, 3)
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("ask")] == [
        f"ask {mode}" for mode in ("kv", "both", "recent", "captions")
    ]
    assert said.count("same next token: True") >= 2


def test_the_bench_of_ingest_compares_with_bare_forwards(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    films.render(film, plan(3, 8, "test"), fps=5, width=112, height=112)
    found = bench_ingest.overhead(tmp_path, film, MODEL, 1, 1.0)
    assert len(found["ratios"]) == 1
    assert found["ratios"][0] > 0
