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
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.units import Bytes
from memdb.slice_batch import SliceBatch


class Unpacker:
    """Unpacks what one recording stored: each kind (codec, tokens, scale width) in one strided call."""

    def __init__(self, spec: RecordingSpec) -> None:
        self._encoded = DTYPES[spec.dtype]
        self._heads, self._head_size = spec.model.shape.kv_heads, spec.model.shape.head_size
        self._codecs: dict[str, Codec] = {}

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
        if len(kinds) == 1 and whole.all():  # the ordinary case
            k, v = self._unpack(kinds[0][0], kinds[0][2], device, dtype)
            return LayerKV(_joined(k), _joined(v))
        tokens = np.zeros(len(whole), np.int64)
        for kind, own, _ in kinds:
            tokens[own] = kind.tokens
        tokens[~whole] = 0
        if not tokens.any():
            return None
        ends = np.cumsum(tokens)
        H, D = self._heads, self._head_size
        K, V = (torch.empty(H, int(ends[-1]), D, dtype=dtype, device=device) for _ in range(2))
        for kind, own, raw in kinds:
            good = whole[own]
            if not good.any():
                continue
            k, v = self._unpack(kind, raw if good.all() else raw[good], device, dtype)
            begins = ends[own[good]] - kind.tokens
            places = torch.from_numpy((begins[:, None] + np.arange(kind.tokens)).ravel()).to(device)
            K.index_copy_(1, places, _joined(k))
            V.index_copy_(1, places, _joined(v))
        return LayerKV(K, V)

    def _unpack(
        self, kind: Kind, raw: Bytes, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        codec = self._codecs.get(kind.codec)
        if codec is None:
            codec = self._codecs[kind.codec] = codecs.codec(kind.codec)
        return unpack_slices(
            codec,
            raw,
            dtype=self._encoded,
            scale_bytes=kind.scale_bytes,
            H=self._heads,
            T=kind.tokens,
            D=self._head_size,
            device=device,
            out=dtype,
        )


def _joined(x: Tensor) -> Tensor:
    """(n, H, T, D) -> (H, n*T, D), time order kept; never a view of what was read."""
    n, H, T, D = x.shape
    joined = x.permute(1, 0, 2, 3).reshape(H, n * T, D)
    return joined.clone() if joined.data_ptr() == x.data_ptr() else joined
