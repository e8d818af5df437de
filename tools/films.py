"""Films of moving coloured shapes for tests and benches, without the questions of `memdb.world`: plain real H.264."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb.h264 import Canvas, add_stream, check_film, write_frames, yuv
from memdb.schemas.errors import BudgetError

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
    choose = random.Random(seed)
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
    check_film(seconds, fps, width, height)
    if not (scene_s >= 0.1 and keyframe_s > 0):
        raise BudgetError("scenes of a film take 0.1 s and more, and key frames come after more than 0 s")
    if rotate % 90:
        raise BudgetError(f"a film cannot be turned by {rotate} degrees: turn it by quarters, such as 90")
    import av

    scenes = plan_scenes(seconds, scene_s=scene_s, seed=seed)
    quarters = rotate // 90 % 4
    with av.open(os.fspath(path), "w") as container:
        if created_at is not None:
            container.metadata["creation_time"] = created_at
        stored = (height, width) if quarters % 2 else (width, height)
        stream = add_stream(container, stored, fps, keyframe_s)
        if quarters:
            stream.set_display_rotation(90 * quarters)
        canvases = _canvases(scenes, seconds, fps, width, height, seed)
        write_frames(container, stream, (canvas.turned(-quarters) for canvas in canvases), fps)
    return scenes


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
        place = _path(random.Random(f"{seed}/{number}"), width - side, height - side)
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
    colours = zip(yuv(COLOURS[scene.colour]), yuv(COLOURS[scene.background]), strict=True)
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
