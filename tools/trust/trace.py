"""A script run once, step by step: from it every directory that a power cut could have left is made.

SQLite and LanceDB write past memdb/files.py. What SQLite has made safe is known at two points, after a commit
and after a checkpoint: a database and its WAL as they are then. All of a WAL may be lost nevertheless, for the
store promises to lose nothing by that. What LanceDB wrote is never safe.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memdb.database import CATALOG
from memdb.files import Step, watched
from tools.trust.runner import WOUND, Runner
from tools.trust.script import Op
from tools.trust.shadow import CUTS, Crash, Folder, Inode, Shadow

DERIVED = ("keys", "captions.lance")
_SAFE_POINTS = ("catalog committed", "catalog checkpointed")
_WAL_LOST, _WAL_CUT = 0.3, 0.15  # shares of WALs that are lost as a whole, or from some byte on


@dataclass(frozen=True)
class Event:
    """A step, or what the runner said, and the files that tell of themselves at that moment."""

    step: Step | None
    said: str = ""
    sqlite: tuple[Path, bytes, bytes] | None = None  # at a point: a database, what is in it, and in its WAL
    is_safe: bool = False
    wound: tuple[Path, int] | None = None  # a file, and where in it bytes changed by themselves
    loose: dict[str, bytes] | None = None  # files that nobody syncs: path in the store to content


@dataclass
class Trace:
    root: Path  # the folder that holds the store
    store: str  # its name
    ops: Sequence[Op]
    start: int  # the first operation that was run
    events: list[Event] = field(default_factory=list)
    base: Folder = field(default_factory=Folder)  # as it was at first, all of it safe

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
        self._known = set(trace.root.rglob("*"))
        self._with_wal: set[Path] = set()  # databases

    def before(self, step: Step) -> None:
        if step.what in ("sync", "sync_folder", "unlink", "remove_folder", "replace"):
            self._discover(step.path if step.what == "sync_folder" else step.path.parent)

    def after(self, step: Step) -> None:
        self._keep(step)
        for path in sorted(self._with_wal):
            if not wal_of(
                path
            ).exists():  # SQLite moved it into the database, and removed it at the last close
                self._with_wal.discard(path)
                self._trace.events.append(Event(None, sqlite=(path, _read(path), b""), is_safe=True))
        if step.what == "point" and ".sqlite" in step.path.name:
            self._with_wal.add(step.path)
            sqlite = (step.path, _read(step.path), _read(wal_of(step.path)))
            self._trace.events.append(Event(step, sqlite=sqlite, is_safe=step.name in _SAFE_POINTS))
        elif step.what == "sync" and ".sqlite" in step.path.name:  # of a database that SQLite wrote
            self._trace.events.append(Event(step, sqlite=(step.path, _read(step.path), b""), is_safe=True))
        else:
            self._trace.events.append(Event(step))

    def say(self, line: str) -> None:
        if line.startswith("wound "):
            _, name, offset = line.split()
            self._trace.events.append(Event(None, wound=(self._path / name, int(offset))))
            return
        loose = self._loose() if line.startswith("done") else None
        self._trace.events.append(Event(None, line, loose=loose))

    def _keep(self, step: Step) -> None:
        """Which names were made through memdb/files.py, or were found."""
        if step.what in ("create", "make_folder"):
            self._known.add(step.path)
        elif step.what in ("unlink", "remove_folder"):
            self._known.discard(step.path)
        elif step.what == "replace" and step.target is not None:
            self._known.discard(step.path)
            self._known.add(step.target)

    def _discover(self, folder: Path) -> None:
        """Names in a folder of LanceDB's that came or went past memdb/files.py, as steps that nothing made safe."""
        derived = [self._path / name for name in DERIVED]
        if not any(folder == top or top in folder.parents for top in derived):
            return
        for above in (*reversed(folder.relative_to(self._path).parents[:-1]), folder.relative_to(self._path)):
            if self._path / above not in self._known and (self._path / above).is_dir():
                self._made_by_others(Step("make_folder", self._path / above))
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and path not in self._known:
                self._made_by_others(Step("create", path))
                self._made_by_others(Step("write", path, data=path.read_bytes()))
        for path in sorted(self._known):
            if path.parent == folder and not path.exists():
                self._made_by_others(Step("unlink", path))

    def _made_by_others(self, step: Step) -> None:
        self._keep(step)
        self._trace.events.append(Event(step))

    def _loose(self) -> dict[str, bytes]:
        found = {}
        for folder in DERIVED:
            for path in sorted((self._path / folder).rglob("*")):
                if path.is_file() and path not in self._known:
                    found[str(path.relative_to(self._path))] = path.read_bytes()
        return found


