"""A store of format 1, killed and cut off from power while it is brought to the present format.

The store is one that memdb itself wrote at format 1, with the digests that it gave then. Whatever happens on
the way, readers find these digests, verify finds nothing, and the next one who opens it for writing ends it.
"""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from pathlib import Path

from memdb.client import Client
from memdb.database import CATALOG, Database
from memdb.files import watched
from memdb.schemas.errors import MemdbError
from memdb.schemas.format import FORMAT_VERSION
from memdb.store import Store, recording_digest
from tools.trust.outcome import Outcome
from tools.trust.script import MIGRATION
from tools.trust.shadow import CUTS
from tools.trust.stub import Death
from tools.trust.trace import STORE, Player, record

ARCHIVE = Path(__file__).resolve().parents[2] / "tests" / "data" / "format-1.tar.xz"
WHENS = ("before", "after")


def unpack(folder: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """The store, and recording and tier to digest."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    digests: dict[str, dict[str, str]] = json.loads((folder / "digests.json").read_text())
    return folder / "store.memdb", digests


def check_old(path: Path, digests: dict[str, dict[str, str]]) -> list[str]:
    """What is wrong with the store, to readers first, then once it was opened for writing."""
    found: list[str] = []
    try:
        for write in (False, True):
            with Store.open(path, write=write) as store:
                names = [row.name for row in store.recordings()]
                given = {
                    name: {tier: recording_digest(store, name, tier) for tier in digests[name]}
                    for name in names
                    if name in digests
                }
                if given != digests:
                    found.append(f"the digests are others, write={write}")
                report = Client(store).verify()
                found += [f"verify: {problem.file}: {problem.what}" for problem in report.problems]
    except MemdbError as error:
        found.append(f"it cannot be read: {type(error).__name__}: {error}")
    if not found and (number := format_on_disk(path)) != FORMAT_VERSION:
        found.append(f"it has the format {number} still")
    return found


def format_on_disk(path: Path) -> object:
    database = Database(path / CATALOG, write=False)
    try:
        return database.select("meta", "WHERE key = 'format'")[0][1]
    finally:
        database.close()


def kills(seed: int, trials: int, folder: Path) -> Outcome:
    """Stubs that die at the steps of a migration, and by the clock."""
    from tools.trust.kills import Script, run_stub

    chance = random.Random(f"{seed} migration")
    outcome = Outcome("kills in a migration")
    given = Script(seed, 1, (MIGRATION,))
    steps = _steps(folder / "steps")
    while outcome.trials < trials:
        path, digests = unpack(folder / "old")
        death: Death | tuple[int, float] = (0, chance.random() * 0.02)
        if chance.random() < 0.7:
            death = Death(0, chance.randrange(steps), chance.choice(WHENS))
        account = run_stub(path, given, 0, death)
        if account.code and not account.was_killed:
            outcome.take(f"killed at {death}", [f"it failed: {account.errors[-300:]}"], [])
        outcome.trials += 1
        outcome.take(f"a migration killed at {death}", check_old(path, digests), [])
        shutil.rmtree(folder / "old")
    return outcome


class _Count:
    def __init__(self) -> None:
        self.steps = 0

    def before(self, step: object) -> None:
        pass

    def after(self, step: object) -> None:
        self.steps += 1


def _steps(folder: Path) -> int:
    """How many steps a migration has."""
    count = _Count()
    path, _ = unpack(folder)
    with watched(count):
        Store.open(path, write=True).close()
    shutil.rmtree(folder)
    return count.steps


def power_cuts(seed: int, folder: Path) -> Outcome:
    """Every kind of power cut after every step of a migration."""
    outcome = Outcome("power cuts in a migration")
    from tools.trust.script import script

    root = folder / "migration"
    old, digests = unpack(folder / "old")
    (root / STORE).parent.mkdir(parents=True)
    old.rename(root / STORE)
    trace = record(root, script(seed, 1, (MIGRATION,)))
    shutil.rmtree(root)
    for cut in CUTS:
        player = Player(trace)
        while player.at < len(trace.events):
            player.step()
            target = folder / "crash"
            player.crash(target, cut, f"{seed} {cut} {player.at}")
            outcome.trials += 1
            what = f"seed {seed}, a migration, after event {player.at}, {cut}"
            outcome.take(what, check_old(target / STORE, digests), [])
            shutil.rmtree(target)
    shutil.rmtree(folder / "old")
    return outcome
