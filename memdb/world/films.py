"""Planned recordings as real H.264 films, fast enough for ten hours.

What stands still is drawn once a scene, what moves is cut out once and laid over it, and light is a factor that
changes once a second: all on the planes that H.264 stores, in which mixing and light are as linear as in RGB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.h264 import OFFSETS, YUV, Bytes, Canvas, add_stream, check_film, write_frames
from memdb.schemas.errors import UsageError
from memdb.world import MARK, draw
from memdb.world.scenes import ASPECT, BESIDE_RADIUS, CORNERS, Scene
from memdb.world.vocabulary import COLOURS, PLACES, SHAPES, TEXTURES

KEYFRAME_S = 2.0
_REACH = 1.15  # how far the outline of a thing reaches, in radii
_WHITE, _INK = 0.97, 0.05

Floats = npt.NDArray[np.float32]
_Planes = tuple[Floats, Floats, Floats]  # Y (h, w), U and V (h / 2, w / 2), each less its offset


def render(
    path: str | os.PathLike[str],
    scenes: Sequence[Scene],
    *,
    fps: int = 25,
    width: int = 640,
    height: int = 360,
    on_frame: Callable[[int], object] | None = None,
) -> None:
    """Write a planned recording as an H.264 film; the container follows from the suffix and carries MARK.

    Frame n shows the plan at n / fps s: places and things are those of `pictures.Painter`, things stand at even
    pixels, light is that of the middle of each second. `on_frame` is told how many frames there are so far. Raises
    UsageError for scenes that do not follow each other from 0 s on, BudgetError for lengths, rates and sizes that no
    film has.
    """
    bounds = [0, *(scene.end_s for scene in scenes)]
    if not scenes or [scene.start_s for scene in scenes] != bounds[:-1]:
        raise UsageError("these scenes are no whole recording: give those of plan(), which begin at 0 s")
    check_film(bounds[-1], fps, width, height)
    import av

    with _one_thread(), av.open(os.fspath(path), "w") as container:
        container.metadata["comment"] = MARK
        stream = add_stream(container, (width, height), fps, KEYFRAME_S)
        write_frames(container, stream, _told(_pictures(scenes, fps, width, height), on_frame), fps)


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is cut out is small: two threads that wait for each other took ten times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _told(pictures: Iterator[Bytes], on_frame: Callable[[int], object] | None) -> Iterator[Bytes]:
    for number, picture in enumerate(pictures, 1):
        yield picture
        if on_frame is not None:
            on_frame(number)


def _pictures(scenes: Sequence[Scene], fps: int, width: int, height: int) -> Iterator[Bytes]:
    """Every frame, (height * 3 / 2, width)."""
    screen = _Screen(width, height)
    for scene in scenes:
        stage = _Stage(screen, scene)
        for frame in range(scene.start_s * fps, scene.end_s * fps):
            yield stage.picture(frame / fps, frame // fps + 0.5)


@dataclass(frozen=True)
class _Look:
    """What a picture of a scene depends on."""

    light: float
    beside: int  # how many of the things beside are there
    rows: int  # the main thing's radius in pixels, 0 where there is none
    corner: tuple[int, int]  # of what is cut out for it


class _Stage:
    """One scene: draws anew only what differs from the frame before."""

    def __init__(self, screen: _Screen, scene: Scene) -> None:
        self._screen, self._scene = screen, scene
        self._bare = self._set = screen.place(scene)
        self._look: _Look | None = None
        self._lit: Canvas | None = None
        self._cut: _Cut | None = None
        self._picture = np.empty((0, 0), np.uint8)

    def picture(self, time_s: float, light_s: float) -> Bytes:
        """The frame at `time_s` in the light of `light_s`."""
        look = self._looks(self._share(time_s), self._share(light_s))
        if look != self._look:
            self._picture = self._drawn(look)
            self._look = look
        return self._picture

    def _share(self, time_s: float) -> float:
        return (time_s - self._scene.start_s) / (self._scene.end_s - self._scene.start_s)

    def _looks(self, share: float, light_share: float) -> _Look:
        scene, light = self._scene, self._scene.light_at(light_share)
        if scene.empty:
            return _Look(light, 0, 0, (0, 0))
        x, y, radius = scene.at(share)
        rows = max(1, round(radius * self._screen.height))
        beside = sum(share >= thing.enters for thing in scene.beside)
        return _Look(light, beside, rows, self._screen.corner(x, y, rows / self._screen.height))

    def _drawn(self, look: _Look) -> Bytes:
        before, scene = self._look, self._scene
        if before is None or before.beside != look.beside:
            self._set = self._with_beside(look.beside)
        if self._lit is None or before is None or (before.light, before.beside) != (look.light, look.beside):
            self._lit = _lit(self._set, look.light)
        if not look.rows:
            return self._lit.turned(0)
        if self._cut is None or before is None or before.rows != look.rows:
            radius = look.rows / self._screen.height
            self._cut = self._screen.cut(radius, scene.shape, scene.colour, (scene.texture, scene.digit))
        canvas = self._lit.copy()
        self._cut.lay(canvas, self._set, look.corner, look.light)
        return canvas.turned(0)

    def _with_beside(self, count: int) -> _Planes:
        y, u, v = self._bare
        planes = y.copy(), u.copy(), v.copy()
        first = sorted(self._scene.beside, key=lambda thing: thing.enters)[:count]
        for thing in first:
            cut = self._screen.cut(BESIDE_RADIUS, thing.shape, thing.colour)
            cut.mix(planes, self._screen.corner(*CORNERS[thing.corner], BESIDE_RADIUS))
        return planes


@dataclass(frozen=True)
class _Cut:
    """A thing cut out of its background."""

    planes: _Planes  # times how much of each pixel it covers
    clear: _Planes  # how much it leaves uncovered

    def mix(self, under: _Planes, corner: tuple[int, int]) -> None:
        """Lay the thing into unlit planes, its corner at even (x, y)."""
        for part, own, clear in self._parts(under, corner):
            part *= clear
            part += own

    def lay(self, canvas: Canvas, under: _Planes, corner: tuple[int, int], light: float) -> None:
        """Lay the thing, lit, over what is `under` it into a canvas."""
        parts = self._parts(under, corner), self._parts(canvas.planes, corner)
        for (part, own, clear), (seen, _, _), offset in zip(*parts, OFFSETS, strict=True):
            seen[:] = _stored(part * clear + own, light, offset)

    def _parts(
        self, planes: tuple[Any, Any, Any], corner: tuple[int, int]
    ) -> Iterator[tuple[Any, Floats, Floats]]:
        """Where the thing lies in each plane, with its own plane and what it leaves; what is outside is cut off."""
        for plane, own, clear, step in zip(planes, self.planes, self.clear, (1, 2, 2), strict=True):
            x, y = corner[0] // step, corner[1] // step
            left, top = max(0, -x), max(0, -y)
            part = plane[max(0, y) : max(0, y + own.shape[0]), max(0, x) : max(0, x + own.shape[1])]
            inside = slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
            yield part, own[inside], clear[inside]


@dataclass(frozen=True)
class _Screen:
    """Draws the formulas of `draw` at a film's size."""

    width: int
    height: int

    def corner(self, x: float, y: float, radius: float) -> tuple[int, int]:
        """The even pixel at which a cut of a thing at x (in widths) and y (in heights) begins."""
        across, down = self._half(radius)
        return 2 * round((x * self.width - across) / 2), 2 * round((y * self.height - down) / 2)

    def place(self, scene: Scene) -> _Planes:
        y = (torch.arange(self.height) + 0.5)[:, None] / self.height
        x = (torch.arange(self.width) + 0.5)[None] * (ASPECT / self.width)
        kind = PLACES.index(scene.place)
        share = draw.place_pattern(kind, x, y, torch.tensor(scene.phase))  # (h, w)
        low, high = draw.palette()[1][kind]
        return _planes(low + share[..., None] * (high - low))

    def cut(self, radius: float, shape: str, colour: str, detail: tuple[str, str] | None = None) -> _Cut:
        """A thing of a radius in heights; `detail`: the texture and the digit of a main one."""
        across, down = self._half(radius)
        u = (torch.arange(2 * across) + 0.5 - across)[None] * (ASPECT / self.width / radius)
        v = (torch.arange(2 * down) + 0.5 - down)[:, None] / (self.height * radius)
        pixel = max(1 / self.height, ASPECT / self.width) / radius
        gap = draw.distance(SHAPES.index(shape), u, v)
        fill = draw.palette()[0][list(COLOURS).index(colour)]
        textured, outline = draw.tones(fill)
        picture = torch.zeros(*gap.shape, 4)  # red, green, blue, each times the cover; the cover
        picture = _over(picture, outline, draw.cover(gap - draw.OUTLINE, pixel))
        if detail is None:
            return _cut_out(_over(picture, fill, draw.cover(gap, pixel)))
        weave = draw.texture(TEXTURES.index(detail[0]), u, v)
        picture = _over(picture, fill + weave[..., None] * (textured - fill), draw.cover(gap, pixel))
        picture = _over(picture, torch.full((3,), _WHITE), draw.cover(draw.plate_distance(u, v), pixel))
        lit = draw.SEGMENTS[int(detail[1])]
        strokes = [gap for gap, on in zip(draw.segment_distances(u, v), lit, strict=True) if on == "1"]
        return _cut_out(
            _over(picture, torch.full((3,), _INK), draw.cover(torch.stack(strokes).amin(0), pixel))
        )

    def _half(self, radius: float) -> tuple[int, int]:
        """Half the width and height, even, of what is cut out for a thing."""
        return (
            2 * math.ceil((radius * _REACH * self.width / ASPECT + 1) / 2),
            2 * math.ceil((radius * _REACH * self.height + 1) / 2),
        )


