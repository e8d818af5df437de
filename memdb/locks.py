"""Locks of a store: `flock` on files in locks/, taken without waiting, freed by the system at any death."""

from __future__ import annotations

import fcntl
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from memdb.schemas.errors import LockedError, StoreError

# `is_held` probes by taking a lock for a moment. A writer that meets a probe tries again; one that meets a
# writer fails within this time.
_PROBE_S = 0.05


def writer_lock(store_path: Path, recording_id: str) -> Path:
    """Held by the one who appends units to a recording."""
    return store_path / "locks" / f"{recording_id}.lock"


def rewrite_lock(store_path: Path, recording_id: str) -> Path:
    """Held by the one who forgets, compacts or ages."""
    return store_path / "locks" / f"{recording_id}.rewrite.lock"


def commit_lock(store_path: Path, recording_id: str) -> Path:
    """Held for a moment: while units are appended, or a span is forgotten, never both."""
    return store_path / "locks" / f"{recording_id}.commit.lock"


class FileLock:
    """An exclusive lock while the object is open. Works between processes and between threads."""

    def __init__(self, path: Path, *, held_message: str = "it is locked", wait: bool = False) -> None:
        """Raises LockedError with `held_message` where another holds the lock, unless `wait`."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise StoreError(f"cannot open the lock {path}: {error.strerror}") from None
        try:
            self._take(held_message, wait)
        except BaseException:
            os.close(self._fd)
            raise

    def _take(self, held_message: str, wait: bool) -> None:
        if wait:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            return
        deadline = time.monotonic() + _PROBE_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LockedError(held_message) from None
                time.sleep(_PROBE_S / 5)
            else:
                return

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock. Changes nothing; a lock file that is not there is not held."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def many_files() -> Iterator[None]:
    """Let this process hold as many files as the system allows it: for whoever locks or pins all of a store."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
