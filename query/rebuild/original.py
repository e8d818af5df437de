"""Tokens at the stream positions at which they were encoded (InfiniPot-V 2506.15745, StreamMem 2508.15717).

Positions keep their gaps where tokens were dropped. What comes next stands behind the largest one of any layer, so
that the question has one place in all of them, although layers hold different tokens (R9).

Where we differ: InfiniPot-V's released code begins the question behind the end of the whole film; we begin it
behind the newest token that is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from memdb.models.cache import CacheContext
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.schemas.keep import Ids


@dataclass(frozen=True)
class Original:
    windowed: ClassVar[bool] = False
    time_text_s: ClassVar[float] = 0.0  # between neighbouring positions there is no room for text

    def rebuild(
        self,
        model: VideoModel,
        init: Sequence[LayerKV],
        found: Sequence[LayerKV | None],
        positions: Sequence[Ids],
    ) -> CacheContext:
        """[init | tokens at their positions]: keys and values of each layer, (H, tokens, D), and where they stand."""
        n = init[0].tokens
        held = [at for kv, at in zip(found, positions, strict=True) if kv is not None and len(at)]
        behind = max([n, *(int(at.max()) + 1 for at in held)])
        none = torch.zeros(0, dtype=torch.long)
        places = [
            none if kv is None else torch.from_numpy(at) for kv, at in zip(found, positions, strict=True)
        ]
        return CacheContext(model.rotary, init, found, places=places, next_places=[behind] * len(init))
