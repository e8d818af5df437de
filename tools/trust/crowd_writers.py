"""Those of a crowd who change the store: they write, forget, compact and copy."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from memdb.backup import backup
from memdb.captions import CaptionIndex
from memdb.compact import compact
from memdb.forget import forget
from memdb.index.page_writer import index_recording
from memdb.schemas.errors import MemdbError, StoreError, UnknownRecording
from memdb.store import Store, recording_digest
from memdb.writer import RecordingWriter
from tools.trust.crowd_log import Moments, life_of, stream_of
from tools.trust.crowd_worker import Worker
from tools.trust.model import reach_ns, running_hash
from tools.trust.runner import SEGMENT_BYTES_MAX
from tools.trust.units import ENCODER, UNIT_NS, Stream, make_unit, spec

UNITS_MAX = 120  # of a recording before it is forgotten as a whole, so that the store has one size at last
_PAUSE_S = 0.15
_TEND_PAUSE_S = 1.0
_COPY_PAUSE_S = 5.0


def write(worker: Worker) -> None:
    """One recording after another of one name: each goes on until somebody forgets it."""
    name, life = f"camera{worker.found.role[-1]}", 0
    with Store.open(worker.path, write=True) as store:
        captions = CaptionIndex(store.path)
        while worker.goes_on:
            with worker.operation("writer"):
                writer = store.writer(
                    spec(stream_of(worker.seed, name, life)), segment_bytes_max=SEGMENT_BYTES_MAX
                )
            _Writing(worker, store, captions, writer, stream_of(worker.seed, name, life)).run()
            life += 1


class _Writing:
    def __init__(
        self,
        worker: Worker,
        store: Store,
        captions: CaptionIndex,
        writer: RecordingWriter,
        stream: Stream,
    ) -> None:
        self._worker, self._store, self._captions = worker, store, captions
        self._writer, self._stream = writer, stream
        self._name = (stream.name, stream.life)

    def run(self) -> None:
        """Until the time is over or the recording is forgotten."""
        try:
            while self._worker.goes_on:
                if self._writer.next_unit < 2 * UNITS_MAX:
                    self._once()
                else:  # it is due to be forgotten
                    self._unless_forgotten(self._writer.tombstones)
                time.sleep(self._worker.random.random() * _PAUSE_S)
        except _Forgotten:
            pass
        finally:
            self._writer.close()

    def _once(self) -> None:
        worker = self._worker
        with worker.operation("append"):
            self._unless_forgotten(self._append)
        if worker.random.random() < 0.1:
            with worker.operation("state"):
                self._unless_forgotten(self._save)
        if worker.random.random() < 0.2:
            with worker.operation("pages"):
                self._unless_forgotten(self._index_pages)
        if worker.random.random() < 0.05:
            with worker.operation("captions"):
                self._captions.index_captions(self._store, ENCODER, flush=True)

    def _unless_forgotten(self, step: Callable[[], object]) -> None:
        try:
            step()
        except MemdbError as error:
            life = self._worker.log.now()[self._name]
            if life.is_going and isinstance(error, StoreError | UnknownRecording):
                raise _Forgotten from error
            raise

    def _append(self) -> None:
        first = self._writer.next_unit
        count = self._worker.random.randint(1, 4)
        self._worker.log.say("will append", *self._name, first + count)
        seen = len(self._writer.tombstones())
        self._writer.append(
            [make_unit(self._stream, number) for number in range(first, first + count)], tombstones_seen=seen
        )
        self._worker.log.say("appended", *self._name, first + count)

    def _save(self) -> None:
        units, seen = self._writer.next_unit, len(self._writer.tombstones())
        payload = running_hash(self._stream, units)
        self._store.state(self._writer.recording.id).save(
            units, payload, reach_ns=reach_ns(units), tombstones=seen
        )
        self._worker.log.say("saved", *self._name, units, seen)

    def _index_pages(self) -> None:
        index_recording(self._store, self._writer.recording.id)


class _Forgotten(Exception):
    """Somebody forgot the whole recording."""


def tend(worker: Worker) -> None:
    """Forget spans, forget recordings that grew long, compact."""
    with Store.open(worker.path, write=True) as store:
        while worker.goes_on:
            time.sleep(worker.random.random() * _TEND_PAUSE_S)
            lives = [
                (key, life) for key, life in worker.log.now().items() if life.units > 4 and not life.is_going
            ]
            if lives:
                (name, number), life = worker.random.choice(lives)
                if life.units > UNITS_MAX:
                    worker.log.say("will forget all", name, number)
                    with worker.operation("forget all"):
                        forget(store, name)
                        worker.log.say("forgot all", name, number)
                else:
                    _forget_a_span(worker, store, name, number, life.units * UNIT_NS)
            if worker.random.random() < 0.4:
                with worker.operation("compact"):
                    compact(store, segment_bytes_max=SEGMENT_BYTES_MAX)


def _forget_a_span(worker: Worker, store: Store, name: str, life: int, end_ns: int) -> None:
    length_ns = 1 + worker.random.randrange(2 * UNIT_NS)
    start_ns = worker.random.randrange(end_ns - length_ns)
    worker.log.say("will forget", name, life, start_ns, start_ns + length_ns)
    with worker.operation("forget"):
        forget(store, name, start_ns=start_ns, end_ns=start_ns + length_ns)
        worker.log.say("forgot", name, life)


def back_up(worker: Worker) -> None:
    """Copy the store, and hold the copy to what was acknowledged before and begun by then."""
    number = 0
    while worker.goes_on:
        number += 1
        target = worker.folder / f"copy{number}"
        before = worker.log.now()
        with worker.operation("backup"):
            report = backup(worker.path, target)
            for problem in report.problems:
                worker.wrong(f"a backup found damage: {problem.file}: {problem.what}")
        after = worker.log.now()
        if target.exists():
            with worker.operation("look at the copy"):
                _look_at_copy(worker, target, Moments(before, after))
            shutil.rmtree(target)
        time.sleep(worker.random.random() * _COPY_PAUSE_S)


def _look_at_copy(worker: Worker, target: Path, moments: Moments) -> None:
    with Store.open(target) as store:
        rows = {(row.name, life_of(row.spec)): row for row in store.recordings()}
        for key, life in moments.items():
            if key not in rows:
                if not life.may_be_missing:
                    worker.wrong(f"the copy has no {key}")
            elif not life.may_be_there:
                worker.wrong(f"the copy has {key}, which was forgotten")
            elif recording_digest(store, key[0]) not in life.digests():
                worker.wrong(f"the copy of {key} holds something else, in {rows[key].units} units")