def _over(picture: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    """Lay a colour, (3,) or (h, w, 3), over (h, w, 4) where it covers."""
    whole = torch.cat((colour.expand(*picture.shape[:2], 3), torch.ones(*picture.shape[:2], 1)), -1)
    return picture + cover[..., None] * (whole - picture)


def _cut_out(picture: Tensor) -> _Cut:
    covered = picture[..., 3].numpy()
    half = _halved(covered)
    return _Cut(_planes(picture[..., :3]), (1 - covered, 1 - half, 1 - half))


def _planes(picture: Tensor) -> _Planes:
    """(h, w, 3) in RGB, 0 to 1, to planes less their offsets."""
    y, u, v = (picture @ torch.from_numpy(YUV.T).float()).permute(2, 0, 1).contiguous().numpy()
    return y, _halved(u), _halved(v)


def _halved(plane: Floats) -> Floats:
    h, w = plane.shape
    mean: Floats = plane.reshape(h // 2, 2, w // 2, 2).mean((1, 3))
    return mean


def _lit(planes: _Planes, light: float) -> Canvas:
    y, u, v = (_stored(plane, light, offset) for plane, offset in zip(planes, OFFSETS, strict=True))
    return Canvas((y, u, v))


def _stored(plane: Floats, light: float, offset: int) -> Bytes:
    """What is brighter than white stays so until it is decoded, which cuts it off in RGB, as a painter does."""
    lit = plane * np.float32(light)
    lit += np.float32(offset + 0.5)
    return lit.clip(0, 255).astype(np.uint8)
