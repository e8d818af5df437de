"""What searches give back: rows of representative keys, and captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

How = Literal["vector", "text", "both"]


@dataclass(frozen=True, eq=False)
class KeyHits:
    """The best rows of a key table, best first; of equal scores the lower row first."""

    rows: npt.NDArray[np.int64]  # (hits,)
    scores: npt.NDArray[np.float32]  # (hits,)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class CaptionHit:
    """One caption that was found. Its text and vector are read from the segments.

    `score` is the cosine for a search by vector alone, else the sum of reciprocal ranks.
    """

    recording_id: str
    unit: int
    start_ns: int
    end_ns: int
    score: float
    how: How


@dataclass(frozen=True)
class CaptionHits:
    """The captions found, best first, and how they were found. It reads like a sequence of hits."""

    hits: tuple[CaptionHit, ...] = ()
    indexed_commit: int = 0  # the search table answered for commits up to here, an exact scan for the rest
    tail_units: int = 0  # captions that the exact scan looked at
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[CaptionHit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: int) -> CaptionHit:
        return self.hits[index]
