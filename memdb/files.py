"""Every change that memdb makes to a disk, SQLite's and Lance's own apart, goes through here.

So there is one place that says what is written in which order and when it is safe, and one place where tests
stand in the way: a `Watch` sees each step before and after it, and may kill the process, raise what a full
disk raises, or keep account of what a power cut would take (bytes, lengths and names that no sync reached).

Every sync has a reason, its `why`: a short text that no other sync has. Taking any one of them away makes a
test fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

Buffer = bytes | memoryview
_BUFFERS_MAX = 1024  # of one pwritev (IOV_MAX)
_MODE = 0o644
_PIECE_BYTES = 2 << 20  # of a big buffer: the disk writes one while the next is copied

What = Literal[
    "create",
    "write",
    "truncate",
    "sync",
    "sync_folder",
    "replace",
    "unlink",
    "make_folder",
    "remove_folder",
    "point",
]


@dataclass(frozen=True)
class Step:
    """One change, or a named moment (`point`)."""

    what: What
    path: Path
    name: str = ""  # of a sync its reason, of a point its name
    offset: int = 0  # of a write, bytes from the start of the file; of a truncate, the new length
    data: bytes = b""  # of a write
    target: Path | None = None  # of a replace


class Watch(Protocol):
    """Looks on. Whatever it raises comes out of the call that was to be made."""

    def before(self, step: Step) -> None: ...

    def after(self, step: Step) -> None: ...


_watch: Watch | None = None


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """For tests: let `watch` see every step of this process."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before


@contextmanager
def _step(step: Step) -> Iterator[None]:
    if _watch is not None:
        _watch.before(step)
    yield
    if _watch is not None:
        _watch.after(step)


def point(name: str, path: Path) -> None:
    """A moment between two steps that a test may want to die at, such as a commit of SQLite."""
    if _watch is not None:
        with _step(Step("point", path, name)):
            pass


class File:
    """A file that is written. Nothing is safe before `sync`, its name not before its folder is synced too."""

    def __init__(self, path: Path, *, new: bool = True) -> None:
        """`new`: the file must not exist; else it is opened as it is, or made. Raises OSError."""
        self.path = path
        made = new or not path.exists()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if new else 0)
        if made:
            with _step(Step("create", path)):
                self.fd = os.open(path, flags, _MODE)
        else:
            self.fd = os.open(path, flags, _MODE)

    def write(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Write buffers one after another from `offset` on; where the last ends. Raises OSError."""
        if _watch is not None:
            with _step(Step("write", self.path, "", offset, b"".join(bytes(buffer) for buffer in buffers))):
                return self._write(buffers, offset)
        return self._write(buffers, offset)

    def _write(self, buffers: Sequence[Buffer], offset: int) -> int:
        pending = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while pending:
            done = os.pwritev(self.fd, pending[:_BUFFERS_MAX], offset)
            offset += done
            while pending and done >= len(pending[0]):
                done -= len(pending.pop(0))
            if done:
                pending[0] = pending[0][done:]
        return offset

    def write_early(self, buffer: Buffer, offset: int) -> int:
        """`write` of one big buffer, which the disk begins to take at once: `sync` has less to wait for then.

        Nothing is safe before `sync` here either, and `sync` tells what failed on the way to the disk.
        """
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self.write([piece], offset)
            _take_early(self.fd, offset, len(piece))
            offset += len(piece)
        return offset

    def truncate(self, length: int) -> None:
        with _step(Step("truncate", self.path, "", length)):
            os.ftruncate(self.fd, length)

    def sync(self, why: str) -> None:
        """Wait until contents and length are on the disk. Raises OSError; the file is of no use then."""
        with _step(Step("sync", self.path, why)):
            os.fdatasync(self.fd)

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _take_early(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing out these bytes; a hint, which it may pass over.

    Linux does so where bytes are said not to be needed. What it is still writing stays in the page cache.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def sync_open(fd: int, path: Path, why: str) -> None:
    """The same as `File.sync` for a file that somebody else wrote and this process has open."""
    with _step(Step("sync", path, why)):
        os.fdatasync(fd)


def sync_folder(folder: Path, why: str) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    with _step(Step("sync_folder", folder, why)):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def replace(source: Path, target: Path) -> None:
    """Rename within one folder, over whatever has the name. Raises OSError."""
    with _step(Step("replace", source, target=target)):
        os.replace(source, target)


def unlink(path: Path) -> None:
    """Remove a file; one that is not there is removed already. Raises OSError."""
    with _step(Step("unlink", path)):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder unless it is there. Raises OSError."""
    if not path.is_dir():
        with _step(Step("make_folder", path)):
            path.mkdir(exist_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder with nothing in it; one that is not there is removed already. Raises OSError."""
    with _step(Step("remove_folder", path)), suppress(FileNotFoundError):
        path.rmdir()


def write_whole(path: Path, buffers: Sequence[Buffer], *, sync: str, sync_name: str) -> None:
    """Put a file in place whole or not at all, safe when this returns. `sync` and `sync_name` are the two whys.

    Raises OSError; the old file, if there was one, is then as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    unlink(temporary)
    try:
        with File(temporary) as file:
            file.write(buffers, 0)
            file.sync(sync)
    except OSError:
        with suppress(OSError):
            unlink(temporary)  # a disk that is full needs its room
        raise
    replace(temporary, path)
    sync_folder(path.parent, sync_name)
