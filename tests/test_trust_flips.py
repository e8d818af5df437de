"""A sample of the damage campaign: every class of file, single bits and harsher."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.trust.flips import run


def test_damage_is_reported_or_without_effect(tmp_path: Path) -> None:
    outcomes = run(11, 5, tmp_path, repair_every=4)
    assert [what for outcome in outcomes for what in outcome.details if "reported" not in what] == []
    assert sum(outcome.trials for outcome in outcomes) >= 60


@pytest.mark.soak
def test_damage_at_length(tmp_path: Path) -> None:
    outcomes = run(1, 200, tmp_path)
    assert all(outcome.ok for outcome in outcomes), [outcome.details for outcome in outcomes]
