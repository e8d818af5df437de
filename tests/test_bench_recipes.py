"""The table of recipes: each is asked the same questions, and uniform sampling gets as many tokens as it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from memdb.world.questions import KINDS
from tools import bench_recipes


def test_a_recipe_stands_beside_uniform_sampling_at_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"--folder {tmp_path / 'f'} --out {tmp_path / 'o'} --length 64 --questions 1 --recipes infinipot-v"
    )
    monkeypatch.setattr(sys, "argv", ["bench_recipes", *words.split()])
    assert bench_recipes.main() == 0
    told = [json.loads(row) for row in (tmp_path / "o" / "outcomes.jsonl").read_text().splitlines()]
    own = [one for one in told if one["row"] == "kv"]
    beside = [one for one in told if one["row"] == "uniform"]
    assert [(one["number"], one["kind"]) for one in own] == [(one["number"], one["kind"]) for one in beside]
    assert {one["kind"] for one in own} == set(KINDS)
    median = sorted(one["context_tokens"] for one in own)[len(own) // 2]
    stamped = bench_recipes.stamped_tokens(None)
    assert stamped == 16 + 7  # of the embedded model
    frames = round(median / stamped)
    past = [one for one in beside if one["kind"] not in ("now", "count")]  # they reach over all that was seen
    assert {one["read_bytes"] for one in past} == {past[0]["read_bytes"]}
    assert past[0]["context_tokens"] < (frames + 2) * stamped + 60
    table = (tmp_path / "o" / "recipes.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[-1].startswith("| infinipot-v | kv | ")
