"""One read as runs of slices, each read by one `preadv` and verified while it is hot, by whoever takes it.

The caller takes what lies in the page cache and never waits for the disk; threads take the rest. A thread that the
kernel does not give back is left behind with its job, whose buffer nobody uses again.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from memdb.codecs.layout import ALIGNMENT as ALIGNMENT_BYTES
from memdb.codecs.planes import unpack
from memdb.schemas.errors import CodecError
from memdb.schemas.units import Bytes, Table

# Descriptor, buffers, offset: os.preadv, or a disk of a test's own.
Preadv = Callable[[int, Sequence[memoryview], int], int]
# Small enough that a run is still in the cache of the core that read it when it is hashed.
RUN_BYTES_MAX = 512 << 10
_SMALL = 32 << 10  # bytes that are copied as fast as they are asked for apart
_THROUGH = np.iinfo(np.int64).min  # no place: through a scratch
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # read what lies in the page cache, or fail at once


# Plain tuples, as they are made and walked for each slice of a question: its number, descriptor, offset and length in
# the file, place in the buffer (-1: through a scratch), its first slice and the one behind its last.
Run = tuple[int, int, int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class Runs:
    """Slices in the order of the files, and the runs that they make. Lists, as they are walked one by one.

    Where slices lie in the buffer as they lie in the file, a run is read straight to its place. Elsewhere (compressed
    slices, small ones in another order) it goes through a scratch of its own.
    """

    runs: list[Run]
    # of each slice
    offsets: list[int]  # bytes from the start of the file
    stored_bytes: list[int]
    xxh3: list[int]
    starts: list[int]  # bytes from the start of the buffer, of the slice before compression
    raw_bytes: npt.NDArray[np.int64]
    element_bytes: npt.NDArray[np.int64]
    indices: npt.NDArray[np.intp] | None  # in the order asked for, where that is another one
    length_bytes: int  # of all runs

    def __len__(self) -> int:
        return len(self.runs)

    def index(self, slice_: int) -> int:
        """Of a slice in the order of the files, its place in the order asked for."""
        return slice_ if self.indices is None else int(self.indices[slice_])


def plan_runs(
    table: Table,
    starts: npt.NDArray[np.int64],
    fds: Mapping[int, int],
    readable: npt.NDArray[np.intp] | None = None,
) -> Runs:
    """The runs of a PIECE_DTYPE table. `fds`: of each file number. `readable`: the rows to read, None for all."""
    indices = readable
    if indices is not None:
        table, starts = table[indices], starts[indices]
    if not _in_file_order(table):
        order = np.lexsort((table["offset"], table["file"]))
        table, starts = table[order], starts[order]
        indices = order if indices is None else indices[order]
    runs = _join(table, np.where(table["stored_bytes"] == table["raw_bytes"], starts, -1), fds)
    return Runs(
        runs,
        table["offset"].tolist(),
        table["stored_bytes"].tolist(),
        table["xxh3"].tolist(),
        starts.tolist(),
        table["raw_bytes"],
        table["element_bytes"],
        indices,
        sum([run[3] for run in runs]),
    )


def _in_file_order(table: Table) -> bool:
    file, offset = table["file"], table["offset"]
    behind = offset[1:] >= offset[:-1] + table["stored_bytes"][:-1]
    return bool(((file[1:] > file[:-1]) | ((file[1:] == file[:-1]) & behind)).all())


def _join(table: Table, places: npt.NDArray[np.int64], fds: Mapping[int, int]) -> list[Run]:
    """The runs of slices in the order of the files. places: where each goes as it is read, -1 for a compressed one."""
    file, offset = table["file"], table["offset"].astype(np.int64)
    end = offset + table["stored_bytes"].astype(np.int64)
    gap = offset[1:] - end[:-1]
    near = (file[1:] == file[:-1]) & (gap >= 0) & (gap < ALIGNMENT_BYTES)
    # Of the same shift: they lie in the buffer as they lie in the file.
    shift = np.where(places >= 0, places - offset, _THROUGH)
    joined = near & (shift[1:] == shift[:-1])
    chains = np.concatenate(([0], np.cumsum(~joined)))
    reach = end - offset[np.concatenate(([0], np.flatnonzero(~joined) + 1))][chains]
    part = (reach - 1) // RUN_BYTES_MAX
    joined &= part[1:] == part[:-1]
    firsts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    lasts = np.concatenate((firsts[1:], [len(file)]))
    begins, ends = offset[firsts], end[lasts - 1]
    numbers = [fds[number] for number in file[firsts].tolist()]
    columns = (begins, ends - begins, places[firsts], firsts, lasts)
    runs = list(zip(range(len(firsts)), numbers, *(column.tolist() for column in columns), strict=True))
    if (near[firsts[1:] - 1] & (ends[1:] - begins[:-1] <= _SMALL)).any():
        runs = _join_small(runs, near.tolist())
    return runs


def _join_small(runs: list[Run], near: list[bool]) -> list[Run]:
    """Little that lies side by side in a file is one run, through a scratch, wherever it goes in the buffer."""
    found: list[Run] = []
    for _, fd, offset, length, place, first, last in runs:
        if found and near[first - 1] and offset + length - found[-1][2] <= _SMALL:
            number, _, begin, _, _, before, _ = found[-1]
            found[-1] = (number, fd, begin, offset + length - begin, -1, before, last)
        else:
            found.append((len(found), fd, offset, length, place, first, last))
    return found


class Left(Exception):
    """The job was left behind while this thread was in the kernel."""


class Job:
    """The runs of one read."""

    def __init__(self, runs: Runs, buffer: Bytes, preadv: Preadv, delay_s: float) -> None:
        self.runs = runs
        self.finished = bytearray(len(runs))
        self.failed: list[tuple[int, str]] = []  # index in the order asked for, and why
        self.error: BaseException | None = None
        self.left = False
        self.idle: queue.SimpleQueue[None] = (
            queue.SimpleQueue()
        )  # one for each thread that found nothing to take
        self._view = buffer.data
        self._preadv, self._delay_s = preadv, delay_s
        self._todo = deque(runs.runs)
        self._held = bytearray(len(runs))  # by a thread just now

    @property
    def complete(self) -> bool:
        """Whether every run is finished, or nobody goes on after an error."""
        return 0 not in self.finished or self.error is not None

    @property
    def bytes_read(self) -> int:
        """From files, of the slices that are whole."""
        bad = {index for index, _ in self.failed}
        if not bad:
            return self.runs.length_bytes
        sizes = enumerate(self.runs.stored_bytes)
        return sum(size for slice_, size in sizes if self.runs.index(slice_) not in bad)

    @property
    def todo(self) -> int:
        """Runs that nobody took yet."""
        return len(self._todo)

    def held(self) -> int:
        """Runs that threads are at: in the kernel, where they do not come back from them."""
        return sum(self._held)

    def wait(self, until_s: float) -> None:
        """Wait until every run is finished, or until that moment of `time.perf_counter`."""
        while not self.complete and (left_s := until_s - time.perf_counter()) > 0:
            with suppress(queue.Empty):
                self.idle.get(timeout=left_s)

    def take_cached(self, *, shared: bool) -> None:
        """Take runs until one is not in the page cache. Never waits for the disk.

        `shared`: threads take runs of this job at the same time.
        """
        missed = self._take(self._popped() if shared else iter(self.runs.runs), RWF_NOWAIT)
        if not shared:
            self._todo = deque() if missed is None else deque(self.runs.runs[missed[0] :])
        elif missed is not None:
            self._todo.appendleft(missed)

    def take(self) -> None:
        """Take runs until none is left, waiting for the disk. For threads."""
        try:
            if self._preadv is os.preadv and not self._delay_s:
                self._take(self._popped(), 0)
            else:
                for run in self._popped():
                    self._read(run, self._target(run), run[5], run[6])
                    self.finished[run[0]] = 1
        except Left:
            pass
        except BaseException as error:
            self.error = error
        self.idle.put(None)

    def _popped(self) -> Iterator[Run]:
        """Runs that nobody else takes."""
        while not self.left:
            try:
                run = self._todo.popleft()
            except IndexError:
                return
            self._held[run[0]] = 1
            try:
                yield run
            finally:
                self._held[run[0]] = 0

    def _take(self, order: Iterator[Run], flags: int) -> Run | None:
        """Read runs and verify them. With `flags`, up to one that is not read at once, which is returned."""
        view, preadv, finished, xxh3 = self._view, os.preadv, self.finished, self.runs.xxh3
        for run in order:
            number, fd, offset, length, place, first, last = run
            target = view[place : place + length] if place >= 0 else memoryview(bytearray(length))
            try:
                done = preadv(fd, (target,), offset, flags)
            except OSError:  # an error, nothing in the page cache, or a file system that does not look there
                done = -1
            if done != length:
                if flags:
                    return run
                self._read(run, target, first, last)
            # The ordinary case of `_settle`, without the call.
            elif place < 0 or last - first > 1 or xxh3_64_intdigest(target) != xxh3[first]:
                self._settle(run, target, first, last, length)
            finished[number] = 1
        return None

    def _target(self, run: Run) -> memoryview:
        _, _, _, length, place, _, _ = run
        return self._view[place : place + length] if place >= 0 else memoryview(bytearray(length))

    def _read(self, run: Run, target: memoryview, first: int, last: int) -> None:
        """Read and settle some slices of a run into their part of its target."""
        offsets, fd, begin = self.runs.offsets, run[1], run[2]
        start, end = offsets[first] - begin, offsets[last - 1] + self.runs.stored_bytes[last - 1] - begin
        try:
            done = self._fill(fd, target[start:end], begin + start)
        except OSError as error:
            if last - first == 1:
                self._fail(first, f"cannot be read: {error.strerror}")
                return
            for index in range(first, last):  # one bad sector must cost one slice, not its neighbours
                self._read(run, target, index, index + 1)
        else:
            self._settle(run, target, first, last, start + done)

    def _fill(self, fd: int, target: memoryview, offset: int) -> int:
        """Fill the target from `offset` on; the bytes that the file had. Raises OSError, Left."""
        done = 0
        while done < len(target):
            if self._delay_s:
                time.sleep(self._delay_s)
            if self.left:
                raise Left
            count = self._preadv(fd, [target[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def _settle(self, run: Run, target: memoryview, first: int, last: int, end: int) -> None:
        """Verify slices of a run in its target, which is filled up to `end`, and bring them to their places."""
        runs = self.runs
        _, _, begin, _, place, _, _ = run
        for index in range(first, last):
            at, size = runs.offsets[index] - begin, runs.stored_bytes[index]
            if at + size > end:
                self._fail(index, "the file ends before it")
            elif xxh3_64_intdigest(target[at : at + size]) != runs.xxh3[index]:
                self._fail(index, "its bytes differ from what was written")
            elif place < 0:
                self._bring(index, target[at : at + size])

    def _bring(self, index: int, stored: memoryview) -> None:
        """A slice from a scratch to its place, unpacked where it is compressed."""
        start, size = self.runs.starts[index], int(self.runs.raw_bytes[index])
        if len(stored) == size:
            self._view[start : start + size] = stored
            return
        try:
            raw = unpack(np.frombuffer(stored, np.uint8), size, int(self.runs.element_bytes[index]))
        except CodecError as error:
            self._fail(index, str(error))
        else:
            self._view[start : start + size] = raw.data

    def _fail(self, index: int, reason: str) -> None:
        self.failed.append((self.runs.index(index), reason))


class ReadThreads:
    """A few threads that take runs of jobs. They start when first needed, and end with `leave` or with this object.

    They are daemons: one that hangs in the kernel does not hold up the end of the process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._inbox: queue.SimpleQueue[Job | None] | None = None
        self._ending: weakref.finalize[..., ReadThreads] | None = None

    def put(self, job: Job, threads: int) -> None:
        """Let so many threads take runs of a job."""
        if self._inbox is None:
            self._inbox = queue.SimpleQueue()
            for _ in range(self.count):
                threading.Thread(target=_work, args=(self._inbox,), name="memdb-read", daemon=True).start()
            self._ending = weakref.finalize(self, _end, self._inbox, self.count)
        for _ in range(threads):
            self._inbox.put(job)

    def leave(self) -> None:
        """Let the threads end, those in the kernel once it gives them back. The next job gets new ones."""
        if self._ending is not None:
            self._ending()
        self._inbox = self._ending = None


def _work(inbox: queue.SimpleQueue[Job | None]) -> None:
    while (job := inbox.get()) is not None:
        job.take()
        del job  # and with it the buffer


def _end(inbox: queue.SimpleQueue[Job | None], count: int) -> None:
    for _ in range(count):
        inbox.put(None)
