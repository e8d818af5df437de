"""kill -9 at every phase, small; `python -m tools.soak --only kills` does more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.trust import kills
from tools.trust.check import check
from tools.trust.model import Model
from tools.trust.runner import Runner
from tools.trust.script import ScriptMaker

SEED, TRIALS = 11, 60


def test_nothing_acknowledged_is_lost_wherever_a_writer_is_killed(tmp_path: Path) -> None:
    found = kills.run(SEED, TRIALS, tmp_path)
    assert found.ok, found.details
    assert found.trials >= TRIALS


@pytest.mark.parametrize("too_much", ["unit", "forgetting", "state"])
def test_the_check_sees_what_is_missing(tmp_path: Path, too_much: str) -> None:
    """Tell it of something that was never done: that is lost."""
    maker = ScriptMaker(3)
    ops = [maker.append("lobby", 3), maker.about("state", "lobby")]
    model = Model()
    for op in ops:
        model = model.after(op)
    with Runner(tmp_path / "s.memdb") as runner:
        runner.run(ops)
    assert check(tmp_path / "s.memdb", [model])[0].ok
    never = {
        "unit": maker.append("lobby", 1),
        "forgetting": maker.forget("lobby", 0, 1),
        "state": maker.append("lobby", 1),
    }[too_much]
    told = model.after(never)
    if too_much == "state":
        told = told.after(maker.about("state", "lobby"))
        told.kept["lobby"].units -= 1
    assert check(tmp_path / "s.memdb", [told])[0].lost
