"""Time stamps as text between blocks: keys without positions carry no clock.

A stamp stands behind the blocks that it dates. Their keys and values were computed long before it and cannot take
it up; it is computed now, sees them, and can be found by what they show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from memdb.models.cache import CacheContext
from memdb.models.places import LINE, Next, Places, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.query.retrieve.topk import Rows
from memdb.schemas.keep import Ids
from memdb.schemas.times import format_time, to_s


@dataclass(frozen=True)
class Stamp:
    """A time that is written behind the block in this row of the key table."""

    row: int
    text: str


@dataclass(frozen=True)
class LayerPlaces:
    """Where one layer's tokens stand: those of its blocks, those of the stamps, and one past the last.

    `ids` (3, tokens) are those of all these places in turn, where a token has three, and `end_id` the next id.
    """

    blocks: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    end: int
    start: int = 0
    ids: npt.NDArray[np.int64] | None = None
    end_id: int = 0

    def of_blocks(self, device: torch.device) -> Places:
        return self._places(self.blocks, device)

    def of_stamps(self, device: torch.device) -> Places:
        return self._places(self.stamps, device)

    def _places(self, order: npt.NDArray[np.int64], device: torch.device) -> Places:
        tokens = torch.from_numpy(order).to(device)
        if self.ids is None:
            return Places.line(tokens, self.end)
        ids = torch.from_numpy(self.ids[:, order - self.start]).to(device)
        return Places(tokens, ids, Next(self.end, self.end_id))


def stamps(starts: Ids, union: Rows, every_ns: int, *, apart_ns: int = 0) -> list[Stamp]:
    """One stamp behind each run of neighbouring blocks and wherever `every_ns` have passed in a run.

    It says when the block that it stands behind began. union: the rows that at least one layer holds, ascending;
    starts: when these began, ns. Stamps that would follow another within `apart_ns` are left out: that is for contexts
    in which not all of them have room.
    """
    found: list[Stamp] = []
    starts_ns = starts.tolist()
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


def written_stamps(
    model: VideoModel,
    starts: Ids,
    union: Rows,
    every_ns: int,
    tokens_max: int | None = None,
    *,
    apart_ns: int = 0,
) -> tuple[list[Stamp], list[list[int]]]:
    """The stamps and their ids, further apart the less room there is."""

    def written(apart_ns: int) -> tuple[list[Stamp], list[list[int]]]:
        marks = stamps(starts, union, every_ns, apart_ns=apart_ns)
        return marks, [model.encode_text(mark.text) for mark in marks]

    marks, texts = written(apart_ns)
    apart_ns = max(apart_ns, every_ns)
    while marks and tokens_max is not None and sum(map(len, texts)) > tokens_max:
        marks, texts = ([], []) if len(marks) == 1 else written(apart_ns)
        apart_ns *= 2
    return marks, texts


def stamped(
    model: VideoModel,
    init: Sequence[LayerKV],
    found: Sequence[LayerKV | None],
    own: Sequence[LayerPlaces],
    texts: Sequence[Sequence[int]],
    placing: Placing,
    window: int | None = None,
) -> CacheContext:
    """[init | blocks and stamps at their places]. The stamps are prefilled in one forward, in which each sees only
    what stands before it.
    """
    places = [layer.of_blocks(model.device) for layer in own]
    context = CacheContext(model.rotary, init, found, window=window, places=places, placing=placing)
    if texts:
        context.place_next([layer.of_stamps(model.device) for layer in own])
        with torch.inference_mode():
            model.forward(model.embed([token for ids in texts for token in ids]), context)
    return context


def layer_places(
    start: int,
    rows: Rows,
    tokens: npt.NDArray[np.int64],
    stamps: Sequence[Stamp],
    stamp_tokens: Sequence[int],
    placing: Placing = LINE,
    raster: npt.NDArray[np.int64] | None = None,
) -> LayerPlaces:
    """Consecutive places from `start` on for one layer: its own blocks, and every stamp in its turn.

    rows: the blocks that this layer holds, ascending; tokens: of each; raster: of their tokens, see `Placing.ids`. A
    stamp stands behind the block of its row, also in a layer that does not hold that block. On a grid it ends a run:
    the blocks behind it begin their rows and columns behind its last id, and their times as well.
    """
    # Sort blocks and stamps together by row, a stamp behind the block of the same row.
    order = np.argsort(
        np.concatenate((2 * np.asarray([stamp.row for stamp in stamps], np.int64) + 1, 2 * rows)),
        kind="stable",
    )
    sizes = np.concatenate((np.asarray(stamp_tokens, np.int64), tokens))
    begins = np.empty(len(sizes), np.int64)
    begins[order] = start + np.concatenate(([0], np.cumsum(sizes[order])[:-1])) if len(sizes) else 0
    ids, end_id = None, start + int(sizes.sum())
    if placing != LINE:
        if raster is not None:  # that of the stamps says nothing
            texts = [np.zeros(size, np.int64) for size in stamp_tokens]
            parts = [*texts, *np.split(raster, np.cumsum(tokens)[:-1])] if len(tokens) else texts
            raster = np.concatenate([parts[index] for index in order]) if parts else None
        ids, end_id = placing.ids(start, sizes[order], order >= len(stamps), raster)
    return LayerPlaces(
        blocks=_spread(begins[len(stamps) :], tokens),
        stamps=_spread(begins[: len(stamps)], np.asarray(stamp_tokens, np.int64)),
        end=start + int(sizes.sum()),
        start=start,
        ids=ids,
        end_id=end_id,
    )


def _spread(begins: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Each begin, begin + 1, ... for as many places as its size says, one after another."""
    if not len(begins):
        return np.zeros(0, np.int64)
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(begins, sizes) + within
