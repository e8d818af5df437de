"""Semantic segments: a unit lasts as long as neighbouring frames look alike (StreamKV, arXiv 2511.07278).

The likeness of a new frame is the cosine of its mean token with that of the frame just before it, as both came from
the projector. A segment of fewer than m frames goes on in any case. One that holds M goes on as well: its two
neighbours that are most alike become one, half of each, so that a long scene is M frames over spans of time.

Where it differs: a segment closes at the latest after `unit_s_max`, so that a scene in which nothing happens does not
hold itself back from every question; 0 turns that off (profiles paper and code). As in the released code, halves are
not weighted by how many frames a unit stands for, and the newest frame is compared with the frame before it, not with
what that one was merged into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memdb.ingest.frames import SeenFrame, cosine, joined, mean_token
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least
from memdb.schemas.times import to_ns


@dataclass(frozen=True)
class SemanticSegment:
    """`theta`: cosine above which a frame goes on with a segment. `frames_min`: m. `frames_max`: M.

    `unit_s_max`: a segment that would last longer closes before; 0 for never.
    """

    theta: float = 0.99
    frames_min: int = 4
    frames_max: int = 64
    unit_s_max: float = 120.0

    def __post_init__(self) -> None:
        at_least("unit.theta", self.theta, -1)
        at_least("unit.frames_min", self.frames_min, 1)
        at_least("unit.frames_max", self.frames_max, 1)
        at_least("unit.unit_s_max", self.unit_s_max, 0)
        if self.frames_max < self.frames_min:
            raise RecipeError(
                f"unit.frames_max = {self.frames_max} is below unit.frames_min = {self.frames_min}: a segment could "
                "never be long enough"
            )

    def extend(
        self, opened: Sequence[SeenFrame], frame: SeenFrame
    ) -> tuple[list[list[SeenFrame]], list[SeenFrame]]:
        segment = list(opened)
        if not segment:
            return [], [frame]
        likeness = cosine(frame.embedding, segment[-1].embedding)
        too_long = 0 < to_ns(self.unit_s_max) < frame.end_ns - segment[0].start_ns
        if too_long or (len(segment) >= self.frames_min and not likeness > self.theta):
            return [segment], [frame]
        segment.append(replace(frame, likeness=likeness))
        return [], merge_most_alike(segment) if len(segment) > self.frames_max else segment


def merge_most_alike(segment: Sequence[SeenFrame]) -> list[SeenFrame]:
    """One frame fewer: of two or more, the neighbours with the highest cosine become one; of equals the first."""
    at = max(range(1, len(segment)), key=lambda i: segment[i].likeness)
    before, after = list(segment[: at - 1]), list(segment[at + 1 :])
    one = joined(segment[at - 1], segment[at], 0.5)
    own = mean_token(one.tokens)
    if before:
        one = replace(one, likeness=cosine(own, mean_token(before[-1].tokens)))
    if after:
        after[0] = replace(after[0], likeness=cosine(mean_token(after[0].tokens), own))
    return [*before, one, *after]
