"""What a retainer does, and the common half of those of tokens: a budget, one order of ties, order of time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from memdb.models.window import LayerKV
from memdb.retain.pools import short_tokens
from memdb.retain.prototypes import Prototypes
from memdb.retain.view import LayerView
from memdb.schemas.params import at_least

_AGE_BITS = 29


class Retainer(Protocol):
    """A frozen dataclass of parameters that says which blocks of a unit each layer stores."""

    @property
    def prompt(self) -> str:
        """The guidance prompt whose queries `select` is given, '' for none."""
        ...

    def select(
        self, layers: Sequence[Sequence[LayerKV]], queries: Sequence[Tensor], frames: int
    ) -> list[list[LayerKV | None]]:
        """Per layer, the blocks of a unit, None where it drops one. The first `frames` are of frames, what is behind
        them stands for all of these.

        queries: those of the guidance prompt, unrotated, a layer each (Hq, T, D); none without one.
        """
        ...


@dataclass(frozen=True)
class Bounded(ABC):
    """Keeps at most `budget_tokens` tokens a layer. A method says in which order it would take them.

    The budget is a number, not a share, so that a memory of ten hours is as large as one of ten minutes; what is
    merged counts as any other token. `short_frames`: the newest frames, which stay whole beside the budget, see
    `memdb.retain.pools`.
    """

    hears: ClassVar[bool] = False  # whether it looks at the importance that a probe gives to tokens (R18)
    prompt: ClassVar[str] = ""
    looks: ClassVar[bool] = True  # whether it looks at keys or values; else it may be given none

    budget_tokens: int = 6144
    short_frames: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        at_least("retain.budget_tokens", self.budget_tokens, 1)
        at_least("retain.short_frames", self.short_frames, 0)

    def tokens_min(self, frame_tokens: int) -> int:
        """The smallest budget that a method can work with on frames of so many tokens."""
        return 1

    def tokens_max(self, view: LayerView) -> int:
        """How many tokens of a view may stay."""
        return self.budget_tokens + short_tokens(view, self.short_frames)

    def choose(self, view: LayerView) -> Tensor:
        """Indices (..., kept) of the tokens that stay, ascending: all of them, or exactly `tokens_max`."""
        T, room = view.tokens, self.tokens_max(view)
        everything = torch.arange(T, device=view.k.device).expand_as(view.position)
        if room >= T:
            return everything
        long = T - (room - self.budget_tokens)
        kept = ascending(self.order(view.first(long))[..., : self.budget_tokens], long)
        return torch.cat((kept, everything[..., long:]), -1) if long < T else kept

    @abstractmethod
    def order(self, view: LayerView) -> Tensor:
        """Indices (..., T) of the tokens, first the one that is dropped last."""

    def select(
        self, layers: Sequence[Sequence[LayerKV]], queries: Sequence[Tensor], frames: int
    ) -> list[list[LayerKV | None]]:
        """Every block is stored as it came: what stays of it, keep sets say."""
        return [list(blocks) for blocks in layers]

    def prototypes_of(
        self, fresh: LayerKV, heard: Sequence[Tensor], frame: Sequence[int], start: int
    ) -> Prototypes | None:
        """Tokens that a chunk's own are joined by, one a frame; None for none.

        fresh: the chunk's keys and values, all layers together (L, H, C, D). heard: what the probe paid to memory and
        chunk, a layer each. frame: number of each token's frame. start: the stream position of the first token.
        """
        return None


def best_first(score: Tensor, frame: Tensor, tier: Tensor | None = None) -> Tensor:
    """Indices (..., T): the lowest `tier`, in it the highest `score`, of equals the newest frame, the lowest index.

    `tier` is 0 to 3, `frame` is not negative. Sorts are stable, so that the order is the same on every device. Tokens
    stand in raster order, so the lowest index of a frame is its lowest patch.
    """
    if score.dtype == torch.float32 and score.shape[-1] and not frame.is_floating_point():
        return torch.sort(_sort_key(score, frame, tier), dim=-1, stable=True).indices
    order = _resorted(None, frame, descending=True)
    order = _resorted(order, score, descending=True)
    return order if tier is None else _resorted(order, tier, descending=False)


def front(order: Tensor, first: Tensor) -> Tensor:
    """The order (..., T) with those tokens before the others that `first` (..., T) marks, in the order's own places."""
    ahead = first.cumsum(-1)  # (..., T)
    behind = ahead[..., -1:] + (~first).cumsum(-1)
    return torch.zeros_like(order).scatter_(-1, torch.where(first, ahead, behind) - 1, order)


def ascending(places: Tensor, tokens: int) -> Tensor:
    """Different places (..., n) among so many tokens, in order, without a sort."""
    n = places.shape[-1]
    mask = torch.zeros(*places.shape[:-1], tokens, dtype=torch.bool, device=places.device)
    mask.scatter_(-1, places, True)
    slot = torch.where(mask, mask.cumsum(-1) - 1, n)  # the last takes all others
    found = places.new_zeros(*places.shape[:-1], n + 1)
    return found.scatter_(-1, slot, torch.arange(tokens, device=places.device).expand_as(slot))[..., :n]


def _sort_key(score: Tensor, frame: Tensor, tier: Tensor | None) -> Tensor:
    """(..., T) int64, rising in the order of `best_first`: 2 bits of tier, 32 of score, 29 of age. One sort, not three.

    The bits of an fp32 number, read as an integer, rise with it, and where it is negative they fall. NaN is above all.
    """
    bits = (score + 0.0).masked_fill(score.isnan(), float("nan")).view(torch.int32)  # -0.0 becomes 0.0
    falling = bits ^ ~(bits >> 31 & 0x7FFFFFFF)  # int32, the highest score has the lowest
    age = (frame.amax(-1, keepdim=True) - frame).clamp(max=(1 << _AGE_BITS) - 1)
    key = (falling.long() + (1 << 31) << _AGE_BITS) + age
    return key if tier is None else key + (tier.long() << 32 + _AGE_BITS)


def _resorted(order: Tensor | None, key: Tensor, *, descending: bool) -> Tensor:
    """The order (..., T), sorted anew by `key` (..., T), which stands by index; among equals it stays."""
    there = key if order is None else key.gather(-1, order)
    indices = torch.sort(there, dim=-1, descending=descending, stable=True).indices
    return indices if order is None else order.gather(-1, indices)
