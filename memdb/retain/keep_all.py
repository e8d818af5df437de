"""Nothing is ever dropped (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memdb.models.window import LayerKV


@dataclass(frozen=True)
class KeepAll:
    prompt: ClassVar[str] = ""

    def select(
        self, layers: Sequence[Sequence[LayerKV]], queries: Sequence[Tensor], frames: int
    ) -> list[list[LayerKV | None]]:
        """Per layer, the blocks of a unit: each kept whole in every layer."""
        return [list(blocks) for blocks in layers]
