"""Tokens with small keys stay (Devoto et al., arXiv 2406.11430): a key of small norm draws attention to its token.

score = -norm of the key, mean over heads; the highest stay. Of equals the newest frame, the lowest patch. The paper
scores each head for itself; a memory has one set a layer, hence the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from memdb.retain.base import Bounded, best_first
from memdb.retain.view import LayerView
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class KeyNorm(Bounded):
    """`newest_tokens`: as many places of the stream before its end stay whole, whatever their keys (ours)."""

    newest_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("retain.newest_tokens", self.newest_tokens, 0)

    def order(self, view: LayerView) -> Tensor:
        norm = view.k.float().norm(dim=-1).mean(-2)  # (..., T)
        older = view.position <= view.position.amax(-1, keepdim=True) - self.newest_tokens
        return best_first(-norm, view.frame, tier=older)
