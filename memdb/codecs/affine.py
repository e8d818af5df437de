"""int8 and int4: keys per channel over the block, values per token (after KIVI, arXiv 2402.02750).

Position-free keys have outlier channels, so a scale per channel keeps them apart from the rest: 3 to 5 times
less error than a scale per token at the same number of bits (measured).

oqm and oqm2: keys and values both per channel over the group, in 4 or 2 bits (StreamingTOM, arXiv 2510.18269).
The group is the block. Where it differs from the released code: codes are taken against scale and minimum as they
are stored, a constant channel has scale 0 (its floor of 1e-8 is 0 in fp16, and the codes are undefined), and a
group that does not fill its last byte is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.codecs.base import get, put
from memdb.codecs.layout import SliceLayout, affine_layout, oqm_layout
from memdb.codecs.plain import out_of_range
from memdb.schemas.errors import CodecError

_FP16_MAX = 65504.0
CHANNEL, TOKEN = 2, 3  # dimensions of (n, H, T, D): the one over which a range is taken


@dataclass(frozen=True)
class Affine:
    """code = round((x - min) / scale) in 0..2^bits - 1, with min and scale as they are stored.

    Codes are taken against the rounded minimum and scale, so an entry is off by at most half a step, plus the
    rounding of the minimum where it lies at the very end of the range. A constant channel has scale 0.
    """

    name: str
    bits: int
    values_over: int = TOKEN  # what shares a scale in V: the channels of a token, or the tokens of a channel

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    def scale_bytes(self, k: Tensor, v: Tensor) -> Tensor:
        largest = torch.maximum(k.abs().amax((1, 2, 3)), v.abs().amax((1, 2, 3))).double()
        return torch.where(2 * largest < _FP16_MAX, 2, 4)

    def layout(self, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int) -> SliceLayout:
        layout = affine_layout if self.values_over == TOKEN else oqm_layout
        return layout(self.bits, scale_bytes, H, T, D)

    def pack(self, k: Tensor, v: Tensor, scale_bytes: int) -> Tensor:
        n, H, T, D = k.shape
        layout = self.layout(k.dtype, scale_bytes, H, T, D)
        width = _width(scale_bytes)
        packed = torch.zeros(n, layout.slice_bytes, dtype=torch.uint8, device=k.device)
        for part, values, over in ((0, k, CHANNEL), (3, v, self.values_over)):
            codes, scale, low = self._quantise(values.float(), over, width)
            # What is not finite, and a range that overflows, both show here: no need to look at every value.
            if not bool((scale.isfinite() & low.isfinite()).all()):
                raise CodecError(out_of_range(self.name, bool(values.isfinite().all())))
            put(packed, layout, part, self._join(codes, over))
            put(packed, layout, part + 1, scale)
            put(packed, layout, part + 2, low)
        return packed

    def unpack(
        self, packed: Tensor, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int, out: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        layout = self.layout(dtype, scale_bytes, H, T, D)
        width = _width(scale_bytes)
        k, v = (
            _restore(
                self._codes(packed, layout, part, over, H, T, D),
                get(packed, layout, part + 1, width, *_ranges(over, H, T, D)),
                get(packed, layout, part + 2, width, *_ranges(over, H, T, D)),
            )
            for part, over in ((0, CHANNEL), (3, self.values_over))
        )
        return k.to(out), v.to(out)

    def select(
        self, packed: Tensor, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int, kept: Tensor
    ) -> Tensor:
        layout, smaller = (self.layout(dtype, scale_bytes, H, tokens, D) for tokens in (T, len(kept)))
        width = _width(scale_bytes)
        out = torch.zeros(len(packed), smaller.slice_bytes, dtype=torch.uint8, device=packed.device)
        for part, over in ((0, CHANNEL), (3, self.values_over)):
            codes = self._codes(packed, layout, part, over, H, T, D)
            put(out, smaller, part, self._join(codes.index_select(2, kept), over))
            for extra in (part + 1, part + 2):
                ranges = get(packed, layout, extra, width, *_ranges(over, H, T, D))
                # of a channel: one for all its tokens
                put(out, smaller, extra, ranges if over == CHANNEL else ranges.index_select(2, kept))
        return out

    def _codes(
        self, packed: Tensor, layout: SliceLayout, part: int, over: int, H: int, T: int, D: int
    ) -> Tensor:
        """(n, H, T, D) uint8 of one part."""
        shape, per_byte = [H, T, D], 8 // self.bits
        size = shape[over - 1]
        shape[over - 1] = -(-size // per_byte)
        return self._split(get(packed, layout, part, torch.uint8, *shape), over, size)

    def _quantise(self, values: Tensor, over: int, width: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """values (n, H, T, D) fp32 -> codes uint8, scale and minimum with dimension `over` of size 1."""
        low = values.amin(over, keepdim=True).to(width)
        scale = ((values.amax(over, keepdim=True) - low.float()).clamp(min=0) / self.levels).to(width)
        step = torch.where(scale > 0, scale.float(), 1.0)
        codes = ((values - low.float()) / step).round_().clamp_(0, self.levels)
        return torch.where(scale > 0, codes, 0.0).to(torch.uint8), scale, low

    def _join(self, codes: Tensor, along: int) -> Tensor:
        """As many codes a byte along a dimension as there is room for, the first in the lowest bits; the end is
        padded with 0."""
        per_byte = 8 // self.bits
        if missing := -codes.shape[along] % per_byte:
            pad = list(codes.shape)
            pad[along] = missing
            codes = torch.cat((codes, codes.new_zeros(pad)), along)
        whole = codes.reshape(*codes.shape[:along], -1, per_byte, *codes.shape[along + 1 :])
        joined = whole.select(along + 1, 0)
        for place in range(1, per_byte):
            joined = joined | (whole.select(along + 1, place) << (place * self.bits))
        return joined

    def _split(self, joined: Tensor, along: int, size: int) -> Tensor:
        if self.bits == 8:
            return joined
        places = [(joined >> shift) & self.levels for shift in range(0, 8, self.bits)]
        return torch.stack(places, along + 1).flatten(along, along + 1).narrow(along, 0, size)


def _ranges(over: int, H: int, T: int, D: int) -> tuple[int, int, int]:
    """The shape of the scales and minima, (H, 1, D) or (H, T, 1)."""
    return (H, 1, D) if over == CHANNEL else (H, T, 1)


def _restore(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return torch.addcmul(low.float(), codes.float(), scale.float())


def _width(scale_bytes: int) -> torch.dtype:
    return torch.float16 if scale_bytes == 2 else torch.float32
