"""Many processes on one store for a few seconds; tools/soak.py lets more of them go on for ten minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.trust import crowd
from tools.trust.crowd_log import Log, Moments
from tools.trust.outcome import Outcome

SEED = 3


def test_everybody_at_once(tmp_path: Path) -> None:
    outcome = crowd.run(SEED, 3.0, tmp_path, readers=2, writers=2)
    assert outcome.ok, outcome.details
    assert outcome.trials > 20


def test_the_log_tells_what_may_be_seen(tmp_path: Path) -> None:
    log, other = Log(tmp_path / "log", SEED), Log(tmp_path / "log", SEED)
    log.say("will append", "camera1", 0, 3)
    log.say("appended", "camera1", 0, 3)
    before = other.now()
    log.say("will append", "camera1", 0, 5)
    log.say("will forget", "camera1", 0, 0, 10)
    life = Moments(before, other.now())["camera1", 0]
    assert (life.before.units, life.after.begun_units) == (3, 5)
    assert [len(kept.spans) for kept in life.keeps()] == [0, 1]
    assert len(life.digests()) == 6, "three to five units, with and without the span"
    assert not life.may_be_missing
    log.say("forgot", "camera1", 0)
    log.say("will forget all", "camera1", 0)
    before = other.now()
    assert Moments(before, other.now())["camera1", 0].may_be_missing
    log.say("forgot all", "camera1", 0)
    before = other.now()
    assert not Moments(before, other.now())["camera1", 0].may_be_there


@pytest.mark.parametrize(
    ("samples", "grows"), [([10] * 40, False), ([10] * 24 + [60] * 16, True), ([5] * 12 + [30] * 28, False)]
)
def test_growth_is_that_after_warming_up(samples: list[int], grows: bool) -> None:
    outcome = Outcome("crowd")
    said: dict[str, object] = {
        "counts": {"text": 1},
        "wrong": [],
        "open_files": samples,
        "anonymous_bytes": [size << 20 for size in samples],
    }
    crowd._judge(outcome, crowd.Ended("reader0", said), 600.0)
    assert outcome.lost == 2 * grows
