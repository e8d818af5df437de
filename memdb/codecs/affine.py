"""int8 and int4: keys per channel over the block, values per token (after KIVI, arXiv 2402.02750).

Position-free keys have outlier channels, so a scale per channel keeps them apart from the rest: 3 to 5 times
less error than a scale per token at the same number of bits (measured).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.codecs.base import get, put
from memdb.codecs.layout import SliceLayout, affine_layout
from memdb.codecs.plain import out_of_range
from memdb.schemas.errors import CodecError

_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Affine:
    """code = round((x - min) / scale) in 0..2^bits - 1, with min and scale as they are stored.

    Codes are taken against the rounded minimum and scale, so an entry is off by at most half a step, plus the
    rounding of the minimum where it lies at the very end of the range. A constant channel has scale 0.
    """

    name: str
    bits: int

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    def scale_bytes(self, k: Tensor, v: Tensor) -> int:
        largest = max(float(k.abs().max()), float(v.abs().max())) if k.numel() else 0.0
        return 2 if 2 * largest < _FP16_MAX else 4

    def layout(self, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int) -> SliceLayout:
        return affine_layout(self.bits, scale_bytes, H, T, D)

    def pack(self, k: Tensor, v: Tensor, scale_bytes: int) -> Tensor:
        n, H, T, D = k.shape
        layout = self.layout(k.dtype, scale_bytes, H, T, D)
        width = _width(scale_bytes)
        packed = torch.zeros(n, layout.slice_bytes, dtype=torch.uint8, device=k.device)
        for part, values, over, along in ((0, k, 2, 2), (3, v, 3, 3)):
            codes, scale, low = self._quantise(values.float(), over, width)
            # What is not finite, and a range that overflows, both show here: no need to look at every value.
            if not bool((scale.isfinite() & low.isfinite()).all()):
                raise CodecError(out_of_range(self.name, bool(values.isfinite().all())))
            put(packed, layout, part, self._join(codes, along))
            put(packed, layout, part + 1, scale)
            put(packed, layout, part + 2, low)
        return packed

    def unpack(
        self, packed: Tensor, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int, out: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        layout = self.layout(dtype, scale_bytes, H, T, D)
        width, per_byte = _width(scale_bytes), 8 // self.bits
        k_codes = self._split(get(packed, layout, 0, torch.uint8, H, -(-T // per_byte), D), 2, T)
        v_codes = self._split(get(packed, layout, 3, torch.uint8, H, T, -(-D // per_byte)), 3, D)
        k = _restore(k_codes, get(packed, layout, 1, width, H, 1, D), get(packed, layout, 2, width, H, 1, D))
        v = _restore(v_codes, get(packed, layout, 4, width, H, T, 1), get(packed, layout, 5, width, H, T, 1))
        return k.to(out), v.to(out)

    def select(
        self, packed: Tensor, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int, kept: Tensor
    ) -> Tensor:
        layout, smaller = (self.layout(dtype, scale_bytes, H, tokens, D) for tokens in (T, len(kept)))
        width, per_byte = _width(scale_bytes), 8 // self.bits
        out = torch.zeros(len(packed), smaller.slice_bytes, dtype=torch.uint8, device=packed.device)
        k_codes = self._split(get(packed, layout, 0, torch.uint8, H, -(-T // per_byte), D), 2, T)
        put(out, smaller, 0, self._join(k_codes.index_select(2, kept), 2))
        for part in (1, 2):  # of a channel of K: one for all its tokens
            put(out, smaller, part, get(packed, layout, part, width, H, 1, D))
        v_codes = get(packed, layout, 3, torch.uint8, H, T, -(-D // per_byte))
        put(out, smaller, 3, v_codes.index_select(2, kept))
        for part in (4, 5):
            put(out, smaller, part, get(packed, layout, part, width, H, T, 1).index_select(2, kept))
        return out

    def _quantise(self, values: Tensor, over: int, width: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """values (n, H, T, D) fp32 -> codes uint8, scale and minimum with dimension `over` of size 1."""
        low = values.amin(over, keepdim=True).to(width)
        scale = ((values.amax(over, keepdim=True) - low.float()).clamp(min=0) / self.levels).to(width)
        step = torch.where(scale > 0, scale.float(), 1.0)
        codes = ((values - low.float()) / step).round_().clamp_(0, self.levels)
        return torch.where(scale > 0, codes, 0.0).to(torch.uint8), scale, low

    def _join(self, codes: Tensor, along: int) -> Tensor:
        """Two 4-bit codes a byte along a dimension, the even one in the low nibble; odd ends padded with 0."""
        if self.bits == 8:
            return codes
        if codes.shape[along] % 2:
            pad = list(codes.shape)
            pad[along] = 1
            codes = torch.cat((codes, codes.new_zeros(pad)), along)
        pairs = codes.reshape(*codes.shape[:along], -1, 2, *codes.shape[along + 1 :])
        return pairs.select(along + 1, 0) | (pairs.select(along + 1, 1) << 4)

    def _split(self, joined: Tensor, along: int, size: int) -> Tensor:
        if self.bits == 8:
            return joined
        pairs = torch.stack((joined & 15, joined >> 4), along + 1)
        return pairs.flatten(along, along + 1).narrow(along, 0, size)


def _restore(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return torch.addcmul(low.float(), codes.float(), scale.float())


def _width(scale_bytes: int) -> torch.dtype:
    return torch.float16 if scale_bytes == 2 else torch.float32
