"""How hard a step of training is, and what went right in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Read:
    """How much rows of questions read: frames a layer at most, frames of all layers together, times between them."""

    most: int
    union: int
    stamps: int


@dataclass(frozen=True)
class Stage:
    """How hard a step is, and what is disturbed."""

    near: Read = Read(16, 28, 10)
    far: Read = Read(64, 104, 28)
    told: Read = Read(16, 32, 10)
    own: float = 0.75  # share of rows that read what their own keys found
    disturbed: float = 0.2  # about the share of streams and rows that are merged or thinned
    frozen: bool = False  # the vision tower learns nothing


@dataclass
class Marks:
    """Sums of what went right, by name; and the losses."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, right: Tensor, of: Tensor) -> None:
        """In place: a recorded graph of kernels goes on adding to the same memory."""
        pair = torch.stack((right.detach().sum().float(), of.detach().sum().float()))
        if name in self.sums:
            self.sums[name] += pair
        else:
            self.sums[name] = pair

    def note(self, name: str, value: Tensor) -> None:
        """One figure of a step, such as a loss."""
        self.add(name, value, value.new_ones(()))

    def clear(self) -> None:
        for pair in self.sums.values():
            pair.zero_()

    def shares(self) -> dict[str, float]:
        return {name: float(pair[0] / pair[1].clamp(min=1)) for name, pair in sorted(self.sums.items())}
