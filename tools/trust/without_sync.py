"""Take away one sync after another: each time the power cuts must find a loss, or the sync is of no use.

    python -m tools.trust.without_sync [--seed N]

The reasons are collected from the sources; that no other code syncs is held by a test.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tools.trust.outcome import Outcome
from tools.trust.pool import spread
from tools.trust.power import Campaign
from tools.trust.shadow import CUTS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("memdb", "ingest", "query", "schemas")
# Calls that sync, and where in them the reasons stand: positions, or names of arguments.
CALLS: dict[str, tuple[int | str, ...]] = {
    "sync": (0,),
    "sync_new": (0, 1),
    "sync_open": (2,),
    "sync_folder": (1,),
    "write_whole": ("sync", "sync_name"),
    "remove_segments": (2,),
}
# Syncs that the stub's stores cannot miss, or that few power cuts of a random script do: the test, in the suite,
# that does whatever the seed.
HELD_BY_TESTS = {
    "the catalog of a backup": (  # where a policy was set, SQLite syncs it once more
        "tests/test_trust_syncs.py::test_a_backup_of_a_store_without_a_policy_is_on_the_disk"
    ),
    "the removal of derived data, before a catalog is made anew": (
        "tests/test_repair.py::test_no_catalog_is_ever_beside_the_wal_of_another"
    ),
    "a catalog made anew, before it gets its name": (
        "tests/test_repair.py::test_no_catalog_is_ever_beside_the_wal_of_another"
    ),
    "the removal of a catalog, before that of its WAL": (
        "tests/test_repair.py::test_no_catalog_is_ever_beside_the_wal_of_another"
    ),
    "the removal of states that fit a repaired catalog no more": (
        "tests/test_repair_forgotten.py::test_states_that_do_not_fit_any_more_are_removed"
    ),
    "the removal of a WAL, before another catalog comes": (
        "tests/test_repair.py::test_no_catalog_is_ever_beside_the_wal_of_another"
    ),
    "the names of what a killed writer left, before it is committed": (
        "tests/test_trust_syncs.py::test_a_killed_forgetting_that_a_writer_commits_is_on_the_disk"
    ),
    "the removal of unfinished segments and of tombstones": (
        "tests/test_trust_syncs.py::test_an_unfinished_segment_that_is_removed_last_stays_removed"
    ),
    "the removal of segments that were written anew": (
        "tests/test_trust_syncs.py::test_bytes_that_were_freed_of_one_recording_stay_away"
    ),
    "the removal of states": (
        "tests/test_trust_syncs.py::test_a_state_that_holds_what_was_forgotten_stays_removed"
    ),
    "the removal of key pages": ("tests/test_trust_syncs.py::test_pages_with_forgotten_keys_stay_removed"),
    "the tombstone of a recording, before it is committed": (
        "tests/test_trust_syncs.py::test_a_forgotten_recording_stays_forgotten_without_its_catalog"
    ),
    "the name of a recording's tombstone": (
        "tests/test_trust_syncs.py::test_a_forgotten_recording_stays_forgotten_without_its_catalog"
    ),
    "the name of a new store": (
        "tests/test_trust_syncs.py::test_a_new_store_is_there_once_a_unit_was_acknowledged"
    ),
    "a new segment's header, before it is committed": (
        "tests/test_trust_syncs.py::test_a_recording_that_was_just_begun_is_whole"
    ),
    "the name of a new segment": ("tests/test_trust_syncs.py::test_a_recording_that_was_just_begun_is_whole"),
    "the removal of caption tables": (
        "tests/test_caption_forget.py::test_a_power_cut_after_a_compaction_brings_nothing_back"
    ),
}
TRIES_MAX = 400  # power cuts without a sync before the search for a loss is given up
_EVENTS_BEHIND = 4  # on average, from a sync to a power cut
_A_TIME = 12
WITHOUT = "MEMDB_TRUST_WITHOUT_SYNC"
_TESTS_FAILED = 1  # pytest's exit code


@dataclass(frozen=True)
class Why:
    """A reason to sync, and the line that gives it."""

    text: str
    place: str


def whys() -> list[Why]:
    """Every reason in the sources."""
    return [why for path in _sources() for why in _whys_of(path)]


def foreign_syncs() -> list[str]:
    """Lines that sync past memdb/files.py."""
    found = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            if name in ("fsync", "fdatasync") and path != ROOT / "memdb" / "files.py":
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    return found


def _sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def _whys_of(path: Path) -> Iterator[Why]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for where in CALLS.get(name, ()):
            if isinstance(where, int):
                given = node.args[where] if where < len(node.args) else None
            else:
                given = next((word.value for word in node.keywords if word.arg == where), None)
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                yield Why(given.value, f"{path.relative_to(ROOT)}:{node.lineno}")


@dataclass(frozen=True)
class Missed:
    """What a store loses without one sync; "" where nothing was found."""

    why: Why
    tries: int
    loss: str


def without(why: Why, campaigns: Sequence[Campaign], tries_max: int = TRIES_MAX) -> Missed:
    """Look for a loss without the syncs of one reason."""
    tries = rounds = 0
    chance = random.Random(why.text)
    while tries < tries_max:
        before, rounds = tries, rounds + 1
        for campaign in campaigns:
            wanted = _moments(campaign, why.text, chance)
            for found in campaign.crashes(wanted, why.text, whole_every=(rounds - 1) % 3, repaired_every=4):
                tries += 1
                if not found.ok:
                    return Missed(why, tries, str(found))
        if tries == before:
            break  # no campaign comes through there
    return Missed(why, tries, "")


def _moments(campaign: Campaign, why: str, chance: random.Random) -> list[tuple[int, str, int]]:
    """A few power cuts behind the syncs: at once, once the operation was acknowledged, and later."""
    events = campaign.trace.events
    syncs = [at for at, event in enumerate(events) if event.step is not None and event.step.name == why]
    acknowledged = [at for at, event in enumerate(events) if event.said.startswith("done")]
    wanted = []
    for _ in range(_A_TIME if syncs else 0):
        sync = chance.choice(syncs)
        behind = [at for at in acknowledged if at > sync]
        soon = min(sync + int(chance.expovariate(1 / _EVENTS_BEHIND)), len(events) - 1)
        at = chance.choice([soon, soon, *behind[:1], chance.choice(behind or [soon])])
        cut = chance.choice([*(name for name in CUTS if name != "everything"), "some names", "some"])
        wanted.append((at, cut, chance.randrange(1 << 30)))
    return wanted


def run(seed: int, folder: Path, *, only: Sequence[str] = ()) -> Outcome:
    """Each reason in turn, or those of `only`. What nothing misses counts as lost: it is useless, or untested."""
    outcome = Outcome("power cut with one sync taken away")
    wanted = [why for why in whys() if not only or why.text in only]
    with outcome.timed():
        for found in spread(_one, [(seed, folder, why) for why in wanted]):
            outcome.add(found)
    return outcome


def _one(given: tuple[int, Path, Why]) -> Outcome:
    seed, folder, why = given
    outcome = Outcome("syncs", trials=1)
    began_s = time.perf_counter()
    if test := HELD_BY_TESTS.get(why.text):
        tries, loss = 0, f"{test} fails" if fails_without(why.text, test) else ""
    else:
        missed = without(why, _campaigns(seed, folder / str(os.getpid())))
        tries, loss = missed.tries, missed.loss
    told = f"{why.text} ({why.place}), {tries} cuts, {time.perf_counter() - began_s:.0f} s"
    if loss:
        outcome.tell(f"{told}: {loss[:200]}")
    else:
        outcome.loses(f"{told}: {test or 'nothing that was tried'} does not miss it")
    return outcome


@lru_cache(maxsize=1)
def _campaigns(seed: int, folder: Path) -> tuple[Campaign, ...]:
    """Of this process."""
    return Campaign(seed, folder), Campaign(seed + 1, folder)


def fails_without(why: str, test: str) -> bool:
    """Whether a test fails where the syncs of one reason are taken out of memdb/files.py."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "tools.trust.no_sync",
            "-p",
            "no:cacheprovider",
            test,
        ],
        cwd=ROOT,
        env=os.environ | {WITHOUT: why},
        capture_output=True,
        check=False,
    )
    return done.returncode == _TESTS_FAILED


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(given.seed, Path(folder), only=given.only)
    for line in outcome.details:
        print(line)
    return int(outcome.lost > 0)


if __name__ == "__main__":
    sys.exit(main())
