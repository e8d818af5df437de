"""The context of encoding: init tokens and the last W tokens of the stream (ReKV, arXiv 2503.00540, stage 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memdb.models.attention import ceiling_scores, sink_attention, softmax_attention
from memdb.models.places import LINE, Placing
from memdb.models.rotary import Rotary, turn


@dataclass
class LayerKV:
    """Unrotated keys and values of one layer, each (H, tokens, D)."""

    k: Tensor
    v: Tensor

    @property
    def tokens(self) -> int:
        return int(self.k.shape[1])

    def plus(self, other: LayerKV) -> LayerKV:
        return LayerKV(torch.cat((self.k, other.k), 1), torch.cat((self.v, other.v), 1))

    def part(self, start: int, stop: int | None = None) -> LayerKV:
        return LayerKV(self.k[:, start:stop], self.v[:, start:stop])


@dataclass
class WindowContext:
    """Each query sees the init tokens and every token less than `window` before it, itself included.

    Positions are relative to the window, so they never grow: a stream position of 10^7 gives the keys of
    position 0. Init tokens never stand further away than `window - 1`. `walk_tokens` bounds the queries that
    are attended at once; it changes memory and speed, nothing else. `counts_init_twice` is the released
    code's slip in the step in which the init tokens leave the window (profile `code`, which therefore walks
    in steps of one frame).

    Where a token has three ids (`placing` is a grid), what is fed is frames in one endless run, after
    `expect_frames`, and the ids of the tokens in the window are kept as they were given. To rotate, time is counted
    from the oldest of them, rows and columns stay. A query that is too far from an init token stands at its own ids,
    none above the grid's ceiling.
    """

    rotary: Rotary
    window: int
    walk_tokens: int = 1024
    counts_init_twice: bool = False
    init: list[LayerKV] = field(default_factory=list)
    local: list[LayerKV] = field(default_factory=list)
    seen: int = 0  # tokens since the window was fresh, init included; capped where it stops to matter
    fresh: list[LayerKV] = field(default_factory=list)  # keys and values of the last forward, a layer each
    placing: Placing = LINE
    frames: int = 0  # of a grid: frames since the window was fresh
    ids: Tensor | None = None  # of a grid: (3, tokens) of the tokens in `local`, on the CPU
    _coming: Tensor | None = None  # (3, T) of the coming forward
    # In a forward over a grid: ids (3, window and new tokens) and their rows of the tables, once for all layers.
    _turned_by: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @property
    def init_tokens(self) -> int:
        return self.init[0].tokens if self.init else 0

    def expect_frames(self, sizes: Sequence[int]) -> None:
        """The coming forward feeds the next frames of the stream, of so many tokens each."""
        self._coming = self.placing.streamed(self.init_tokens, self.frames, sizes)
        if self._coming is not None:
            self.frames += len(sizes)

    def begin(self, tokens: int) -> None:
        self.fresh = []
        if self._coming is None:
            assert self.seen == 0 or self.placing == LINE, "a grid is told which frames come"
            return
        assert self._coming.shape[1] == tokens, "frames of other sizes came than were expected"
        self.ids = self._coming if self.ids is None else torch.cat((self.ids, self._coming), 1)
        counted = self.ids.clone()  # (3, known tokens)
        counted[0] -= self.ids[0, 0] - self.init_tokens
        ids = counted.to(self.rotary.inv_freq.device)
        self._turned_by = (ids, self.rotary.rows(ids, int(counted.max()) + 1))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        new = LayerKV(k, v)
        self.fresh.append(new)
        if self.seen == 0:
            return self._causal(q, new, scale)
        known = self.local[layer].plus(new) if layer < len(self.local) else new
        out = self._walk(layer, q, known, scale)
        keep = min(known.tokens, self.window)
        kept = known.part(known.tokens - keep)
        if layer < len(self.local):
            self.local[layer] = kept
        else:
            self.local.append(kept)
        return out

    def end(self, tokens: int) -> None:
        if self.seen == 0:
            self.init = self.fresh
        if self.ids is not None:
            self.ids = self.ids[:, -self.window :]
        self._coming = self._turned_by = None
        self.seen = min(self.seen + tokens, self._saturated)

    @property
    def _saturated(self) -> int:
        """From here on every query sees every init token at the ceiling and a full window."""
        return 2 * self.window + self.init_tokens

    def _causal(self, q: Tensor, new: LayerKV, scale: float) -> Tensor:
        T = new.tokens
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        return softmax_attention(self.rotary.rotate(q, 0), self.rotary.rotate(new.k, 0), new.v, scale, mask)

    def _walk(self, layer: int, q: Tensor, known: LayerKV, scale: float) -> Tensor:
        """Attend in steps of whole queries; keys are rotated once, at their place behind the init tokens."""
        T = q.shape[1]
        before = known.tokens - T  # local tokens older than this forward
        q_near = self._rotate(q, before)  # (Hq, T, D)
        local = LayerKV(self._rotate(known.k, 0), known.v)
        outs = []
        for start in range(0, T, self.walk_tokens):
            stop = min(T, start + self.walk_tokens)
            first = max(0, before + start - self.window + 1)  # the oldest key that a query of this step sees
            keys = local.part(first, before + stop)
            q_index = torch.arange(before + start, before + stop, device=q.device)
            k_index = torch.arange(first, before + stop, device=q.device)
            distance = q_index[:, None] - k_index[None]  # (queries, keys)
            mask = (distance >= 0) & (distance < self.window)
            step = slice(start, stop)
            at = (self.seen + start, before + start)
            outs.append(self._step(layer, q[:, step], q_near[:, step], keys, mask, *at, scale))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def _rotate(self, x: Tensor, index: int) -> Tensor:
        """x (H, T, D), tokens from `index` of the window on, at their places."""
        if self._turned_by is None:
            return self.rotary.rotate(x, self.init_tokens + index)
        cos, sin = self._turned_by[1]
        stop = index + x.shape[1]
        return turn(x, cos[index:stop], sin[index:stop])

    def _rotate_far(self, q: Tensor, index: int) -> Tensor:
        """q (Hq, T, D) where init tokens see it that are further away than the window reaches."""
        ceiling = self.placing.ceiling(self.window)
        if self._turned_by is None:
            ids = torch.full((q.shape[1],), ceiling, device=q.device)
        else:
            ids = self._turned_by[0][:, index : index + q.shape[1]].clamp(max=ceiling)
        return self.rotary.rotate_at(q, ids, ceiling + 1)

    def _step(
        self,
        layer: int,
        q: Tensor,
        q_near: Tensor,
        keys: LayerKV,
        mask: Tensor,
        place: int,
        index: int,
        scale: float,
    ) -> Tensor:
        """One step whose first query is token `index` of the window, at `place` counted from the fresh one."""
        n, T, W = self.init_tokens, q.shape[1], self.window
        init = self.init[layer]
        if place + T <= W and n:  # nothing has left the window: init tokens are ordinary tokens
            init_mask = mask.new_ones(T, n)
            k = torch.cat((self.rotary.rotate(init.k, 0), keys.k), 1)
            v = torch.cat((init.v, keys.v), 1)
            return softmax_attention(q_near, k, v, scale, torch.cat((init_mask, mask), 1))
        if not n:
            return softmax_attention(q_near, keys.k, keys.v, scale, mask)
        places = torch.arange(place, place + T, device=q.device)
        near = places[:, None] - torch.arange(n, device=q.device)[None] < W  # (T, n)
        q_far = self._rotate_far(q, index)
        k_near = self.rotary.rotate(init.k, 0)
        if not self.counts_init_twice:
            # Known without a look at `near`, for which a GPU would have to come to rest in every layer.
            some = near if place - (n - 1) < W else None
            scores = ceiling_scores(q_near, some, q_far, self.rotary.rest(init.k), k_near)
            return sink_attention(q_near, keys.k, keys.v, scale, mask, scores, init.v)
        moved = init.part(0, min(n, place + T - W))  # as many as this step pushed out of the window
        scores = ceiling_scores(q_near, None, q_far, self.rotary.rest(moved.k), k_near)
        k = torch.cat((k_near, keys.k), 1)
        v = torch.cat((init.v, keys.v), 1)
        return sink_attention(q_near, k, v, scale, torch.cat((near, mask), 1), scores, moved.v)
