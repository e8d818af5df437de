"""Frames that hardly differ become one (StreamMem, arXiv 2508.15717).

A frame whose mean token has a cosine above delta with that of the frame before it is averaged into what stands for
the frames before it. The average is a true mean over all of them, kept with their number, so that the first of a long
still run weighs as much as the last; the paper does not say how it averages. What was merged covers a time range.

Where it differs: a merged frame closes at the latest after `unit_s_max` (ours), 0 for never.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memdb.ingest.frames import SeenFrame, cosine, joined
from memdb.schemas.params import at_least
from memdb.schemas.times import to_ns


@dataclass(frozen=True)
class MergeFrames:
    """`delta`: cosine above which a frame is merged; above 1 for none. `unit_s_max`: neither a merged frame nor the
    unit that it ends grows longer than this by merging.
    """

    delta: float = 0.95
    unit_s_max: float = 120.0

    def __post_init__(self) -> None:
        at_least("reduce.delta", self.delta, -1)
        at_least("reduce.unit_s_max", self.unit_s_max, 0)

    def merge(self, first_ns: int, last: SeenFrame, frame: SeenFrame) -> SeenFrame | None:
        """`last` with one more frame in it, None where that is another frame. first_ns: start of the open unit.

        The mean stays fp32 while frames may still come to it.
        """
        if 0 < to_ns(self.unit_s_max) < frame.end_ns - first_ns:
            return None
        if not cosine(frame.embedding, last.embedding) > self.delta:
            return None
        return joined(replace(last, tokens=last.tokens.float()), frame, 1 / (last.count + 1))
