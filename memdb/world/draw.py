"""The world's pictures as formulas: places, shapes, textures and digits, the same for films and for training.

Everything is a function of coordinates, in heights of the picture with the origin at the top left, so a picture of
any size shows the same scene; edges are smooth over one pixel. Tensors broadcast: (F, 1, 1) parameters against
(h, w) coordinates give F pictures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memdb.world.vocabulary import COLOURS, PLACES, SHAPES, TEXTURES

# Two colours a place: what its pattern runs between.
PALETTE = {
    "desert": ((218, 195, 145), (190, 160, 112)),
    "sea": ((70, 112, 142), (98, 145, 175)),
    "forest": ((58, 80, 58), (88, 112, 80)),
    "city": ((112, 112, 122), (172, 172, 155)),
    "snow": ((228, 231, 238), (196, 202, 218)),
    "night": ((24, 24, 46), (92, 92, 118)),
    "garden": ((122, 152, 102), (155, 182, 124)),
    "road": ((88, 88, 88), (124, 124, 120)),
    "room": ((182, 162, 150), (122, 92, 76)),
    "cave": ((68, 58, 54), (104, 88, 78)),
}
# A digit's seven segments: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)
OUTLINE = 0.07  # of the radius
_PLATE = (0.44, 0.5)  # half the width and height of the white plate, in radii
_GLYPH = (0.22, 0.34, 0.07)  # half the width and height of a digit, half its stroke


def place_pattern(place: int, x: Tensor, y: Tensor, phase: Tensor) -> Tensor:
    """How far between its two colours a place is, 0 to 1, at x (to 16/9) and y (to 1)."""
    turn = math.tau * phase
    name = PLACES[place]
    if name == "desert":
        return 0.5 + 0.5 * torch.sin(18 * y + 2 * torch.sin(5 * x + turn))
    if name == "sea":
        return 0.5 + 0.5 * torch.sin(50 * y + torch.sin(12 * x + turn))
    if name == "forest":
        return 0.5 + 0.5 * torch.sin(30 * x + turn) + 0 * y
    if name == "city":
        return _step(torch.sin(22 * x + turn) - 0.2, 8) * _step(torch.sin(26 * y) - 0.2, 8)
    if name == "snow":
        return _step(torch.sin(20 * x + turn) * torch.sin(20 * y) - 0.55, 5)
    if name == "night":
        return _step(torch.sin(31 * x + turn) * torch.sin(33 * y + 9 * x) - 0.85, 9)
    if name == "garden":
        return _step(torch.sin(14 * x + turn) * torch.sin(14 * y), 8)
    if name == "road":
        return 0.5 + 0.5 * torch.sin(20 * (x + y) + turn)
    if name == "room":
        return _step(y - 0.62 + 0 * x + 0.04 * torch.sin(turn), 60)
    far = torch.sqrt((x - 0.89) ** 2 + (y - 0.5) ** 2)
    return 0.5 + 0.5 * torch.sin(24 * far + turn)


def distance(shape: int, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to a shape's edge in radii, negative inside, at u to the right and v down from its middle."""
    name, au = SHAPES[shape], u.abs()
    if name == "circle":
        return torch.sqrt(u * u + v * v) - 0.92
    if name == "square":
        return torch.maximum(au, v.abs()) - 0.82
    if name == "bar":
        return torch.maximum(au - 1.05, v.abs() - 0.5)
    if name == "diamond":
        return (au + v.abs()) * 0.7071 - 0.76
    if name == "cross":
        av = v.abs()
        return torch.minimum(torch.maximum(au - 1.0, av - 0.38), torch.maximum(au - 0.38, av - 1.0))
    if name == "triangle":
        return torch.maximum(v - 0.75, (au * 1.79 - v - 0.97) * 0.488)
    if name == "star":
        return _star(u, v)
    tops = torch.sqrt((au - 0.44) ** 2 + (v + 0.3) ** 2) - 0.52
    return torch.minimum(tops, torch.maximum(-v - 0.3, (au * 0.74 + v * 0.67) - 0.52))


def _star(u: Tensor, v: Tensor) -> Tensor:
    fifth = math.pi / 5
    angle = (torch.remainder(torch.atan2(u, -v) + fifth, 2 * fifth) - fifth).abs()
    length = torch.sqrt(u * u + v * v)
    return (length * torch.cos(angle) - 1.05) * 0.384 + length * torch.sin(angle) * 0.923


def texture(kind: int, u: Tensor, v: Tensor) -> Tensor:
    """How much of a texture's dark part, 0 to 1, at u and v in radii."""
    name = TEXTURES[kind]
    if name == "plain":
        return 0 * (u + v)
    if name == "striped":
        return _step(torch.sin(v * (math.tau / 0.5)) + 0 * u, 4)
    if name == "dotted":
        return _step(torch.cos(u * (math.tau / 0.62)) * torch.cos(v * (math.tau / 0.62)) - 0.25, 4)
    return _step(torch.sin(u * (math.tau / 1.0)) * torch.sin(v * (math.tau / 1.0)), 6)


def _step(value: Tensor, sharp: float) -> Tensor:
    return (0.5 + sharp * value).clamp(0, 1)


def cover(gap: Tensor, pixel: Tensor | float) -> Tensor:
    """How much of a pixel (its size in the same measure) lies inside, from the signed distance of its middle."""
    return (0.5 - gap / pixel).clamp(0, 1)


def segment_distances(u: Tensor, v: Tensor) -> list[Tensor]:
    """Signed distances to the seven segments of a digit, in radii."""
    wide, high, half = _GLYPH
    across = u.abs() - wide - half
    bars = [torch.maximum(across, (v - at).abs() - half) for at in (-high, 0.0, high)]
    sides = [
        torch.maximum((u - x).abs() - half, (v - y).abs() - high / 2 - half)
        for y in (-high / 2, high / 2)
        for x in (-wide, wide)
    ]
    return [bars[0], sides[0], sides[1], bars[1], sides[2], sides[3], bars[2]]


def plate_distance(u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to the white plate behind a digit, in radii."""
    return torch.maximum(u.abs() - _PLATE[0], v.abs() - _PLATE[1])


def tones(colour: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 3) colours, 0 to 1 -> the tone of their texture and of their outline: what can be told from them."""
    bright = (colour * colour.new_tensor([0.3, 0.59, 0.11])).sum(-1, keepdim=True)
    dark = bright < 0.35
    textured = torch.where(dark, colour + 0.38, colour * 0.55)
    outline = torch.where(dark, torch.full_like(colour, 0.95), torch.full_like(colour, 0.08))
    return textured, outline


def palette(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Colours of things (COLOURS, 3) and of places (PLACES, 2, 3), 0 to 1."""
    things = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 255
    places = torch.tensor([PALETTE[name] for name in PLACES], dtype=torch.float32, device=device) / 255
    return things, places