STORE = "house/s.memdb"  # in a folder that is made with it


def record(root: Path, ops: Sequence[Op], start: int = 0) -> Trace:
    """Run a script on the store in the folder `root`, where nothing else is, from operation `start` on."""
    trace = Trace(root, STORE, ops, start)
    trace.base = Folder.of(root, without=(f"{CATALOG}-shm",))
    recorder = Recorder(trace)
    with watched(recorder), Runner(root / STORE, recorder.say) as runner:
        runner.run(ops, start)
    return trace


class Player:
    """Goes through a trace, and writes directories as a power cut after each event would leave them."""

    def __init__(self, trace: Trace, ignored: str = "") -> None:
        self._trace = trace
        self._path = trace.root / trace.store
        self._ignored = ignored
        self._shadow = Shadow(trace.root, _copy(trace.base), ignored)
        self._loose: dict[str, bytes] = {}
        self.at = 0  # events that were made

    def step(self) -> Event:
        """Let the next event happen."""
        event = self._trace.events[self.at]
        self.at += 1
        if event.step is not None:
            self._shadow.see(event.step)
        if event.sqlite is not None:
            ignored = event.step is not None and event.step.name == self._ignored
            self._see_sqlite(*event.sqlite, is_safe=event.is_safe and not ignored)
        if event.wound is not None:
            self._wound(*event.wound)
        if event.loose is not None:
            self._loose = event.loose
        return event

    def crash(self, target: Path, cut: str, seed: object) -> None:
        """Write what is left into the folder `target`, which stands for the one that holds the store."""
        chance = random.Random(f"{seed}")
        Crash(CUTS[cut], chance).write(self._shadow.top, target)
        store = target / self._trace.store
        for wal in sorted(store.glob("*-wal")):
            what = chance.random()
            if what < _WAL_LOST:
                wal.unlink()
            elif what < _WAL_LOST + _WAL_CUT:
                os.truncate(wal, chance.randint(0, wal.stat().st_size))
        if store.is_dir():
            for name, content in self._loose.items():
                _write_loose(store / name, content, chance)

    def _wound(self, path: Path, offset: int) -> None:
        folder = self._shadow.folder(path.parent)
        node = folder.current.get(path.name) if folder is not None else None
        assert isinstance(node, Inode)
        assert not node.pending
        node.durable = node.durable[:offset] + WOUND + node.durable[offset + len(WOUND) :]

    def _see_sqlite(self, path: Path, database: bytes, wal: bytes, *, is_safe: bool) -> None:
        folder = self._shadow.folder(path.parent)
        assert folder is not None
        node = folder.current.get(path.name)
        if not isinstance(node, Inode):  # SQLite made it
            node = Inode()
            folder.change((path.name, node))
        if not is_safe:
            if not node.durable:  # it is being made: what SQLite wrote may have come through, up to some byte
                node.pending = [(0, database)]
            return
        node.durable, node.pending = database, []
        # SQLite makes the name of a WAL safe with its first sync. One that it empties may be back after a power
        # cut: with what is in the database already, which changes nothing.
        name = wal_of(path).name
        folder.durable[name] = folder.current[name] = Inode(wal)


def wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


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
