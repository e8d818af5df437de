"""Clips of a fixed number of frames (rLiVS, arXiv 2510.17364: 16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb.ingest.frames import SeenFrame
from memdb.ingest.units.base import extend_to
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class Clip:
    """`frames`: frames a clip. `unit_s_max`: a clip that would last longer closes before; 0 for never.

    The limit is ours: at low sample rates a clip would hold what was seen minutes ago back from every question.
    """

    frames: int = 16
    unit_s_max: float = 120.0

    def __post_init__(self) -> None:
        at_least("unit.frames", self.frames, 1)
        at_least("unit.unit_s_max", self.unit_s_max, 0)

    def extend(
        self, opened: Sequence[SeenFrame], frame: SeenFrame
    ) -> tuple[list[list[SeenFrame]], list[SeenFrame]]:
        return extend_to(lambda clip: self.frames, self.unit_s_max, opened, frame)
