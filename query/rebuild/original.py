"""Tokens at the stream positions at which they were encoded (InfiniPot-V 2506.15745, StreamMem 2508.15717).

Positions keep their gaps where tokens were dropped. What comes next stands behind the largest one of any layer, so
that the question has one place in all of them, although layers hold different tokens (R9).

Where we differ: InfiniPot-V's released code begins the question behind the end of the whole film; we begin it
behind the newest token that is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from memdb.models.cache import CacheContext
from memdb.models.places import LINE, Next, Places, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.schemas.keep import Ids


@dataclass(frozen=True)
class Original:
    windowed: ClassVar[bool] = False

    time_text_s: float = field(
        default=0.0, init=False
    )  # between neighbouring positions there is no room for text

    def rebuild(
        self,
        model: VideoModel,
        init: Sequence[LayerKV],
        found: Sequence[LayerKV | None],
        positions: Sequence[Ids],
        frame_tokens: int,
        placing: Placing = LINE,
    ) -> CacheContext:
        """[init | tokens at their positions]: keys and values of each layer, (H, tokens, D), and where they stand.

        Where a token has three ids they follow from its position; `frame_tokens`: of each frame of the stream.
        """
        n, none = init[0].tokens, np.zeros(0, np.int64)
        own = [none if kv is None else at for kv, at in zip(found, positions, strict=True)]
        end = behind(placing, n, own, frame_tokens)
        places = [self.seat(placing, n, at, frame_tokens, end).to(model.device) for at in own]
        return CacheContext(model.rotary, init, found, places=places, placing=placing)

    def seat(self, placing: Placing, start: int, positions: Ids, frame_tokens: int, end: Next) -> Places:
        """Where one layer's tokens stand, behind `start` init tokens; `end`: see `behind`."""
        at = torch.from_numpy(positions)
        return Places(at, placing.at(start, at, frame_tokens), end)


def behind(placing: Placing, start: int, positions: Sequence[Ids], frame_tokens: int) -> Next:
    """The place behind the tokens of all layers, and behind `start` init tokens."""
    own = [torch.from_numpy(at) for at in positions]
    ids = [placing.at(start, at, frame_tokens) for at in own]
    return Next(_one_past(start, own), _one_past(start, ids))


def _one_past(start: int, numbers: Sequence[Tensor]) -> int:
    """One more than the largest of all, `start` at least."""
    return max([start, *(int(own.max()) + 1 for own in numbers if own.numel())])
