"""The representative key of a block: the mean of its unrotated keys (methods.md P1; ReKV, StreamKV, StreamingTOM).

Heads are kept apart, so a query is folded over its group by sum and compared with H * D numbers, which equals
comparing the expanded vectors (P3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.models.window import LayerKV
from memdb.schemas.errors import CodecError


@dataclass(frozen=True)
class MeanKey:
    def keys(self, layers: Sequence[Sequence[LayerKV | None]]) -> npt.NDArray[np.float16]:
        """Blocks of a unit, per layer, each (H, T, D) -> (L, blocks, H*D); zeros where a layer holds no block."""
        blank = next(kv.k for row in layers for kv in row if kv is not None)[:, :1]
        rows = [
            torch.stack([(blank * 0 if kv is None else kv.k).float().mean(1).flatten() for kv in row])
            for row in layers
        ]
        keys = torch.stack(rows).to(torch.float16)  # accumulated in fp32, stored in fp16
        if not bool(keys.isfinite().all()):
            raise CodecError("a block's mean key exceeds fp16: try --dtype float32, or check the checkpoint")
        return keys.cpu().numpy()


def fold(q: Tensor, kv_heads: int) -> Tensor:
    """Queries (Hq, T, D), unrotated -> the query vector (H*D,): mean over tokens, sum over each group (P2, P3)."""
    Hq, _, D = q.shape
    mean = q.float().mean(1)  # (Hq, D)
    return mean.view(kv_heads, Hq // kv_heads, D).sum(1).flatten()
