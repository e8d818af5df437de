"""Power cuts after every step of every protocol: what was acknowledged is there, whatever the file system chose.

The script is run once; each directory that a cut could have left is made from its trace, opened, held to the
account of what was acknowledged before that step, and gone on with to the end of the script.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

from memdb.database import CATALOG
from tools.trust import migration
from tools.trust.check import REPAIRING, Findings, check, finish
from tools.trust.model import Model
from tools.trust.outcome import Outcome
from tools.trust.pool import WORKERS, hushed, spread
from tools.trust.script import Op, protocols
from tools.trust.trace import Player, record

WHOLE_EVERY = 6
# After every step all that no sync reached is lost, all of it came through, and no new name did. What stands in
# between has more kinds than there is time for: the seed draws one for each step.
ALWAYS = ("nothing", "everything", "contents without names")
BETWEEN = ("names without contents", "names with garbage", "torn", "some", "some names")


class Campaign:
    """A trace, and the directories that are made of it."""

    def __init__(self, seed: int, folder: Path, ops: Sequence[Op] | None = None) -> None:
        self._folder = folder / f"power-{seed}"
        self._seed = seed
        self._folder.mkdir(parents=True)
        home = self._folder / "home"
        home.mkdir()
        self.trace = record(home, protocols(seed) if ops is None else ops)
        shutil.rmtree(home)
        self._models = [Model()]
        for op in self.trace.ops:
            self._models.append(self._models[-1].after(op))

    @property
    def events(self) -> int:
        return len(self.trace.events)

    def crashes(
        self,
        wanted: Sequence[tuple[int, str, int]],
        ignored: str = "",
        *,
        whole_every: int = 1,
        repaired_every: int = 10,
    ) -> Iterator[Findings]:
        """What is found after power cuts: each behind an event, of a kind, with a seed. Events in order.

        `ignored`: syncs of this reason do nothing. One in `repaired_every` loses its catalog too, and is repaired
        from the segments alone. `whole_every`: one in so many goes on to the end of the script,
        the others with the operation that was under way and an append to every recording; 0: none goes on.
        """
        player = Player(self.trace, ignored)
        for at, cut, seed in sorted(wanted):
            chance = random.Random(f"{self._seed} {at} {cut} {seed} behind")
            while player.at <= at:
                player.step()
            findings, model = self._crash(player, at, cut, seed)
            if findings.ok and chance.random() < 1 / repaired_every:
                findings = self._without_catalog(at)
            elif findings.ok and whole_every:
                self._go_on(at, model, findings, whole=chance.random() < 1 / whole_every)
            shutil.rmtree(self._folder / "crash")
            yield findings

    def _crash(self, player: Player, at: int, cut: str, seed: int) -> tuple[Findings, Model]:
        done, under_way = self.trace.acknowledged(at + 1)
        target = self._folder / "crash"
        player.crash(target, cut, f"{self._seed} {at} {cut} {seed}")
        path = target / self.trace.store
        return check(
            path,
            deepcopy(self._models[done]).outcomes(under_way),
            may_be_new=done == 0,
            repairing=under_way is not None and under_way.kind in REPAIRING,
            derived_may_be_damaged=True,
        )

    def _without_catalog(self, at: int) -> Findings:
        """The catalog is lost after the power cut: what was forgotten must not come back by its repair either."""
        done, under_way = self.trace.acknowledged(at + 1)
        path = self._folder / "crash" / self.trace.store
        if done == 0:
            return Findings()
        for file in sorted(path.glob(f"{CATALOG}*")):
            file.unlink()
        models = list(deepcopy(self._models[done]).outcomes(under_way))
        for model in models:
            model.lose_catalog()
        found, _ = check(path, models, repairing=True, derived_may_be_damaged=True)
        return Findings(
            [f"repaired: {what}" for what in found.lost], [f"repaired: {what}" for what in found.silent]
        )

    def _go_on(self, at: int, model: Model, findings: Findings, *, whole: bool) -> None:
        done, _ = self.trace.acknowledged(at + 1)
        ops = list(self.trace.ops)
        if not whole and done < len(ops):
            ops = [*ops[: done + 1], *_appends(model.after(ops[done]))]
        path = self._folder / "crash" / self.trace.store
        ending = finish(path, model, ops, done, derived_may_be_damaged=True)
        findings.lost += [f"at the end: {what}" for what in ending.lost]
        findings.silent += [f"at the end: {what}" for what in ending.silent]

    def cuts(self, at: int) -> list[str]:
        """The kinds of power cut that are tried behind an event."""
        return [*ALWAYS, random.Random(f"{self._seed} {at} between").choice(BETWEEN)]

    def where(self, at: int) -> str:
        """An event in words."""
        event = self.trace.events[at]
        _, op = self.trace.acknowledged(at + 1)
        step = event.step
        what = event.said if step is None else f"{step.what} {step.name} {step.path.name[-12:]}"
        return f"in {op}: after {what}"


def _appends(model: Model) -> list[Op]:
    return [Op("append", kept.stream, kept.units + 1, 1) for kept in model.kept.values()]


def run(seed: int, trials: int, folder: Path, *, campaign: Campaign | None = None) -> Outcome:
    """`trials` power cuts spread over the script; 0: four after every step, in several processes."""
    outcome = Outcome("power cut after each step")
    with outcome.timed(), hushed():
        outcome.add(migration.power_cuts(seed, folder))
        if trials:
            outcome.add(_sample(seed, trials, campaign or Campaign(seed, folder)))
        else:
            for part in spread(_share, [(seed, folder / str(number), number) for number in range(WORKERS)]):
                outcome.add(part)
    return outcome


def _sample(seed: int, trials: int, campaign: Campaign) -> Outcome:
    every = _every(campaign)
    wanted = random.Random(f"{seed} cuts").sample(every, min(trials, len(every)))
    return _run(seed, campaign, sorted(wanted))


def _share(given: tuple[int, Path, int]) -> Outcome:
    """What one of the processes does of a whole campaign: it makes a trace of its own, of the same steps."""
    seed, folder, number = given
    campaign = Campaign(seed, folder)
    found = _run(seed, campaign, [cut for cut in _every(campaign) if cut[0] % WORKERS == number])
    if number == 0:
        found.tell(f"{campaign.events} steps of {len(campaign.trace.ops)} operations")
    return found


def _every(campaign: Campaign) -> list[tuple[int, str, int]]:
    return [(at, cut, 0) for at in range(campaign.events) for cut in campaign.cuts(at)]


def _run(seed: int, campaign: Campaign, wanted: Sequence[tuple[int, str, int]]) -> Outcome:
    outcome = Outcome("power cuts")
    for (at, cut, _), found in zip(wanted, campaign.crashes(wanted, whole_every=WHOLE_EVERY), strict=True):
        outcome.trials += 1
        outcome.take(f"seed {seed}, {campaign.where(at)}, {cut}", found.lost, found.silent)
    return outcome
