"""Power cuts after every step of every protocol: what was acknowledged is there, whatever the file system chose.

The script is run once; each directory that a cut could have left is made from its trace, opened, held to the
account of what was acknowledged before that step, and gone on with to the end of the script.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.trust.check import Findings, check, finish
from tools.trust.model import Model
from tools.trust.outcome import Outcome
from tools.trust.script import Op, protocols
from tools.trust.shadow import CUTS
from tools.trust.trace import DERIVED, Player, record

WHOLE_EVERY = 6
REPAIRING = ("repair", "wound")


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
        self, wanted: Sequence[tuple[int, str, int]], ignored: str = "", *, whole_every: int = 1
    ) -> Iterator[Findings]:
        """What is found after power cuts: each behind an event, of a kind, with a seed. Events in order.

        `ignored`: syncs of this reason do nothing. `whole_every`: one in so many goes on to the end of the script,
        the others with the operation that was under way and an append to every recording.
        """
        player = Player(self.trace, ignored)
        for number, (at, cut, seed) in enumerate(sorted(wanted)):
            while player.at <= at:
                player.step()
            yield self._crash(player, at, cut, seed, whole=number % whole_every == 0)

    def _crash(self, player: Player, at: int, cut: str, seed: int, *, whole: bool) -> Findings:
        done, under_way = self.trace.acknowledged(at + 1)
        target = self._folder / "crash"
        player.crash(target, cut, f"{self._seed} {at} {cut} {seed}")
        path = target / self.trace.store
        findings, model = check(
            path,
            self._models[done].outcomes(under_way),
            may_be_new=done == 0,
            repairing=under_way is not None and under_way.kind in REPAIRING,
            derived_may_be_damaged=True,
        )
        if findings.ok:
            ops = list(self.trace.ops)
            if not whole and done < len(ops):
                ops = [*ops[: done + 1], *_appends(model.after(ops[done]))]
            ending = finish(path, model, ops, done, derived_may_be_damaged=True)
            findings.lost += [f"at the end: {what}" for what in ending.lost]
            findings.silent += [f"at the end: {what}" for what in ending.silent]
        shutil.rmtree(target)
        return findings

    def cuts(self, at: int) -> list[str]:
        """The kinds of power cut that are tried behind an event: all, but two behind a step of derived data's."""
        step = self.trace.events[at].step
        if step is None or not set(DERIVED) & set(step.path.parts):
            return list(CUTS)
        return random.Random(at).sample(sorted(CUTS), 2)

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
    """`trials` power cuts spread over the script; 0: all kinds of cut after every step."""
    outcome = Outcome("power cut after each step")
    with outcome.timed():
        campaign = campaign or Campaign(seed, folder)
        every = [(at, cut, 0) for at in range(campaign.events) for cut in campaign.cuts(at)]
        chance = random.Random(f"{seed} cuts")
        wanted = sorted(chance.sample(every, min(trials, len(every))) if trials else every)
        for (at, cut, _), found in zip(
            wanted, campaign.crashes(wanted, whole_every=WHOLE_EVERY), strict=True
        ):
            outcome.trials += 1
            what = f"seed {seed}, {campaign.where(at)}, {cut}"
            outcome.take(what, found.lost, found.silent)
        outcome.tell(f"{campaign.events} steps of {len(campaign.trace.ops)} operations")
    return outcome
