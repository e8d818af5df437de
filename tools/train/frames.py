"""Single frames of the training world, drawn on the GPU by the thousand: what the vision tower learns to see from."""

from __future__ import annotations

import torch
from torch import Tensor

from memdb.world.pictures import COLUMNS, DIGIT, LIGHT, PHASE, PLACE, TEXTURE, THING, THINGS
from memdb.world.scenes import ASPECT, BESIDE_RADIUS, CORNERS, EMPTY_SHARE, RADIUS
from memdb.world.vocabulary import (
    COLOURS,
    DIGITS,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    combinations,
)


class Frames:
    """Parameters of pictures as scenes of `split` have them, each of a scene and a moment of its own."""

    def __init__(self, split: str, device: torch.device) -> None:
        colours = tuple(COLOURS)
        self.device = device
        self._mains = torch.tensor(
            [
                (
                    SIZES.index(size),
                    colours.index(colour),
                    SHAPES.index(shape),
                    PLACES.index(place),
                    MOTIONS.index(motion),
                )
                for size, colour, shape, place, motion in combinations(split)
            ],
            device=device,
        )
        self._radius = torch.tensor([RADIUS[size] for size in SIZES], device=device)
        self._corners = torch.tensor(CORNERS, device=device)

    def draw(self, count: int) -> Tensor:
        """(count, COLUMNS), as `memdb.world.pictures.parameters` gives them for planned scenes."""
        size, colour, shape, place, motion = self._mains[self._among(len(self._mains), count)].unbind(1)
        share = self._between(0, 1, count)
        rows = torch.zeros(count, COLUMNS, device=self.device)
        rows[:, PLACE], rows[:, PHASE] = place.float(), self._between(0, 1, count)
        rows[:, LIGHT] = self._between(0.85, 1, count) + self._between(-0.12, 0.12, count) * share
        rows[:, TEXTURE] = self._among(len(TEXTURES), count).float()
        rows[:, DIGIT] = self._among(len(DIGITS), count).float()
        here = self._between(0, 1, count) >= EMPTY_SHARE
        x, y, radius = self._at(motion, self._radius[size], share)
        rows[:, THINGS : THINGS + THING] = torch.stack(
            (x * ASPECT, y, radius, shape.float(), colour.float(), here.float()), 1
        )
        many = torch.tensor((0, 1, 1, 2), device=self.device)[self._among(4, count)]
        lot = torch.rand(count, len(SHAPES), device=self.device).scatter(1, shape[:, None], 2.0)
        others = lot.argsort(1)[:, :2]
        corners = torch.rand(count, len(CORNERS), device=self.device).argsort(1)[:, :2]
        for at in range(2):
            enters = torch.tensor((0.0, 0.0, 0.3), device=self.device)[self._among(3, count)]
            there = here & (many > at) & (share >= enters)
            place_of = self._corners[corners[:, at]]
            start = THINGS + (1 + at) * THING
            rows[:, start : start + THING] = torch.stack(
                (
                    place_of[:, 0] * ASPECT,
                    place_of[:, 1],
                    torch.full_like(share, BESIDE_RADIUS),
                    others[:, at].float(),
                    self._among(len(COLOURS), count).float(),
                    there.float(),
                ),
                1,
            )
        return rows

    def _at(self, motion: Tensor, radius: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scene.at, for many."""
        x, y = self._between(0.35, 0.65, len(share)), self._between(0.45, 0.55, len(share))
        along = {name: motion == at for at, name in enumerate(MOTIONS)}
        back = along["left"] | along["up"] | along["shrinks"]
        share = torch.where(back, 1 - share, share)
        x = torch.where(along["left"] | along["right"], 0.22 + 0.56 * share, x)
        y = torch.where(along["up"] | along["down"], 0.3 + 0.4 * share, y)
        radius = torch.where(along["grows"] | along["shrinks"], radius * (0.75 + 0.5 * share), radius)
        return x, y, radius

    def _among(self, many: int, count: int) -> Tensor:
        return torch.randint(many, (count,), device=self.device)

    def _between(self, low: float, high: float, count: int) -> Tensor:
        return low + (high - low) * torch.rand(count, device=self.device)
