"""Evenly spaced tokens: the control of the papers on retention, and what ageing thins by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Uniform:
    """Token i of m kept ones is the one in the middle of the i-th of m equal stretches: 2 of 8 are 2 and 6.

    It looks at places alone. So the same tokens are kept in all layers, K and V stay together, and what is
    stored of a token can be gathered as it is.
    """

    def choose(self, tokens: int, kept: int) -> npt.NDArray[np.int64]:
        """(kept,) places among `tokens`, ascending. 1 <= kept <= tokens."""
        assert 1 <= kept <= tokens, (kept, tokens)
        return (2 * np.arange(kept, dtype=np.int64) + 1) * tokens // (2 * kept)
