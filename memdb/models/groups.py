"""The context of encoding over what is stored: [init | older groups, dequantised | new frames] (StreamingTOM, arXiv
2510.18269, stage 3).

A group is one frame's tokens. What a new frame sees of older groups is what the codec keeps of them, so that
quantisation noise enters the encoding, and the window can be read back from the store.

Three ways of it, by profile:
- `fixed` (ours): a frame sees every older frame as it is stored, those of its own batch too, and itself as it is. So
  what is encoded does not depend on where batches are cut. Positions are relative: the init tokens stand directly
  before the oldest group in view.
- `paper`: the frames of a batch see each other as they are. Positions are relative.
- `code`: as `paper`, but a group keeps the positions at which it was written, and each batch is written behind as many
  tokens as the window holds. Once the window is full every batch has the same positions: how far apart two of them
  were is lost.

Where we differ from the released code in all of them: keys are quantised before they are rotated, in whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from memdb.codecs.base import Codec
from memdb.models.attention import softmax_attention
from memdb.models.places import Grid, Placing
from memdb.models.rotary import Rotary, turn
from memdb.models.window import LayerKV


class GroupContext:
    """Init tokens, and the newest groups that fit into `window` tokens, whole ones, as they are stored.

    `held`: those groups, a layer each, unrotated. `stands` (held tokens,): where they were written, of profile `code`.
    `frames`: how many came since the window was fresh. `widths`: per layer the scale width so far, as the pack of a
    unit decides it. `fresh`: keys and values of the last forward at compute precision, a layer each.
    """

    def __init__(
        self,
        rotary: Rotary,
        init: Sequence[LayerKV],
        none: Sequence[LayerKV],
        codec: Codec,
        window: int,
        *,
        profile: str,
        placing: Placing,
        widths: dict[int, int],
    ) -> None:
        """`none`: a layer each, keys and values of no tokens."""
        self._rotary, self._codec, self._window, self._placing = rotary, codec, window, placing
        self.init = list(init)
        self.keeps_places, self._alone = profile == "code", profile == "fixed"
        self.held, self.stands, self.frames = list(none), torch.zeros(0, dtype=torch.long), 0
        self.widths = dict(widths)
        self.raster = torch.zeros(
            0, dtype=torch.long
        )  # of held tokens: at which place of its frame each stands
        self.fresh: list[LayerKV] = []
        self._next: list[LayerKV] = []
        self._group = self._frame = 0  # tokens of each frame, and places that it has

    @property
    def held_tokens(self) -> int:
        return self.held[0].tokens

    @property
    def place(self) -> int:
        """The position behind everything that is in view, at which `code` writes what comes next."""
        return self.init[0].tokens + self.held_tokens

    def take_back(self, held: Sequence[LayerKV], stands: Tensor, raster: Tensor | None, frames: int) -> None:
        """The window as it was, from what is stored. `raster`: None where frames are whole, or have no grid."""
        self.held, self.stands, self.frames = list(held), stands, frames
        self.raster = torch.zeros_like(stands) if raster is None else raster

    def expect_frames(self, sizes: Sequence[int], raster: Tensor | None = None) -> None:
        """The coming forward feeds frames of so many tokens each: as many as in all frames before.

        raster (F, G): at which places of their frames these stand, where a reducer left some only.
        """
        self._group = sizes[0]
        self._whole = raster is None or not isinstance(self._placing, Grid)
        self._frame = (
            self._placing.tokens if isinstance(self._placing, Grid) and not self._whole else sizes[0]
        )
        own = torch.arange(self._group).repeat(len(sizes)) if raster is None else raster.flatten().cpu()
        self._rasters = torch.cat((self.raster, own))
        assert set(sizes) == {self._group}, "a reducer gives every frame of a recording as many tokens"
        assert self.held_tokens % self._group == 0, "groups of another size are in the window"
        self._kept_tokens = self._window // self._group * self._group

    def begin(self, tokens: int) -> None:
        n, w, G = self.init[0].tokens, self.held_tokens, self._group
        self.fresh, self._next = [], []
        if self.keeps_places:
            self._numbers = torch.cat((self.stands, self.place + torch.arange(tokens)))
        else:
            self._numbers = n + self.frames * G - w + torch.arange(w + tokens)
        nth = (self._numbers - n) // G  # of the stream's frames, or of those that stood in view in `code`
        within = (self._numbers - n) % G if self._whole else self._rasters
        ids = self._placing.at(
            n, n + nth * self._frame + within, self._frame
        )  # (w + tokens,) or (3, w + tokens)
        begins = self._placing.at(n, n + nth * self._frame, self._frame)
        self._later = torch.zeros_like(ids)
        if not self.keeps_places:  # a window's positions never grow: they count from its oldest frame
            first = self._placing.at(n, torch.tensor([n]), self._frame)
            ids = ids - (begins[..., :1] - first)
            self._later = begins - begins[..., :1]  # on a grid in time alone
        self._top = max(int(ids.max()) + 1, n + int(self._later.max()) + 1)
        self._turns = self._rotary.rows(ids.to(self.init[0].k.device), self._top)  # (w + tokens, R) each

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        w, T, (cos, sin) = self.held_tokens, q.shape[1], self._turns
        self.fresh.append(LayerKV(k, v))
        stored = self.held[layer].plus(self._as_stored(layer, k, v))  # (H, w + T, D)
        near = LayerKV(turn(stored.k, cos, sin), stored.v)
        own = LayerKV(turn(k, cos[w:], sin[w:]), v)
        q = turn(q, cos[w:], sin[w:])
        outs, step = [], self._group if self._alone else T
        for start in range(0, T, step):
            stop, first = start + step, max(0, w + start - self._kept_tokens)
            seen = near.part(first, w + start).plus(own.part(start, stop))
            seen = self._init_before(layer, first).plus(seen)
            mask = torch.ones(step, seen.tokens, dtype=torch.bool, device=q.device)
            mask = mask.tril(seen.tokens - step)
            outs.append(softmax_attention(q[:, start:stop], seen.k, seen.v, scale, mask))
        self._next.append(stored.part(max(0, stored.tokens - self._kept_tokens)))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def end(self, tokens: int) -> None:
        self.held = self._next
        self.stands = self._numbers[len(self._numbers) - self.held_tokens :]
        self.raster = self._rasters[len(self._rasters) - self.held_tokens :]
        self.frames += tokens // self._group

    def _init_before(self, layer: int, first: int) -> LayerKV:
        """The init tokens, rotated to stand before token `first` of what is known."""
        init = self.init[layer]
        ids = torch.arange(init.tokens) + self._later[..., first : first + 1]  # (n,) or (3, n)
        return LayerKV(self._rotary.rotate_at(init.k, ids.to(init.k.device), self._top), init.v)

    def _as_stored(self, layer: int, k: Tensor, v: Tensor) -> LayerKV:
        """New keys and values (H, T, D) as the codec gives them back, each group on its own."""
        H, T, D = k.shape
        G, codec, dtype = self._group, self._codec, k.dtype
        ks, vs = (x.reshape(H, T // G, G, D).transpose(0, 1).contiguous() for x in (k, v))  # (F, H, G, D)
        # A layer widens with the first group that needs it, and stays wide.
        needed: list[int] = codec.scale_bytes(ks, vs).tolist()
        own = list(accumulate(needed, max, initial=self.widths.get(layer, 0)))[1:]
        self.widths[layer] = own[-1]
        parts, start = [], 0
        for wide, run in groupby(own):
            stop = start + len(list(run))
            packed = codec.pack(ks[start:stop], vs[start:stop], wide)
            parts.append(codec.unpack(packed, dtype, wide, H, G, D, dtype))
            start = stop
        back = (torch.cat(part).transpose(0, 1).reshape(H, T, D) for part in zip(*parts, strict=True))
        return LayerKV(*back)
