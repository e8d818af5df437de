"""Frames picked by time: one for each slot of a fixed grid, decided without looking ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from memdb.schemas.errors import BudgetError, SourceError
from memdb.schemas.frames import DecodedFrame, Frame
from memdb.schemas.recording import Gap
from memdb.schemas.times import NS_PER_S

FPS_MAX = 1000.0
FPS_MIN = 1e-6  # a frame in eleven days; below that a rate is a slip of the hand, and 1 / rate overflows


def checked_fps(fps: float, name: str) -> float:
    """`fps` itself, if it is a rate that a film can have. Raises BudgetError otherwise."""
    if not (math.isfinite(fps) and FPS_MIN <= fps <= FPS_MAX):
        raise BudgetError(
            f"{name} {fps!r} is not a rate: give frames a second, above 0 and up to {FPS_MAX:g}"
        )
    return fps


def slot_ns(sample_fps: float) -> int:
    """The length of one slot of the sampling grid, in nanoseconds. Raises BudgetError for absurd rates."""
    return round(NS_PER_S / checked_fps(sample_fps, "sample_fps"))


def sample(
    frames: Iterator[DecodedFrame | Gap], sample_fps: float, *, after_ns: int = -1, number: int = 0
) -> Iterator[Frame]:
    """The first frame of every slot `[k * slot, (k + 1) * slot)`; an empty slot gives nothing.

    A frame is decided when it arrives, from its own time and the slot taken last, so that a film sampled in
    one go and one that is taken up again give the same frames. To take it up after the frame at `after_ns`,
    pass its start and, as `number`, the number of the next frame: frames up to there are decoded but neither
    picked nor converted to a picture, and the slot of `after_ns` counts as taken.

    A frame whose picture cannot be had (its source has noted that) is passed over, and the next frame of the
    slot stands for it. Raises BudgetError for rates that are not finite, not above 0, or above 1000.
    """
    picked = sample_with_gaps(frames, sample_fps, after_ns=after_ns, number=number)
    return (item for item in picked if isinstance(item, Frame))


def sample_with_gaps(
    frames: Iterator[DecodedFrame | Gap], sample_fps: float, *, after_ns: int = -1, number: int = 0
) -> Iterator[Frame | Gap]:
    """The same, with the source's gaps in their places.

    A gap begins where the slot of the frame before it ends, and one that ends before that is none. One without
    an end yet passes as it is. A film that is taken up again gives the gaps behind `after_ns` again.
    """
    return _picked(frames, slot_ns(sample_fps), after_ns, number)


def _picked(
    frames: Iterator[DecodedFrame | Gap], period_ns: int, after_ns: int, number: int
) -> Iterator[Frame | Gap]:
    taken = after_ns // period_ns  # -1, before the first slot, for after_ns = -1
    for frame in frames:
        if isinstance(frame, Gap):
            start_ns = max(frame.start_ns, (taken + 1) * period_ns)
            if frame.end_ns == frame.start_ns:
                yield frame
            elif frame.end_ns > start_ns:
                yield replace(frame, start_ns=start_ns)
            continue
        slot = frame.pts_ns // period_ns
        if slot <= taken:  # holds for every frame up to after_ns, too
            continue
        try:
            image = frame.image()
        except SourceError:
            continue
        yield Frame(number, frame.pts_ns, (slot + 1) * period_ns, image)
        taken = slot
        number += 1
