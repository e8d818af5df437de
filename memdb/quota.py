"""The limits of a store, as a writer meets them: the disk's reserve, and `store_bytes_max` of the policy.

A batch that does not fit is refused before a byte of it is written, so that what was acknowledged is never in
danger. Where the policy says so, the oldest footage makes room first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from memdb.folder import POLICY
from memdb.policy import FORGET_OLDEST, Policy, read_policy
from memdb.room import RESERVE_BYTES, free_bytes, used_bytes
from memdb.schemas.errors import CorruptionError, StoreFull
from memdb.schemas.units import Unit

logger = logging.getLogger(__name__)

RESERVE_BATCHES = 4  # so many of its batches stay free beside, where that is more than RESERVE_BYTES
# The store is measured anew after so long, after so many bytes, and always close to its limit.
_MEASURE_S = 60.0
_MEASURE_BYTES = 64 << 20
_CLOSE_SHARE = 32
_RECORD_BYTES = 16 << 10  # of a unit beside its big parts, about: footer, caption, row
_COMMIT_BYTES = 128 << 10  # of the catalog's WAL

# Makes room for so many bytes more, by forgetting what is oldest.
MakeRoom = Callable[[int], None]


def batch_bytes(units: Sequence[Unit]) -> int:
    """About what a batch takes on the disk."""
    return _COMMIT_BYTES + sum(unit.payload_bytes + _RECORD_BYTES for unit in units)


class Quota:
    """What one writer asks before each batch. Cheap: the store is measured now and then, and counted on between.

    The limit holds for what a batch adds. What is derived of it, and encoder states, may pass it until the next.
    """

    def __init__(self, store_path: Path) -> None:
        self._path = store_path
        self._policy = Policy()
        self._policy_file: tuple[int, int] | None = None
        self._used_bytes = 0
        self._since_bytes = 0
        self._measured_s = float("-inf")

    def require(self, size_bytes: int, make_room: MakeRoom) -> None:
        """Raises StoreFull where `size_bytes` more do not fit, on the disk or in the store."""
        self._read_policy()
        excess = self._excess(size_bytes)
        if excess > 0 and self._policy.when_full == FORGET_OLDEST:
            make_room(excess)
            self._measured_s = float("-inf")
            excess = self._excess(size_bytes)
        if excess > 0:
            raise self._full(size_bytes)
        self._since_bytes += size_bytes

    def _excess(self, size_bytes: int) -> int:
        """How many bytes too much a batch would be."""
        reserve = max(RESERVE_BYTES, RESERVE_BATCHES * size_bytes)
        over = size_bytes + reserve - free_bytes(self._path)
        limit = self._policy.store_bytes_max
        if limit is None:
            return over
        return max(over, self._used(limit) + size_bytes - limit)

    def _used(self, limit: int) -> int:
        now_s = time.monotonic()
        used = self._used_bytes + self._since_bytes
        close = limit - used < limit // _CLOSE_SHARE
        if close or self._since_bytes > _MEASURE_BYTES or now_s - self._measured_s > _MEASURE_S:
            self._used_bytes, self._since_bytes = used_bytes(self._path), 0
            self._measured_s = now_s
        return self._used_bytes + self._since_bytes

    def _full(self, size_bytes: int) -> StoreFull:
        limit, free = self._policy.store_bytes_max, free_bytes(self._path)
        if limit is not None and self._used(limit) + size_bytes > limit:
            return StoreFull(
                f"the store is full: it may hold {limit:,} bytes: what was acknowledged is safe; forget a span with "
                "memdb forget and run memdb compact, or raise store_bytes_max with memdb policy"
            )
        return StoreFull(
            f"the disk is full: {free:,} bytes are free, and {max(RESERVE_BYTES, RESERVE_BATCHES * size_bytes):,} "
            "stay so: what was acknowledged is safe; make room, then run the same ingest again"
        )

    def _read_policy(self) -> None:
        """As it is now: it may be set while an ingest runs."""
        try:
            found = (self._path / POLICY).stat()
            file = (found.st_mtime_ns, found.st_ino)
        except FileNotFoundError:
            file = None
        if file == self._policy_file:
            return
        self._policy_file = file
        try:
            self._policy = read_policy(self._path)
        except CorruptionError as error:  # better to go on without a limit than without a memory
            logger.warning("%s; until then the disk alone is the limit", error)
            self._policy = Policy()
