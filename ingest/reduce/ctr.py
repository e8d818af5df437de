"""Causal temporal reduction: a fixed number of tokens a frame, from this frame and the one before (StreamingTOM,
arXiv 2510.18269).

Tokens that are like those at the same place of the frame before are static, the others dynamic; each kind gets its
share of the budget of G. Of the dynamic ones those are kept at which the vision tower looks most; the static ones are
gathered about density peaks and blended into them. What is left stands in raster order.

Where it differs: the jitter that breaks ties between densities is drawn from the recording's seed and the frame's
number, so that a frame comes out the same whenever it is reduced again; `dpc` is the textbook's unless `released` is
asked for; blending and means are in fp32. The released code's rule for budgets that overflow never acts, because G is
at most N, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.ingest.frames import SeenFrame
from memdb.ingest.reduce.base import Carried, Reducer
from memdb.ingest.reduce.dpc import KINDS, centres, distances, jitter, top
from memdb.ingest.terms import Terms
from memdb.ingest.units.base import UnitStage
from memdb.models.protocol import Pixels
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least, share

PAPER_TOKENS, PAPER_FRAME_TOKENS = 50, 196


@dataclass(frozen=True)
class CausalTemporal(Reducer):
    """`tokens`: G, what is left of a frame; 0 for the paper's share, 50 of 196, of the model's frame.

    `tau`: cosine above which a token is static. `neighbours`: k of DPC. `beta`: a centre's own share of what its
    cluster becomes. `dpc`: textbook or released.
    """

    tokens: int = 0
    tau: float = 0.9
    neighbours: int = 7
    beta: float = 0.6
    dpc: str = "textbook"

    def __post_init__(self) -> None:
        at_least("reduce.tokens", self.tokens, 0)
        at_least("reduce.neighbours", self.neighbours, 1)
        at_least("reduce.tau", self.tau, -1)
        share("reduce.beta", self.beta)
        if self.dpc not in KINDS:
            raise RecipeError(f"reduce.dpc = {self.dpc!r}: choose one of {', '.join(KINDS)}")

    def kept(self, frame_tokens: int) -> int:
        """G for a model of N tokens a frame. Raises RecipeError where a frame has not as many."""
        if self.tokens > frame_tokens:
            raise RecipeError(
                f"reduce.tokens = {self.tokens}, but a frame of this model has {frame_tokens}: give at most that, or "
                "0 for the paper's share of it"
            )
        return self.tokens or max(1, round(frame_tokens * PAPER_TOKENS / PAPER_FRAME_TOKENS))

    def begin(self, terms: Terms, unit: UnitStage) -> BesideTheLast:
        return BesideTheLast(self, terms, unit)

    def reduce(
        self, frames: Tensor, saliency: Tensor, before: Tensor | None, *, seed: int, numbers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Frames (F, N, E) with saliency (F, N) -> their tokens (F, G, E) and raster ids (F, G), ascending.

        before: the frame that precedes them, as it was before reduction, (N, E); None where there is none, and then
        all of the first is dynamic. numbers: of the frames in the recording.
        """
        N = frames.shape[1]
        noise = torch.stack([jitter(seed, number, N) for number in numbers]).to(frames.device)
        static = static_tokens(frames, before, self.tau)
        return reduce_frames(
            frames,
            saliency,
            static,
            self.kept(N),
            noise,
            neighbours=self.neighbours,
            beta=self.beta,
            kind=self.dpc,
        )


class BesideTheLast(Carried):
    """Frames are reduced when their unit closes, each beside the one before it as that was."""

    def __init__(self, method: CausalTemporal, terms: Terms, unit: UnitStage) -> None:
        super().__init__(terms, unit)
        self._method = method

    def see(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Sequence[Tensor | None]]:
        tokens, saliency = self._terms.model.salient_tokens(pixels)  # (F, N, E), (F, N)
        return tokens, list(saliency)

    def reduce(self, groups: Sequence[Sequence[SeenFrame]]) -> Sequence[Sequence[SeenFrame]]:
        with self._terms.laps("reduce"):
            frames = [frame for group in groups for frame in group]
            tokens, raster = self._method.reduce(
                torch.stack([frame.tokens for frame in frames]),
                torch.stack([frame.saliency for frame in frames if frame.saliency is not None]),
                self.before.tokens if self.before is not None else None,
                seed=self._terms.seed,
                numbers=[frame.number for frame in frames],
            )
            self.before = replace(frames[-1], picture=b"", saliency=None)
            reduced = iter(
                replace(frame, tokens=kept, raster=places)
                for frame, kept, places in zip(frames, tokens, raster, strict=True)
            )
            return [[next(reduced) for _ in group] for group in groups]


def static_tokens(frames: Tensor, before: Tensor | None, tau: float) -> Tensor:
    """(F, N) bool: the cosine with the same place of the frame before is above `tau`, in fp32."""
    units = F.normalize(frames.float(), dim=-1)  # (F, N, E)
    first = torch.zeros_like(units[0]) if before is None else F.normalize(before.float(), dim=-1)
    likeness = (units * torch.cat((first[None], units[:-1]))).sum(-1)
    static = likeness > tau
    if before is None:
        static[0] = False
    return static


def budgets(static: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """How many static and how many dynamic tokens are kept, (F,) each: `tokens` together, never more than there are."""
    kept = tokens * static.sum(-1) // static.shape[-1]
    return kept, tokens - kept


def reduce_frames(
    frames: Tensor,
    saliency: Tensor,
    static: Tensor,
    tokens: int,
    noise: Tensor,
    *,
    neighbours: int,
    beta: float,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Frames (F, N, E), saliency and noise (F, N), static (F, N) bool -> tokens (F, G, E), raster ids (F, G)."""
    static_count, dynamic_count = budgets(static, tokens)
    distance = distances(frames, kind=kind)  # (F, N, N)
    peaks = centres(distance, static, static_count, neighbours, noise, kind=kind)
    kept = peaks | top(saliency.float(), ~static, dynamic_count)  # (F, N), G of each frame
    raster = (
        kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :tokens]
    )  # (F, G) ascending
    whole = blended(frames, distance, static, peaks, beta)
    return whole.gather(1, raster[..., None].expand(-1, -1, frames.shape[-1])), raster


def blended(frames: Tensor, distance: Tensor, static: Tensor, peaks: Tensor, beta: float) -> Tensor:
    """Frames (F, N, E) in which each centre is beta of itself and 1 - beta of the mean of its cluster's members.

    Every other static token is a member of its nearest centre's cluster; of equally near ones the earlier. A centre
    without members stays as it is, and so does everything that is no centre.
    """
    nearest = distance.masked_fill(~peaks[:, None, :], torch.inf).argmin(-1)  # (F, N)
    members = static & ~peaks
    belongs = F.one_hot(nearest, frames.shape[1]).bool() & members[..., None]  # (F, member, centre)
    sizes = belongs.sum(1)  # (F, N)
    # A frame at a time: the same sum in the same order, whatever frames stand beside it.
    values = frames.float()
    sums = [own @ frame for own, frame in zip(belongs.transpose(1, 2).float(), values, strict=True)]
    means = torch.stack(sums) / sizes.clamp(min=1)[..., None]
    mixed = (beta * values + (1 - beta) * means).to(frames.dtype)
    return torch.where((peaks & (sizes > 0))[..., None], mixed, frames)
