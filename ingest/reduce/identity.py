"""No reduction: every visual token goes to the language model."""

from __future__ import annotations

from dataclasses import dataclass

from memdb.ingest.reduce.base import Reducer


@dataclass(frozen=True)
class Identity(Reducer):
    pass
