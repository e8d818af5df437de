"""What a question chose of a memory, turned back to where it stood (LiveVLM, version 2 of arXiv 2505.15269).

Keys are chosen without a position and then given theirs again. "Restored" is taken to mean the original positions, with
gaps where pages were not chosen. The alternative is a switch (ours, as the paper shows neither).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memdb.models.cache import CacheContext
from memdb.models.places import LINE, Grid, Next, Places, Placing, closed_up
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.query.rebuild.original import Original
from memdb.query.rebuild.stamps import layer_places, stamped, written_stamps
from memdb.schemas.errors import RecipeError
from memdb.schemas.keep import Ids
from memdb.schemas.params import seconds_or_none
from memdb.schemas.times import to_ns


@dataclass(frozen=True)
class Restored(Original):
    """`consecutive`: no gaps, each layer as long as what it holds (P5), so that no position lies beyond those that the
    model was trained on. Where a token has three ids, frames are renumbered in time alone.

    `time_text_s` (ours): the time as text behind what is left of a frame, never two within so many seconds; 0 for none,
    as in the paper. Only where gaps are closed is there room for it. Without it nothing in such a context says when
    anything was.
    """

    consecutive: bool = False
    time_text_s: float = 0.0

    def __post_init__(self) -> None:
        seconds_or_none("rebuild.time_text_s", self.time_text_s)
        if self.time_text_s and not self.consecutive:
            raise RecipeError(
                "rebuild.time_text_s writes times between tokens, and at restored positions there is no room between "
                "them: set rebuild.consecutive = true, or rebuild.time_text_s = 0"
            )

    def dated(
        self,
        model: VideoModel,
        init: Sequence[LayerKV],
        found: Sequence[LayerKV | None],
        tokens: Sequence[tuple[Ids, Ids]],
        frame_tokens: int,
        placing: Placing,
        tokens_max: int,
    ) -> CacheContext:
        """[init | tokens without gaps, with times between], the times in at most `tokens_max` tokens.

        tokens: a layer each, positions and when the frame of each began, ns. The rest: see `rebuild`.
        """
        n, none = init[0].tokens, np.zeros(0, np.int64)
        stand = [none if kv is None else at - n for kv, (at, _) in zip(found, tokens, strict=True)]
        began = [none if kv is None else at for kv, (_, at) in zip(found, tokens, strict=True)]
        frames = [at // frame_tokens for at in stand]
        union, first = np.unique(np.concatenate(frames), return_index=True)
        every_ns = to_ns(self.time_text_s)
        marks, texts = written_stamps(
            model, np.concatenate(began)[first], union, every_ns, tokens_max, apart_ns=every_ns
        )
        own, sizes = [], [len(ids) for ids in texts]
        for at, frame in zip(stand, frames, strict=True):
            mine, counts = np.unique(frame, return_counts=True)
            raster = None
            if isinstance(placing, Grid):
                raster = (2 * (at % frame_tokens) + 1) * placing.tokens // (2 * frame_tokens)
            own.append(layer_places(n, mine, counts, marks, sizes, placing, raster))
        return stamped(model, init, found, own, texts, placing)

    def seat(self, placing: Placing, start: int, positions: Ids, frame_tokens: int, end: Next) -> Places:
        if not self.consecutive:
            return super().seat(placing, start, positions, frame_tokens, end)
        closed = closed_up(placing, start, torch.from_numpy(positions), frame_tokens)
        if placing == LINE:
            return Places.line(closed, start + len(positions))
        ids = placing.at(start, closed, frame_tokens)
        behind = int(ids.max()) + 1 if ids.numel() else start
        order = torch.arange(start, start + len(positions))
        return Places(order, ids, Next(start + len(positions), behind))
