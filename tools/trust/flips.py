"""One random bit flipped in every kind of file: reported, or without any effect on what can be asked.

A finished store holds recordings of two codecs, a forgotten span, segments that were compacted and others
that were not, caption tables, key pages, states, and the WAL that a killed writer left. A bit is flipped, the
store is asked everything, verify runs, and the bit is flipped back.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from memdb.database import CATALOG
from memdb.schemas.errors import MemdbError
from memdb.schemas.times import to_s
from memdb.store import Store
from tools.trust.look import verify_any
from tools.trust.observe import Answer, observe
from tools.trust.outcome import Outcome
from tools.trust.runner import Runner
from tools.trust.script import Op, ScriptMaker
from tools.trust.units import UNIT_NS, Stream

WAL = f"{CATALOG}-wal"
CLASSES: dict[str, Callable[[str], bool]] = {
    "catalog": lambda file: file == CATALOG,
    "WAL": lambda file: file == WAL,
    "segments": lambda file: file.startswith("segments/"),
    "Lance data": lambda file: file.startswith("captions.lance/") and "/data/" in file,
    "Lance indexes and manifests": lambda file: file.startswith("captions.lance/") and "/data/" not in file,
    "key pages": lambda file: file.startswith("keys/"),
    "states": lambda file: file.startswith("state/"),
}


@dataclass(frozen=True)
class Extent:
    """Where a unit that counts lies in a segment."""

    file: str
    start: int
    end: int
    recording: str
    start_s: float
    end_s: float


def make_store(seed: int, folder: Path) -> Path:
    """The store, as a copy of one whose writer is still at work: it has a WAL."""
    maker = ScriptMaker(seed, names=("lobby", "door", "hall"), codecs=("int4", "raw", "int4"))
    ops: list[Op] = []
    for name in ("lobby", "door", "hall"):
        ops += [maker.append(name, 3), maker.about("state", name), maker.append(name, 2)]
    ops += [maker.about("gap", "door"), maker.about("epoch", "door"), maker.about("state", "door")]
    ops += [Op("captions"), maker.about("pages", "lobby"), maker.about("pages", "door")]
    ops += [maker.forget("hall", UNIT_NS // 2, 2 * UNIT_NS), maker.forget("lobby", 0, UNIT_NS + 1)]
    ops += [Op("compact"), maker.append("lobby", 2), maker.append("door", 2)]
    ops += [maker.forget("door", 3 * UNIT_NS, 3 * UNIT_NS + UNIT_NS // 3)]
    ops += [Op("captions"), maker.about("pages", "lobby"), maker.about("pages", "door")]
    ops += [maker.append("hall", 2), maker.about("state", "hall"), Op("reopen")]
    tail = [maker.append("lobby", 1), maker.append("hall", 1), maker.about("epoch", "hall")]
    with Runner(folder / "made.memdb") as runner:
        runner.run(ops)
        runner.run([*ops, *tail], len(ops))
        shutil.copytree(folder / "made.memdb", folder / "s.memdb")
    shutil.rmtree(folder / "made.memdb")
    (folder / "s.memdb" / f"{CATALOG}-shm").unlink(missing_ok=True)
    return folder / "s.memdb"


class Bench:
    """A store, what it answers when it is whole, and where its units lie."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.path = make_store(seed, folder)
        names = ("lobby", "door", "hall")
        streams = [Stream(seed, name) for name in names]
        self.words = ("star", *(stream.word(number) for stream in streams for number in (0, 1, 4)))
        self.whole = observe(self.path, self.words)
        assert not any(answer.reported for answer in self.whole.values()), self.whole
        assert verify_any(self.path).ok, verify_any(self.path).problems
        self.extents = _extents(self.path)
        self.files = {
            name: [file for file in _files(self.path) if belongs(file)] for name, belongs in CLASSES.items()
        }

    def flip(self, file: str, byte: int, bit: int) -> list[str]:
        """What is wrong with how a flipped bit is met: nothing, if all is well."""
        path = self.path / file
        data = path.read_bytes()
        changed = bytearray(data)
        changed[byte] ^= 1 << bit
        path.write_bytes(bytes(changed))
        try:
            return self._judge(file, byte)
        finally:
            path.write_bytes(data)
            (self.path / f"{CATALOG}-shm").unlink(missing_ok=True)

    def _judge(self, file: str, byte: int) -> list[str]:
        try:
            found = observe(self.path, self.words)
            report = verify_any(self.path)
        except MemdbError as error:  # verify itself may say that a newer memdb made the store
            return [] if "newer" in str(error) else [f"verify: {error}"]
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        differing = unlike(self.whole, found)
        wrong = [f"{what} differs without a report" for what in differing if not _reported(found, what)]
        named = {problem.file for problem in report.problems}
        accepted = {CATALOG, WAL} if file in (CATALOG, WAL) else {file}
        if differing and report.ok:
            wrong.append(f"verify sees nothing, and these differ: {differing}")
        if named and not named & accepted:
            wrong.append(f"verify names {sorted(named)}")
        unit = next(
            (unit for unit in self.extents if unit.file == file and unit.start <= byte < unit.end), None
        )
        if unit is not None and not any(
            (problem.recording, problem.start_s, problem.end_s) == (unit.recording, unit.start_s, unit.end_s)
            for problem in report.problems
        ):
            wrong.append(f"verify does not name the unit of {unit.recording} at {unit.start_s:g} s")
        return wrong


def unlike(whole: Mapping[str, Answer], found: Mapping[str, Answer]) -> list[str]:
    """Questions that are answered in another way than they were."""
    if found["open"].reported:
        return ["open"]
    return [what for what, answer in whole.items() if what not in found or found[what].value != answer.value]


def _reported(found: Mapping[str, Answer], what: str) -> bool:
    """Whether a question, or the list of recordings without which it could not be asked, came with a report."""
    answer = found.get(what)
    return bool(found["recordings"].reported if answer is None else answer.reported)


def _files(path: Path) -> list[str]:
    return sorted(
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.stat().st_size
    )


def _extents(path: Path) -> list[Extent]:
    with Store.open(path) as store:
        return [
            Extent(
                f"segments/{unit.segment}",
                unit.offset,
                unit.offset + unit.length,
                row.name,
                to_s(unit.start_ns),
                to_s(unit.end_ns),
            )
            for row in store.recordings()
            for unit in store.units(row.id)
        ]


def run(seed: int, trials: int, folder: Path) -> list[Outcome]:
    """`trials` bits in each kind of file."""
    chance = random.Random(f"{seed} flips")
    bench = Bench(seed, folder)
    outcomes = []
    for name, files in bench.files.items():
        outcome = Outcome(f"bit flips: {name}")
        assert files, f"the store has no {name}"
        with outcome.timed():
            for _ in range(trials):
                file = chance.choice(files)
                byte, bit = chance.randrange((bench.path / file).stat().st_size), chance.randrange(8)
                outcome.trials += 1
                for wrong in bench.flip(file, byte, bit):
                    outcome.is_silent(f"seed {seed}, {file}, byte {byte}, bit {bit}: {wrong}")
        outcomes.append(outcome)
    return outcomes
