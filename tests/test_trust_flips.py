"""A sample of the damage campaign: every class of file, single bits and harsher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memdb.captions import CaptionIndex
from memdb.schemas.rows import Part
from memdb.store import Store
from memdb.verify import verify_path
from tools.trust.flips import run
from tools.trust.runner import Runner
from tools.trust.script import Op
from tools.trust.units import ENCODER, VECTOR_SIZE, Stream


def test_damage_is_reported_or_without_effect(tmp_path: Path) -> None:
    outcomes = run(11, 5, tmp_path, repair_every=4)
    assert [what for outcome in outcomes for what in outcome.details] == []
    assert sum(outcome.trials for outcome in outcomes) >= 60


@pytest.mark.parametrize("indexed", [False, True])
def test_a_search_says_which_caption_it_could_not_read(tmp_path: Path, indexed: bool) -> None:
    """It was left out with a line in the log only."""
    path = tmp_path / "s.memdb"
    stream = Stream(5, "lobby")
    with Runner(path) as runner:
        runner.do(Op("append", stream, 0, 4))
        if indexed:
            runner.do(Op("captions"))
    with Store.open(path) as store:
        rows = [row for row in store.units(store.recordings()[0].id) if row.has_caption]
        at = rows[1].parts[Part.VECTOR].offset
        file = path / "segments" / rows[1].segment
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
        hits = CaptionIndex(path).search(store, ENCODER, vector=np.ones(VECTOR_SIZE), limit=9)
    assert [hit.unit for hit in sorted(hits, key=lambda hit: hit.unit)] == [
        row.number for row in rows if row is not rows[1]
    ]
    assert len(hits.warnings) == 1
    assert f"the vector of unit {rows[1].number}" in hits.warnings[0]


def test_a_state_under_the_name_of_another_is_reported(tmp_path: Path) -> None:
    """It was whole in itself, and passed over by whoever loads states only."""
    path = tmp_path / "s.memdb"
    stream = Stream(5, "lobby")
    with Runner(path) as runner:
        for op in (
            Op("append", stream, 0, 2),
            Op("state", stream),
            Op("append", stream, 2, 2),
            Op("state", stream),
        ):
            runner.do(op)
    first, second = sorted((path / "state").glob("*.state"))
    second.write_bytes(first.read_bytes())
    problems = verify_path(path).problems
    assert [problem.file for problem in problems] == [f"state/{second.name}"]
