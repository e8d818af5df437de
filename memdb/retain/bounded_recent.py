"""The newest tokens only: the control that many memories do not beat on questions about now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memdb.retain.view import LayerView
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class BoundedRecent:
    """`budget_tokens`: tokens a layer."""

    uses_attention: ClassVar[bool] = False
    budget_tokens: int = 4096

    def __post_init__(self) -> None:
        at_least("retain.budget_tokens", self.budget_tokens, 1)

    def least_tokens(self, frame_tokens: int) -> int:
        return frame_tokens

    def choose(self, view: LayerView) -> Tensor:
        first = max(0, view.tokens - self.budget_tokens)
        return torch.arange(first, view.tokens, device=view.position.device)
