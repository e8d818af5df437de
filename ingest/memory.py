"""The encoder's own copy of a bounded memory, at compute precision: per layer its tokens and where they are from.

It is part of the encoder state, saved and restored bit for bit. What a question reads is the stored form of the same
tokens, named by the keep set of the last commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Held, is_meant
from memdb.ingest.layer_tokens import (
    FIELDS,
    LayerTokens,
    chunk_words,
    of_prototypes,
    prototype_ids,
)
from memdb.ingest.snapshot import Asked
from memdb.models.places import Grid, Placing
from memdb.models.transfers import Received, sent
from memdb.models.window import LayerKV
from memdb.retain.base import Bounded
from memdb.retain.prototypes import Prototypes
from memdb.retain.view import StreamEnd
from memdb.schemas.keep import KeepSet
from memdb.schemas.recording import Tombstone


class EncoderMemory:
    """At most the retainer's budget of tokens a layer, after every chunk, and the newest frames where it has two pools.

    Init tokens are apart and always there. Layers that hold equally many tokens stand in one piece from chunk to chunk,
    so that a GPU is asked once and not L times; after a forgetting they may differ, and come together again.

    While a chunk is taken the host never waits for the GPU, which still encodes that chunk: everything is put into its
    queue, and one copy at the end says what has come of it. Whoever wants to know that (`keep_set`, the next chunk)
    waits for it, and the host does other things until then.
    """

    def __init__(self, init: Sequence[LayerKV], retainer: Bounded) -> None:
        self.init = list(init)
        self._retainer = retainer
        self._frames: dict[int, Held] = {}  # of which any layer holds a token, by number
        self._in_order = True  # ids rise with the stream, as long as there are no prototypes
        self._hold([LayerTokens.none(kv) for kv in init])
        self._look([])

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
        self.settle()
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
        fresh: LayerKV,
        prototypes: Prototypes | None,
        heard: Sequence[Tensor],
        start: int,
        grid: tuple[int, int],
    ) -> None:
        """A chunk comes in, and what the retainer does not choose goes.

        fresh: the chunk's keys and values, all layers together (L, H, C, D). prototypes: one of each of its frames, in
        all layers, where the retainer makes them. heard: what the probe paid to memory and chunk, empty without one.
        start: the stream position of its first token. grid: rows and columns of a frame.
        """
        self.settle()
        self._in_order = self._in_order and prototypes is None
        for frame in frames:
            self._frames[frame.number] = Held(frame.start_ns, frame.end_ns, len(frame.tokens))
        device, count = fresh.k.device, sum(len(frame.tokens) for frame in frames)
        words = chunk_words(unit, frames, start, device)
        ids = None if prototypes is None else prototype_ids(unit, len(frames), device)
        kept: list[LayerTokens] = []
        fits: list[Tensor] = []
        for own, layers in zip(self._pieces, self._layers_of_pieces(), strict=True):
            came = [LayerTokens(fresh.k[layers], fresh.v[layers], *words)]
            paid = torch.stack(list(heard[layers])) if heard else None
            order, stream = None, None
            if prototypes is None or ids is None:
                behind = partial(self._tokens_from, layers, start, count)
                stream = StreamEnd(start + count, len(frames[-1].tokens), behind)
            else:
                assert paid is not None, "prototypes are means by importance"
                came.append(of_prototypes(prototypes, ids, layers))
                # What the probe paid to the tokens of its frame together is the importance of a prototype in the round
                # in which it is made (ours).
                paid = torch.cat((paid, prototypes.mass[layers]), -1)
            tokens = own.plus(*came)
            if prototypes is not None:  # a token before a prototype that stands where it does
                # What was held stands before all that came.
                M = own.id.shape[-1]
                new = torch.argsort(tokens.position[..., M:], dim=-1, stable=True) + M
                order = torch.cat((torch.arange(M, device=device).expand(len(new), M), new), -1)
            found, fit = self._retained(tokens, paid, order, grid, stream, len(frames[-1].tokens))
            kept.append(found)
            fits.append(fit)
        self._pieces = kept
        self._look(fits)

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

    def _look(self, fits: Sequence[Tensor]) -> None:
        """Ask the device what it holds now. fits: whether what retainers chose could be."""
        numbers = sorted(self._frames)
        device = self._pieces[0].id.device
        known = sent(torch.tensor(numbers, dtype=torch.long), device)
        held = torch.zeros(len(numbers) + 1, dtype=torch.long, device=device)
        ids: list[Tensor] = []
        positions: list[Tensor] = []
        for piece in self._pieces:
            mine, position = piece.id, piece.position
            if not self._in_order:
                mine, order = mine.sort(-1)
                position = position.gather(-1, order)
            ids.append(mine.flatten())
            positions.append(position.flatten())
            held.scatter_(-1, torch.searchsorted(known, piece.frame.flatten()), 1)
        fit = torch.stack(list(fits)).all() if fits else torch.ones((), dtype=torch.bool, device=device)
        sizes = [piece.id.shape[-1] for piece in self._pieces for _ in range(len(piece.id))]
        flat = torch.cat((*ids, *positions, held, fit.long()[None]))
        self._asked: Asked | None = Asked(Received(flat), tuple(sizes), tuple(numbers))
        if len(set(sizes)) == 1 < len(self._pieces):
            self._hold(self.layers)

    def settle(self) -> None:
        """Hear what the device answered, and let go of frames of which nothing is left."""
        if self._asked is None:
            return
        self._seen, self._asked = self._asked.answer(), None
        for number in self._seen.gone:
            del self._frames[number]

    def forget(self, tombstones: Sequence[Tombstone]) -> None:
        """Let go of the tokens of frames that overlap these spans."""
        self.settle()
        gone = [number for number, frame in self._frames.items() if is_meant(frame, tombstones)]
        left = []
        for own in self.layers:
            stays = ~torch.isin(own.frame, torch.tensor(gone, dtype=torch.long, device=own.frame.device))
            left.append(own.at(stays.nonzero()[:, 0]))
        self._hold(left)
        self._look([])

    def keep_set(self) -> KeepSet:
        """What it holds, for the commit of the unit that came in last; in the order of ids."""
        self.settle()
        return KeepSet(self._seen.ids, self._seen.positions)

    # The exact byte form

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, own in enumerate(self.layers):
            for name in FIELDS:
                yield f"memory.{number}.{name}", getattr(own, name)

    def frame_rows(self) -> list[list[int]]:
        self.settle()
        return [[number, held.start_ns, held.end_ns, held.tokens] for number, held in self._frames.items()]

    def restore(
        self, tensors: Mapping[str, Tensor], rows: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        """Inverse of `tensors` and `frame_rows`. Raises KeyError, ValueError for what is none of this memory."""
        layers: list[LayerTokens] = []
        for number, own in enumerate(self.layers):
            parts = [tensors[f"memory.{number}.{name}"].to(device) for name in FIELDS]
            found = LayerTokens(*parts)
            shapes = {found.k.shape, found.v.shape, (own.k.shape[0], len(found.id), own.k.shape[2])}
            if len(shapes) > 1 or found.k.dtype != own.k.dtype or len({len(part) for part in parts[2:]}) > 1:
                raise ValueError(f"the memory of layer {number} is of another model")
            if any(part.dtype != torch.long or part.ndim != 1 for part in parts[2:]):
                raise ValueError(f"the memory of layer {number} has words that are no numbers")
            layers.append(found)
        self._frames = {int(number): Held(int(a), int(b), int(n)) for number, a, b, n in rows}
        self._in_order = all(bool((layer.id.diff() > 0).all()) for layer in layers)
        self._hold(layers)
        self._look([])


def grid_of(placing: Placing, frame_tokens: int) -> tuple[int, int]:
    """Rows and columns of a frame's tokens: the placing's own, else a square where they make one, else one row."""
    if isinstance(placing, Grid):
        return placing.rows, placing.columns
    side = math.isqrt(frame_tokens)
    return (side, side) if side * side == frame_tokens else (1, frame_tokens)
