"""Reading slices: in offset order, into one reused buffer, each verified, within a deadline.

Slices that lie side by side in a file are read by one `preadv`, each straight to its place, so that n slices of one
kind are one (n, raw_bytes) array without a copy. Damage is an answer here, never an exception: the query goes on
with what is whole. So is a disk that does not answer: what did not come by the deadline counts as bad, and neither
the thread that waits for it nor the buffer that it would write to is used again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

import numpy as np
import numpy.typing as npt

from memdb.codecs.layout import ALIGNMENT as ALIGNMENT_BYTES
from memdb.codecs.layout import aligned
from memdb.pieces import MISSING, Names, Pieces, renewed, wanted_pieces
from memdb.read_job import RWF_NOWAIT, Job, Preadv, ReadThreads, Runs, plan_runs
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.schemas.units import Bytes
from memdb.segments import OpenSegment, SegmentGone, reading
from memdb.slice_batch import BadSlice, SliceBatch, bad_slice
from memdb.store import Store

logger = logging.getLogger(__name__)

DEADLINE_S = 30.0
PINNED_MAX = 256  # files; one read may open as many again
_STUCK_MAX = 16  # threads left behind at a time: with so many, only the page cache is read
_CORES = os.cpu_count() or 1
# A second thread pays for its start from here on where everything lies in the page cache, if its runs are so long on
# average: over shorter ones threads wait for each other's Python more than they copy side by side.
_SHARE_BYTES = 4 << 20
_SHARE_RUN_BYTES = 64 << 10


class SliceReader:
    """Reads slices of one store. One read at a time; several readers may share a store."""

    def __init__(
        self,
        store: Store,
        *,
        threads: int = 4,
        preadv: Preadv = os.preadv,
        delay_s: float = 0.0,
        deadline_s: float = DEADLINE_S,
        allocate: Callable[[int], Bytes] | None = None,
    ) -> None:
        """`delay_s` is slept before each `preadv`; `allocate` gives the buffer (pinned memory, say).

        A read ends after `deadline_s`, whatever the disk does. Each thread that an earlier read left hanging halves
        that, so that all the reads of a question together wait for a dead disk at most twice as long.
        """
        self._store = store
        self._preadv = preadv
        self._delay_s = delay_s
        self._deadline_s = deadline_s
        # A test's own disk has no page cache that the caller may look into.
        self._cached_first = preadv is os.preadv and not delay_s and bool(RWF_NOWAIT)
        self._allocate = allocate or _new_buffer
        self._buffer = np.zeros(0, np.uint8)
        self._names = Names()
        self._threads = ReadThreads(threads)
        self._left: list[Job] = []  # of which threads were left behind in the kernel
        self._pinned: dict[str, OpenSegment] | None = None
        self._pins = ExitStack()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._threads.leave()

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep the files of the reads inside open: what one read found, the next ones find too.

        For the length of one question: a file that is open is not removed by a compaction. Of so many files that a
        process could not hold them, the earlier ones are let go.
        """
        if self._pinned is not None:
            yield
            return
        self._pinned = {}
        try:
            with self._pins:
                yield
        finally:
            self._pinned = None

    def read(self, wanted: Sequence[tuple[UnitRow, npt.NDArray[np.intp]]]) -> SliceBatch:
        """Read slices: of each unit those whose numbers in `row.slices` are given.

        The order asked for is kept. Missing files, short reads and errors of the system become bad slices.
        """
        return self.read_pieces(wanted_pieces(self._store, wanted, self._names))

    def read_pieces(self, pieces: Pieces) -> SliceBatch:
        """The same of slices whose places are known."""
        with self._lock:
            return self._read(pieces)

    def _read(self, pieces: Pieces) -> SliceBatch:
        began_s = time.perf_counter()
        with ExitStack() as own:
            if self._pinned is not None and len(self._pinned) > PINNED_MAX:
                self._pins.close()
                self._pinned.clear()
            opened = self._pinned if self._pinned is not None else {}
            pins = self._pins if self._pinned is not None else own
            files, refused = self._open(pieces, opened, pins)
            rows: list[UnitRow] = []
            if gone := [number for number, error in refused.items() if isinstance(error, SegmentGone)]:
                # Replaced since the rows were read, or lost: the catalog of this moment tells.
                pieces, rows = renewed(self._store, pieces, gone)
                files, refused = self._open(pieces, opened, pins)
            starts, raw_bytes = self._lay_out(pieces)
            failed = _refused(pieces, refused)
            job = self._job(pieces, starts, files, failed)
            if job is not None:
                self._run(job, began_s, failed)
        bad = self._bad(pieces, starts, failed) if failed else []
        read_bytes = job.bytes_read if job is not None else 0
        read_s = time.perf_counter() - began_s
        return SliceBatch(pieces, self._buffer, starts, raw_bytes, bad, read_bytes, read_s, rows)

    def _bad(
        self, pieces: Pieces, starts: npt.NDArray[np.int64], failed: list[tuple[int, str]]
    ) -> list[BadSlice]:
        bad = [bad_slice(pieces, index, reason) for index, reason in sorted(failed)]
        for slice_ in bad:
            start = int(starts[slice_.index])
            self._buffer[start : start + int(pieces.table["raw_bytes"][slice_.index])] = 0
        for file, count in Counter(slice_.file for slice_ in bad).items():
            logger.warning("%s: %d of %d slices cannot be served", file, count, len(pieces))
        return bad

    def _open(
        self, pieces: Pieces, opened: dict[str, OpenSegment], pins: ExitStack
    ) -> tuple[dict[int, int], dict[int, CorruptionError]]:
        """Of each file that is wanted the descriptor, or why it has none."""
        fds: dict[int, int] = {}
        refused: dict[int, CorruptionError] = {}
        for number in set(pieces.table["file"].tolist()):
            name = pieces.names.files[number].segment
            try:
                if number == MISSING:
                    raise CorruptionError("the catalog knows no place of it", file="catalog.sqlite")
                if name not in opened:
                    opened[name] = pins.enter_context(reading(self._store.segments_path, name))
                fds[number] = opened[name].fd
            except CorruptionError as error:
                refused[number] = error
        return fds, refused

    def _lay_out(self, pieces: Pieces) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each slice goes in the buffer, kind by kind, and its size there."""
        kinds, raw = pieces.table["kind"], pieces.table["raw_bytes"]
        if not len(kinds):
            return np.zeros(0, np.int64), raw
        if int(kinds.min()) == int(kinds.max()):
            stride = aligned(int(raw[0]))
            starts = np.arange(0, len(raw) * stride, stride) if stride else np.zeros(len(raw), np.int64)
            size = len(raw) * stride
        else:
            room = (raw + (ALIGNMENT_BYTES - 1)) & -ALIGNMENT_BYTES
            order = np.argsort(kinds, kind="stable")
            starts = np.empty(len(raw), np.int64)
            starts[order] = np.cumsum(room[order]) - room[order]
            size = int(room.sum())
        if self._buffer.size < size:  # kept between reads: fresh pages cost more than the read itself
            self._buffer = self._allocate(size)
        return starts, raw

    def _job(
        self,
        pieces: Pieces,
        starts: npt.NDArray[np.int64],
        fds: dict[int, int],
        failed: list[tuple[int, str]],
    ) -> Job | None:
        """What there is to read, None for nothing."""
        readable = None
        if failed:
            readable = np.setdiff1d(np.arange(len(pieces)), [index for index, _ in failed])
        if not len(pieces) or (readable is not None and not len(readable)):
            return None
        runs = plan_runs(pieces.table, starts, fds, readable)
        return Job(runs, self._buffer, self._preadv, self._delay_s)

    def _run(self, job: Job, began_s: float, failed: list[tuple[int, str]]) -> None:
        """Read the runs of a job: what is cached here, the rest in threads, until the deadline."""
        self._left = [left for left in self._left if left.held()]
        stuck = sum(left.held() for left in self._left)
        deadline_s = self._deadline_s / 2**stuck
        try:
            if self._cached_first:
                helpers = min(self._threads.count, _CORES - 1, _helpers(job.runs))
                if helpers > 0:
                    self._threads.put(job, helpers)
                job.take_cached(shared=helpers > 0)
            if job.todo and stuck < _STUCK_MAX:
                self._threads.put(job, min(self._threads.count, job.todo))
            if not job.todo or stuck < _STUCK_MAX:
                job.wait(began_s + deadline_s)
            if job.error is not None:
                raise job.error
        except BaseException:
            self._leave(job)
            raise
        if job.complete:
            failed += job.failed
        else:
            failed += self._late(job, f"the disk did not give it within {deadline_s:g} s")

    def _late(self, job: Job, reason: str) -> list[tuple[int, str]]:
        """Go on without the runs that are not finished: what the others brought moves to a new buffer."""
        finished, failed, buffer = bytes(job.finished), list(job.failed), self._buffer
        runs = job.runs
        self._leave(job)
        self._buffer = self._allocate(buffer.size)
        late = []
        for number, _, _, _, _, first, last in runs.runs:
            for index in range(first, last):
                if finished[number]:
                    start, end = runs.starts[index], runs.starts[index] + int(runs.raw_bytes[index])
                    self._buffer[start:end] = buffer[start:end]
                else:
                    late.append((runs.index(index), reason))
        known = {index for index, _ in late}
        return late + [item for item in failed if item[0] not in known]

    def _leave(self, job: Job) -> None:
        """Use neither the threads of a job nor its buffer again: some of them may still be in the kernel."""
        job.left = True
        self._left.append(job)
        self._threads.leave()
        self._buffer = np.zeros(0, np.uint8)


def _helpers(runs: Runs) -> int:
    """How many threads more than the caller's pay for a read from the page cache."""
    size = runs.length_bytes
    return size // _SHARE_BYTES if size >= len(runs) * _SHARE_RUN_BYTES else 0


def _refused(pieces: Pieces, refused: dict[int, CorruptionError]) -> list[tuple[int, str]]:
    """Slices of files that cannot be opened, by their place in the order asked for, and why."""
    return [
        (index, str(error))
        for number, error in refused.items()
        for index in np.flatnonzero(pieces.table["file"] == number).tolist()
    ]


def _new_buffer(size: int) -> Bytes:
    """`size` bytes that begin at a multiple of 64."""
    spare = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    skip = -spare.ctypes.data % ALIGNMENT_BYTES
    return spare[skip : skip + size]
