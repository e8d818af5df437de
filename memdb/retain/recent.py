"""The newest tokens and nothing else: the control that every memory must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.retain.base import Bounded
from memdb.retain.view import LayerView


@dataclass(frozen=True)
class Recent(Bounded):
    """The last `budget_tokens` of the stream, in every layer the same."""

    def order(self, view: LayerView) -> Tensor:
        return torch.arange(view.tokens - 1, -1, -1, device=view.k.device).expand_as(view.position)
