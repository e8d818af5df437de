"""What a retainer sees of a bounded memory: the tokens of one layer, or of several at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.schemas.units import BlockKind


@dataclass(frozen=True, eq=False)
class LayerView:
    """The tokens that a layer holds, in order of their positions, all on one device.

    Keys are unrotated, so that equal content has equal keys at any time. Every token knows where it came from, also
    after many rounds: a retainer never has to infer it from the order of the survivors.

    `importance` is what the rows of a probe (a chat template, an observation window) paid to each token in one
    softmax over everything the layer holds; see `memdb.retain.attention`. None where a method looks at none.

    Layers that hold equally many tokens may stand in one view (`stacked`): all tensors then have one more dimension
    in front, and so has what `choose` gives. Each layer is decided for itself, but a GPU is asked once and not L
    times.
    """

    k: Tensor  # (..., H, T, D) unrotated
    v: Tensor  # (..., H, T, D)
    position: Tensor  # (..., T) int64, write positions in the stream, ascending
    frame: Tensor  # (..., T) int64, >= 0; a prototype has the number of its frame
    patch: Tensor  # (..., T, 2) int64, row and column; -1, -1 for what was merged of several patches
    kind: Tensor  # (..., T) int64, a BlockKind
    grid: tuple[int, int]  # rows and columns of a whole frame
    importance: Tensor | None = None  # (..., T) fp32

    def __post_init__(self) -> None:
        shape = (*self.k.shape[:-3], self.tokens)
        assert self.v.shape == self.k.shape, (self.k.shape, self.v.shape)
        assert self.position.shape == self.frame.shape == self.kind.shape == shape
        assert self.patch.shape == (*shape, 2)
        assert self.importance is None or self.importance.shape == shape

    @staticmethod
    def stacked(views: Sequence[LayerView]) -> LayerView:
        """Several layers as one view; they must hold equally many tokens."""

        def stack(name: str) -> Tensor:
            return torch.stack([getattr(view, name) for view in views])

        importance = None if views[0].importance is None else stack("importance")
        k, v, position, frame, patch, kind = map(stack, ("k", "v", "position", "frame", "patch", "kind"))
        return LayerView(k, v, position, frame, patch, kind, views[0].grid, importance)

    @property
    def tokens(self) -> int:
        return int(self.k.shape[-2])

    @property
    def merged(self) -> Tensor:
        """(..., T) True where a token stands for no single patch: prototypes, summaries, merged frames, centres."""
        return self.patch[..., 0] < 0

    @property
    def prototype(self) -> Tensor:
        """(..., T) True for the prototypes of frames."""
        return self.kind == int(BlockKind.PROTOTYPE)

    def first(self, tokens: int) -> LayerView:
        """The oldest tokens, with the importance that they have in the whole."""
        if tokens == self.tokens:
            return self
        own = slice(tokens)
        importance = None if self.importance is None else self.importance[..., own]
        position, frame, kind = (x[..., own] for x in (self.position, self.frame, self.kind))
        k, v, patch = self.k[..., own, :], self.v[..., own, :], self.patch[..., own, :]
        return LayerView(k, v, position, frame, patch, kind, self.grid, importance)

    def part(self, kept: Tensor) -> LayerView:
        """The tokens `kept` (..., kept). Their importance goes: it was shared out over another set of tokens."""
        position, frame, kind = (x.gather(-1, kept) for x in (self.position, self.frame, self.kind))
        patch = self.patch.gather(-2, kept[..., None].expand(*kept.shape, 2))
        return LayerView(rows(self.k, kept), rows(self.v, kept), position, frame, patch, kind, self.grid)


def rows(x: Tensor, places: Tensor) -> Tensor:
    """x (..., H, T, D) at `places` (..., n), in all heads the same -> (..., H, n, D).

    As rows of one matrix: gathering number by number takes many times as long.
    """
    *lead, H, T, D = x.shape
    table = x.reshape(-1, D)  # (... * H * T, D)
    start = torch.arange(math.prod((*lead, H)), device=x.device).view(*lead, H, 1) * T
    index = start + places[..., None, :]  # (..., H, n)
    return table.index_select(0, index.flatten()).view(*index.shape, D)
