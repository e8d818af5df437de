"""The encoder's own copy of a bounded memory, at compute precision: per layer its tokens and where they are from.

It is part of the encoder state, saved and restored bit for bit. What a question reads is the stored form of the same
tokens, named by the keep set of the last commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Held, is_meant
from memdb.models.places import Grid, Placing
from memdb.models.window import LayerKV
from memdb.retain.base import Bounded
from memdb.retain.prototypes import Prototypes
from memdb.retain.view import LayerView, rows
from memdb.schemas.keep import KeepSet, token_ids
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import BlockKind


@dataclass(eq=False)
class LayerTokens:
    """Tokens of one layer in the order of the stream: k, v (H, M, D) unrotated, the others (M,) int64. Of several
    layers that hold equally many, `stacked`, with one more dimension in front.

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
        return LayerTokens(*(torch.stack([getattr(layer, name) for layer in layers]) for name in _FIELDS))

    def unstacked(self) -> list[LayerTokens]:
        return [LayerTokens(*parts) for parts in zip(*(getattr(self, name) for name in _FIELDS), strict=True)]

    def at(self, places: Tensor) -> LayerTokens:
        """The tokens at these places (..., n)."""
        words = (getattr(self, name).gather(-1, places) for name in _WORDS)
        return LayerTokens(rows(self.k, places), rows(self.v, places), *words)

    def plus(self, k: Tensor, v: Tensor, words: Sequence[Tensor]) -> LayerTokens:
        """With other tokens behind them. k, v (..., H, n, D); words: the others, (n,) for all layers or (..., n)."""
        lead = self.id.shape[:-1]
        both = (
            torch.cat((getattr(self, name), new.expand(*lead, -1)), -1)
            for name, new in zip(_WORDS, words, strict=True)
        )
        return LayerTokens(torch.cat((self.k, k), -2), torch.cat((self.v, v), -2), *both)

    def view(self, grid: tuple[int, int], importance: Tensor | None) -> LayerView:
        """As a retainer sees them, of one layer or of several that are stacked. grid: rows and columns of a frame."""
        patch = self.patch[..., None]  # (..., M, 1)
        place = torch.cat((patch // grid[1], patch % grid[1]), -1).where(patch >= 0, -1)
        return LayerView(self.k, self.v, self.position, self.frame, place, self.kind, grid, importance)


_FIELDS = tuple(field.name for field in fields(LayerTokens))
_WORDS = _FIELDS[2:]


class EncoderMemory:
    """At most the retainer's budget of tokens a layer, after every chunk, and the newest frames where it has two pools.

    Init tokens are apart and always there.
    """

    def __init__(self, init: Sequence[LayerKV], retainer: Bounded) -> None:
        self.init = list(init)
        self.layers = [LayerTokens.none(kv) for kv in init]
        self._retainer = retainer
        self._frames: dict[int, Held] = {}  # of which any layer holds a token, by number

    @property
    def kv(self) -> list[LayerKV]:
        return [layer.kv for layer in self.layers]

    @property
    def positions(self) -> list[Tensor]:
        return [layer.position for layer in self.layers]

    @property
    def frames(self) -> list[Held]:
        """The frames that it holds anything of, oldest first."""
        return [self._frames[number] for number in sorted(self._frames)]

    def take(
        self,
        unit: int,
        frames: Sequence[SeenFrame],
        fresh: Sequence[LayerKV],
        prototypes: Prototypes | None,
        heard: Sequence[Tensor],
        start: int,
        grid: tuple[int, int],
    ) -> None:
        """A chunk comes in, and what the retainer does not choose goes.

        fresh: the chunk's keys and values, a layer each. prototypes: one of each of its frames, in all layers, where
        the retainer makes them.
        heard: what the probe paid to memory and chunk, empty without one. start: the stream position of its first
        token. grid: rows and columns of a frame.
        """
        for frame in frames:
            self._frames[frame.number] = Held(frame.start_ns, frame.end_ns, len(frame.tokens))
        words = chunk_words(unit, frames, start, fresh[0].k.device)
        made = None if prototypes is None else (prototypes, _prototype_words(unit, frames, prototypes.frame))
        if len({len(layer.id) for layer in self.layers}) == 1:  # then a GPU is asked once and not L times
            k, v = (torch.stack([getattr(kv, name) for kv in fresh]) for name in ("k", "v"))
            paid = torch.stack(list(heard)) if heard else None
            came = LayerTokens.stacked(self.layers).plus(k, v, words)
            self.layers = self._retained(came, paid, made, grid).unstacked()
        else:
            self.layers = [
                self._retained(
                    own.plus(new.k, new.v, words),
                    heard[layer] if heard else None,
                    None if made is None else (made[0].layer(layer), made[1]),
                    grid,
                )
                for layer, (own, new) in enumerate(zip(self.layers, fresh, strict=True))
            ]
        self._let_go()

    def _retained(
        self,
        tokens: LayerTokens,
        importance: Tensor | None,
        made: tuple[Prototypes, tuple[Tensor, Tensor, Tensor]] | None,
        grid: tuple[int, int],
    ) -> LayerTokens:
        """What stays of one layer, or of several that are stacked, which is decided in one call."""
        if made is not None:
            assert importance is not None, "prototypes are means by importance"
            tokens, importance = _with_prototypes(tokens, importance, *made)
        view = tokens.view(grid, importance)
        places = self._retainer.choose(view)  # (..., kept)
        most = self._retainer.tokens_max(view)
        assert places.shape[-1] <= most, f"{places.shape[-1]} tokens are kept, of a budget of {most}"
        fits = (places.diff(dim=-1) > 0).all() & ((places >= 0) & (places < view.tokens)).all()
        assert bool(fits), "the places of a layer do not ascend, or lie outside"
        return tokens.at(places)

    def forget(self, tombstones: Sequence[Tombstone]) -> None:
        """Let go of the tokens of frames that overlap these spans."""
        gone = [number for number, frame in self._frames.items() if is_meant(frame, tombstones)]
        for layer, own in enumerate(self.layers):
            left = ~torch.isin(own.frame, torch.tensor(gone, dtype=torch.long, device=own.frame.device))
            self.layers[layer] = own.at(left.nonzero()[:, 0])
        self._let_go()

    def _let_go(self) -> None:
        held = set(torch.unique(torch.cat([own.frame for own in self.layers])).tolist())
        self._frames = {number: frame for number, frame in self._frames.items() if number in held}

    def keep_set(self) -> KeepSet:
        """What it holds, for the commit of the unit that came in last; in the order of ids."""
        sizes = [len(own.id) for own in self.layers]
        words = [*(own.id for own in self.layers), *(own.position for own in self.layers)]
        flat = torch.cat(words).cpu().numpy().reshape(2, -1)  # off a GPU at once, not layer by layer
        ids, positions = [], []
        for mine, at in zip(*(np.split(row, np.cumsum(sizes)[:-1]) for row in flat), strict=True):
            order = np.argsort(mine)
            ids.append(mine[order])
            positions.append(at[order])
        return KeepSet(tuple(ids), tuple(positions))

    # The exact byte form

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, own in enumerate(self.layers):
            for name in _FIELDS:
                yield f"memory.{number}.{name}", getattr(own, name)

    def frame_rows(self) -> list[list[int]]:
        return [[number, held.start_ns, held.end_ns, held.tokens] for number, held in self._frames.items()]

    def restore(
        self, tensors: Mapping[str, Tensor], rows: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        """Inverse of `tensors` and `frame_rows`. Raises KeyError, ValueError for what is none of this memory."""
        for number, own in enumerate(self.layers):
            parts = [tensors[f"memory.{number}.{name}"].to(device) for name in _FIELDS]
            found = LayerTokens(*parts)
            shapes = {found.k.shape, found.v.shape, (own.k.shape[0], len(found.id), own.k.shape[2])}
            if len(shapes) > 1 or found.k.dtype != own.k.dtype or len({len(part) for part in parts[2:]}) > 1:
                raise ValueError(f"the memory of layer {number} is of another model")
            self.layers[number] = found
        self._frames = {int(number): Held(int(a), int(b), int(n)) for number, a, b, n in rows}


def grid_of(placing: Placing, frame_tokens: int) -> tuple[int, int]:
    """Rows and columns of a frame's tokens: the placing's own, else a square where they make one, else one row."""
    if isinstance(placing, Grid):
        return placing.rows, placing.columns
    side = math.isqrt(frame_tokens)
    return (side, side) if side * side == frame_tokens else (1, frame_tokens)


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
    patch = torch.cat([_patches(frame).to(device) for frame in frames])
    *others, kinds = torch.from_numpy(words).to(device).unbind()
    return (*others, patch, kinds)


def _patches(frame: SeenFrame) -> Tensor:
    """(tokens,) raster numbers in the frame, -1 where a token is of several frames."""
    if frame.count > 1:
        return torch.full((len(frame.tokens),), -1)
    own = torch.arange(len(frame.tokens)) if frame.raster is None else frame.raster
    return own.to(torch.long)


def _prototype_words(unit: int, frames: Sequence[SeenFrame], frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, patches and kinds of prototypes of these frames: blocks of their own behind the unit's frames, one each."""
    block = {own.number: len(frames) + place for place, own in enumerate(frames)}
    ids = token_ids(unit, np.array([block[number] for number in frame.tolist()], np.int64), 0)
    merged, kind = (torch.full_like(frame, fill) for fill in (-1, int(BlockKind.PROTOTYPE)))
    return torch.from_numpy(ids).to(frame.device), merged, kind


def _with_prototypes(
    tokens: LayerTokens, importance: Tensor, made: Prototypes, words: tuple[Tensor, Tensor, Tensor]
) -> tuple[LayerTokens, Tensor]:
    """The candidates with prototypes among them, by position, a token before a prototype that stands where it does.

    What the probe paid to the tokens of its frame together is the importance of a prototype in the round in which
    it is made (ours).
    """
    ids, merged, kind = words
    whole = tokens.plus(made.k, made.v, (ids, made.position, made.frame, merged, kind))
    order = torch.argsort(whole.position, dim=-1, stable=True)
    return whole.at(order), torch.cat((importance, made.mass), -1).gather(-1, order)
