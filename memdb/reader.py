"""Reading slices: in offset order, by a few threads, into one reused buffer, each verified.

Slices that lie side by side in a file are read by one `preadv`, each straight to its place in the order that
was asked for, so that n slices of one kind are one (n, raw_bytes) array without a copy. Damage is an answer
here, never an exception: the query goes on with what is whole.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from memdb.codecs.planes import element_bytes, unpack
from memdb.schemas.errors import CodecError, CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.schemas.units import Bytes
from memdb.segments import OpenSegment, reading
from memdb.store import Store

logger = logging.getLogger(__name__)

Preadv = Callable[[int, Sequence[memoryview], int], int]
_ALIGNMENT_BYTES = 64
_RUN_BYTES_MAX = 4 << 20  # of one preadv, so that threads share a long run
_RUN_SLICES_MAX = 500  # below IOV_MAX with a piece of padding between each two
RAW_BYTES_MAX = 1 << 30  # of one slice; a row that claims more is damaged


@dataclass(frozen=True)
class BadSlice:
    """A slice that could not be served."""

    index: int  # in the order asked for
    file: str  # relative to the store
    recording_id: str
    unit: int
    block: int
    layer: int
    reason: str


@dataclass(frozen=True, eq=False)
class SliceBatch:
    """The slices of one read, before compression, in the order asked for.

    All views end with the next read of the same reader: it reuses the buffer.
    """

    buffer: Bytes
    starts: npt.NDArray[np.int64]  # (n,) bytes into the buffer, aligned to 64
    raw_bytes: npt.NDArray[np.int64]  # (n,)
    bad: list[BadSlice]
    bytes_read: int  # from files
    read_s: float

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        """(n,) which slices are what was written. The bytes of the others are zero."""
        mask = np.ones(len(self), bool)
        mask[[slice_.index for slice_ in self.bad]] = False
        return mask

    def raw(self, index: int) -> Bytes:
        """(raw_bytes,) of one slice. Raises CorruptionError for a bad one."""
        for slice_ in self.bad:
            if slice_.index == index:
                raise CorruptionError(f"{slice_.file}: {slice_.reason}", file=slice_.file)
        start = int(self.starts[index])
        return self.buffer[start : start + int(self.raw_bytes[index])]

    def stacked(self, first: int = 0, last: int | None = None) -> Bytes:
        """(n, raw_bytes) view of all slices, or of those from `first` to before `last`; no copy.

        They must be of one size. Rows of bad slices are zero: leave them out by `whole`.
        """
        starts, sizes = self.starts[first:last], self.raw_bytes[first:last]
        if not len(starts):
            return np.zeros((0, 0), np.uint8)
        size = int(sizes[0])
        if (sizes != size).any():
            raise ValueError("slices of different sizes cannot be stacked")
        stride = -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        start = int(starts[0])
        return self.buffer[start : start + len(starts) * stride].reshape(len(starts), stride)[:, :size]


@dataclass(frozen=True)
class _Run:
    """Slices that lie side by side in one file, up to padding: their places in the order asked for."""

    segment: OpenSegment
    members: list[int]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is read where to: one entry a slice, in the order asked for."""

    offsets: list[int]  # bytes from the start of the file
    stored_bytes: list[int]
    raw_bytes: list[int]
    xxh3: list[int]
    starts: list[int]  # in the buffer, of the slice before compression
    scratch_starts: list[int]  # in the scratch buffer, of a compressed slice
    element_bytes: list[int]

    def compressed(self, index: int) -> bool:
        return self.stored_bytes[index] < self.raw_bytes[index]


