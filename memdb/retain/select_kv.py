"""How many frames of a segment each layer keeps, and which (StreamKV's SelectKV, arXiv 2511.07278, AAAI 2026)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.index.mean_key import fold
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least, share

MODES = ("paper", "code", "fixed")
RETRIEVE_MAX = 128  # blocks a layer, in the released code
SLACK = 5  # the released code's search stops when the sum is nearer than this to its target
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SelectKV:
    """Layers share a budget: one whose scores stand out needs few frames, one that is undecided needs many.

    In each layer the scores of the segment's frames become weights by a softmax, sorted and summed up; every layer
    keeps frames until its sum reaches p, and p, one for all layers, is set so that the total fits. Then each layer
    keeps its best frames.

    `keep`: the share of a segment's frames that is kept (the paper quotes the share that is dropped). `mode`:
    - `fixed`: z-scores of cosines. A layer whose frames score alike weighs them alike. The total is exact and no
      layer is left without a frame.
    - `paper`: cosines as they are; since these are nearly equal after a softmax, so are the layers. Exact, too.
    - `code`: z-scores of dot products, p by bisection until the total is off by less than 5, then a linear rescale
      into a band around the mean, whose repair goes over the layers once: the total may be missed. Frames that
      score alike make their layer keep all of them.
    `band`: half the width of that band as a share of its middle, for `code` (its script: 1.0).

    Equal scores: the earlier frame stays; equal weights: the earlier layer gets it.
    """

    keep: float = 0.6
    mode: str = "fixed"
    band: float = 1.0

    def __post_init__(self) -> None:
        share("retain.keep", self.keep)
        at_least("retain.band", self.band, 0)
        if self.mode not in MODES:
            raise RecipeError(f"retain.mode = {self.mode!r}: choose one of {', '.join(MODES)}")

    @property
    def sim(self) -> str:
        """What `guidance_scores` has to compute for this mode."""
        return "dot" if self.mode == "code" else "cos"

    def choose(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Per layer, from the scores (blocks,) of a segment's frames, the indices of those that stay, ascending.

        A summary block takes no part; whoever calls adds it in every layer.
        """
        return top_blocks(scores, self.counts(scores))

    def counts(self, scores: Sequence[Tensor]) -> list[int]:
        if self.mode == "code":
            return code_compress_counts(scores, self.keep, self.band)
        total = sum(math.ceil(round(self.keep * len(score), 9)) for score in scores)  # 0.1 * 30 exceeds 3
        return exact_counts(scores, total, z_scores=self.mode == "fixed")


def guidance_scores(q: Tensor, keys: Tensor, sim: str) -> Tensor:
    """Queries q (Hq, r, D) of a guidance prompt and mean keys (blocks, H*D), all unrotated -> (blocks,) in fp32.

    `dot`: the mean query with each key, as the released code has it. `cos`: the cosine of the two as vectors of
    Hq*D, every key repeated over its group, as the paper has it. No key is repeated to compute either.
    """
    Hq, _, D = q.shape
    group = Hq * D // keys.shape[1]
    keys = keys.float()
    dot = keys @ fold(q, Hq // group)  # (blocks,)
    if sim == "dot":
        return dot
    length = q.float().mean(1).norm() * (keys.norm(dim=1) * math.sqrt(group))
    return dot / length.clamp(min=1e-12)


def top_blocks(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Per layer the indices of the `counts` highest of its scores (blocks,), ascending; of equals the earliest."""
    return [
        torch.sort(score, descending=True, stable=True).indices[:count].sort().values
        for score, count in zip(scores, counts, strict=True)
    ]


def exact_counts(scores: Sequence[Tensor], total: int, *, z_scores: bool) -> list[int]:
    """Blocks a layer, `total` together, or everything where that is less; at least one a layer.

    A layer takes its next block when p passes the sum of weights it has so far. So the blocks of all layers stand
    in one order of rising p, and the first `total` of it are the answer: no search, no repair.
    """
    if total < len(scores):
        raise RecipeError(
            f"{total} blocks for {len(scores)} layers: every layer keeps one, give a larger share"
        )
    sums = [_sums(score, z_scores) for score in scores]
    # The first block of a layer stands before all others: nothing is summed up yet.
    enters = np.concatenate([np.concatenate(([-1.0], row[:-1])) for row in sums])
    layer = np.repeat(np.arange(len(sums)), [len(row) for row in sums])
    first = np.argsort(enters, kind="stable")[:total]
    return [int(count) for count in np.bincount(layer[first], minlength=len(sums))]


def _sums(score: Tensor, z_scores: bool) -> Floats:
    """(blocks,) running sums of the softmax of a layer's scores, highest first, in fp64."""
    z = score.detach().cpu().numpy().astype(np.float64)
    if z_scores:
        std = z.std(ddof=1) if len(z) > 1 else 0.0
        # Equal scores in fp32 differ from their mean by a rounding in fp64, which must not become a z-score.
        z = np.zeros_like(z) if std <= 1e-7 * np.abs(z).max() else (z - z.mean()) / std
    weight = np.exp(z - z.max())
    sums: Floats = np.sort(weight / weight.sum())[::-1].cumsum()
    return sums


# The released code


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
