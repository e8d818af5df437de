"""Every sampled frame is a unit (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb.ingest.frames import SeenFrame


@dataclass(frozen=True)
class OneFrame:
    def extend(
        self, opened: Sequence[SeenFrame], frame: SeenFrame
    ) -> tuple[list[list[SeenFrame]], list[SeenFrame]]:
        return [[frame]], []
