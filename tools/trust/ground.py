"""A finished store with something of everything in it, to be damaged; and what it was a while before.

Three recordings: lobby (whole and compacted, with a forgotten span), door (two sessions, a forgotten span, not
compacted, its newest units in neither table nor pages) and one that was forgotten as a whole. Captions are
indexed twice, key pages made, states saved, a policy set. It is a copy of the directory while a writer was
open: the WAL is that of a killed writer.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from memdb.compact import compact
from memdb.database import CATALOG
from memdb.folder import POLICY
from memdb.policy import parse, write_policy
from memdb.schemas.times import to_s
from memdb.store import Store
from tools.trust.runner import SEGMENT_BYTES_MAX, Runner
from tools.trust.script import Op, ScriptMaker
from tools.trust.units import UNIT_NS

# The classes of file, in the order of the table.
CLASSES = (
    "catalog",
    "WAL",
    "segments",
    "Lance data",
    "Lance indexes and manifests",
    "key pages",
    "state",
    "policy",
)
LOBBY_UNITS, DOOR_UNITS = 10, 7
_POLICY = {"store_bytes_max": "40 GB", "age": [{"after": "9000 d", "codec": "int4"}]}


@dataclass(frozen=True)
class Stretch:
    """Where a unit that counts lies."""

    file: str
    start: int  # bytes
    end: int
    recording: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Ground:
    path: Path
    older: Path  # the same store some commits before
    files: dict[str, tuple[str, ...]]  # by class, relative to the store
    stretches: tuple[Stretch, ...]

    def units_at(self, file: str, start: int, end: int) -> list[Stretch]:
        """The units that bytes of a file belong to."""
        return [one for one in self.stretches if one.file == file and one.start < end and one.end > start]


def class_of(file: str) -> str | None:
    """The class of a file, None for what holds nothing (locks, shared memory, a hint)."""
    if file in (CATALOG, f"{CATALOG}-wal", POLICY):
        return {CATALOG: "catalog", POLICY: "policy"}.get(file, "WAL")
    folder, _, rest = file.partition("/")
    if folder == "captions.lance":
        if rest.endswith("latest_version_hint.json"):
            return None
        return "Lance data" if "/data/" in rest else "Lance indexes and manifests"
    return {"segments": "segments", "keys": "key pages", "state": "state"}.get(folder)


def make_ground(seed: int, folder: Path) -> Ground:
    """Make it in a folder; a second or two."""
    work, path, older = (folder / f"{name}.memdb" for name in ("work", "ground", "older"))
    with Runner(work) as runner:
        maker = ScriptMaker(seed, names=("lobby", "door", "yard"))
        _first_session(runner, maker)
    with Runner(work) as runner:
        runner.do(maker.append("door", 1))
        shutil.copytree(work, older)
        _second_session(runner, maker)
        shutil.copytree(work, path)
    shutil.rmtree(work)
    return Ground(path, older, _files(path), _stretches(path))


def _first_session(runner: Runner, maker: ScriptMaker) -> None:
    for op in (
        *(maker.append("lobby", LOBBY_UNITS), maker.about("gap", "lobby"), maker.about("epoch", "lobby")),
        *(maker.append("yard", 3), maker.about("state", "lobby"), maker.about("end", "lobby")),
        *(maker.about("pages", "lobby"), Op("captions")),
        maker.forget("lobby", 2 * UNIT_NS + 7, 4 * UNIT_NS - 9),
        *(Op("compact"), maker.about("state", "lobby")),
        *(maker.append("door", DOOR_UNITS), maker.about("state", "door"), maker.about("gap", "door")),
    ):
        runner.do(op)
    write_policy(runner.path, parse({"when_full": "forget-oldest"}))


def _second_session(runner: Runner, maker: ScriptMaker) -> None:
    for op in (
        *(maker.append("door", 3), maker.about("pages", "door"), Op("captions")),
        *(maker.append("lobby", 3), maker.about("pages", "lobby"), Op("captions")),
        *(maker.forget("door", UNIT_NS // 2, 2 * UNIT_NS + UNIT_NS // 3), maker.forget_all("yard")),
        *(maker.append("door", 2), maker.about("state", "door"), maker.about("state", "lobby")),
    ):
        runner.do(op)
    compact(runner.store, segment_bytes_max=SEGMENT_BYTES_MAX, only="lobby")
    runner.do(maker.append("door", 1))
    write_policy(runner.path, parse(_POLICY))


def _files(path: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {name: [] for name in CLASSES}
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size):
        name = str(file.relative_to(path))
        kind = class_of(name)
        if kind is not None:
            found[kind].append(name)
    return {kind: tuple(names) for kind, names in found.items()}


def _stretches(path: Path) -> tuple[Stretch, ...]:
    with Store.open(path) as store:
        return tuple(
            Stretch(
                f"segments/{unit.segment}",
                unit.offset,
                unit.offset + unit.length,
                row.name,
                to_s(unit.start_ns),
                to_s(unit.end_ns),
            )
            for row in store.recordings()
            for unit in store.units(row.id)
        )
