"""What a retainer sees of a bounded memory: the tokens of one layer, or of several at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.schemas.units import BlockKind


@dataclass(frozen=True)
class StreamEnd:
    """What the host knows of a view's newest tokens, so that it need not wait for a device to say it."""

    end: int  # one past the last position
    frame_tokens: int  # of the newest frame
    tokens_from: Callable[[int], int]  # how many stand at this position or behind it, as many in every layer


@dataclass(frozen=True, eq=False)
class LayerView:
    """The tokens that a layer holds, in order of their positions, all on one device.

    Keys are unrotated, so that equal content has equal keys at any time. Every token knows where it came from, also
    after many rounds: a retainer never has to infer it from the order of the survivors.

    `importance` is what the rows of a probe (a chat template, an observation window) paid to each token in one
    softmax over everything the layer holds; see `memdb.retain.attention`. None where a method looks at none.

    `frames` and `stream` say what whoever made the view knows on the host. Without them a device is asked, and does
    nothing until the host has heard it and said what comes next.

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
    frames: int | None = None  # no layer has tokens of more distinct frames
    stream: StreamEnd | None = None
    reduced_tokens: int = 0  # of each frame as the reducer left it; 0: as many as the grid has patches

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
        known = [view.frames for view in views if view.frames is not None]
        frames = max(known) if len(known) == len(views) else None
        grid, reduced = views[0].grid, views[0].reduced_tokens
        return LayerView(k, v, position, frame, patch, kind, grid, importance, frames, None, reduced)

    @property
    def tokens(self) -> int:
        return int(self.k.shape[-2])

    @property
    def frame_tokens(self) -> int:
        """How many tokens a whole frame had when it came."""
        return self.reduced_tokens or self.grid[0] * self.grid[1]

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
        return LayerView(
            k, v, position, frame, patch, kind, self.grid, importance, self.frames, None, self.reduced_tokens
        )

    def part(self, kept: Tensor) -> LayerView:
        """The tokens `kept` (..., kept). Their importance goes: it was shared out over another set of tokens."""
        position, frame, kind = (x.gather(-1, kept) for x in (self.position, self.frame, self.kind))
        patch = self.patch.gather(-2, kept[..., None].expand(*kept.shape, 2))
        k, v = rows(self.k, kept), rows(self.v, kept)
        return LayerView(
            k, v, position, frame, patch, kind, self.grid, None, self.frames, None, self.reduced_tokens
        )


def rows(x: Tensor, places: Tensor) -> Tensor:
    """x (..., H, T, D) at `places` (..., n), in all heads the same -> (..., H, n, D).

    As rows of one matrix: gathering number by number takes many times as long. A row is a token with all its heads
    where these stand together in memory, and a GPU copies few long rows faster than many short ones.
    """
    *lead, H, T, D = x.shape
    tokens = x.transpose(-3, -2)  # (..., T, H, D)
    if tokens.is_contiguous():
        first = torch.arange(math.prod(lead), device=x.device).view(*lead, 1) * T
        index = first + places  # (..., n)
        found = tokens.reshape(-1, H * D).index_select(0, index.flatten())
        return found.view(*index.shape, H, D).transpose(-3, -2)
    table = x.reshape(-1, D)  # (... * H * T, D)
    start = torch.arange(math.prod((*lead, H)), device=x.device).view(*lead, H, 1) * T
    index = start + places[..., None, :]  # (..., H, n)
    return table.index_select(0, index.flatten()).view(*index.shape, D)
