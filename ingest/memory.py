"""The encoder's own copy of a bounded memory, at compute precision: per layer its tokens and where they are from.

It is part of the encoder state, saved and restored bit for bit. What a question reads is the stored form of the same
tokens, named by the keep set of the last commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Held, is_meant
from memdb.models.places import Grid, Placing
from memdb.models.window import LayerKV
from memdb.retain.base import Bounded
from memdb.retain.prototypes import Prototypes
from memdb.retain.view import LayerView, StreamEnd, received, rows, sent
from memdb.schemas.keep import Ids, KeepSet, token_ids
from memdb.schemas.recording import Tombstone
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
        k, v = (_stacked([getattr(layer, name) for layer in layers]) for name in ("k", "v"))
        return LayerTokens(
            k, v, *(torch.stack([getattr(layer, name) for layer in layers]) for name in _WORDS)
        )

    def unstacked(self) -> list[LayerTokens]:
        return [LayerTokens(*parts) for parts in zip(*(getattr(self, name) for name in _FIELDS), strict=True)]

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


_FIELDS = tuple(field.name for field in fields(LayerTokens))
_WORDS = _FIELDS[2:]


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    """Keys or values (H, n, D), a layer each -> (L, H, n, D), in memory the heads of a token together."""
    return torch.stack([x.transpose(0, 1) for x in layers]).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What the memory holds, on the host: a layer each, in the order of ids."""

    ids: tuple[Ids, ...]
    positions: tuple[Ids, ...]
    frames: frozenset[int]

    def tokens_from(self, layers: slice, position: int) -> int:
        """How many stand at this position or behind it, as many in each of these layers."""
        counts = {int(np.count_nonzero(own >= position)) for own in self.positions[layers]}
        assert len(counts) == 1, "the newest frames are whole in all layers"
        return counts.pop()


