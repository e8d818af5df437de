"""The representative key of a block: the mean of its unrotated keys (methods.md P1; ReKV, StreamKV, StreamingTOM).

Heads are kept apart, so a query is folded over its group by sum and compared with H * D numbers, which equals
comparing the expanded vectors (P3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.models.frame_encoder import FrameEncoder
from memdb.models.protocol import VideoModel
from memdb.models.transfers import Received, sent, together
from memdb.models.window import LayerKV
from memdb.schemas.errors import CodecError


@dataclass(frozen=True, eq=False)
class Means:
    """Mean keys on their way from a device: flat, and behind them the largest of their absolute values."""

    flat: Received
    shape: tuple[int, int, int]  # layers, blocks, numbers of a key


@dataclass(frozen=True)
class MeanKey:
    def open(self, model: VideoModel) -> FrameEncoder | None:
        """What puts frames into one space with questions, where the index keeps more than keys."""
        return None

    def keys(self, layers: Sequence[Sequence[LayerKV | None]]) -> npt.NDArray[np.float16]:
        """Blocks of a unit, per layer, each (H, T, D) -> (L, blocks, H*D); zeros where a layer holds no block."""
        return self.checked(self.means(layers))

    def means(self, layers: Sequence[Sequence[LayerKV | None]]) -> Means:
        """`keys` on their way from the device: put into its queue, and not waited for."""
        blocks = [kv for row in layers for kv in row]
        keys = [kv.k for kv in blocks if kv is not None]
        alike = len(keys) == len(blocks) and len({k.shape[1] for k in keys}) == 1
        rows = _mean(keys) if alike else _means_of_any(blocks)
        shape = (len(layers), len(layers[0]), rows.shape[1])
        largest = torch.linalg.vector_norm(rows, math.inf)[None]  # no number where one is none
        return Means(Received(torch.cat((rows.view(-1), largest))), shape)

    def checked(self, means: Means) -> npt.NDArray[np.float16]:
        """The keys themselves. Raises CodecError where one does not fit into fp16."""
        flat = means.flat.read()
        keys: npt.NDArray[np.float16] = flat[:-1].reshape(means.shape)
        if not np.isfinite(flat[-1]):
            raise CodecError("a block's mean key exceeds fp16: try --dtype float32, or check the checkpoint")
        return keys


def _mean(keys: Sequence[Tensor]) -> Tensor:
    """Keys (H, T, D) of n blocks of one size -> (n, H * D), accumulated in fp32, rounded to fp16."""
    return together(keys).mean(2, dtype=torch.float32).flatten(1).to(torch.float16)


def _means_of_any(blocks: Sequence[LayerKV | None]) -> Tensor:
    """(n, H * D): all blocks of one size at once, of all layers; zeros where there is none."""
    sizes = [0 if kv is None else kv.tokens for kv in blocks]
    found: list[Tensor] = []
    order: list[int] = []
    for size in sorted(set(sizes) - {0}):
        own = [n for n, tokens in enumerate(sizes) if tokens == size]
        found.append(_mean([kv.k for n in own if (kv := blocks[n]) is not None]))
        order += own
    place = np.full(len(blocks), len(order))  # behind all others, where the zeros are
    place[order] = np.arange(len(order))
    nothing = found[0].new_zeros(1, found[0].shape[1])
    return torch.cat((*found, nothing)).index_select(0, sent(torch.from_numpy(place), nothing.device))


def fold(q: Tensor, kv_heads: int) -> Tensor:
    """Queries (Hq, T, D), unrotated -> the query vector (H*D,): mean over tokens, sum over each group (P2, P3)."""
    Hq, _, D = q.shape
    mean = q.float().mean(1)  # (Hq, D)
    return mean.view(kv_heads, Hq // kv_heads, D).sum(1).flatten()
