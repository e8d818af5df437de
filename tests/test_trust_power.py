"""Power cuts after steps of every protocol, a sample of them; `python -m tools.soak --only power` makes all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.trust import power, without_sync
from tools.trust.power import Campaign

SEED, TRIALS = 5, 40
# Of all reasons to sync the quickest to be missed; `make soak` takes each of them away in turn.
QUICK = (
    "the names of a new store's catalog and folders",
    "the name of a new store",
    "a unit's bytes, before it is committed",
    "the name of a new segment",
    "a saved state",
    "the name of a saved state",
    "a sealed segment, before it is committed",
    "the name of a sealed segment",
    "what a killed writer left, before it is committed",
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(SEED, tmp_path_factory.mktemp("power"))


def test_nothing_acknowledged_is_lost_whatever_a_power_cut_leaves(tmp_path: Path, campaign: Campaign) -> None:
    found = power.run(SEED, TRIALS, tmp_path, campaign=campaign)
    assert found.ok, found.details
    assert found.trials >= TRIALS


@pytest.mark.parametrize("why", QUICK)
def test_a_sync_that_is_taken_away_is_missed(campaign: Campaign, why: str) -> None:
    found = [reason for reason in without_sync.whys() if reason.text == why]
    assert len(found) == 1
    assert without_sync.without(found[0], [campaign], 60).loss


def test_every_reason_to_sync_is_given_once() -> None:
    reasons = [why.text for why in without_sync.whys()]
    assert len(reasons) > 20
    assert sorted(reasons) == sorted(set(reasons))


def test_nobody_syncs_but_memdb_files() -> None:
    assert without_sync.foreign_syncs() == []
