"""Recordings as plans: scenes with exact truth, drawn from a seed.

A scene has a place, one main thing with a size, colour, shape and motion, details that captions leave out (a
digit and a texture on it, up to two small things beside it), and a light that drifts. Scenes resemble earlier ones
in all but one attribute, or come again, so that a search meets real distractors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from memdb.schemas.errors import UsageError
from memdb.world.vocabulary import (
    COLOURS,
    DIGITS,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Main,
    combinations,
    split_of,
)

SCENE_S = (6, 14)  # whole seconds, the last second excluded
SECONDS_MAX = 1_000_000
EMPTY_SHARE, RESEMBLES_SHARE, AGAIN_SHARE = 0.05, 0.25, 0.03
RADIUS = {"small": 0.16, "large": 0.25}  # in heights of the picture
BESIDE_RADIUS = 0.11
ASPECT = 16 / 9
CORNERS = ((0.12, 0.17), (0.88, 0.17), (0.12, 0.83), (0.88, 0.83))  # in widths and heights


@dataclass(frozen=True)
class Beside:
    """A small thing in a corner, there from the share `enters` of its scene on."""

    colour: str
    shape: str
    corner: int
    enters: float


@dataclass(frozen=True)
class Scene:
    """`[start_s, end_s)` of a recording, with everything that is true in it. An `empty` one shows its place only."""

    start_s: int
    end_s: int
    size: str
    colour: str
    shape: str
    place: str
    motion: str
    texture: str
    digit: str
    beside: tuple[Beside, ...]
    x: float  # of the resting coordinate, in widths and heights
    y: float
    phase: float  # of the place's pattern
    light: float  # factor at the beginning
    drift: float  # what is added to it until the end
    empty: bool = False

    @property
    def main(self) -> Main:
        return self.size, self.colour, self.shape, self.place, self.motion

    def at(self, share: float) -> tuple[float, float, float]:
        """Where the main thing is after `share` of the scene: x in widths, y and radius in heights."""
        x, y, radius = self.x, self.y, RADIUS[self.size]
        if self.motion in ("left", "right"):
            x = 0.22 + 0.56 * (share if self.motion == "right" else 1 - share)
        elif self.motion in ("up", "down"):
            y = 0.3 + 0.4 * (share if self.motion == "down" else 1 - share)
        elif self.motion in ("grows", "shrinks"):
            radius *= 0.75 + 0.5 * (share if self.motion == "grows" else 1 - share)
        return x, y, radius

    def light_at(self, share: float) -> float:
        return self.light + self.drift * share


def plan(seed: int | str, seconds: int, split: str = "test") -> list[Scene]:
    """The scenes of a recording of whole `seconds`, the last one cut. The same arguments give the same scenes.

    Raises UsageError for lengths and splits that there are not.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if not 1 <= seconds <= SECONDS_MAX:
        raise UsageError(
            f"a recording of {seconds} s cannot be planned: choose 1 to {SECONDS_MAX} whole seconds"
        )
    choose = random.Random(f"{split}/{seed}")  # noqa: S311
    scenes: list[Scene] = []
    start_s = 0
    while start_s < seconds:
        end_s = start_s + choose.randrange(*SCENE_S)
        if seconds - end_s < SCENE_S[0]:
            end_s = seconds
        scenes.append(_scene(choose, scenes, start_s, end_s, split))
        start_s = end_s
    return scenes


def scene_at(scenes: list[Scene], time_s: float) -> Scene:
    """The scene that is on at a time. Raises UsageError where there is none."""
    low, high = 0, len(scenes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if scenes[middle].end_s <= time_s else (low, middle)
    if low == len(scenes) or scenes[low].start_s > time_s:
        raise UsageError(f"nothing is planned for {time_s:g} s")
    return scenes[low]


def _scene(choose: random.Random, before: list[Scene], start_s: int, end_s: int, split: str) -> Scene:
    chance = choose.random()
    if before and chance < AGAIN_SHARE:
        again = choose.choice(before)
        return replace(again, start_s=start_s, end_s=end_s, phase=choose.random())
    main = choose.choice(combinations(split))
    if before and chance < AGAIN_SHARE + RESEMBLES_SHARE:
        main = _resembling(choose, choose.choice(before).main, split)
    size, colour, shape, place, motion = main
    return Scene(
        start_s,
        end_s,
        size,
        colour,
        shape,
        place,
        motion,
        choose.choice(TEXTURES),
        choose.choice(DIGITS),
        tuple(_beside(choose, shape)),
        choose.uniform(0.35, 0.65),
        choose.uniform(0.45, 0.55),
        choose.random(),
        choose.uniform(0.85, 1.0),
        choose.uniform(-0.12, 0.12),
        empty=choose.random() < EMPTY_SHARE,
    )


def _resembling(choose: random.Random, main: Main, split: str) -> Main:
    """The same but for one attribute, in the same split; where there is none, the same."""
    ranges = (SIZES, tuple(COLOURS), SHAPES, PLACES, MOTIONS)
    others = [
        cast(Main, (*main[:at], value, *main[at + 1 :]))
        for at, values in enumerate(ranges)
        for value in values
        if value != main[at]
    ]
    mine = [other for other in others if split_of(other) == split]
    return choose.choice(mine) if mine else main


def _beside(choose: random.Random, shape: str) -> Iterator[Beside]:
    """None, one or two, of shapes unlike the main thing's and each other's."""
    count = choose.choice((0, 1, 1, 2))
    shapes = choose.sample([other for other in SHAPES if other != shape], count)
    for name, corner in zip(shapes, choose.sample(range(len(CORNERS)), count), strict=True):
        yield Beside(choose.choice(tuple(COLOURS)), name, corner, choose.choice((0.0, 0.0, 0.3)))
