"""The context of answering: a cache rebuilt from blocks, which may differ from layer to layer, and then grows.

Every token has a place of its own in each layer; who sees whom is decided by its order alone, so blocks that
differ per layer, text that is put between blocks, and a window over a long context are one mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.models.attention import ceiling_scores, sink_attention, softmax_attention
from memdb.models.places import LINE, Next, Places, Placing
from memdb.models.rotary import Rotary
from memdb.models.window import LayerKV
from memdb.retain.attention import attention_rows


@dataclass
class Placed:
    """One layer's cache: rotated keys and values (H, capacity, D), places (capacity,), of which `used` count.

    `place` is the order of the tokens and never repeats; by what they were turned need not be kept. `next` is
    the next place (see Next). Room is added by doubling.
    """

    k: Tensor
    v: Tensor
    place: Tensor
    used: int
    next: Next

    def add(self, k: Tensor, v: Tensor, places: Places) -> None:
        T = k.shape[1]
        if self.used + T > self.k.shape[1]:
            self._grow(max(256, T, self.k.shape[1]))
        self.k[:, self.used : self.used + T] = k
        self.v[:, self.used : self.used + T] = v
        self.place[self.used : self.used + T] = places.order
        self.used += T
        end = places.end
        self.next = Next(max(self.next.order, end.order), max(self.next.id, end.id))

    def _grow(self, room: int) -> None:
        H, _, D = self.k.shape
        self.k = torch.cat((self.k[:, : self.used], self.k.new_empty(H, room, D)), 1)
        self.v = torch.cat((self.v[:, : self.used], self.v.new_empty(H, room, D)), 1)
        self.place = torch.cat((self.place[: self.used], self.place.new_zeros(room)))


class AttentionProbe:
    """Sums the attention that the last row of each forward pays to the tokens placed in [start, stop).

    Only these rows are computed, beside the fused attention (rLiVS, arXiv 2510.17364: the last prompt token and
    every generated token; mean over rows, heads and the layers that are named).
    """

    def __init__(self, layers: Sequence[int], start: int, stop: int) -> None:
        self.layers = frozenset(layers)
        self.start, self.stop = start, stop
        self.total: Tensor | None = None  # (stop - start,), fp32
        self.rows = 0

    def observe(self, layer: int, q_last: Tensor, k: Tensor, place: Tensor, scale: float) -> None:
        """q_last (Hq, D) and k (H, S, D), rotated; place (S,)."""
        if layer not in self.layers:
            return
        if k.is_cuda:
            row = attention_rows(q_last[:, None], k, scale)[:, 0].mean(0)  # (S,)
        else:  # sums in another order, which recordings made on a CPU depend on
            k = k.repeat_interleave(q_last.shape[0] // k.shape[0], 0)  # (Hq, S, D)
            row = (
                torch.einsum("hd,hsd->hs", q_last.float(), k.float()).mul_(scale).softmax(-1).mean(0)
            )  # (S,)
        count = self.stop - self.start
        inside = (place >= self.start) & (place < self.stop)
        slot = torch.where(inside, place - self.start, count)  # the last takes all others
        heard = torch.zeros(count + 1, device=row.device).scatter_(0, slot, row)[:count]
        self.total = heard if self.total is None else self.total + heard
        self.rows += 1

    def mean(self) -> Tensor:
        """Mean attention a token of the span received, (stop - start,), fp32."""
        if self.total is None:
            raise RuntimeError("the probe saw no forward")
        return self.total / self.rows


class CacheContext:
    """[init | blocks at consecutive places | whatever is fed next], a list of tokens per layer.

    The cache is rotated once, when it is built; after that only new keys are. `window` limits the view over a
    long context as ReKV does (init tokens at the ceiling W - 1, everything else less than W before the query);
    None sees everything.
    """

    def __init__(
        self,
        rotary: Rotary,
        init: Sequence[LayerKV],
        blocks: Sequence[LayerKV | None],
        *,
        window: int | None = None,
        places: Sequence[Places] | None = None,
        placing: Placing = LINE,
    ) -> None:
        """`places`: per layer, of its block tokens, room between blocks included; without, consecutive as text is."""
        self.rotary = rotary
        self.window = window
        self.placing = placing
        self.init = list(init)
        self.probe: AttentionProbe | None = None
        self.layers: list[Placed] = []
        self._incoming: list[Places] | None = None
        for layer, (head, tail) in enumerate(zip(init, blocks, strict=True)):
            whole = head if tail is None else head.plus(tail)
            self._hold(whole, None if places is None else places[layer].after(head.tokens))

    def _hold(self, whole: LayerKV, places: Places | None = None) -> None:
        """Rotate one layer's tokens to their places, consecutive ones unless said, and keep them."""
        if places is None:
            places = Places.text(Next(0, 0), whole.tokens, whole.k.device)
        k = self.rotary.rotate_at(whole.k, places.ids, places.end.id) if whole.tokens else whole.k
        self.layers.append(Placed(k, whole.v, places.order, whole.tokens, places.end))

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, layer by layer."""
        return [layer.used for layer in self.layers]

    def place_next(self, places: Sequence[Places]) -> None:
        """Put the tokens of the coming forward at given places, a layer each."""
        self._incoming = list(places)

    def begin(self, tokens: int) -> None:
        pass

    def end(self, tokens: int) -> None:
        self._incoming = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        held = self.layers[layer]
        T = q.shape[1]
        if self._incoming is not None:
            places = self._incoming[layer]
        else:
            places = Places.text(held.next, T, q.device)
        q_near = self.rotary.rotate_at(q, places.ids, places.end.id)
        held.add(self.rotary.rotate_at(k, places.ids, places.end.id), v, places)
        keys = held.k[:, : held.used]
        if self.probe is not None:
            self.probe.observe(layer, q_near[:, -1], keys, held.place[: held.used], scale)
        if self.window is not None and places.end.order > self.window:
            return self._windowed(layer, q, q_near, places, scale)
        mask = None
        if T > 1 or self._incoming is not None:
            mask = held.place[None, : held.used] <= places.order[:, None]
        return softmax_attention(q_near, keys, held.v[:, : held.used], scale, mask)

    def _windowed(self, layer: int, q: Tensor, q_near: Tensor, places: Places, scale: float) -> Tensor:
        held, init, W, place = self.layers[layer], self.init[layer], self.window, places.order
        assert W is not None
        n = init.tokens
        distance = place[:, None] - held.place[None, n : held.used]
        mask = (distance >= 0) & (distance < W)
        k, v = held.k[:, n : held.used], held.v[:, n : held.used]
        if not n:
            return softmax_attention(q_near, k, v, scale, mask)
        near = place[:, None] - held.place[None, :n] < W
        ceiling = self.placing.ceiling(W)
        q_far = self.rotary.rotate_at(q, places.ids.clamp(max=ceiling), ceiling + 1)
        some = near if bool(near.any()) else None
        scores = ceiling_scores(q_near, some, q_far, self.rotary.rest(init.k), held.k[:, :n])
        return sink_attention(q_near, k, v, scale, mask, scores, init.v)


class RetrievalContext(CacheContext):
    """Runs a question's tokens layer by layer, each layer asking `fetch` for the blocks that it wants to see.

    `fetch(layer, q)` gets that layer's unrotated queries (Hq, T, D) and returns its blocks' keys and values, or
    None. Deeper layers see what shallower ones brought in (ReKV, arXiv 2503.00540, stage 7). The question
    leaves none of its own keys behind: after the forward this is the cache [init | retrieved].
    `seat(layer, start)` gives the places of what a layer fetched, behind `start` init tokens; on a line it may be
    left out.
    """

    def __init__(
        self,
        rotary: Rotary,
        init: Sequence[LayerKV],
        fetch: Callable[[int, Tensor], LayerKV | None],
        *,
        window: int | None = None,
        seat: Callable[[int, int], Places] | None = None,
        placing: Placing = LINE,
    ) -> None:
        super().__init__(rotary, [], [], window=window, placing=placing)
        self._seat = seat
        self.init = list(init)
        self.found: list[LayerKV | None] = []
        self._fetch: Callable[[int, Tensor], LayerKV | None] | None = fetch

    def end(self, tokens: int) -> None:
        super().end(tokens)
        self._fetch = None  # from here on this is an ordinary cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self._fetch is None:
            return super().attend(layer, q, k, v, scale)
        found = self._fetch(layer, q)
        self.found.append(found)
        head = self.init[layer]
        if found is None or self._seat is None:
            self._hold(head if found is None else head.plus(found))
        else:
            self._hold(head.plus(found), self._seat(layer, head.tokens).after(head.tokens))
        held = self.layers[layer]
        used, next_place = held.used, held.next
        out = super().attend(layer, q, k, v, scale)
        held.used, held.next = used, next_place
        return out
