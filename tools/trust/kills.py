"""kill -9 at every step of every phase, and by the clock: what was acknowledged stays, what was forgotten is gone.

A chain is one store that is killed several times: after each death a reader holds it to the account of what
was acknowledged, then the next stub goes on; at last the script runs to its end, where the digests must be
those of a run that nobody disturbed.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from memdb.files import Step, watched
from tools.trust import migration
from tools.trust.check import REPAIRING, check, finish
from tools.trust.model import Model
from tools.trust.outcome import Outcome
from tools.trust.runner import Runner
from tools.trust.script import ONCE, Op, script
from tools.trust.stub import WHENS, Death

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 14
KILLS_A_CHAIN = 3
MIGRATIONS_SHARE = 7  # in a hundred kills
PARALLEL = 2
CLOCK = "by the clock"
BY_CLOCK_ONLY = ("captions",)  # LanceDB writes past memdb/files.py
# Phases in which a stub is killed, in turn; those behind the first line are operations of the script.
PHASES = (
    *("a new store", "segment write", "between sync and commit", "after commit", CLOCK),
    *("state", "pages", "captions", "forget", "forget_all", "compact", "ageing", "repair", "wound", "backup"),
    *("import", "policy", "close", "gap", CLOCK),
)
_HUNG_S = 120.0
_CLOCK_S = 0.05  # longer than most operations take
_LANCE_S = 0.15


@dataclass(frozen=True)
class Point:
    """A step of a script at which a stub may die."""

    phase: str
    op: int
    step: int
    write: bool


def phase_of(op: Op, step: Step) -> str:
    """A name for the stretch of a protocol that a step belongs to."""
    if op.kind != "append":
        return op.why if op.kind == "compact" and op.why else op.kind
    if step.what == "point":
        return {"catalog before commit": "between sync and commit", "catalog committed": "after commit"}.get(
            step.name, "checkpoint"
        )
    return "segment write" if step.path.suffix == ".seg" or step.path.name == "segments" else "a new store"


class _Steps:
    """A Watch that lists the steps of a script that runs undisturbed."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self.points: list[Point] = []
        self._ops, self._op, self._step = ops, -1, 0

    def begin(self, op: int) -> None:
        self._op, self._step = op, 0

    def before(self, step: Step) -> None:
        if self._op >= 0:
            phase = phase_of(self._ops[self._op], step)
            self.points.append(Point(phase, self._op, self._step, step.what == "write"))

    def after(self, step: Step) -> None:
        self._step += 1


def points_of(ops: Sequence[Op], path: Path) -> list[Point]:
    """Every step of a script, found by running it once."""
    steps = _Steps(ops)

    def say(line: str) -> None:
        if line.startswith("begin "):
            steps.begin(int(line.split()[1]))

    with watched(steps), Runner(path, say) as runner:
        runner.run(ops)
    shutil.rmtree(path.parent)
    return steps.points


@dataclass
class Account:
    """What a stub said before it ended."""

    acknowledged: int  # operations, from the start of the script
    under_way: int  # the operation that was begun last
    code: int = 0
    errors: str = ""

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


