"""Time stamps as text between blocks: keys without positions carry no clock.

A stamp stands behind the blocks that it dates. Their keys and values were computed long before it and cannot take
it up; it is computed now, sees them, and can be found by what they show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb.query.retrieve.topk import Rows
from memdb.schemas.times import format_time, to_s
from memdb.schemas.units import Table


@dataclass(frozen=True)
class Stamp:
    """A time that is written behind the block in this row of the key table."""

    row: int
    text: str


@dataclass(frozen=True)
class LayerPlaces:
    """Where one layer's tokens stand: those of its blocks, those of the stamps, and one past the last."""

    blocks: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    end: int


def stamps(blocks: Table, union: Rows, every_ns: int, *, apart_ns: int = 0) -> list[Stamp]:
    """One stamp behind each run of neighbouring blocks and wherever `every_ns` have passed in a run.

    It says when the block that it stands behind began. union: the rows that at least one layer holds, ascending.
    Stamps that would follow another within `apart_ns` are left out: that is for contexts in which not all of them
    have room.
    """
    found: list[Stamp] = []
    starts_ns = blocks["start_ns"][union].tolist()
    begun_ns, last_ns = 0, 0  # of the blocks since the last stamp, and the time that it said
    fresh = True
    for index, (row, start_ns) in enumerate(zip(union.tolist(), starts_ns, strict=True)):
        if fresh:
            begun_ns, fresh = start_ns, False
        goes_on = index + 1 < len(union) and union[index + 1] == row + 1
        if goes_on and starts_ns[index + 1] - begun_ns < every_ns:
            continue
        fresh = True
        if not found or start_ns - last_ns >= apart_ns:
            found.append(Stamp(row, f"[{format_time(round(to_s(start_ns), 1))}]"))
            last_ns = start_ns
    return found


def layer_places(
    start: int,
    rows: Rows,
    tokens: npt.NDArray[np.int64],
    stamps: Sequence[Stamp],
    stamp_tokens: Sequence[int],
) -> LayerPlaces:
    """Consecutive places from `start` on for one layer: its own blocks, and every stamp in its turn.

    rows: the blocks that this layer holds, ascending; tokens: of each. A stamp stands behind the block of its
    row, also in a layer that does not hold that block.
    """
    # Sort blocks and stamps together by row, a stamp behind the block of the same row.
    order = np.argsort(
        np.concatenate((2 * np.asarray([stamp.row for stamp in stamps], np.int64) + 1, 2 * rows)),
        kind="stable",
    )
    sizes = np.concatenate((np.asarray(stamp_tokens, np.int64), tokens))
    begins = np.empty(len(sizes), np.int64)
    begins[order] = start + np.concatenate(([0], np.cumsum(sizes[order])[:-1])) if len(sizes) else 0
    return LayerPlaces(
        blocks=_spread(begins[len(stamps) :], tokens),
        stamps=_spread(begins[: len(stamps)], np.asarray(stamp_tokens, np.int64)),
        end=start + int(sizes.sum()),
    )


def _spread(begins: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Each begin, begin + 1, ... for as many places as its size says, one after another."""
    if not len(begins):
        return np.zeros(0, np.int64)
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(begins, sizes) + within
