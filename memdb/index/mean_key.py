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
        sizes = [0 if kv is None else kv.tokens for kv in blocks]
        first = next(kv for kv in blocks if kv is not None)
        place = np.full(
            len(blocks), len(blocks) - sizes.count(0)
        )  # of those that none holds: behind all others
        found: list[Tensor] = []
        at = 0
        for size in sorted(set(sizes) - {0}):  # all of one size at once, of all layers
            own = [n for n, tokens in enumerate(sizes) if tokens == size]
            place[own] = np.arange(at, at + len(own))
            at += len(own)
            stacked = together([kv.k for n in own if (kv := blocks[n]) is not None])
            found.append(stacked.mean(2, dtype=torch.float32).flatten(1).to(torch.float16))
        H, _, D = first.k.shape
        rows = found[0] if len(found) == 1 and at == len(blocks) else self._placed(found, place)
        largest = rows.abs().amax()[None]  # no number where one is none
        return Means(Received(torch.cat((rows.flatten(), largest))), (len(layers), len(layers[0]), H * D))

    def checked(self, means: Means) -> npt.NDArray[np.float16]:
        """The keys themselves. Raises CodecError where one does not fit into fp16."""
        flat = means.flat.read()
        keys: npt.NDArray[np.float16] = flat[:-1].reshape(means.shape)
        if not np.isfinite(flat[-1]):
            raise CodecError("a block's mean key exceeds fp16: try --dtype float32, or check the checkpoint")
        return keys

    def _placed(self, found: Sequence[Tensor], place: npt.NDArray[np.int64]) -> Tensor:
        """Rows of all sizes, one after another, at their places; behind them a row of zeros."""
        nothing = found[0].new_zeros(1, found[0].shape[1])
        return torch.cat((*found, nothing)).index_select(0, sent(torch.from_numpy(place), nothing.device))


def fold(q: Tensor, kv_heads: int) -> Tensor:
    """Queries (Hq, T, D), unrotated -> the query vector (H*D,): mean over tokens, sum over each group (P2, P3)."""
    Hq, _, D = q.shape
    mean = q.float().mean(1)  # (Hq, D)
    return mean.view(kv_heads, Hq // kv_heads, D).sum(1).flatten()
