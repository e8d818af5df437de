"""How the released code of StreamKV shares a budget among layers (arXiv 2511.07278): mode `code` of SelectKV.

The total may be missed: the search stops near it, and the repair after the rescale goes over the layers once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RETRIEVE_MAX = 128  # blocks a layer
SLACK = 5  # the search stops when the sum is nearer than this to its target


def code_compress_counts(
    scores: Sequence[Tensor], keep: float, band: float, *, stable: bool = True
) -> list[int]:
    """What the released code keeps a layer of a segment: scores a layer, dot products (blocks,)."""
    T = max(len(score) for score in scores)
    counts = code_counts(scores, int(len(scores) * T * keep))
    low = max(1, int(T * keep * (1 - band)))
    high = min(T, int(T * keep * (1 + band)))
    return [max(1, count) for count in code_rescaled(counts, low, high, stable=stable)]


def code_retrieve_counts(
    scores: Sequence[Tensor], blocks: int, band: float, *, stable: bool = True
) -> list[int]:
    """What the released code retrieves a layer, `blocks` on average: scores a layer, dot products (blocks,)."""
    counts = code_counts(scores, len(scores) * blocks)
    low = max(blocks * (1 - band), 1)
    high = min(blocks * (1 + band), RETRIEVE_MAX)
    return code_rescaled(counts, low, high, stable=stable)


def code_counts(scores: Sequence[Tensor], total: int) -> list[int]:
    """Blocks a layer by bisection of p in [0, 1]: how many sums are below p, at least one.

    It ends when the total is nearer than 5 or p is known to 1e-6. In the arithmetic of the scores' dtype. Where a
    layer's scores are all equal its z-scores are no numbers, no sum counts as reaching p, and it keeps everything.
    """
    rows = []
    for score in scores:
        z = (score - score.mean()) / score.std() if len(score) > 1 else score * math.nan
        rows.append(z.softmax(0).sort(descending=True).values.cumsum(0).cpu())
    low, high, p = 0.0, 1.0, 0.0
    while high - low > 1e-6:
        p = (low + high) / 2
        found = _below(rows, p)
        if abs(sum(found) - total) < SLACK:
            break
        low, high = (low, p) if sum(found) > total else (p, high)
    return _below(rows, p)


def _below(rows: Sequence[Tensor], p: float) -> list[int]:
    return [max(1, int((~(row >= torch.tensor(p, dtype=row.dtype))).sum())) for row in rows]


def code_rescaled(counts: Sequence[int], low: float, high: float, *, stable: bool = True) -> list[int]:
    """The released code's rescale of `counts` (L,) into [low, high].

    Linear from [smallest, largest] to the band, times whatever restores the total, rounded half to even, clipped;
    then the layers are visited once, the smallest first where the total is short, the largest where it is over,
    and one is added or taken where the band allows it. Equal counts stay as they are, also outside the band.
    `stable`: equal counts are visited in order of the layers; else as numpy's sort leaves them on this machine.
    """
    old = np.array(counts, np.float64)
    if old.min() == old.max():
        return list(counts)
    spread = (old - old.min()) / (old.max() - old.min()) * (high - low) + low
    new = np.clip(np.round(spread * (old.sum() / spread.sum())), low, high)
    missing = round(float(old.sum() - new.sum()))
    step = 1 if missing > 0 else -1
    for row in np.argsort(step * new, kind="stable" if stable else "quicksort"):
        if not missing:
            break
        if new[row] < high if step > 0 else new[row] > low:
            new[row] += step
            missing -= step
    return [int(count) for count in new]
