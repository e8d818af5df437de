"""Evenly spaced tokens of the whole stream: the control that knows no content.

A memory that thins out what it holds, again and again, thins the oldest most. This one does not: each stream
position has a rank that never changes, its multiple of the golden ratio modulo one, and the lowest ranks stay.
Positions below any rank are spaced by two or three step lengths (the three-distance theorem), so the memory is even
over the stream at every moment, over patches too, and is what one look at the whole stream would have kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memdb.retain.view import LayerView
from memdb.schemas.params import at_least

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as a signed word
_SIGN = -(1 << 63)


@dataclass(frozen=True)
class BoundedUniform:
    """`budget_tokens`: tokens a layer."""

    uses_attention: ClassVar[bool] = False
    budget_tokens: int = 4096

    def __post_init__(self) -> None:
        at_least("retain.budget_tokens", self.budget_tokens, 1)

    def least_tokens(self, frame_tokens: int) -> int:
        return frame_tokens

    def choose(self, view: LayerView) -> Tensor:
        order = torch.argsort(rank(view.position), stable=True)
        return order[: self.budget_tokens].sort().values


def rank(position: Tensor) -> Tensor:
    """(T,) int64, in the order of position / golden ratio modulo one. int64 products wrap, as they shall."""
    return (position * _GOLDEN) ^ _SIGN