def run_stub(path: Path, given: Script, start: int, death: Death | tuple[int, float] | None) -> Account:
    """Run a stub from operation `start` on.

    `death`: a step at which it kills itself, or an operation and the seconds after which it is killed from here.
    """
    words = [str(path), str(given.seed), str(given.length), ",".join(given.kinds), "--start", str(start)]
    if isinstance(death, Death):
        words += ["--die", str(death)]
    account = Account(start, start)
    with subprocess.Popen(
        [sys.executable, "-m", "tools.trust.stub", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        hung = threading.Timer(_HUNG_S, process.terminate)
        hung.start()
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            said = line.split()
            if not line.endswith("\n"):
                break  # it died while it spoke
            if said[0] == "begin":
                account.under_way = int(said[1])
                if isinstance(death, tuple) and death[0] == account.under_way:
                    time.sleep(death[1])
                    process.kill()
            elif said[0] in ("unit", "done"):  # a unit is told once its append returned
                account.acknowledged = account.under_way + 1
        account.errors = process.stderr.read()
        account.code = process.wait()
        hung.cancel()
    return account


@dataclass(frozen=True)
class Script:
    seed: int
    length: int
    kinds: tuple[str, ...]  # operations that come once; the plain ones come in any case

    @property
    def ops(self) -> list[Op]:
        return script(self.seed, self.length, self.kinds)


class _Chain:
    """One store, killed several times and then run to its end."""

    def __init__(self, given: Script, folder: Path, phases: Sequence[str]) -> None:
        self._given, self._ops = given, given.ops
        self._random = random.Random(f"{given.seed} kills")
        self._home = folder / str(given.seed)
        self._path = self._home / "s.memdb"
        points = points_of(self._ops, self._path)
        self._deaths = sorted(
            ((phase, death) for phase in phases if (death := self._death(phase, points)) is not None),
            key=lambda found: _op_of(found[1]),
        )
        self._model, self._start = Model(), 0
        self.outcome = Outcome("kills")
        self.phases: Counter[str] = Counter()

    def run(self) -> _Chain:
        for phase, death in self._deaths:
            self._kill(phase, death)
            if not self.outcome.ok:
                return self
        ending = finish(self._path, self._model, self._ops, self._start)
        self.outcome.take(f"{self._given}, run to its end", ending.lost, ending.silent)
        shutil.rmtree(self._home)
        return self

    def _death(self, phase: str, points: Sequence[Point]) -> Death | tuple[int, float] | None:
        """A moment of a phase; None where the script does not come through it."""
        if phase == CLOCK:
            return self._random.randrange(len(self._ops)), self._random.random() ** 2 * _CLOCK_S
        if phase in BY_CLOCK_ONLY:
            ops = [index for index, op in enumerate(self._ops) if op.kind == phase]
            return (self._random.choice(ops), self._random.random() * _LANCE_S) if ops else None
        found = [point for point in points if point.phase == phase]
        if not found:
            return None
        point = self._random.choice(found)
        return Death(point.op, point.step, self._random.choice(WHENS if point.write else WHENS[:2]))

    def _kill(self, phase: str, death: Death | tuple[int, float]) -> None:
        account = run_stub(self._path, self._given, self._start, death)
        what = f"{self._given}, killed in {phase} at {death}"
        if not account.was_killed:
            if account.code:
                self.outcome.loses(f"{what}: it failed: {account.errors.strip().splitlines()[-1:]}")
            self._through(account.acknowledged)
            return
        self.outcome.trials += 1
        self.phases[phase] += 1
        self._through(account.acknowledged)
        under_way = self._ops[account.under_way] if account.under_way >= account.acknowledged else None
        if not self._path.exists():
            return  # it died before it made anything
        findings, self._model = check(
            self._path,
            self._model.outcomes(under_way),
            may_be_new=not self._start,
            repairing=under_way is not None and under_way.kind in REPAIRING,
        )
        self.outcome.take(what, findings.lost, findings.silent)

    def _through(self, acknowledged: int) -> None:
        for op in self._ops[self._start : acknowledged]:
            self._model = self._model.after(op)
        self._start = max(self._start, acknowledged)


def _op_of(death: Death | tuple[int, float]) -> int:
    return death.op if isinstance(death, Death) else death[0]


def run(seed: int, trials: int, folder: Path) -> Outcome:
    """Kill stubs until `trials` of them died, in every phase in turn."""
    outcome = Outcome("kill -9 at fault points and by the clock (stub)")
    phases: Counter[str] = Counter()
    made = 0

    def chain(number: int) -> _Chain:
        own = [PHASES[(number * KILLS_A_CHAIN + at) % len(PHASES)] for at in range(KILLS_A_CHAIN)]
        return _Chain(Script(seed * 1000 + number, LENGTH, tuple(set(own) & ONCE)), folder, own)

    with outcome.timed(), ThreadPoolExecutor(PARALLEL) as threads:
        migrations = migration.kills(seed, max(1, trials * MIGRATIONS_SHARE // 100), folder)
        outcome.add(migrations)
        phases["migration"] = migrations.trials
        while outcome.trials < trials and outcome.ok:
            batch = max(PARALLEL, (trials - outcome.trials) // KILLS_A_CHAIN)
            chains = [chain(number) for number in range(made, made + batch)]
            for found in threads.map(_Chain.run, chains):
                outcome.add(found.outcome)
                phases += found.phases
            made += batch
    outcome.tell(", ".join(f"{phase} {count}" for phase, count in sorted(phases.items())))
    return outcome
