"""Tokens of a bounded memory as the encoder holds them: keys and values, and where each token is from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from memdb.ingest.frames import SeenFrame
from memdb.models.transfers import sent
from memdb.models.window import LayerKV
from memdb.retain.prototypes import Prototypes
from memdb.retain.view import LayerView, StreamEnd, rows
from memdb.schemas.keep import token_ids
from memdb.schemas.units import BlockKind


@dataclass(eq=False)
class LayerTokens:
    """Tokens of one layer in the order of the stream: k, v (H, M, D) unrotated, the others (M,) int64. Of several
    layers that hold equally many, `stacked`, with one more dimension in front.

    In memory the heads of a token stand together, see `rows`.

    id: see schemas/keep.py. position: at which they were encoded. frame, kind: see LayerView. patch: raster index in
    the frame, -1 for what was merged.
    """

    k: Tensor
    v: Tensor
    id: Tensor
    position: Tensor
    frame: Tensor
    patch: Tensor
    kind: Tensor

    @classmethod
    def none(cls, like: LayerKV) -> LayerTokens:
        words = torch.empty(0, dtype=torch.long, device=like.k.device)
        return cls(like.k[:, :0], like.v[:, :0], *([words] * 5))

    @property
    def kv(self) -> LayerKV:
        return LayerKV(self.k, self.v)

    @staticmethod
    def stacked(layers: Sequence[LayerTokens]) -> LayerTokens:
        kv = layers_together([layer.kv for layer in layers])
        return LayerTokens(
            kv.k, kv.v, *(torch.stack([getattr(layer, name) for layer in layers]) for name in _WORDS)
        )

    def unstacked(self) -> list[LayerTokens]:
        return [LayerTokens(*parts) for parts in zip(*(getattr(self, name) for name in FIELDS), strict=True)]

    def at(self, places: Tensor) -> LayerTokens:
        """The tokens at these places (..., n)."""
        words = (getattr(self, name).gather(-1, places) for name in _WORDS)
        return LayerTokens(rows(self.k, places), rows(self.v, places), *words)

    def ordered(self, order: Tensor, looks: bool) -> LayerTokens:
        """All of them in another order (..., M). Keys and values of no use to who does not look are NaN: to move them
        takes longer than everything else.
        """
        if looks:
            return self.at(order)
        words = (getattr(self, name).gather(-1, order) for name in _WORDS)
        k, v = (x.new_full((), math.nan).expand(x.shape) for x in (self.k, self.v))
        return LayerTokens(k, v, *words)

    def plus(self, *others: LayerTokens) -> LayerTokens:
        """With other tokens behind them, whose words may be (n,) for all layers."""
        lead = self.id.shape[:-1]
        both = (
            torch.cat([getattr(part, name).expand(*lead, -1) for part in (self, *others)], -1)
            for name in _WORDS
        )
        k, v = (
            torch.cat([x.transpose(-3, -2) for x in parts], -3).transpose(-3, -2)
            for parts in zip(*((part.k, part.v) for part in (self, *others)), strict=True)
        )
        return LayerTokens(k, v, *both)

    def view(
        self,
        grid: tuple[int, int],
        importance: Tensor | None,
        frames: int | None = None,
        stream: StreamEnd | None = None,
        reduced_tokens: int = 0,
    ) -> LayerView:
        """As a retainer sees them, of one layer or of several that are stacked. grid: rows and columns of a frame.
        The others: what the host knows, see LayerView.
        """
        patch = self.patch[..., None]  # (..., M, 1)
        place = torch.cat((patch // grid[1], patch % grid[1]), -1).where(patch >= 0, -1)
        words = (self.position, self.frame, place, self.kind)
        return LayerView(self.k, self.v, *words, grid, importance, frames, stream, reduced_tokens)


FIELDS = tuple(field.name for field in fields(LayerTokens))
_WORDS = FIELDS[2:]


def layers_together(layers: Sequence[LayerKV]) -> LayerKV:
    """Keys and values (H, n, D), a layer each -> (L, H, n, D), in memory the heads of a token together."""
    return LayerKV(*(_together([getattr(kv, name) for kv in layers]) for name in ("k", "v")))


def _together(layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.transpose(0, 1) for x in layers]).transpose(1, 2)


def _heads_together(x: Tensor) -> Tensor:
    """The same (..., H, n, D), in memory the heads of a token together: what is put together wants to lie alike."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def chunk_words(
    unit: int, frames: Sequence[SeenFrame], start: int, device: torch.device
) -> tuple[Tensor, ...]:
    """What a chunk's tokens are, beside keys and values: each frame is a block of the unit, in raster order.

    Of a reduced frame the patches are those that its tokens stood at; a centre that CTR blended counts as its own
    patch, of which most of it is (ours). What was merged of several frames stands for no patch (R6).
    """
    sizes = [len(frame.tokens) for frame in frames]
    block = np.repeat(np.arange(len(frames)), sizes)
    within = np.concatenate([np.arange(size) for size in sizes])
    number = np.repeat([frame.number for frame in frames], sizes)
    kind = np.repeat([int(frame.kind) for frame in frames], sizes)
    position = start + np.arange(len(block))
    words = np.stack((token_ids(unit, block, within), position, number, kind)).astype(np.int64)
    known, patches = torch.from_numpy(words), [_patches(frame) for frame in frames]
    if all(patch.device.type == "cpu" for patch in patches):  # in one piece with the others
        *others, kinds, patch = sent(torch.cat((known, torch.cat(patches)[None])), device).unbind()
    else:
        *others, kinds = sent(known, device).unbind()
        patch = torch.cat([patch if patch.device == device else sent(patch, device) for patch in patches])
    return (*others, patch, kinds)


def _patches(frame: SeenFrame) -> Tensor:
    """(tokens,) raster numbers in the frame, -1 where a token is of several frames."""
    if frame.count > 1:
        return torch.full((len(frame.tokens),), -1)
    own = torch.arange(len(frame.tokens)) if frame.raster is None else frame.raster
    return own.to(torch.long)


def prototype_ids(unit: int, frames: int, device: torch.device) -> Tensor:
    """Of the prototypes of a unit: blocks of their own behind the unit's frames, one each."""
    return sent(torch.from_numpy(token_ids(unit, frames + np.arange(frames), 0)), device)


def of_prototypes(made: Prototypes, ids: Tensor, layers: slice) -> LayerTokens:
    """As tokens, in these layers; of the words what is the same in all of them once."""
    merged, kind = (torch.full_like(ids, fill) for fill in (-1, int(BlockKind.PROTOTYPE)))
    k, v = (_heads_together(x[layers]) for x in (made.k, made.v))
    return LayerTokens(k, v, ids, made.position[layers], made.frame, merged, kind)