class SliceReader:
    """Reads slices of one store. One read at a time; several readers may share a store."""

    def __init__(
        self,
        store: Store,
        *,
        threads: int = 4,
        preadv: Preadv = os.preadv,
        delay_s: float = 0.0,
        allocate: Callable[[int], Bytes] | None = None,
    ) -> None:
        """`delay_s` is slept before each `preadv`; `allocate` gives the buffer (pinned memory, say)."""
        self._store = store
        self._preadv = preadv
        self._delay_s = delay_s
        self._allocate = allocate or _new_buffer
        self._buffer = np.zeros(0, np.uint8)
        self._scratch = np.zeros(0, np.uint8)
        self._element_bytes: dict[str, int] = {}
        self._thread_count = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="memdb-read")
        self._lock = threading.Lock()

    def close(self) -> None:
        self._threads.shutdown()

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, wanted: Sequence[tuple[UnitRow, npt.NDArray[np.intp]]]) -> SliceBatch:
        """Read slices: of each unit those whose numbers in `row.slices` are given.

        The order asked for is kept. Missing files, short reads and errors of the system become bad slices.
        """
        with self._lock:
            return self._read(wanted)

    def _read(self, wanted: Sequence[tuple[UnitRow, npt.NDArray[np.intp]]]) -> SliceBatch:
        began_s = time.perf_counter()
        plan, starts, raw_bytes = self._plan(wanted)
        owners = [at for at, (_, indices) in enumerate(wanted) for _ in range(len(indices))]
        failed: list[tuple[int, str]] = []
        with ExitStack() as opened:
            segments = self._open(opened, wanted)
            runs = _runs(plan, [segments[wanted[owner][0].segment] for owner in owners], failed)
            bytes_read = 0
            for run_bytes, run_failed in self._map(plan, runs):
                bytes_read += run_bytes
                failed += run_failed
        bad = [_bad_slice(wanted, owners, index, reason) for index, reason in sorted(failed)]
        for slice_ in bad:
            start = plan.starts[slice_.index]
            self._buffer[start : start + plan.raw_bytes[slice_.index]] = 0
        for file, count in Counter(slice_.file for slice_ in bad).items():
            logger.warning("%s: %d of %d slices cannot be served", file, count, len(owners))
        return SliceBatch(self._buffer, starts, raw_bytes, bad, bytes_read, time.perf_counter() - began_s)

    def _map(self, plan: _Plan, runs: list[_Run]) -> list[tuple[int, list[tuple[int, str]]]]:
        """Read the runs, each thread a stretch of neighbours."""
        share = max(1, -(-len(runs) // self._thread_count))
        stretches = [runs[first : first + share] for first in range(0, len(runs), share)]
        if len(stretches) <= 1:
            return [self._read_run(plan, run) for run in runs]
        futures = [
            self._threads.submit(lambda stretch: [self._read_run(plan, run) for run in stretch], stretch)
            for stretch in stretches
        ]
        wait(futures)  # all of them: the files are closed afterwards, whatever one raised
        return [result for future in futures for result in future.result()]

    def _plan(
        self, wanted: Sequence[tuple[UnitRow, npt.NDArray[np.intp]]]
    ) -> tuple[_Plan, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        tables = [row.slices[indices] for row, indices in wanted]
        raw, stored = _column(tables, "raw_bytes"), _column(tables, "stored_bytes")
        if len(raw) and int(raw.max()) > RAW_BYTES_MAX:
            raise CorruptionError(f"a slice of {int(raw.max())} bytes cannot be", file="catalog.sqlite")
        room, scratch_room = _aligned(raw), np.where(stored < raw, _aligned(stored), 0)
        starts = np.cumsum(room) - room
        self._buffer = _grown(self._buffer, int(room.sum()), self._allocate)
        self._scratch = _grown(self._scratch, int(scratch_room.sum()), _new_buffer)
        offsets = [
            table["offset"].astype(np.int64) + row.payload_offset
            for table, (row, _) in zip(tables, wanted, strict=True)
            if len(table)
        ]
        sizes = [self._element_bytes_of(row) for row, indices in wanted for _ in range(len(indices))]
        plan = _Plan(
            np.concatenate(offsets).tolist() if offsets else [],
            stored.tolist(),
            raw.tolist(),
            [int(value) for table in tables for value in table["xxh3"].tolist()],
            starts.tolist(),
            (np.cumsum(scratch_room) - scratch_room).tolist(),
            sizes,
        )
        return plan, starts, raw

    def _element_bytes_of(self, row: UnitRow) -> int:
        """Of the recording, looked up once: it cannot change."""
        if row.recording_id not in self._element_bytes:
            spec = self._store.recording_by_id(row.recording_id).spec
            self._element_bytes[row.recording_id] = element_bytes(spec.recipe.codec, spec.dtype)
        return self._element_bytes[row.recording_id]

    def _open(
        self, opened: ExitStack, wanted: Sequence[tuple[UnitRow, npt.NDArray[np.intp]]]
    ) -> dict[str, OpenSegment | str]:
        """Segment name to the open file, or to why it cannot be opened."""
        segments: dict[str, OpenSegment | str] = {}
        for name in {row.segment for row, _ in wanted}:
            try:
                segments[name] = opened.enter_context(reading(self._store.segments_path, name))
            except CorruptionError as error:
                segments[name] = str(error)
        return segments

    def _read_run(self, plan: _Plan, run: _Run) -> tuple[int, list[tuple[int, str]]]:
        """Bytes read, and which slices failed for what reason."""
        targets: list[memoryview] = []
        ends: list[int] = []  # of each slice, bytes from the start of the run
        first = at = plan.offsets[run.members[0]]
        for index in run.members:
            if plan.offsets[index] > at:
                targets.append(memoryview(bytearray(plan.offsets[index] - at)))
            targets.append(self._target(plan, index))
            at = plan.offsets[index] + plan.stored_bytes[index]
            ends.append(at - first)
        try:
            done = self._read_into(run.segment.fd, targets, first)
        except OSError as error:
            if len(run.members) == 1:
                return 0, [(run.members[0], f"cannot be read: {error.strerror}")]
            # One bad sector must cost one slice, not its neighbours.
            each = [self._read_run(plan, _Run(run.segment, [index])) for index in run.members]
            return sum(size for size, _ in each), [item for _, items in each for item in items]
        failed = []
        for index, end in zip(run.members, ends, strict=True):
            reason = "the file ends before it" if end > done else self._check(plan, index)
            if reason:
                failed.append((index, reason))
        return done, failed

    def _target(self, plan: _Plan, index: int) -> memoryview:
        if plan.compressed(index):
            buffer, start = self._scratch, plan.scratch_starts[index]
        else:
            buffer, start = self._buffer, plan.starts[index]
        return buffer.data[start : start + plan.stored_bytes[index]]

    def _read_into(self, fd: int, targets: list[memoryview], offset: int) -> int:
        """Fill the targets from `offset` on; the bytes that the file had. Raises OSError."""
        done = 0
        while targets:
            if self._delay_s:
                time.sleep(self._delay_s)
            count = self._preadv(fd, targets, offset + done)
            if count == 0:
                break
            done += count
            while targets and count >= len(targets[0]):
                count -= len(targets.pop(0))
            if count:
                targets[0] = targets[0][count:]
        return done

    def _check(self, plan: _Plan, index: int) -> str:
        """Verify a slice and unpack it into its place. Returns what is wrong, "" if nothing is."""
        stored = self._target(plan, index)
        if xxhash.xxh3_64_intdigest(stored) != plan.xxh3[index]:
            return "its bytes differ from what was written"
        if plan.compressed(index):
            start, size = plan.starts[index], plan.raw_bytes[index]
            try:
                raw = unpack(np.frombuffer(stored, np.uint8), size, plan.element_bytes[index])
            except CodecError as error:
                return str(error)
            self._buffer[start : start + size] = raw
        return ""


def _runs(plan: _Plan, segments: list[OpenSegment | str], failed: list[tuple[int, str]]) -> list[_Run]:
    """Group the slices into runs, in the order of files and offsets; those without a file go to `failed`."""
    readable: list[tuple[int, int, int, OpenSegment]] = []
    for index, segment in enumerate(segments):
        if isinstance(segment, str):
            failed.append((index, segment))
        else:
            readable.append((segment.fd, plan.offsets[index], index, segment))
    runs: list[_Run] = []
    fd, end, run_bytes = -1, 0, 0
    for found_fd, offset, index, segment in sorted(readable, key=lambda item: item[:3]):
        size = plan.stored_bytes[index]
        beside = found_fd == fd and 0 <= offset - end < _ALIGNMENT_BYTES
        if not beside or run_bytes + size > _RUN_BYTES_MAX or len(runs[-1].members) == _RUN_SLICES_MAX:
            runs.append(_Run(segment, []))
            run_bytes = 0
        runs[-1].members.append(index)
        fd, end, run_bytes = found_fd, offset + size, run_bytes + size
    return runs


def _bad_slice(
    wanted: Sequence[tuple[UnitRow, npt.NDArray[np.intp]]], owners: list[int], index: int, reason: str
) -> BadSlice:
    row, indices = wanted[owners[index]]
    piece = row.slices[indices[index - owners.index(owners[index])]]
    block, layer = int(piece["block"]), int(piece["layer"])
    what = f"unit {row.number}, block {block}, layer {layer}: {reason}"
    return BadSlice(index, f"segments/{row.segment}", row.recording_id, row.number, block, layer, what)


def _column(tables: Sequence[npt.NDArray[np.void]], name: str) -> npt.NDArray[np.int64]:
    if not tables:
        return np.zeros(0, np.int64)
    return np.concatenate([table[name] for table in tables]).astype(np.int64)


def _aligned(size: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _grown(buffer: Bytes, size: int, allocate: Callable[[int], Bytes]) -> Bytes:
    """The buffer, or a larger one. Kept between reads: fresh pages cost more than the read itself."""
    return buffer if buffer.size >= size else allocate(size)


def _new_buffer(size: int) -> Bytes:
    """`size` bytes that begin at a multiple of 64."""
    spare = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    skip = -spare.ctypes.data % _ALIGNMENT_BYTES
    return spare[skip : skip + size]
