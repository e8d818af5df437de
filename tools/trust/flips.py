"""Damage every file of a finished store: somebody says so, or nothing that can be observed differs.

    python -m tools.trust.flips [--seed N] [--trials N]

After each damage: `memdb verify` names the file, and the unit's recording and times where a unit is touched; or
no answer differs. An answer that differs comes with a warning or is a typed error, whatever verify says. Then
the store is repaired: what comes of derived files and the catalog is the store as it was; what comes of damaged
segments is all but what the repair says is lost, and nothing that was forgotten.

A state is no truth: a resumed ingest replays from an older one and compares. So one that was deleted counts as
no damage where the next older one, or none, is what is loaded.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from memdb.database import CATALOG
from memdb.repair import repair
from memdb.repair_report import RepairReport
from memdb.schemas.errors import MemdbError, NotAStore
from memdb.verify import Problem
from tools.trust.answers import Answer, Answers, answers
from tools.trust.damage import FLIP, HARSHER, Damage, harm
from tools.trust.ground import CLASSES, Stretch, make_ground
from tools.trust.look import verify_any
from tools.trust.outcome import Outcome, table
from tools.trust.pool import WORKERS, spread

FLIPS_SHARE = 0.7  # of the trials of a class
TRUTH = ("segments", "state", "policy")  # what no other file holds


def verified(path: Path) -> list[Problem]:
    """As the command checks a store; that there is none is a report of the catalog."""
    try:
        return list(verify_any(path).problems)
    except NotAStore as error:
        return [Problem(CATALOG, str(error))]


class Campaign:
    """One ground, damaged again and again in copies."""

    def __init__(self, seed: int, folder: Path, *, repair_every: int = 1) -> None:
        self._chance = random.Random(f"{seed} flips")
        self._seed = seed
        self._folder = folder
        self._ground = make_ground(seed, folder)
        self._repair_every = repair_every
        self._whole = answers(self._copy("whole"))
        if any(answer.told for answer in self._whole.values()) or verified(self._ground.path):
            raise RuntimeError(f"the ground of seed {seed} is not whole")

    def _copy(self, name: str) -> Path:
        target = self._folder / f"{name}.memdb"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self._ground.path, target)
        return target

    def run(self, kind: str, trials: int, ways: tuple[str, ...]) -> Outcome:
        """Damage files of one class, in turn by each of the ways."""
        outcome = Outcome(f"{kind}: {ways[0] if len(ways) == 1 else 'harsher'}")
        with outcome.timed():
            sizes = [(self._ground.path / file).stat().st_size for file in self._ground.files[kind]]
            for number in range(trials):
                file = self._chance.choices(self._ground.files[kind], sizes)[0]
                if number % 3 == 0:
                    file = self._chance.choice(self._ground.files[kind])
                path = self._copy("trial")
                way = ways[number % len(ways)]
                damage = harm(self._ground, path, file, way, self._chance)
                if damage is None:
                    continue
                outcome.trials += 1
                self._judge(outcome, kind, path, damage, mend=number % self._repair_every == 0)
        return outcome

    def _judge(self, outcome: Outcome, kind: str, path: Path, damage: Damage, *, mend: bool) -> None:
        what = f"seed {self._seed}: {damage}"
        try:
            problems = verified(path)
        except Exception as error:
            outcome.is_silent(f"{what}: verify raises {type(error).__name__}: {error}")
            return
        files = {problem.file for problem in problems}
        reported = damage.file in files or (kind == "WAL" and CATALOG in files)
        found = answers(path)
        # A table's older manifest, or none, leaves captions to be searched one by one: these are ranked apart.
        ranks = damage.kind not in ("an older version", "deleted")
        differing = differences(self._whole, found, ranks=ranks)
        for name in differing:
            if name in found and found[name].untyped:
                outcome.is_silent(f"{what}: {name}: {found[name].value!r:.200}")
                return
        if kind == "state" and damage.kind in ("deleted", "an older version"):
            differing = [name for name in differing if not name.startswith("state of")]
        silent = [name for name in differing if not _told(name, found)]
        if "open" not in found and silent:
            outcome.is_silent(f"{what}: answered without a word: {_some(silent)}")
        elif differing and not reported:
            outcome.is_silent(f"{what}: verify names {sorted(files)}, other answers: {_some(differing)}")
        elif reported and kind == "segments":
            self._check_times(outcome, what, damage, problems)
        if mend and outcome.ok:
            self._mend(outcome, what, kind, path, damage)

    def _check_times(self, outcome: Outcome, what: str, damage: Damage, problems: list[Problem]) -> None:
        """Each unit that counts and was touched must be told by recording and times."""
        before = (self._ground.path / damage.file).read_bytes()
        target = self._folder / "trial.memdb" / damage.file
        now = target.read_bytes() if target.exists() else b""
        for unit in self._ground.units_at(damage.file, damage.start, damage.end):
            if before[unit.start : unit.end] == now[unit.start : unit.end]:
                continue  # the older version has it too
            named = any(
                problem.recording == unit.recording
                and (
                    (problem.start_s is None and damage.kind not in (FLIP, "512 zeros"))  # the whole file
                    or _overlaps(problem, unit)
                )
                for problem in problems
                if problem.file == damage.file
            )
            if not named:
                outcome.is_silent(f"{what}: verify does not name {unit.recording} from {unit.start_s:g} s")
                return

    def _mend(self, outcome: Outcome, what: str, kind: str, path: Path, damage: Damage) -> None:
        """Repair, and hold the store to what must be left."""
        try:
            report = repair(path)
        except MemdbError as error:
            outcome.loses(f"{what}: repair fails: {type(error).__name__}: {error}")
            return
        except Exception as error:
            outcome.loses(f"{what}: repair raises {type(error).__name__}: {error}")
            return
        found = answers(path)
        differing = differences(self._whole, found, ranks=False)
        if kind not in TRUTH:
            if differing:
                outcome.loses(f"{what}: after the repair others: {_some(differing)}")
            elif problems := verified(path):
                outcome.loses(f"{what}: after the repair verify says {problems[0]}")
            return
        self._check_left(outcome, what, damage, report, differing, found)

    def _check_left(
        self,
        outcome: Outcome,
        what: str,
        damage: Damage,
        report: RepairReport,
        differing: list[str],
        found: Answers,
    ) -> None:
        """After damage to what no other file holds: only units that were touched or told may differ."""
        if damage.file == "policy.json" or damage.file.startswith("state/"):
            wrong = [name for name in differing if not name.startswith(("policy", "state of"))]
            if wrong:
                outcome.loses(f"{what}: after the repair others: {_some(wrong)}")
            return
        told = {(span.recording, number) for span in report.spans for number in _numbers(span)}
        for name in differing:
            if not name.startswith("caption of") or name not in found:
                continue
            recording, number = name.removeprefix("caption of ").split()
            if (recording, int(number)) not in told and not found[name].told:
                outcome.loses(f"{what}: after the repair {name} is another, and the repair says nothing")
                return


def _overlaps(problem: Problem, unit: Stretch) -> bool:
    if problem.start_s is None or problem.end_s is None:
        return False
    return problem.start_s < unit.end_s and problem.end_s > unit.start_s


def _numbers(span: object) -> range:
    return range(getattr(span, "first_unit", 0), getattr(span, "last_unit", -1) + 1)


def differences(whole: Answers, found: Answers, *, ranks: bool = True) -> list[str]:
    """The questions that are answered otherwise, or not at all; warnings beside the right answer do not count.

    Without `ranks` the order of captions by words does not count: it depends on how many of them are indexed.
    """
    if "open" in found:
        return ["open"]
    names = [
        name
        for name, answer in whole.items()
        if name not in found
        or (found[name].value != answer.value and (ranks or not _same(name, answer, found)))
    ]
    return [*names, *(name for name in found if name not in whole)]


def _same(name: str, answer: Answer, found: Answers) -> bool:
    now = found[name].value
    if name.startswith("captions ") and isinstance(now, list) and isinstance(answer.value, list):
        return sorted(now) == sorted(answer.value)
    return False


def _told(name: str, found: Answers) -> bool:
    """Whether a report came with an answer, or with the one without which the question could not be asked."""
    if name in found:
        return found[name].told
    words = set(name.replace(",", "").split())
    before = [asked for asked in found if asked.startswith(("units of ", "slices of "))]
    return any(found[asked].told for asked in before if asked.split()[-1] in words) or (
        "recordings" in found and found["recordings"].told
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def run(seed: int, trials: int, folder: Path, *, repair_every: int = 1) -> list[Outcome]:
    """`trials` flips of single bits in each class of file, and half as many harsher ones: a row each."""
    return list(rows(seed, trials, folder, repair_every=repair_every))


def run_spread(seed: int, trials: int, folder: Path) -> list[Outcome]:
    """The same, shared among processes that each damage a store of their own."""
    shares = [
        (seed * WORKERS + number, -(-trials // WORKERS), folder / str(number)) for number in range(WORKERS)
    ]
    first, *others = spread(_share, shares)
    for other in others:
        for row, more in zip(first, other, strict=True):
            row.add(more)
            row.seconds = max(row.seconds, more.seconds)
    return first


def _share(given: tuple[int, int, Path]) -> list[Outcome]:
    seed, trials, folder = given
    folder.mkdir()
    return run(seed, trials, folder)


def rows(
    seed: int, trials: int, folder: Path, *, repair_every: int = 1, kinds: Sequence[str] = CLASSES
) -> Iterator[Outcome]:
    """The same, one after another."""
    campaign = Campaign(seed, folder, repair_every=repair_every)
    for kind in kinds:
        yield campaign.run(kind, trials, (FLIP,))
        yield campaign.run(kind, -(-trials // 2), HARSHER)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--repair-every", type=int, default=1)
    parser.add_argument("--kind", action="append", choices=CLASSES, default=[])
    given = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in rows(
            given.seed,
            given.trials,
            Path(folder),
            repair_every=given.repair_every,
            kinds=given.kind or CLASSES,
        ):
            outcomes.append(outcome)
            for line in outcome.details:
                print(line, flush=True)
    print(table(outcomes))
    return int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
