"""What the world is made of, and which combinations belong to training, development and test."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import product

SIZES = ("small", "large")
COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 175),
    "orange": (245, 135, 25),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
    "pink": (250, 150, 190),
    "cyan": (60, 205, 215),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "bar")
PLACES = ("desert", "sea", "forest", "city", "snow", "night", "garden", "road", "room", "cave")
MOTIONS = ("left", "right", "up", "down", "still", "grows", "shrinks")
TEXTURES = ("plain", "striped", "dotted", "checked")
DIGITS = tuple(str(digit) for digit in range(10))

SPLITS = ("train", "dev", "test")
Main = tuple[str, str, str, str, str]  # size, colour, shape, place, motion


@cache
def split_of(main: Main) -> str:
    """To which split a combination belongs: 1 in 10 to development, 2 in 10 to test, by its hash."""
    share = hashlib.blake2b(" ".join(main).encode(), digest_size=4).digest()
    tenth = int.from_bytes(share, "big") % 10
    return "dev" if tenth == 0 else "test" if tenth <= 2 else "train"


@cache
def combinations(split: str) -> tuple[Main, ...]:
    """Every combination of main attributes in a split; no combination is in two."""
    every = product(SIZES, COLOURS, SHAPES, PLACES, MOTIONS)
    return tuple(main for main in every if split_of(main) == split)
