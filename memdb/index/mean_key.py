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

from memdb.models.frame_encoder import FrameEncoder
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.schemas.errors import CodecError


@dataclass(frozen=True)
class MeanKey:
    def open(self, model: VideoModel) -> FrameEncoder | None:
        """What puts frames into one space with questions, where the index keeps more than keys."""
        return None

    def keys(self, layers: Sequence[Sequence[LayerKV | None]]) -> npt.NDArray[np.float16]:
        """Blocks of a unit, per layer, each (H, T, D) -> (L, blocks, H*D); zeros where a layer holds no block."""
        held = [
            (layer, block, kv.k)
            for layer, row in enumerate(layers)
            for block, kv in enumerate(row)
            if kv is not None
        ]
        H, _, D = held[0][2].shape
        keys = np.zeros((len(layers), len(layers[0]), H * D), np.float16)
        at: list[int] = []
        which: list[int] = []
        found: list[Tensor] = []
        for tokens in sorted({k.shape[1] for _, _, k in held}):  # all of one size at once, of all layers
            own = [item for item in held if item[2].shape[1] == tokens]
            means = torch.stack([k for _, _, k in own]).mean(2, dtype=torch.float32).flatten(1)
            at += [layer for layer, _, _ in own]
            which += [block for _, block, _ in own]
            found.append(means.to(torch.float16))  # accumulated in fp32, stored in fp16
        keys[at, which] = torch.cat(found).cpu().numpy()  # a GPU is waited for once
        if not np.isfinite(keys).all():
            raise CodecError("a block's mean key exceeds fp16: try --dtype float32, or check the checkpoint")
        return keys


def fold(q: Tensor, kv_heads: int) -> Tensor:
    """Queries (Hq, T, D), unrotated -> the query vector (H*D,): mean over tokens, sum over each group (P2, P3)."""
    Hq, _, D = q.shape
    mean = q.float().mean(1)  # (Hq, D)
    return mean.view(kv_heads, Hq // kv_heads, D).sum(1).flatten()
