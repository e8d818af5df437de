"""Room on the disk: how much there is, and how much of it is not for memdb to take.

A disk that is full to the last byte takes the machine down with it, and leaves no room to forget anything.
So every write of some size asks here first, and is refused before a byte of it is written.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from memdb.schemas.errors import StoreError, StoreFull

RESERVE_BYTES = 64 << 20  # an ingest leaves this much free, and at least four of its batches
# What makes room may go further: forgetting, compaction, ageing.
UPKEEP_RESERVE_BYTES = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: Path) -> int:
    """What this user may still write to the file system of a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def require(folder: Path, size_bytes: int, *, reserve_bytes: int, what: str) -> None:
    """Raises StoreFull where `size_bytes` more would leave less than `reserve_bytes` free."""
    free = free_bytes(folder)
    if free - size_bytes < reserve_bytes:
        raise StoreFull(
            f"no room for {what}: {free:,} bytes are free, it takes {size_bytes:,} and {reserve_bytes:,} stay "
            "free: delete something on this disk, or forget a span with memdb forget, then run the same again"
        )


def used_bytes(folder: Path) -> int:
    """Everything in a store's directory."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue  # another process just removed it
    return total


def refused(error: OSError, what: str) -> StoreError:
    """What a write that failed becomes: StoreFull where the disk has no room."""
    if error.errno in _FULL:
        return StoreFull(f"{what}: {error.strerror}: what was kept is safe; make room, then run it again")
    return StoreError(f"{what}: {error.strerror}: what was kept is safe; check the disk, then run it again")
