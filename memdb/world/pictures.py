"""Many pictures of planned scenes at once, on any device: what training sees, and what films are checked against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.world import draw
from memdb.world.scenes import ASPECT, BESIDE_RADIUS, CORNERS, Scene
from memdb.world.vocabulary import COLOURS, DIGITS, PLACES, SHAPES, TEXTURES

# Columns of a frame's parameters: 5 of the whole, then 3 things of 6.
PLACE, PHASE, LIGHT, TEXTURE, DIGIT = range(5)
THINGS, THING = 5, 6  # where the things begin; x, y, radius, shape, colour, present
COLUMNS = THINGS + 3 * THING
_COLOURS = {name: at for at, name in enumerate(COLOURS)}


def parameters(scenes: Sequence[Scene], times_s: Sequence[float]) -> npt.NDArray[np.float32]:
    """The numbers that a picture is drawn from, (F, COLUMNS): `scenes[f]` as it is at `times_s[f]`."""
    rows = np.zeros((len(scenes), COLUMNS), np.float32)
    for row, scene, time_s in zip(rows, scenes, times_s, strict=True):
        share = (time_s - scene.start_s) / (scene.end_s - scene.start_s)
        row[:THINGS] = (
            PLACES.index(scene.place),
            scene.phase,
            scene.light_at(share),
            TEXTURES.index(scene.texture),
            DIGITS.index(scene.digit),
        )
        x, y, radius = scene.at(share)
        here = float(not scene.empty)
        row[THINGS : THINGS + THING] = (
            x * ASPECT,
            y,
            radius,
            SHAPES.index(scene.shape),
            _COLOURS[scene.colour],
            here,
        )
        for at, thing in enumerate(scene.beside, 1):
            x, y = CORNERS[thing.corner]
            present = here * float(share >= thing.enters)
            start = THINGS + at * THING
            row[start : start + THING] = (
                x * ASPECT,
                y,
                BESIDE_RADIUS,
                SHAPES.index(thing.shape),
                _COLOURS[thing.colour],
                present,
            )
    return rows


@dataclass(frozen=True)
class Painter:
    """Pictures of `height` x `width` pixels, each the mean over `fine` samples across (films are wide)."""

    height: int
    width: int
    fine: int = 1

    def paint(self, rows: Tensor) -> Tensor:
        """Parameters (F, COLUMNS) -> pictures (F, 3, height, width), 0 to 1."""
        x, y, pixel = self._grid(rows.device)
        column = rows[:, :, None, None]  # (F, COLUMNS, 1, 1)
        things, places = draw.palette(rows.device)
        picture = self._place(column, places, x, y)
        for at in (2, 1, 0):
            own = column[:, THINGS + at * THING : THINGS + (at + 1) * THING]
            picture = self._thing(picture, own, things, x, y, pixel, column if at == 0 else None)
        picture = (picture * column[:, LIGHT, :, :, None]).clamp(0, 1)  # (F, h, w * fine, 3)
        F, h = picture.shape[:2]
        return picture.view(F, h, self.width, self.fine, 3).mean(3).permute(0, 3, 1, 2)

    def _grid(self, device: torch.device) -> tuple[Tensor, Tensor, float]:
        across = self.width * self.fine
        y = (torch.arange(self.height, device=device) + 0.5) / self.height
        x = (torch.arange(across, device=device) + 0.5) * (ASPECT / across)
        return x[None, None, :], y[None, :, None], max(1 / self.height, ASPECT / across)

    def _place(self, column: Tensor, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        kind = column[:, PLACE].long()  # (F, 1, 1)
        share = torch.zeros(len(column), y.shape[1], x.shape[2], device=column.device)
        for number in range(len(PLACES)):
            share = torch.where(kind == number, draw.place_pattern(number, x, y, column[:, PHASE]), share)
        low, high = places[kind[:, 0, 0]].unbind(1)  # (F, 3) each
        return low[:, None, None] + share[..., None] * (high - low)[:, None, None]

    def _thing(
        self,
        picture: Tensor,
        own: Tensor,
        things: Tensor,
        x: Tensor,
        y: Tensor,
        pixel: float,
        main: Tensor | None,
    ) -> Tensor:
        """Lay one thing over the picture; the main one with its texture and digit (`main`: all columns)."""
        at_x, at_y, radius, shape, colour, present = (own[:, k] for k in range(THING))
        radius = radius.clamp(min=1e-3)
        u, v = (x - at_x) / radius, (y - at_y) / radius
        fine = pixel / radius
        kind = shape.long()
        gap = torch.zeros_like(u + v)
        for number in range(len(SHAPES)):
            gap = torch.where(kind == number, draw.distance(number, u, v), gap)
        fill = things[colour.long()[:, 0, 0]]  # (F, 3)
        textured, outline = draw.tones(fill)
        picture = _over(picture, outline[:, None, None], draw.cover(gap - draw.OUTLINE, fine) * present)
        body = fill[:, None, None]
        if main is not None:
            weave = torch.zeros_like(gap)
            for number in range(1, len(TEXTURES)):
                weave = torch.where(main[:, TEXTURE].long() == number, draw.texture(number, u, v), weave)
            body = body + weave[..., None] * (textured - fill)[:, None, None]
        picture = _over(picture, body, draw.cover(gap, fine) * present)
        if main is None:
            return picture
        white, ink = picture.new_tensor([0.97] * 3), picture.new_tensor([0.05] * 3)
        picture = _over(picture, white, draw.cover(draw.plate_distance(u, v), fine) * present)
        lit = torch.tensor([[int(bit) for bit in row] for row in draw.SEGMENTS], device=picture.device)
        on = lit[main[:, DIGIT].long()[:, 0, 0]]  # (F, 7)
        stroke = torch.full_like(gap, 9.0)
        for number, segment in enumerate(draw.segment_distances(u, v)):
            stroke = torch.where(on[:, number, None, None] > 0, torch.minimum(stroke, segment), stroke)
        return _over(picture, ink, draw.cover(stroke, fine) * present)


def _over(picture: Tensor, colour: Tensor, share: Tensor) -> Tensor:
    return picture + share[..., None] * (colour - picture)
