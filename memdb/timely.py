"""Waiting for a disk, but not for ever: what it does not give in time is left to a thread that nobody waits for."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from memdb.read_job import RWF_NOWAIT
from memdb.records import read_exactly
from memdb.schemas.errors import CorruptionError

DEADLINE_S = 30.0
_STUCK_MAX = 16  # with so many threads left behind, nothing is waited for any more

T = TypeVar("T")


class Patience:
    """Runs what may hang. Each call that an earlier one left hanging halves the deadline, as in `SliceReader`: all
    that a question does waits for a dead disk at most twice as long. Several threads may use one.
    """

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._stuck: list[threading.Thread] = []

    def wait_for(self, call: Callable[[], T], *, file: str) -> T:
        """What `call` returns or raises; CorruptionError, naming the file, where it does not end in time.

        It must hold a reference to everything that it writes to: it may go on after its caller has gone.
        """
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        deadline_s = self._deadline_s / 2 ** len(self._stuck)
        late = CorruptionError(f"{file}: the disk did not give it within {deadline_s:g} s", file=file)
        if len(self._stuck) >= _STUCK_MAX:
            raise late
        ended: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                ended.put((call(), None))
            except BaseException as error:
                ended.put((None, error))

        thread = threading.Thread(target=run, name="memdb-wait", daemon=True)
        thread.start()
        try:
            found, error = ended.get(timeout=deadline_s)
        except queue.Empty:
            self._stuck = [*self._stuck, thread]
            raise late from None
        if error is not None:
            raise error
        return found  # type: ignore[return-value]


def read_timely(
    patience: Patience, fd: int, offset: int, length: int, file_bytes: int, *, file: str
) -> bytes:
    """As `read_exactly`: from the page cache at once, else with patience. Raises CorruptionError."""
    if 0 <= length <= file_bytes and (cached := _cached(fd, offset, length)) is not None:
        return cached
    return patience.wait_for(lambda: read_exactly(fd, offset, length, file_bytes, file=file), file=file)


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
