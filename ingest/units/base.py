"""What a unit stage does: it is given frames one by one, in time order, and says where a unit closes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from memdb.ingest.frames import SeenFrame


class UnitStage(Protocol):
    """Pure: the frames of the open unit are handed in, so that there is no state but theirs to save.

    `extend` decides on the open unit and one more frame, without looking ahead (methods.md R17).
    """

    def extend(
        self, opened: Sequence[SeenFrame], frame: SeenFrame
    ) -> tuple[list[list[SeenFrame]], list[SeenFrame]]:
        """The units that close with this frame (usually none or one), and the unit that stays open."""
        ...
