"""What an encoder holds of the stream, as times: for forgetting, and for knowing how far back a state reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memdb.schemas.recording import Tombstone


class Timed(Protocol):
    @property
    def start_ns(self) -> int: ...

    @property
    def end_ns(self) -> int: ...


@dataclass(frozen=True)
class Held:
    """Tokens of one frame in the window, or of one clip in the recurrent queue."""

    start_ns: int
    end_ns: int
    tokens: int

    @property
    def row(self) -> tuple[int, int, int]:
        """As a saved state has it."""
        return self.start_ns, self.end_ns, self.tokens

    @classmethod
    def of_row(cls, row: Sequence[int]) -> Held:
        start, end, tokens = row
        return cls(int(start), int(end), int(tokens))


def is_meant(item: Timed, tombstones: Sequence[Tombstone]) -> bool:
    """Whether one of the spans overlaps a frame or clip that was taken in before all of them."""
    return any(item.start_ns < stone.end_ns and item.end_ns > stone.start_ns for stone in tombstones)


def newest(frames: Sequence[Held], tokens: int) -> list[Held]:
    """The frames to which the last `tokens` tokens belong; of the oldest perhaps not all are among them."""
    kept: list[Held] = []
    for frame in reversed(frames):
        if tokens <= 0:
            break
        kept.append(frame)
        tokens -= frame.tokens
    return kept[::-1]
