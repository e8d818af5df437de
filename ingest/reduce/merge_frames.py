"""Frames that hardly differ become one (StreamMem, arXiv 2508.15717).

A frame whose mean token has a cosine above delta with that of the frame before it is averaged into what stands for
the frames before it. The average is a true mean over all of them, kept with their number, so that the first of a long
still run weighs as much as the last; the paper does not say how it averages. What was merged covers a time range.

Where it differs: a merged frame closes at the latest after `unit_s_max` (ours), 0 for never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from memdb.ingest.encoder_state import Saved, bytes_tensor, tensor_bytes
from memdb.ingest.frames import SeenFrame, compared, cosine, joined
from memdb.ingest.reduce.base import Carried, Reducer
from memdb.ingest.terms import Terms
from memdb.ingest.units.base import UnitStage
from memdb.schemas.params import at_least
from memdb.schemas.times import to_ns


@dataclass(frozen=True)
class MergeFrames(Reducer):
    """`delta`: cosine above which a frame is merged; above 1 for none. `unit_s_max`: neither a merged frame nor the
    unit that it ends grows longer than this by merging.
    """

    delta: float = 0.95
    unit_s_max: float = 120.0

    def __post_init__(self) -> None:
        at_least("reduce.delta", self.delta, -1)
        at_least("reduce.unit_s_max", self.unit_s_max, 0)

    def begin(self, terms: Terms, unit: UnitStage) -> Merging:
        return Merging(self, terms, unit)

    def merge(self, first_ns: int, last: SeenFrame, frame: SeenFrame) -> SeenFrame | None:
        """`last` with one more frame in it, None where that is another frame. first_ns: start of the open unit.

        The mean stays fp32 while frames may still come to it.
        """
        if 0 < to_ns(self.unit_s_max) < frame.end_ns - first_ns:
            return None
        if not cosine(frame.embedding, last.embedding) > self.delta:
            return None
        return joined(replace(last, tokens=last.tokens.float()), frame, 1 / (last.count + 1))


class Merging(Carried):
    """The last open frame may still grow: it goes to its unit when the next one is another, and may open one itself."""

    def __init__(self, method: MergeFrames, terms: Terms, unit: UnitStage) -> None:
        super().__init__(terms, unit)
        self._method = method

    def arrived(self, frames: Sequence[SeenFrame]) -> Sequence[SeenFrame]:
        return compared(frames)

    def extend(self, frame: SeenFrame) -> list[list[SeenFrame]]:
        if not self.opened:
            self.opened = [frame]
            return []
        *before, last = self.opened
        merged = self._method.merge(self.opened[0].start_ns, last, frame)
        if merged is not None:
            self.opened = [*before, merged]
            return []
        closed, opened = self._unit.extend(before, last)
        self.opened = [*opened, frame]
        return closed

    def finish(self) -> list[list[SeenFrame]]:
        closed: list[list[SeenFrame]] = []
        if self.opened:
            closed, self.opened = self._unit.extend(self.opened[:-1], self.opened[-1])
        return closed + super().finish()

    def reduce(self, groups: Sequence[Sequence[SeenFrame]]) -> Sequence[Sequence[SeenFrame]]:
        """A mean was kept in fp32 while it grew."""
        dtype = self._terms.model.dtype
        return [[replace(frame, tokens=frame.tokens.to(dtype)) for frame in group] for group in groups]

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        if len(self.opened) > 1:
            found["jpeg.last"] = bytes_tensor(self.opened[-1].jpeg())
        return found

    def restore(self, saved: Saved) -> None:
        super().restore(saved)
        if "jpeg.last" in saved.tensors:
            picture = tensor_bytes(saved.tensors["jpeg.last"])
            self.opened[-1] = replace(self.opened[-1], picture=picture)
