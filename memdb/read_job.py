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

# With flags in the fourth place, as os.preadv takes them.
Preadv = Callable[[int, Sequence[memoryview], int], int]
# Small enough that a run is still in the cache of the core that read it when it is hashed.
RUN_BYTES_MAX = 512 << 10
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # read what lies in the page cache, or fail at once


# Plain tuples, as they are made and walked for each slice of a question: its number, descriptor, offset and length in
# the file, place in the buffer (-1: through a scratch), its first slice and the one behind its last.
Run = tuple[int, int, int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class Runs:
    """Slices in the order of the files, and the runs that they make. Lists, as they are walked one by one.

    Where slices lie in the buffer as they lie in the file, runs are read straight to their places. Elsewhere
    (compressed slices, another order) each goes through a scratch of its own.
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

    def __len__(self) -> int:
        return len(self.runs)

    def index(self, slice_: int) -> int:
        """Of a slice in the order of the files, its place in the order asked for."""
        return slice_ if self.indices is None else int(self.indices[slice_])

    @property
    def length_bytes(self) -> int:
        return sum(run[3] for run in self.runs)


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
    # The ordinary case: the order asked for is the order of the files, and nothing is compressed.
    offsets, sizes, places = table["offset"].tolist(), table["stored_bytes"].tolist(), starts.tolist()
    runs = None
    if sizes == table["raw_bytes"].tolist():
        runs = _walk(table["file"].tolist(), offsets, sizes, places, fds, straight=True)
    if runs is None:
        order = np.lexsort((table["offset"], table["file"]))
        table, indices = table[order], order if indices is None else indices[order]
        offsets, sizes, places = (
            table["offset"].tolist(),
            table["stored_bytes"].tolist(),
            starts[order].tolist(),
        )
        runs = _walk(table["file"].tolist(), offsets, sizes, places, fds, straight=False)
        assert runs is not None
    return Runs(
        runs,
        offsets,
        sizes,
        table["xxh3"].tolist(),
        places,
        table["raw_bytes"],
        table["element_bytes"],
        indices,
    )


def _walk(
    files: list[int],
    offsets: list[int],
    sizes: list[int],
    places: list[int],
    fds: Mapping[int, int],
    *,
    straight: bool,
) -> list[Run] | None:
    """The runs of slices in the order of the files. None where `straight` and they come in another order."""
    runs: list[Run] = []
    first, held, shift, begin, end = 0, -1, 0, 0, 0
    for index, (file, offset, size, place) in enumerate(zip(files, offsets, sizes, places, strict=True)):
        if file == held:
            if (
                0 <= offset - end < ALIGNMENT_BYTES
                and offset + size - begin <= RUN_BYTES_MAX
                and (place - offset == shift or not straight)
            ):
                end = offset + size
                continue
            if straight and offset < end:
                return None
        elif straight and file < held:
            return None
        if held >= 0:
            target = shift + begin if straight else -1
            runs.append((len(runs), fds[held], begin, end - begin, target, first, index))
        first, held, shift, begin, end = index, file, place - offset, offset, offset + size
    target = shift + begin if straight else -1
    runs.append((len(runs), fds[held], begin, end - begin, target, first, len(sizes)))
    return runs


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
        )  # gets one when a thread finds nothing to take
        self._view = buffer.data
        self._preadv, self._delay_s = preadv, delay_s
        self._todo = deque(runs.runs)
        self._taken = bytearray(len(runs))

    @property
    def complete(self) -> bool:
        return 0 not in self.finished

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

    def stuck(self) -> list[int]:
        """Runs that a thread took and has not come back from."""
        return [run for run in range(len(self.runs)) if self._taken[run] and not self.finished[run]]

    def wait(self, until_s: float) -> None:
        """Wait until every run is finished, or until that moment of `time.perf_counter`."""
        while not self.complete and (left_s := until_s - time.perf_counter()) > 0:
            with suppress(queue.Empty):
                self.idle.get(timeout=left_s)

    def take_cached(self, *, shared: bool) -> None:
        """Take runs until one is not in the page cache. Never waits for the disk.

        `shared`: threads take runs of this job at the same time.
        """
        view, preadv, finished, xxh3 = self._view, os.preadv, self.finished, self.runs.xxh3
        missed = -1
        for run in self._popped() if shared else self.runs.runs:
            number, fd, offset, length, place, first, last = run
            target = view[place : place + length] if place >= 0 else memoryview(bytearray(length))
            try:
                done = preadv(fd, (target,), offset, RWF_NOWAIT)
            except OSError:  # not there, or a file system that cannot say: a thread will see
                done = -1
            if done != length:
                missed = number
                break
            # The ordinary case of `_settle`, without the call.
            if place < 0 or last - first > 1 or xxh3_64_intdigest(target) != xxh3[first]:
                self._settle(run, target, first, last, length)
            finished[number] = 1
        if not shared:
            self._todo = deque(self.runs.runs[missed:] if missed >= 0 else ())
        elif missed >= 0:
            self._todo.appendleft(self.runs.runs[missed])

    def _popped(self) -> Iterator[Run]:
        while True:
            try:
                yield self._todo.popleft()
            except IndexError:
                return

    def take(self) -> None:
        """Take runs until none is left, waiting for the disk. For threads."""
        while not self.left:
            try:
                run = self._todo.popleft()
            except IndexError:
                break
            number, _, _, length, place, first, last = run
            self._taken[number] = 1
            try:
                target = self._view[place : place + length] if place >= 0 else memoryview(bytearray(length))
                self._read(run, target, first, last)
            except BaseException as error:
                self.error = error
            self.finished[number] = 1
        self.idle.put(None)

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
