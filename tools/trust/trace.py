"""A script run once, step by step: from it every directory that a power cut could have left is made.

SQLite and LanceDB write past memdb/files.py. What SQLite has made safe is known at two points, after a commit
and after a checkpoint: the files as they are then. What LanceDB wrote is never safe.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memdb.database import CATALOG
from memdb.files import Step, watched
from tools.trust.runner import Runner
from tools.trust.script import Op
from tools.trust.shadow import CUTS, Crash, Folder, Inode, Shadow

WAL = f"{CATALOG}-wal"
_SAFE_POINTS = ("catalog committed", "catalog checkpointed")
_LOST_SHARE, _CUT_SHARE = 0.3, 0.15  # of WALs that are lost as a whole, or from some byte on


@dataclass(frozen=True)
class Event:
    """A step, or what the runner said, and the files that tell of themselves at that moment."""

    step: Step | None
    said: str = ""
    catalog: tuple[bytes, bytes] | None = (
        None  # the database and its WAL, where they are safe or begin to exist
    )
    is_safe: bool = False
    loose: dict[str, bytes] | None = None  # files that nobody syncs: path in the store to content


@dataclass
class Trace:
    root: Path  # the folder that holds the store
    store: str  # its name
    ops: Sequence[Op]
    start: int  # the first operation that was run
    events: list[Event] = field(default_factory=list)
    base: Folder = field(default_factory=Folder)  # as it was at first, all of it safe
    base_catalog: tuple[bytes, bytes] | None = None

    def acknowledged(self, cut: int) -> tuple[int, Op | None]:
        """How many operations were acknowledged before event `cut`, and which was under way."""
        done, under_way = self.start, None
        for event in self.events[:cut]:
            words = event.said.split()
            if not words:
                continue
            if words[0] == "begin":
                under_way = int(words[1])
            elif words[0] in ("unit", "done") and under_way is not None:
                done = under_way + 1
        op = self.ops[under_way] if under_way is not None and under_way >= done else None
        return done, op


class Recorder:
    """A Watch that keeps every step, and copies of the files that are changed past memdb/files.py."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._path = trace.root / trace.store
        self._made: set[Path] = set()

    def before(self, step: Step) -> None:
        pass

    def after(self, step: Step) -> None:
        if step.what in ("create", "replace"):
            self._made.add(step.target or step.path)
        catalog = None
        if step.what == "point" and step.path.name == CATALOG:
            catalog = (_read(self._path / CATALOG), _read(self._path / WAL))
        self._trace.events.append(Event(step, "", catalog, step.name in _SAFE_POINTS))

    def say(self, line: str) -> None:
        loose = self._loose() if line.startswith("done") else None
        self._trace.events.append(Event(None, line, loose=loose))

    def _loose(self) -> dict[str, bytes]:
        found = {}
        for folder in ("keys", "captions.lance"):
            for path in sorted((self._path / folder).rglob("*")):
                if path.is_file() and path not in self._made:
                    found[str(path.relative_to(self._path))] = path.read_bytes()
        return found


def record(path: Path, ops: Sequence[Op], start: int = 0) -> Trace:
    """Run a script on the store at `path`, alone in its folder, from operation `start` on."""
    trace = Trace(path.parent, path.name, ops, start)
    trace.base = Folder.of(path.parent, without=(WAL, f"{CATALOG}-shm"))
    if path.exists():
        trace.base_catalog = (_read(path / CATALOG), _read(path / WAL))
    recorder = Recorder(trace)
    with watched(recorder), Runner(path, recorder.say) as runner:
        runner.run(ops, start)
    return trace


class Player:
    """Goes through a trace, and writes directories as a power cut after each event would leave them."""

    def __init__(self, trace: Trace, ignored: str = "") -> None:
        self._trace = trace
        self._path = trace.root / trace.store
        self._shadow = Shadow(trace.root, _copy(trace.base), ignored)
        self._catalog, self._safe = trace.base_catalog, trace.base_catalog is not None
        self._loose: dict[str, bytes] = {}
        self.at = 0  # events that were made

    def step(self) -> Event:
        """Let the next event happen."""
        event = self._trace.events[self.at]
        self.at += 1
        if event.step is not None:
            self._shadow.see(event.step)
        if event.catalog is not None and (event.is_safe or not self._safe):
            self._catalog, self._safe = event.catalog, event.is_safe
        if event.loose is not None:
            self._loose = event.loose
        return event

    def crash(self, target: Path, cut: str, seed: object) -> None:
        """Write what is left into the empty folder `target`, which stands for the store's."""
        chance = random.Random(f"{seed}")
        Crash(CUTS[cut], chance).write(self._shadow.top, target)
        store = target / self._trace.store
        if not store.is_dir():
            return
        if (store / CATALOG).exists() and self._catalog is not None:
            self._write_catalog(store, chance)
        for name, content in self._loose.items():
            _write_loose(store / name, content, chance)

    def _write_catalog(self, store: Path, chance: random.Random) -> None:
        assert self._catalog is not None
        database, wal = self._catalog
        if not self._safe:  # it was being made: what SQLite wrote may have come through, up to some byte
            size = chance.choice([0, len(database), chance.randint(0, len(database))])
            (store / CATALOG).write_bytes(database[:size])
            return
        (store / CATALOG).write_bytes(database)
        what = chance.random()
        if what < _LOST_SHARE:
            wal = b""
        elif what < _LOST_SHARE + _CUT_SHARE:
            wal = wal[: chance.randint(0, len(wal))]
        if wal:
            (store / WAL).write_bytes(wal)


def _write_loose(path: Path, content: bytes, chance: random.Random) -> None:
    what = chance.random()
    if what < 0.2:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if what < 0.4:
        content = content[: chance.randint(0, len(content))]
    elif what < 0.5:
        content = chance.randbytes(len(content))
    elif what < 0.6:
        content = bytes(len(content))
    path.write_bytes(content)


def _copy(folder: Folder) -> Folder:
    copy = Folder(
        {
            name: _copy(node) if isinstance(node, Folder) else Inode(node.durable)
            for name, node in folder.durable.items()
        }
    )
    copy.current = dict(copy.durable)
    return copy


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
