"""What a unit stage does: it is given frames one by one, in time order, and says where a unit closes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from memdb.ingest.frames import SeenFrame
from memdb.schemas.times import to_ns


class UnitStage(Protocol):
    """Pure: the frames of the open unit are handed in, so that there is no state but theirs to save.

    `extend` decides on the open unit and one more frame, without looking ahead (methods.md R17).
    """

    def extend(
        self, opened: Sequence[SeenFrame], frame: SeenFrame
    ) -> tuple[list[list[SeenFrame]], list[SeenFrame]]:
        """The units that close with this frame (usually none or one), and the unit that stays open."""
        ...


def extend_to(
    count_of: Callable[[Sequence[SeenFrame]], int],
    unit_s_max: float,
    opened: Sequence[SeenFrame],
    frame: SeenFrame,
) -> tuple[list[list[SeenFrame]], list[SeenFrame]]:
    """A unit that closes with `count_of` it frames, or before the one with which it would last more than `unit_s_max`
    (0: never).
    """
    closed: list[list[SeenFrame]] = []
    unit = list(opened)
    if unit and 0 < to_ns(unit_s_max) < frame.end_ns - unit[0].start_ns:
        closed.append(unit)
        unit = []
    unit.append(frame)
    if len(unit) >= count_of(unit):
        closed.append(unit)
        unit = []
    return closed, unit
