"""A recording: one video or live stream in a store."""

from __future__ import annotations

import re
from dataclasses import dataclass

from memdb.schemas.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@+-]{0,127}")


@dataclass(frozen=True)
class Gap:
    """A stretch of media time in which the source gave nothing."""

    start_ns: int
    end_ns: int
    reason: str


@dataclass(frozen=True)
class Epoch:
    """A stretch that was encoded from a fresh window, from unit `first_unit` on."""

    number: int
    first_unit: int
    reason: str


@dataclass(frozen=True)
class Tombstone:
    """A span that was forgotten: whatever of the units below `below_unit` overlaps it is gone, in all tiers.

    Compaction joins those that follow each other: the last then stands in the place of each of them.
    """

    number: int  # 0-based in the recording
    start_ns: int
    end_ns: int
    below_unit: int  # the number of units at the time: what came later is not meant
    at_ns: int  # wall clock

    def covers(self, unit: int, start_ns: int, end_ns: int) -> bool:
        """Whether something of a unit that spans `[start_ns, end_ns)` is forgotten."""
        return unit < self.below_unit and start_ns < self.end_ns and end_ns > self.start_ns


def check_name(name: str) -> str:
    """The name itself, if it can stand in a store. Raises UsageError for one that climbs out or is odd."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"recording name {name!r} is not allowed: use 1 to 128 letters, digits, spaces and . _ @ + -, "
            "beginning with a letter or digit, without '..'"
        )
    return name
