"""Layers of a memory for the tests of retention: ragged frames, prototypes, equal scores on purpose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from memdb.retain.view import LayerView
from memdb.schemas.units import BlockKind


@dataclass(frozen=True)
class Film:
    """`whole`: no patch is missing. `exact`: keys and values along axes, so that plain arithmetic has no rounding
    and equal scores abound; otherwise normal numbers. `prototypes`: every third frame has one.
    """

    frames: int = 6
    grid: tuple[int, int] = (3, 4)
    H: int = 2
    D: int = 8
    seed: int = 0
    whole: bool = False
    exact: bool = True
    prototypes: bool = False

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def view(self) -> LayerView:
        random = np.random.default_rng(self.seed)
        rows: list[tuple[int, int, int, int, int]] = []  # position, frame, row, column, kind
        for frame in range(self.frames):
            start = 13 + frame * self.frame_tokens
            for patch in range(self.frame_tokens):
                if self.whole or random.random() < 0.7:
                    place = divmod(patch, self.grid[1])
                    rows.append((start + patch, frame, *place, int(BlockKind.FRAME)))
            if self.prototypes and frame % 3 == 0:
                place_of = start + int(random.integers(self.frame_tokens))
                rows.append((place_of, frame, -1, -1, int(BlockKind.PROTOTYPE)))
        rows.sort(key=lambda row: row[0])
        table = torch.tensor(rows)  # (T, 5)
        T = len(rows)
        received = torch.from_numpy(random.integers(1, 6, T) / 16).float()
        return LayerView(
            self.tensor(random, T),
            self.tensor(random, T),
            table[:, 0],
            table[:, 1],
            table[:, 2:4],
            table[:, 4],
            self.grid,
            received if self.exact else torch.from_numpy(random.random(T)).float(),
        )

    def tensor(self, random: np.random.Generator, T: int) -> Tensor:
        if not self.exact:
            return torch.from_numpy(random.normal(size=(self.H, T, self.D))).float()
        axis = torch.from_numpy(random.integers(0, 2, (self.H, T)))
        length = torch.from_numpy(2.0 ** random.integers(0, 3, (self.H, T))).float()
        sign = torch.from_numpy(random.choice([-1.0, 1.0], (self.H, T))).float()
        return torch.nn.functional.one_hot(axis, self.D).float() * (length * sign)[..., None]


def joined(old: LayerView, new: LayerView) -> LayerView:
    """The memory with what follows it, as a commit leaves it before retention."""
    pairs = ((getattr(old, name), getattr(new, name)) for name in ("position", "frame", "patch", "kind"))
    importance = None if new.importance is None else torch.cat((torch.ones(old.tokens), new.importance))
    return LayerView(
        torch.cat((old.k, new.k), 1),
        torch.cat((old.v, new.v), 1),
        *(torch.cat(pair) for pair in pairs),
        grid=old.grid,
        importance=importance,
    )


def later(view: LayerView, frames: int, frame_tokens: int) -> LayerView:
    """The same tokens, `frames` frames later."""
    return replace(view, position=view.position + frames * frame_tokens, frame=view.frame + frames)


def best(score: list[float], frame: list[int], tier: list[int] | None = None) -> list[int]:
    """The order of ties written out: tier up, score down, frame down, index up."""
    tiers = tier or [0] * len(score)
    return sorted(range(len(score)), key=lambda i: (tiers[i], -score[i], -frame[i], i))
