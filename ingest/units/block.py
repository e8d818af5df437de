"""Blocks of a fixed number of frames, the first longer than the others (InfiniPot-V, arXiv 2506.15745).

The released code fills a memory of 32 frames with the first block, and then takes 8 at a time, so that old and new
are 32 again. It counts temporal patches, of two pictures each on Qwen models; here a frame is whatever the model
takes as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb.ingest.frames import SeenFrame
from memdb.ingest.units.base import extend_to
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class FixedBlock:
    """`first_frames`: of the block that begins the recording; `frames`: of every other one.

    `unit_s_max`: a block that would last longer closes before; 0 for never. The limit is ours.
    """

    first_frames: int = 32
    frames: int = 8
    unit_s_max: float = 120.0

    def __post_init__(self) -> None:
        at_least("unit.first_frames", self.first_frames, 1)
        at_least("unit.frames", self.frames, 1)
        at_least("unit.unit_s_max", self.unit_s_max, 0)

    def extend(
        self, opened: Sequence[SeenFrame], frame: SeenFrame
    ) -> tuple[list[list[SeenFrame]], list[SeenFrame]]:
        return extend_to(self._count, self.unit_s_max, opened, frame)

    def _count(self, block: Sequence[SeenFrame]) -> int:
        return self.frames if block[0].number else self.first_frames
