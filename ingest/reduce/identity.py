"""No reduction: every visual token goes to the language model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    pass
