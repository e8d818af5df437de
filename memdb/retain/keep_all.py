"""Nothing is ever dropped (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb.models.window import LayerKV


@dataclass(frozen=True)
class KeepAll:
    def keep(self, layers: Sequence[Sequence[LayerKV]]) -> list[list[LayerKV | None]]:
        """Per layer, the blocks of a unit: each kept whole in every layer."""
        return [list(blocks) for blocks in layers]
