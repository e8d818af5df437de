"""From the slices of a read to the keys and values of a layer, whatever codecs and sizes its blocks have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb import codecs
from memdb.codecs.base import Codec
from memdb.codecs.pack import unpack_slices
from memdb.models.load import DTYPES
from memdb.models.window import LayerKV
from memdb.pieces import Kind
from memdb.schemas.errors import CodecError, RecipeError
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.units import Bytes
from memdb.slice_batch import SliceBatch

CPU_VALUES = 1 << 19  # of keys, and as many of values


class Unpacker:
    """Unpacks what one recording stored: each kind (codec, tokens, scale width) in one strided call."""

    def __init__(self, spec: RecordingSpec) -> None:
        self._encoded = DTYPES[spec.dtype]
        self._heads, self._head_size = spec.model.shape.kv_heads, spec.model.shape.head_size
        self._codecs: dict[str, Codec] = {}
        self._fits: dict[Kind, bool] = {}

    def join(
        self,
        batch: SliceBatch,
        whole: npt.NDArray[np.bool_],
        device: torch.device,
        dtype: torch.dtype,
        first: int = 0,
    ) -> LayerKV | None:
        """The slices in `whole` (n,) one after another, (H, tokens, D), in the order asked for. None without any.

        They are those of the batch from `first` on.
        """
        kinds = batch.kinds(first, first + len(whole))
        tokens = np.zeros(len(whole), np.int64)
        for kind, own, _ in kinds:
            tokens[own] = kind.tokens
        tokens[~whole] = 0
        if not tokens.any():
            return None
        ends = np.cumsum(tokens)
        shape = (self._heads, int(ends[-1]), self._head_size)
        K, V = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        for kind, own, raw in kinds:
            good = whole[own]
            if good.all() and len(kinds) == 1:  # the ordinary case
                self._into(K, V, kind, raw)
            elif good.any():
                mine = (self._heads, int(good.sum()) * kind.tokens, self._head_size)
                k, v = (torch.empty(mine, dtype=dtype, device=device) for _ in range(2))
                self._into(k, v, kind, raw if good.all() else raw[good])
                begins = ends[own[good]] - kind.tokens
                places = torch.from_numpy((begins[:, None] + np.arange(kind.tokens)).ravel()).to(device)
                K.index_copy_(1, places, k)
                V.index_copy_(1, places, v)
        return LayerKV(K, V)

    def fits(self, kind: Kind) -> bool:
        """Whether slices of a kind have the size that its codec gives to so many tokens.

        Others are a hostile writer's, under right checksums: nothing may be allocated by their tokens.
        """
        known = self._fits.get(kind)
        if known is None:
            try:
                size = (
                    self._codec(kind.codec)
                    .layout(self._encoded, kind.scale_bytes, self._heads, kind.tokens, self._head_size)
                    .slice_bytes
                )
            except (CodecError, RecipeError):  # of no file, or of no codec
                size = -1
            known = self._fits[kind] = size == kind.raw_bytes and kind.scale_bytes in (0, 2, 4)
        return known

    def _into(self, K: Tensor, V: Tensor, kind: Kind, raw: Bytes) -> None:
        """Slices of one kind (n, raw_bytes) to K and V (H, n*T, D), never views of what was read.

        On a GPU in one call; on a CPU in steps whose values stay in its cache, which takes half the time.
        """
        H, D, T, n = self._heads, self._head_size, kind.tokens, len(raw)
        step = max(1, CPU_VALUES // max(1, H * T * D)) if K.device.type == "cpu" else n
        for first in range(0, n, step):
            k, v = self._unpack(kind, raw[first : first + step], K.device, K.dtype)
            K.view(H, n, T, D)[:, first : first + step] = k.transpose(0, 1)
            V.view(H, n, T, D)[:, first : first + step] = v.transpose(0, 1)

    def _unpack(
        self, kind: Kind, raw: Bytes, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return unpack_slices(
            self._codec(kind.codec),
            raw,
            dtype=self._encoded,
            scale_bytes=kind.scale_bytes,
            H=self._heads,
            T=kind.tokens,
            D=self._head_size,
            device=device,
            out=dtype,
        )

    def _codec(self, name: str) -> Codec:
        codec = self._codecs.get(name)
        if codec is None:
            codec = self._codecs[name] = codecs.codec(name)
        return codec
