"""Groups at the positions at which they were written, as StreamingTOM's released code leaves them (arXiv 2510.18269).

Positions repeat: once the encoder's window was full, every batch was written at the same ones, so groups of different
hours stand at one distance from the question. The question begins where the cache ends, which may be before a group's
position. This is here to be compared with `consecutive`, not to be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memdb.models.cache import CacheContext
from memdb.models.places import LINE, Grid, Next, Places, Placing, place_frames
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.query.retrieve.topk import Rows


@dataclass(frozen=True)
class Written:
    windowed: ClassVar[bool] = False
    time_text_s: ClassVar[float] = 0.0  # a position that is taken twice leaves no room for text

    def places(
        self,
        model: VideoModel,
        start: int,
        sizes: Sequence[int],
        stands: Tensor,
        placing: Placing = LINE,
        raster: Rows | None = None,
    ) -> Places:
        """Of groups of these sizes behind `start` init tokens; stands (tokens,): where their tokens were written.
        `raster` (tokens,): at which place of its frame each stood, where that is known.

        Who sees whom goes by their order in time. What comes next stands where it would behind consecutive groups.
        """
        end = place_frames(placing, start, sizes, stands.device).end
        order = torch.arange(start, start + len(stands))
        group = max(sizes, default=1)
        ids = placing.at(start, stands, group) if len(stands) else order
        if raster is not None and isinstance(placing, Grid):
            frames = (stands - start) // group * placing.tokens
            ids = placing.at(start, start + frames + torch.from_numpy(raster), placing.tokens)
        model.rotary.tables(
            _highest(ids) + 1
        )  # a cache makes room up to `end` alone, and these stand beyond it
        return Places(order, ids, Next(end.order, end.id)).to(model.device)

    def rebuild(
        self,
        model: VideoModel,
        init: Sequence[LayerKV],
        found: Sequence[LayerKV | None],
        places: Sequence[Places],
        placing: Placing = LINE,
    ) -> CacheContext:
        """[init | groups where they were written], a list of groups and their places per layer."""
        return CacheContext(model.rotary, init, found, places=places, placing=placing)


def _highest(ids: Tensor) -> int:
    return int(ids.max()) if ids.numel() else 0