class EncoderMemory:
    """At most the retainer's budget of tokens a layer, after every chunk, and the newest frames where it has two pools.

    Init tokens are apart and always there. Layers that hold equally many tokens stand in one piece from chunk to chunk,
    so that a GPU is asked once and not L times; after a forgetting they may differ, and come together again.

    While a chunk is taken the host never waits for the GPU, which still encodes that chunk: everything is put into its
    queue, and one copy at the end says what has come of it.
    """

    def __init__(self, init: Sequence[LayerKV], retainer: Bounded) -> None:
        self.init = list(init)
        self._retainer = retainer
        self._frames: dict[int, Held] = {}  # of which any layer holds a token, by number
        self._hold([LayerTokens.none(kv) for kv in init])
        self._seen = self._look([])

    @property
    def layers(self) -> list[LayerTokens]:
        return [layer for piece in self._pieces for layer in piece.unstacked()]

    @property
    def kv(self) -> list[LayerKV]:
        return [LayerKV(k, v) for piece in self._pieces for k, v in zip(piece.k, piece.v, strict=True)]

    @property
    def positions(self) -> list[Tensor]:
        return [position for piece in self._pieces for position in piece.position]

    @property
    def frames(self) -> list[Held]:
        """The frames that it holds anything of, oldest first."""
        return [self._frames[number] for number in sorted(self._frames)]

    def _hold(self, layers: Sequence[LayerTokens]) -> None:
        """In one piece where they may stand so, else in a piece each."""
        alike = len({len(layer.id) for layer in layers}) == 1
        groups = [layers] if alike else [[layer] for layer in layers]
        self._pieces = [LayerTokens.stacked(group) for group in groups]  # of one layer or more, stacked

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
        device, count = fresh[0].k.device, sum(len(frame.tokens) for frame in frames)
        words = chunk_words(unit, frames, start, device)
        ids = None if prototypes is None else _prototype_ids(unit, len(frames), device)
        kept: list[LayerTokens] = []
        fits: list[Tensor] = []
        for own, layers in zip(self._pieces, self._layers_of_pieces(), strict=True):
            k, v = (_stacked([getattr(kv, name) for kv in fresh[layers]]) for name in ("k", "v"))
            came = [LayerTokens(k, v, *words)]
            paid = torch.stack(list(heard[layers])) if heard else None
            order, stream = None, None
            if prototypes is None or ids is None:
                behind = partial(self._tokens_from, layers, start, count)
                stream = StreamEnd(start + count, len(frames[-1].tokens), behind)
            else:
                assert paid is not None, "prototypes are means by importance"
                came.append(_of_prototypes(prototypes, ids, layers))
                # What the probe paid to the tokens of its frame together is the importance of a prototype in the round
                # in which it is made (ours).
                paid = torch.cat((paid, prototypes.mass[layers]), -1)
            tokens = own.plus(*came)
            if prototypes is not None:  # a token before a prototype that stands where it does
                order = torch.argsort(tokens.position, dim=-1, stable=True)
            found, fit = self._retained(tokens, paid, order, grid, stream, len(frames[-1].tokens))
            kept.append(found)
            fits.append(fit)
        self._pieces = kept
        self._note(fits)

    def _retained(
        self,
        tokens: LayerTokens,
        importance: Tensor | None,
        order: Tensor | None,
        grid: tuple[int, int],
        stream: StreamEnd | None,
        frame_tokens: int,
    ) -> tuple[LayerTokens, Tensor]:
        """What stays of layers that are stacked, decided in one call; and whether what was chosen could be.

        order (L, T): that of positions, where the tokens stand otherwise. Keys and values are gathered once, by both.
        """
        seen, paid = tokens, importance
        if order is not None:
            seen = tokens.ordered(order, self._retainer.looks)
            paid = None if importance is None else importance.gather(-1, order)
        view = seen.view(grid, paid, len(self._frames), stream, frame_tokens)
        places = self._retainer.choose(view)  # (L, kept)
        most = self._retainer.tokens_max(view)
        assert places.shape[-1] <= most, f"{places.shape[-1]} tokens are kept, of a budget of {most}"
        fits = (places.diff(dim=-1) > 0).all() & ((places >= 0) & (places < view.tokens)).all()
        return tokens.at(places if order is None else order.gather(-1, places)), fits

    def _layers_of_pieces(self) -> list[slice]:
        ends = np.cumsum([len(piece.id) for piece in self._pieces]).tolist()
        return [slice(end - len(piece.id), end) for end, piece in zip(ends, self._pieces, strict=True)]

    def _tokens_from(self, layers: slice, start: int, count: int, position: int) -> int:
        """How many stand at a position or behind it in these layers, with a chunk of `count` tokens from `start` on."""
        return self._seen.tokens_from(layers, position) + min(count, max(0, start + count - position))

    def _note(self, fits: Sequence[Tensor] = ()) -> None:
        """Look at what it holds now, and let go of frames of which nothing is left."""
        self._seen = self._look(fits)
        self._frames = {number: held for number, held in self._frames.items() if number in self._seen.frames}
        if len({piece.id.shape[-1] for piece in self._pieces}) == 1 < len(self._pieces):
            self._hold(self.layers)

    def _look(self, fits: Sequence[Tensor]) -> Snapshot:
        """What it holds, by one copy from the device. fits: whether what retainers chose could be."""
        numbers = sorted(self._frames)
        device = self._pieces[0].id.device
        known = sent(torch.tensor(numbers, dtype=torch.long), device)
        held = torch.zeros(len(numbers) + 1, dtype=torch.long, device=device)
        ids: list[Tensor] = []
        positions: list[Tensor] = []
        for piece in self._pieces:
            mine, order = piece.id.sort(-1)
            ids.append(mine.flatten())
            positions.append(piece.position.gather(-1, order).flatten())
            held.scatter_(-1, torch.searchsorted(known, piece.frame.flatten()), 1)
        fit = torch.stack(list(fits)).all() if fits else torch.ones((), dtype=torch.bool, device=device)
        flat = received(torch.cat((*ids, *positions, held, fit.long()[None])))
        assert flat[-1], "the places of a layer do not ascend, or lie outside"
        sizes = [piece.id.shape[-1] for piece in self._pieces for _ in range(len(piece.id))]
        M, ends = sum(sizes), np.cumsum(sizes)[:-1]
        there = flat[2 * M : 2 * M + len(numbers)].tolist()
        return Snapshot(
            tuple(np.split(flat[:M], ends)),
            tuple(np.split(flat[M : 2 * M], ends)),
            frozenset(number for number, is_held in zip(numbers, there, strict=True) if is_held),
        )

    def forget(self, tombstones: Sequence[Tombstone]) -> None:
        """Let go of the tokens of frames that overlap these spans."""
        gone = [number for number, frame in self._frames.items() if is_meant(frame, tombstones)]
        left = []
        for own in self.layers:
            stays = ~torch.isin(own.frame, torch.tensor(gone, dtype=torch.long, device=own.frame.device))
            left.append(own.at(stays.nonzero()[:, 0]))
        self._hold(left)
        self._note()

    def keep_set(self) -> KeepSet:
        """What it holds, for the commit of the unit that came in last; in the order of ids."""
        return KeepSet(self._seen.ids, self._seen.positions)

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
        layers: list[LayerTokens] = []
        for number, own in enumerate(self.layers):
            parts = [tensors[f"memory.{number}.{name}"].to(device) for name in _FIELDS]
            found = LayerTokens(*parts)
            shapes = {found.k.shape, found.v.shape, (own.k.shape[0], len(found.id), own.k.shape[2])}
            if len(shapes) > 1 or found.k.dtype != own.k.dtype or len({len(part) for part in parts[2:]}) > 1:
                raise ValueError(f"the memory of layer {number} is of another model")
            if any(part.dtype != torch.long or part.ndim != 1 for part in parts[2:]):
                raise ValueError(f"the memory of layer {number} has words that are no numbers")
            layers.append(found)
        self._frames = {int(number): Held(int(a), int(b), int(n)) for number, a, b, n in rows}
        self._hold(layers)
        self._seen = self._look([])


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


def _prototype_ids(unit: int, frames: int, device: torch.device) -> Tensor:
    """Of the prototypes of a unit: blocks of their own behind the unit's frames, one each."""
    return sent(torch.from_numpy(token_ids(unit, frames + np.arange(frames), 0)), device)


def _of_prototypes(made: Prototypes, ids: Tensor, layers: slice) -> LayerTokens:
    """As tokens, in these layers; of the words what is the same in all of them once."""
    merged, kind = (torch.full_like(ids, fill) for fill in (-1, int(BlockKind.PROTOTYPE)))
    k, v, position = made.k[layers], made.v[layers], made.position[layers]
    return LayerTokens(k, v, ids, position, made.frame, merged, kind)
