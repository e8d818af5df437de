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
from memdb.models.window import LayerKV
from memdb.recipes import GUIDANCE_PROMPT
from memdb.retain.select_kv_code import code_compress_counts
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least, share

MODES = ("paper", "code", "fixed")
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
    `prompt`: the guidance prompt behind each segment, whose queries score its frames; the text is ours.

    Equal scores: the earlier frame stays; equal weights: the earlier layer gets it.
    """

    keep: float = 0.6
    mode: str = "fixed"
    band: float = 1.0
    prompt: str = GUIDANCE_PROMPT

    def __post_init__(self) -> None:
        share("retain.keep", self.keep)
        at_least("retain.band", self.band, 0)
        if self.mode not in MODES:
            raise RecipeError(f"retain.mode = {self.mode!r}: choose one of {', '.join(MODES)}")
        if not self.prompt.strip():
            raise RecipeError("retain.prompt is empty: say what to keep, or set retain = 'all'")

    @property
    def sim(self) -> str:
        """What `guidance_scores` has to compute for this mode."""
        return "dot" if self.mode == "code" else "cos"

    def select(
        self, layers: Sequence[Sequence[LayerKV]], queries: Sequence[Tensor], frames: int
    ) -> list[list[LayerKV | None]]:
        """Per layer, the blocks of a segment, None where it drops one. What is behind its `frames` frames, the
        summary, is not counted and stays in every layer (R7).

        queries: those of the guidance prompt, unrotated, a layer each (Hq, T, D).
        """
        scores = []
        for q, row in zip(queries, layers, strict=True):
            k = torch.stack([kv.k for kv in row[:frames]])  # (F, H, T, D)
            scores.append(guidance_scores(q, k.float().mean(2).flatten(1), self.sim))
        # Off a GPU at once: counting and sorting a few numbers a layer takes it longer than a CPU.
        kept = [set(own.tolist()) for own in self.choose(torch.stack(scores).cpu().unbind())]
        return [
            [kv if at in own or at >= frames else None for at, kv in enumerate(row)]
            for own, row in zip(kept, layers, strict=True)
        ]

    def choose(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Per layer, from the scores (blocks,) of a segment's frames, the indices of those that stay, ascending.

        A summary block takes no part; whoever calls adds it in every layer.
        """
        return top_blocks(scores, self.counts(scores))

    def counts(self, scores: Sequence[Tensor]) -> list[int]:
        if self.mode == "code":
            return code_compress_counts(scores, self.keep, self.band)
        # 0.1 * 30 exceeds 3; and however small the share is, every layer keeps one.
        total = sum(max(1, math.ceil(round(self.keep * len(score), 9))) for score in scores)
        return exact_counts(scores, total, z_scores=self.mode == "fixed")


def guidance_scores(q: Tensor, keys: Tensor, sim: str) -> Tensor:
    """Queries q (Hq, r, D) of a guidance prompt and mean keys (blocks, H*D), all unrotated -> (blocks,) in fp32.

    `dot`: the mean query with each key, as the released code has it. `cos`: the cosine of the two as vectors of
    Hq*D, every key repeated over its group, as the paper has it. No key is repeated to compute either.
    """
    Hq, _, D = q.shape
    group = Hq * D // keys.shape[1]
    keys = keys.float()
    dot: Tensor = keys @ fold(q, Hq // group)  # (blocks,)
    if sim == "dot":
        return dot
    length: Tensor = q.float().mean(1).norm() * (keys.norm(dim=1) * math.sqrt(group))
    return dot / length.clamp(min=1e-12)


def top_blocks(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Per layer the indices of the `counts` highest of its scores (blocks,), ascending; of equals the earliest."""
    return [
        torch.sort(score, descending=True, stable=True).indices[:count].sort().values
        for score, count in zip(scores, counts, strict=True)
    ]


def exact_counts(
    scores: Sequence[Tensor], total: int, *, z_scores: bool, low: int = 1, high: int | None = None
) -> list[int]:
    """Blocks a layer, `total` together, or everything where that is less; each `low` to `high`, None for no bound.

    A layer takes its next block when p passes the sum of weights it has so far. So the blocks of all layers stand
    in one order of rising p, and the first `total` of it are the answer: no search, no repair.
    """
    if total < sum(min(low, len(score)) for score in scores):
        least = "one" if low == 1 else low
        raise RecipeError(
            f"{total} blocks for {len(scores)} layers: every layer keeps {least}, give a larger share"
        )
    enters = [_enters(_sums(score, z_scores)[:high], low) for score in scores]
    layer = np.repeat(np.arange(len(enters)), [len(row) for row in enters])
    first = np.argsort(np.concatenate(enters), kind="stable")[:total]
    return [int(count) for count in np.bincount(layer[first], minlength=len(enters))]


def _enters(sums: Floats, low: int) -> Floats:
    """(blocks,) the p at which a layer takes each of its blocks, best first; the first `low` before all others."""
    enters = np.concatenate(([-1.0], sums[:-1]))
    enters[:low] = -1.0
    return enters


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
