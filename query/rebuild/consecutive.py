"""Blocks at consecutive positions in time order, with times as text between them (methods.md P5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memdb.models.cache import CacheContext
from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.query.rebuild.stamps import Stamp, layer_places, stamped, written_stamps
from memdb.query.retrieve.topk import Rows
from memdb.schemas.params import seconds_or_none
from memdb.schemas.times import to_ns
from memdb.schemas.units import Table


@dataclass(frozen=True)
class Consecutive:
    """`windowed`: a context longer than the encoding window is seen through that window, as ReKV does.

    `time_text_s`: a time stamp as text behind each run of neighbouring blocks and at least this often within;
    0 for none, as in the papers.
    """

    windowed: bool = False
    time_text_s: float = 4.0

    def __post_init__(self) -> None:
        seconds_or_none("rebuild.time_text_s", self.time_text_s)

    def rebuild(
        self,
        model: VideoModel,
        init: Sequence[LayerKV],
        blocks: Table,
        rows: Sequence[Rows],
        found: Sequence[LayerKV | None],
        window: int | None,
        stamp_tokens_max: int | None = None,
        placing: Placing = LINE,
        rasters: Sequence[Rows | None] | None = None,
    ) -> CacheContext:
        """[init | stamps and blocks in time order], a list of blocks per layer.

        blocks: the key table's. rows: per layer, its blocks, ascending. found: their keys and values, joined.
        Where stamps would take more than `stamp_tokens_max` they are thinned out. Where a token has three ids, blocks
        are renumbered in time alone, each layer's own, and keep their rows and columns; `rasters`: a layer each, of
        their tokens, where these are not all of a frame's (see `Placing.ids`).
        """
        union = np.unique(np.concatenate(rows)) if rows else np.zeros(0, np.int64)
        marks: list[Stamp] = []
        texts: list[list[int]] = []
        if self.time_text_s:
            starts, every_ns = blocks["start_ns"][union], to_ns(self.time_text_s)
            marks, texts = written_stamps(model, starts, union, every_ns, stamp_tokens_max)
        if not marks and placing == LINE:
            return CacheContext(model.rotary, init, found, window=window)
        sizes = [len(ids) for ids in texts]
        start = init[0].tokens
        own = [
            layer_places(start, mine, blocks["tokens"][mine].astype(np.int64), marks, sizes, placing, raster)
            for mine, raster in zip(rows, rasters or [None] * len(rows), strict=True)
        ]
        return stamped(model, init, found, own, texts, placing, window)
