"""raw (the dtype of encoding, bit for bit), fp16 and bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.codecs.base import get, put
from memdb.codecs.layout import SliceLayout, plain_layout
from memdb.schemas.errors import CodecError


@dataclass(frozen=True)
class Plain:
    name: str
    stored: str | None  # a torch dtype's name; None: as encoded

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        found: torch.dtype = dtype if self.stored is None else getattr(torch, self.stored)
        return found

    def scale_bytes(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros(len(k), dtype=torch.long)

    def layout(self, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int) -> SliceLayout:
        return plain_layout(self._dtype(dtype).itemsize, H, T, D)

    def pack(self, k: Tensor, v: Tensor, scale_bytes: int) -> Tensor:
        n, H, T, D = k.shape
        stored = self._dtype(k.dtype)
        layout = self.layout(k.dtype, scale_bytes, H, T, D)
        packed = torch.zeros(n, layout.slice_bytes, dtype=torch.uint8, device=k.device)
        for part, values in ((0, k), (3, v)):
            kept = values.to(stored)
            if not bool(kept.isfinite().all()):
                raise CodecError(out_of_range(self.name, bool(values.isfinite().all())))
            put(packed, layout, part, kept)
        return packed

    def unpack(
        self, packed: Tensor, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int, out: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        layout = self.layout(dtype, scale_bytes, H, T, D)
        k, v = (get(packed, layout, part, self._dtype(dtype), H, T, D).to(out) for part in (0, 3))
        return k, v

    def select(
        self, packed: Tensor, dtype: torch.dtype, scale_bytes: int, H: int, T: int, D: int, kept: Tensor
    ) -> Tensor:
        stored = self._dtype(dtype)
        layout, smaller = (self.layout(dtype, scale_bytes, H, tokens, D) for tokens in (T, len(kept)))
        out = torch.zeros(len(packed), smaller.slice_bytes, dtype=torch.uint8, device=packed.device)
        for part in (0, 3):
            put(out, smaller, part, get(packed, layout, part, stored, H, T, D).index_select(2, kept))
        return out


def out_of_range(name: str, finite: bool) -> str:
    """What to do about values that a codec cannot hold; `finite` says whether they were finite at all."""
    if finite:
        wider = "bf16, raw or int4" if name == "fp16" else "raw"
        return f"keys or values exceed the range of codec {name!r}: ingest with --codec {wider}"
    return "the model gave keys or values that are not finite: try --dtype float32, or check the checkpoint"
