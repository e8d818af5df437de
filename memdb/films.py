"""Films of moving coloured shapes, rendered to real H.264 files: something to remember and to ask about."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from memdb.schemas.errors import BudgetError

Bytes = npt.NDArray[np.uint8]

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 30, 30),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
_SUPERSAMPLING = 4  # shapes are drawn this much larger, once a scene, and averaged down: smooth edges


@dataclass(frozen=True)
class Scene:
    """One shape that moves on one background during `[start_s, end_s)`."""

    start_s: float
    end_s: float
    shape: str
    colour: str
    background: str

    def __str__(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on {self.background}"


def plan_scenes(seconds: float, *, scene_s: float = 4.0, seed: int = 0) -> list[Scene]:
    """Scenes of `scene_s` that fill `seconds`, the last one cut; neighbours differ in shape and colours."""
    choose = random.Random(seed)  # noqa: S311
    scenes: list[Scene] = []
    for number in range(math.ceil(seconds / scene_s)):
        before = scenes[-1] if scenes else None
        shape = choose.choice([s for s in SHAPES if before is None or s != before.shape])
        colour = choose.choice([c for c in COLOURS if before is None or c != before.colour])
        background = choose.choice(
            [c for c in COLOURS if c != colour and (not before or c != before.background)]
        )
        end_s = min((number + 1) * scene_s, seconds)
        scenes.append(Scene(number * scene_s, end_s, shape, colour, background))
    return scenes


def render_film(
    path: str | os.PathLike[str],
    *,
    seconds: float,
    fps: int = 25,
    width: int = 640,
    height: int = 360,
    seed: int = 0,
    keyframe_s: float = 2.0,
    rotate: int = 0,
    scene_s: float = 4.0,
    created_at: str | None = None,
) -> list[Scene]:
    """Write an H.264 film (the container follows from the suffix) and return what is to be seen in it.

    The same arguments give the same pictures. With `rotate` (90, 180 or 270, counter-clockwise) the pictures
    are stored turned, with a display matrix that turns them back, as phones do: a player shows `width` x
    `height`, upright. `created_at` (ISO 8601) becomes the container's creation time. Raises BudgetError for
    lengths, rates and sizes that no film has.
    """
    if not (0 < seconds <= 86_400 and 1 <= fps <= 240 and scene_s >= 0.1 and keyframe_s > 0):
        raise BudgetError(
            "a film takes up to a day, at 1 to 240 frames a second, in scenes of 0.1 s and more"
        )
    if not all(side % 2 == 0 and 32 <= side <= 4096 for side in (width, height)) or rotate % 90:
        raise BudgetError("a film is 32 to 4096 pixels wide and high, in even numbers, turned by quarters")
    import av

    scenes = plan_scenes(seconds, scene_s=scene_s, seed=seed)
    quarters = rotate // 90 % 4
    with av.open(os.fspath(path), "w") as container:
        if created_at is not None:
            container.metadata["creation_time"] = created_at
        stored = (height, width) if quarters % 2 else (width, height)
        stream = _h264_stream(container, stored, fps, keyframe_s)
        if quarters:
            stream.set_display_rotation(90 * quarters)
        for number, canvas in enumerate(_canvases(scenes, seconds, fps, width, height, seed)):
            frame = av.VideoFrame.from_ndarray(canvas.turned(-quarters), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return scenes


def _h264_stream(container: Any, size: tuple[int, int], fps: int, keyframe_s: float) -> Any:
    options = {
        "preset": "superfast",
        "crf": "20",
        "g": str(max(1, round(keyframe_s * fps))),
        "sc_threshold": "0",
    }
    stream = container.add_stream("libx264", rate=fps, options=options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    return stream


class Canvas:
    """A picture as the planes that H.264 stores: drawing there saves turning each frame from RGB."""

    def __init__(self, planes: tuple[Bytes, Bytes, Bytes]) -> None:
        self.planes = planes  # Y (height, width), U and V (height / 2, width / 2)

    @classmethod
    def filled(cls, width: int, height: int, colour: tuple[int, int, int]) -> Canvas:
        y, u, v = _yuv(colour)
        half = (height // 2, width // 2)
        return cls((_full((height, width), y), _full(half, u), _full(half, v)))

    def paste(self, patch: Canvas, x: int, y: int) -> None:
        """Lay `patch` at even `x`, `y`."""
        for plane, piece, step in zip(self.planes, patch.planes, (1, 2, 2), strict=True):
            rows, columns = piece.shape
            plane[y // step : y // step + rows, x // step : x // step + columns] = piece

    def copy(self) -> Canvas:
        y, u, v = self.planes
        return Canvas((y.copy(), u.copy(), v.copy()))

    def turned(self, quarters: int) -> Bytes:
        """The planes one below the other, turned counter-clockwise: (height * 3 / 2, width) for PyAV."""
        planes = [np.rot90(plane, quarters) for plane in self.planes]
        width = planes[0].shape[1]
        return np.concatenate([plane.reshape(-1, width) for plane in planes])


def _canvases(
    scenes: Sequence[Scene], seconds: float, fps: int, width: int, height: int, seed: int
) -> Iterator[Canvas]:
    """Every frame of the film, each a canvas of its own."""
    frame_count = max(1, round(seconds * fps))
    bounds = [math.ceil(scene.start_s * fps) for scene in scenes] + [frame_count]
    for number, scene in enumerate(scenes):
        empty = Canvas.filled(width, height, COLOURS[scene.background])
        side = min(width, height) * 2 // 5 // 2 * 2
        patch = _drawn(scene, side)
        place = _path(random.Random(f"{seed}/{number}"), width - side, height - side)  # noqa: S311
        for frame in range(bounds[number], bounds[number + 1]):
            canvas = empty.copy()
            canvas.paste(patch, *place(frame / fps - scene.start_s))
            yield canvas


def _path(choose: random.Random, width: int, height: int) -> Callable[[float], tuple[int, int]]:
    """A function of seconds to a place in `width` x `height`, in even pixels: two slow swings."""
    swings = [(choose.uniform(0.5, 1.2), choose.uniform(0, math.tau), size) for size in (width, height)]

    def place(seconds: float) -> tuple[int, int]:
        x, y = (
            int((0.5 + 0.5 * math.sin(speed * seconds + phase)) * size) // 2 * 2
            for speed, phase, size in swings
        )
        return x, y

    return place


def _drawn(scene: Scene, side: int) -> Canvas:
    """The shape on its background, a square of `side` (even) pixels."""
    cover = _coverage(scene.shape, side)  # (side, side), 0 to 1
    quarter = cover.reshape(side // 2, 2, side // 2, 2).mean((1, 3))
    covers = (cover, quarter, quarter)
    colours = zip(_yuv(COLOURS[scene.colour]), _yuv(COLOURS[scene.background]), strict=True)
    y, u, v = (
        np.rint(back + (front - back) * part).astype(np.uint8)
        for part, (front, back) in zip(covers, colours, strict=True)
    )
    return Canvas((y, u, v))


def _coverage(shape: str, side: int) -> npt.NDArray[np.float64]:
    """How much of each pixel the shape covers, (side, side), 0 to 1."""
    from PIL import Image, ImageDraw

    large = side * _SUPERSAMPLING
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, large - 1, large - 1), fill=255)
    elif shape == "square":
        draw.rectangle((large // 12, large // 12, large * 11 // 12, large * 11 // 12), fill=255)
    elif shape == "triangle":
        draw.polygon([(large / 2, 0), (0, large - 1), (large - 1, large - 1)], fill=255)
    else:
        radii = [large / 2 if corner % 2 == 0 else large / 5 for corner in range(10)]
        turns = [math.pi * corner / 5 for corner in range(10)]
        points = [
            (large / 2 + r * math.sin(a), large / 2 - r * math.cos(a))
            for r, a in zip(radii, turns, strict=True)
        ]
        draw.polygon(points, fill=255)
    fine: npt.NDArray[np.float64] = np.asarray(mask, np.float64) / 255
    cover: npt.NDArray[np.float64] = fine.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING).mean((1, 3))
    return cover


def _yuv(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """RGB to the limited range of BT.601, as decoders assume it for films that do not say."""
    r, g, b = (channel / 255 for channel in colour)
    y = 16 + 65.481 * r + 128.553 * g + 24.966 * b
    u = 128 - 37.797 * r - 74.203 * g + 112.0 * b
    v = 128 + 112.0 * r - 93.786 * g - 18.214 * b
    return round(y), round(u), round(v)


def _full(shape: tuple[int, int], value: int) -> Bytes:
    return np.full(shape, value, np.uint8)
