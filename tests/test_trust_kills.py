"""kill -9 at every phase, small; `python -m tools.soak --only kills` does more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools.trust import kills
from tools.trust.check import check, finish, remains
from tools.trust.model import Model
from tools.trust.runner import Runner
from tools.trust.script import Op, ScriptMaker
from tools.trust.units import UNIT_NS

SEED, TRIALS = 11, 36


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


@pytest.mark.parametrize("whole", [False, True])
def test_a_copy_may_hold_what_its_original_forgot_and_the_original_may_not(
    tmp_path: Path, whole: bool
) -> None:
    """An imported recording is one of its own: forgetting where it came from takes nothing of it."""
    path, maker = tmp_path / "s.memdb", ScriptMaker(3)
    ops = [maker.append("lobby", 3), maker.about("pages", "lobby"), Op("captions")]
    ops.append(replace(maker.about("import", "lobby"), why="copy"))
    ops.append(maker.forget_all("lobby") if whole else maker.forget("lobby", 0, 2 * UNIT_NS))
    model = Model()
    for op in ops:
        model = model.after(op)
    with Runner(path) as runner:
        runner.run(ops[:-1])
        own = runner.store.recording("lobby").id
        runner.run(ops[-1:])
    left = {Path(what.split(" still holds ")[0]) for what in remains(path, model)}
    assert {file.parent.name for file in left} == {"segments", "keys"}
    assert all(file.name.startswith(own) for file in left)
    ending = finish(path, model, [Op("compact")], 0)
    assert ending.ok, str(ending)
