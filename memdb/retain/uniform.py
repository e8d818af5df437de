"""Evenly spaced tokens: the control of the papers on retention, and what ageing thins by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.retain.base import Bounded
from memdb.retain.view import LayerView

GOLDEN = 2_654_435_769  # 2^32 over the golden ratio


class Uniform:
    """Token i of m kept ones is the one in the middle of the i-th of m equal stretches: 2 of 8 are 2 and 6.

    It looks at places alone. So the same tokens are kept in all layers, K and V stay together, and what is
    stored of a token can be gathered as it is.
    """

    def choose(self, tokens: int, kept: int) -> npt.NDArray[np.int64]:
        """(kept,) places among `tokens`, ascending. 1 <= kept <= tokens."""
        assert 1 <= kept <= tokens, (kept, tokens)
        return (2 * np.arange(kept, dtype=np.int64) + 1) * tokens // (2 * kept)


@dataclass(frozen=True)
class UniformTokens(Bounded):
    """Evenly spaced tokens of a stream whose end is not known: the control over a bounded memory.

    Thinning the survivors evenly at each step would halve the old ones again and again. Here a token has a rank
    that its position alone decides, its place in the golden-ratio sequence, and the lowest ranks stay. The
    positions of the lowest m of any stretch of the stream are spread evenly over it (they stand at most three
    distances apart), and what was dropped earlier could not be among them: the memory is a function of the stream
    so far, whatever the steps in which it was thinned.
    """

    def order(self, view: LayerView) -> Tensor:
        rank = view.position * GOLDEN % (1 << 32)  # (..., T) positions below 2^31
        return torch.sort(rank, dim=-1, stable=True).indices
