"""Small reads that end in time: what lies in the page cache at once, the rest by a thread that may be left behind."""

from __future__ import annotations

import os
import queue
import threading

from memdb.read_job import RWF_NOWAIT
from memdb.records import read_exactly
from memdb.schemas.errors import CorruptionError

DEADLINE_S = 30.0
_STUCK_MAX = 16  # with so many threads left behind, only the page cache is read


class TimelyReader:
    """Reads for threads that cannot wait for ever. Several may use one at the same time."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        """Each thread that an earlier read left hanging halves the deadline, as in `SliceReader`."""
        self._deadline_s = deadline_s
        self._stuck: list[threading.Thread] = []

    def read(self, fd: int, offset: int, length: int, file_bytes: int, *, file: str) -> bytes:
        """`length` bytes at `offset`. Raises CorruptionError where the file does not give them, or not in time."""
        if 0 <= length <= file_bytes and (cached := _cached(fd, offset, length)) is not None:
            return cached
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        deadline_s = self._deadline_s / 2 ** len(self._stuck)
        answer: queue.SimpleQueue[bytes | CorruptionError] = queue.SimpleQueue()

        def wait() -> None:
            try:
                answer.put(read_exactly(fd, offset, length, file_bytes, file=file))
            except CorruptionError as error:
                answer.put(error)

        late = CorruptionError(
            f"{file}: the disk did not give byte {offset} within {deadline_s:g} s", file=file
        )
        if len(self._stuck) >= _STUCK_MAX:
            raise late
        thread = threading.Thread(target=wait, name="memdb-part", daemon=True)
        thread.start()
        try:
            found = answer.get(timeout=deadline_s)
        except queue.Empty:
            self._stuck = [*self._stuck, thread]
            raise late from None
        if isinstance(found, CorruptionError):
            raise found
        return found


def _cached(fd: int, offset: int, length: int) -> bytes | None:
    """The bytes, if all of them can be had without waiting."""
    if not RWF_NOWAIT:
        return None
    buffer = bytearray(length)
    try:
        done = os.preadv(fd, [buffer], offset, RWF_NOWAIT)
    except OSError:  # not there, or a file system that does not look there
        return None
    return bytes(buffer) if done == length else None
