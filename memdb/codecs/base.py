"""What a codec does: keys and values of n slices to bytes and back, on the CPU or a GPU alike."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from memdb.codecs.layout import SliceLayout


class Codec(Protocol):
    @property
    def name(self) -> str: ...

    def scale_bytes(self, k: Tensor, v: Tensor) -> Tensor:
        """k and v (n, H, T, D) -> (n,) int64, on whichever device: how wide scales each slice needs, 2 (fp16), 4 where
        fp16 overflows, 0 without scales.
        """
        ...

    def layout(self, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int) -> SliceLayout:
        """`dtype` is the dtype of encoding."""
        ...

    def pack(self, k: Tensor, v: Tensor, scale_bytes: int) -> Tensor:
        """k and v (n, H, T, D) -> (n, slice_bytes) uint8. Raises CodecError for values that it cannot hold."""
        ...

    def unpack(
        self, packed: Tensor, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int, out: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(n, slice_bytes) uint8 -> k and v (n, H, T, D) in `out`; `dtype` is the dtype of encoding."""
        ...

    def select(
        self, packed: Tensor, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int, kept: Tensor
    ) -> Tensor:
        """The slices of the tokens `kept` (m,) alone: (n, slice_bytes of m tokens) uint8.

        What is stored of a token is gathered and never quantised anew: its values come out bit for bit.
        """
        ...


def put(packed: Tensor, layout: SliceLayout, part: int, values: Tensor) -> None:
    """Write `values` (n, ...) of any dtype into one part of every slice."""
    size, offset = layout.sizes[part], layout.offsets[part]
    packed[:, offset : offset + size] = values.contiguous().view(len(packed), -1).view(torch.uint8)


def get(packed: Tensor, layout: SliceLayout, part: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """One part of every slice as (n, *shape) of `dtype`; a view where the memory allows."""
    size, offset = layout.sizes[part], layout.offsets[part]
    return packed[:, offset : offset + size].view(dtype).reshape(len(packed), *shape)
