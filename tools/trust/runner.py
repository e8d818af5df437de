"""Runs operations against a real store, and says what was acknowledged once the call returned.

It stands for an ingest without a model: it appends units that follow from a seed and their number, saves
states that hold a running hash of everything so far, and when it goes on after a death it replays from the
last whole state and compares with the digests of first writing, as `ingest/run.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from memdb import files
from memdb.database import CATALOG
from memdb.digest import unit_digest
from memdb.files import Step, Watch, watched
from memdb.forget import forget
from memdb.index.page_writer import index_recording
from memdb.policy import Age, Policy
from memdb.schemas.errors import UnknownRecording, UsageError
from memdb.schemas.recording import Tombstone
from memdb.sealed import FORGOTTEN_DIGEST
from memdb.store import Store
from memdb.writer import RecordingWriter
from tools.trust.model import WINDOW_UNITS, reach_ns, running_hash
from tools.trust.script import AGEING, OPEN_END, Op
from tools.trust.units import ENCODER, STARTED_NS, UNIT_NS, Stream, make_unit, marks, spec

Say = Callable[[str], None]
NOW_NS = STARTED_NS + 400 * 86_400 * 1_000_000_000  # the wall clock of whoever ages: every unit is old enough
POLICIES = {
    1: Policy(store_bytes_max=1 << 40),
    AGEING: Policy(ages=(Age(86_400 * 1_000_000_000, captions_only=True),)),
}
WOUND = bytes(range(96))
SEGMENT_BYTES_MAX = 12_000  # some four units: scripts roll over into the next segment often


class Diverged(Exception):
    """What was written first is not what comes out now."""


class Failed(Exception):
    """A call returned, and said that it did not do what it is for."""


class _Death(Exception):
    """Stands for kill -9 of a writer in this process."""


class _DiesAt:
    """A Watch that raises before a sync, after another Watch had its turn."""

    def __init__(self, why: str) -> None:
        self._why = why

    def before(self, step: Step) -> None:
        if step.name == self._why:
            raise _Death(self._why)

    def after(self, step: Step) -> None:
        pass


@contextmanager
def also_watched(watch: Watch) -> Iterator[None]:
    """Let `watch` see every step besides the Watch that looks on already."""
    first = files._watch
    with watched(_Both(first, watch) if first is not None else watch):
        yield


class _Both:
    def __init__(self, first: Watch, second: Watch) -> None:
        self._watches = (first, second)

    def before(self, step: Step) -> None:
        for watch in self._watches:
            watch.before(step)

    def after(self, step: Step) -> None:
        for watch in self._watches:
            watch.after(step)


class Runner:
    """A store and its writers, kept open from one operation to the next as a long ingest does."""

    def __init__(self, path: Path, say: Say = lambda line: None) -> None:
        self.path = path
        self._say = say
        self._store: Store | None = None
        self._writers: dict[str, RecordingWriter] = {}
        self.left: list[str] = []  # what the last compaction could not remove, as it says
        self._graves: list[object] = []  # their connections stay open: closing would empty the WAL

    def run(self, ops: Sequence[Op], start: int = 0) -> None:
        """`begin I` before an operation, `done I` after it, `unit NAME LIFE NUMBER DIGEST` for each unit."""
        for index in range(start, len(ops)):
            self._say(f"begin {index}")
            self.do(ops[index])
            self._say(f"done {index}")

    def do(self, op: Op) -> None:
        method: Callable[[Op], None] = getattr(self, f"_{op.kind}")
        method(op)

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = Store.open(self.path, create=True, write=True)
        return self._store

    def _close_writers(self) -> None:
        for name in list(self._writers):
            self._writers.pop(name).close()

    def close(self) -> None:
        self._close_writers()
        if self._store is not None:
            self._store.close()
            self._store = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()

    # One method an operation

    def _append(self, op: Op) -> None:
        stream = _stream(op)
        writer = self._writer(stream)
        seen = len(writer.tombstones())
        units = [make_unit(stream, number) for number in range(writer.next_unit, op.first + op.count)]
        if units:
            writer.append(units, tombstones_seen=seen)
        for unit in units:
            self._say(f"unit {stream.name} {stream.life} {unit.number} {unit_digest(unit).hex()}")

    def _die(self, op: Op) -> None:
        """An append in which the writer dies before a sync: what it wrote stays with the system, unsafe."""
        try:
            with also_watched(_DiesAt(op.why)):
                self._append(op)
        except _Death:
            self._abandon()
        self._append(op)

    def _abandon(self) -> None:
        """As a killed process leaves its files: locks are free, SQLite's WAL stays as it is."""
        for writer in self._writers.values():
            writer._file_lock.close()
            if writer._segment is not None:
                writer._segment.close()
        self._graves += [*self._writers.values(), self._store]
        self._writers, self._store = {}, None

    def _begin(self, op: Op) -> None:
        self._epoch(op)

    def _state(self, op: Op) -> None:
        stream = _stream(op)
        writer = self._writer(stream)
        tombstones = writer.tombstones()
        units = writer.next_unit
        payload = running_hash(stream, units) + _window(stream, units, tombstones)
        states = self.store.state(writer.recording.id)
        states.save(units, payload, reach_ns=reach_ns(units), tombstones=len(tombstones))

    def _gap(self, op: Op) -> None:
        writer = self._writer(_stream(op))
        start_ns = writer.next_unit * UNIT_NS
        writer.gap(start_ns, start_ns + 1000, "dark")

    def _epoch(self, op: Op) -> None:
        writer = self._writer(_stream(op))
        row = self.store.recording_by_id(writer.recording.id)
        if all(epoch.first_unit != writer.next_unit for epoch in row.epochs):
            writer.epoch(len(row.epochs), writer.next_unit, "a fresh window")

    def _end(self, op: Op) -> None:
        writer = self._writer(_stream(op))
        writer.end(writer.next_unit * UNIT_NS)

    def _close(self, op: Op) -> None:
        writer = self._writers.pop(_stream(op).name, None)
        if writer is not None:
            writer.close()

    def _reopen(self, op: Op) -> None:
        self.close()
        _ = self.store

    def _pages(self, op: Op) -> None:
        writer = self._writer(_stream(op))
        index_recording(self.store, writer.recording.id, flush=True)

    def _captions(self, op: Op) -> None:
        from memdb.captions import CaptionIndex

        CaptionIndex(self.store.path).index_captions(self.store, ENCODER, flush=True)

    def _forget(self, op: Op) -> None:
        end_ns = None if op.end_ns == OPEN_END else op.end_ns
        forget(self.store, _stream(op).name, start_ns=op.start_ns, end_ns=end_ns, now_ns=1)

    def _forget_all(self, op: Op) -> None:
        self._close(op)
        with suppress(UnknownRecording):  # it was under way when the process died, and had come through
            forget(self.store, _stream(op).name, now_ns=1)

    def _compact(self, op: Op) -> None:
        """With `count`, beside writers that are open; else alone, so that nothing is left behind."""
        from memdb.compact import compact

        if not op.count:
            self._close_writers()
        report = compact(self.store, now_ns=NOW_NS, age_now=True, segment_bytes_max=SEGMENT_BYTES_MAX)
        self.left = [*report.left, *(what for done in report.recordings for what in done.left)]

    def _repair(self, op: Op) -> None:
        from memdb.repair import repair

        self.close()
        report = repair(self.path)
        if report.spans:
            raise Failed(f"repair of a whole store found damage: {[str(span) for span in report.spans]}")

    def _wound(self, op: Op) -> None:
        """Damage the end of a unit's record, where it says what it is; then repair a store that nobody closed."""
        from memdb.repair import repair

        stream = _stream(op)
        self._writer(stream)
        recording = self.store.recording(stream.name)
        if op.first < recording.units:  # else it is a stub that goes on, and it is done
            row = self.store.unit(recording.id, op.first)
            path = self.store.segments_path / row.segment
            offset = row.offset + row.length - len(WOUND)
            if row.parts and _read(path, offset, len(WOUND)) != WOUND:
                self._damage(path, offset)
        if op.count:
            self.store.catalog.database.checkpoint()  # a WAL that holds the first page would make good the damage
            self._damage(self.path / CATALOG, 0)
        self._abandon()
        repair(self.path)

    def _damage(self, path: Path, offset: int) -> None:
        """Bytes that change on the disk without anybody's doing."""
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(WOUND)
        self._say(f"wound {path.relative_to(self.path)} {offset}")

    def _policy(self, op: Op) -> None:
        from memdb.clock import set_policy

        set_policy(self.store, POLICIES[op.count], now_ns=NOW_NS)

    def _backup(self, op: Op) -> None:
        from memdb.backup import backup

        target = self.path.with_name(op.why)
        if target.exists() and any(target.iterdir()):
            return  # it was under way when the process died, and had come through
        report = backup(self.path, target)
        if report.problems:
            raise Failed(f"a backup of a whole store found damage: {report.problems}")

    def _export(self, op: Op) -> None:
        from memdb.transfer import export_recording

        if not self.path.with_name(op.why).exists():
            export_recording(self.path, _stream(op).name, self.path.with_name(op.why))

    def _import(self, op: Op) -> None:
        """A recording by way of a file into the same store under another name."""
        from memdb.transfer import export_recording, import_recording

        file = self.path.with_name("recording.memdb-export")
        with suppress(UsageError):  # the name is taken: it had come through before the process died
            export_recording(self.path, _stream(op).name, file)
            import_recording(self.store, file, recording=op.why)
        file.unlink(missing_ok=True)

    def _writer(self, stream: Stream) -> RecordingWriter:
        writer = self._writers.get(stream.name)
        if writer is None:
            writer = self.store.writer(spec(stream), segment_bytes_max=SEGMENT_BYTES_MAX)
            self._writers[stream.name] = writer
            self._replay(stream, writer)
        return writer

    def _replay(self, stream: Stream, writer: RecordingWriter) -> None:
        """From the last whole state to the watermark: everything must come out as it was first written."""
        row = writer.recording
        found = self.store.state(row.id).load_latest(
            row.spec.encoding_fingerprint, writer.next_unit, row.tombstones
        )
        if found is not None and found.payload[:16] != running_hash(stream, found.unit):
            raise Diverged(f"the state of unit {found.unit} of {row.name} is another")
        for number in range(found.unit if found else 0, writer.next_unit):
            first = self.store.unit(row.id, number).first_digest
            if first not in (FORGOTTEN_DIGEST, unit_digest(make_unit(stream, number))):
                raise Diverged(f"unit {number} of {row.name} came out otherwise than at first")


def _read(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _stream(op: Op) -> Stream:
    assert op.stream is not None, op
    return op.stream


def _window(stream: Stream, units: int, tombstones: Sequence[Tombstone]) -> bytes:
    """The marks of the last units: what an encoder's window holds of them, without what was forgotten."""
    whole = [
        make_unit(stream, number)
        for number in range(max(0, units - WINDOW_UNITS), units)
        if not any(dead.covers(number, number * UNIT_NS, (number + 1) * UNIT_NS) for dead in tombstones)
    ]
    return b"".join(mark for unit in whole for mark in marks(unit, stream).values())
