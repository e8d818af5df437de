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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from memdb.files import Step, watched
from tools.trust.check import check, finish
from tools.trust.model import Model
from tools.trust.outcome import Outcome
from tools.trust.runner import Runner
from tools.trust.script import BASIC, Op, script
from tools.trust.stub import WHENS, Death

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 14
KILLS_A_CHAIN = 3
PARALLEL = 2
KINDS = (*BASIC, "captions", "compact", "repair")
CLOCK = "by the clock"
BY_CLOCK_ONLY = ("captions",)  # LanceDB writes past memdb/files.py
# Phases in which a stub is killed; those that are named as operations need these in the script.
PHASES = (
    *("a new store", "segment write", "between sync and commit", "after commit", CLOCK, "state", "pages"),
    *("forget", "forget_all", "captions", "close", "gap", "compact", "repair"),
)
DEAR = ("captions", "compact", "repair")  # in scripts of which a kill is wanted in them
PER_KIND = frozenset(
    {"state", "pages", "forget", "forget_all", "captions", "close", "gap", "compact", "repair"}
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
        return op.kind
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
    shutil.rmtree(path)
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
    kinds: tuple[str, ...]

    @property
    def ops(self) -> list[Op]:
        return script(self.seed, self.length, self.kinds)


class _Chain:
    """One store, killed several times and then run to its end."""

    def __init__(self, given: Script, folder: Path, phases: Sequence[str]) -> None:
        self._given, self._ops = given, given.ops
        self._random = random.Random(f"{given.seed} kills")
        self._path = folder / f"{given.seed}.memdb"
        self._phases = phases
        self._points = points_of(self._ops, self._path)
        self._model, self._start = Model(), 0
        self.outcome = Outcome("kills")
        self.phases: Counter[str] = Counter()

    def run(self) -> _Chain:
        for phase in self._phases:
            found = self._death(phase)
            if found is None or not self._kill(phase, found):
                continue
            if not self.outcome.ok:
                return self
        ending = finish(self._path, self._model, self._ops, self._start)
        self.outcome.take(f"{self._given}, run to its end", ending.lost, ending.silent)
        shutil.rmtree(self._path, ignore_errors=True)
        return self

    def _death(self, phase: str) -> Death | tuple[int, float] | None:
        """A moment of a phase that is still to come."""
        if phase == CLOCK:
            left = range(self._start, len(self._ops))
            return (self._random.choice(left), self._random.random() ** 2 * _CLOCK_S) if left else None
        points = [point for point in self._points if point.phase == phase and point.op >= self._start]
        if phase in BY_CLOCK_ONLY:
            ops = [index for index, op in enumerate(self._ops) if op.kind == phase and index >= self._start]
            return (self._random.choice(ops), self._random.random() * _LANCE_S) if ops else None
        if not points:
            return None
        point = self._random.choice(points)
        return Death(point.op, point.step, self._random.choice(WHENS if point.write else WHENS[:2]))

    def _kill(self, phase: str, death: Death | tuple[int, float]) -> bool:
        """Whether the stub died, where else it ran on to its end."""
        account = run_stub(self._path, self._given, self._start, death)
        what = f"{self._given}, killed in {phase} at {death}"
        if not account.was_killed:
            if account.code:
                self.outcome.loses(f"{what}: it failed: {account.errors.strip().splitlines()[-1:]}")
            self._through(account.acknowledged)
            return False
        self.outcome.trials += 1
        self.phases[phase] += 1
        self._through(account.acknowledged)
        under_way = self._ops[account.under_way] if account.under_way >= account.acknowledged else None
        if not self._path.exists():
            return True  # it died before it made anything
        findings, self._model = check(
            self._path,
            self._model.outcomes(under_way),
            may_be_new=not self._start,
            repairing=under_way is not None and under_way.kind == "repair",
        )
        self.outcome.take(what, findings.lost, findings.silent)
        return True

    def _through(self, acknowledged: int) -> None:
        for op in self._ops[self._start : acknowledged]:
            self._model = self._model.after(op)
        self._start = max(self._start, acknowledged)


def run(
    seed: int,
    trials: int,
    folder: Path,
    *,
    kinds: Sequence[str] = KINDS,
    length: int = LENGTH,
    log: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Kill stubs until `trials` of them died, in every phase in turn."""
    outcome = Outcome("kill -9 at fault points and by the clock (stub)")
    phases: Counter[str] = Counter()
    wanted = [phase for phase in PHASES if phase in kinds or phase not in PER_KIND]
    made = 0

    def chain(number: int) -> _Chain:
        own = [wanted[(number * KILLS_A_CHAIN + at) % len(wanted)] for at in range(KILLS_A_CHAIN)]
        needed = tuple(kind for kind in kinds if kind in own or kind not in DEAR)
        return _Chain(Script(seed * 1000 + number, length, needed), folder, own)

    with outcome.timed(), ThreadPoolExecutor(PARALLEL) as threads:
        while outcome.trials < trials and outcome.ok:
            batch = max(PARALLEL, (trials - outcome.trials) // KILLS_A_CHAIN)
            chains = [chain(number) for number in range(made, made + batch)]
            for found in threads.map(_Chain.run, chains):
                outcome.add(found.outcome)
                phases += found.phases
            made += batch
    outcome.tell(", ".join(f"{phase} {count}" for phase, count in sorted(phases.items())))
    return outcome
