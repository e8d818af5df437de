"""What is true in a frame, and a head that is to tell it from the frame's tokens.

Captions and answers teach a vision tower slowly, for a wrong word says little of what was not seen. Told of every
frame, facts are a hundred times as much to learn from in a step. The heads are for training alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdb.world.pictures import DIGIT, PLACE, TEXTURE, THING, THINGS
from memdb.world.scenes import Scene
from memdb.world.vocabulary import COLOURS, DIGITS, MOTIONS, PLACES, SHAPES, SIZES, TEXTURES

IGNORED = -100
# Of the picture alone, in the order of `shown`: no single frame shows a size (things grow and shrink) or a motion.
SHOWN: dict[str, int] = {
    "place": len(PLACES),
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "texture": len(TEXTURES),
    "digit": len(DIGITS),
    **{f"beside_{shape}": 1 + len(COLOURS) for shape in SHAPES},  # none, or its colour
}
TOLD: dict[str, tuple[str, ...]] = {"size": SIZES, "motion": MOTIONS}  # of a scene, in the order of `told`
# What a time behind frames or a caption is to take up of them, so that it can be found: columns of SHOWN and TOLD.
NOTED = ("place", "colour", "shape", "texture", "digit", "size", "motion")
NOTED_SIZES = tuple({**SHOWN, **{name: len(own) for name, own in TOLD.items()}}[name] for name in NOTED)
NOTED_COLUMNS = tuple([*SHOWN, *TOLD].index(name) for name in NOTED)
NUMBERS = 100  # of two digits, as times have them
PLACED = 3  # x, y and radius of the main thing
_MOVING_S = 2  # of a scene, behind which its motion can be told
# What brings x, y and radius to about -1 to 1: their middles, and half of what they span.
_MIDDLE, _HALF = (0.89, 0.5, 0.2), (0.5, 0.2, 0.1)


def told(scenes: Sequence[Scene], times: Sequence[int]) -> npt.NDArray[np.int64]:
    """Size and motion of the scene in each frame, (F, 2), as indices; IGNORED where there is nothing to tell."""
    rows = np.full((len(scenes), len(TOLD)), IGNORED, np.int64)
    for row, scene, time_s in zip(rows, scenes, times, strict=True):
        if scene.empty:
            continue
        row[0] = SIZES.index(scene.size)
        if time_s >= scene.start_s + _MOVING_S:
            row[1] = MOTIONS.index(scene.motion)
    return rows


def shown(rows: Tensor) -> Tensor:
    """What the pictures of these parameters (F, COLUMNS) show: (F, len(SHOWN)), IGNORED without a main thing."""
    things = rows[:, THINGS:].view(len(rows), 3, THING)
    shape, colour, there = things[..., 3].long(), things[..., 4].long(), things[..., 5] > 0
    main = torch.stack(
        (colour[:, 0], shape[:, 0], rows[:, TEXTURE].long(), rows[:, DIGIT].long()), 1
    ).masked_fill(~there[:, :1], IGNORED)
    beside = torch.zeros(len(rows), len(SHAPES), dtype=torch.long, device=rows.device)
    for at in (1, 2):
        own = (shape[:, at, None] == torch.arange(len(SHAPES), device=rows.device)) & there[:, at, None]
        beside = beside + own * (1 + colour[:, at, None])
    return torch.cat((rows[:, PLACE, None].long(), main, beside), 1)


def placed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the main thing is and how large, (F, PLACED) from about -1 to 1, and in which frames there is one."""
    main = rows[:, THINGS : THINGS + THING]
    parts = [
        (main[:, at] - middle) / half for at, (middle, half) in enumerate(zip(_MIDDLE, _HALF, strict=True))
    ]
    return torch.stack(parts, 1), main[:, 5] > 0


def noted(scene: Scene, *, moving: bool) -> list[int]:
    """What a caption says of a scene, in the order of NOTED; IGNORED for what it does not say."""
    place = PLACES.index(scene.place)
    if scene.empty:
        return [place, *[IGNORED] * (len(NOTED) - 1)]
    motion = MOTIONS.index(scene.motion) if moving else IGNORED
    main = tuple(COLOURS).index(scene.colour), SHAPES.index(scene.shape)
    return [place, *main, IGNORED, IGNORED, SIZES.index(scene.size), motion]


class Noter(nn.Module):
    """What single tokens of text have taken up, and which number they still are.

    A time is copied from its tokens, and nothing else in training asks them to stay what they were.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in (*NOTED_SIZES, NUMBERS))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(n, E) -> the scores of every fact and of the numbers, (n, its values) each."""
        tokens = self.norm(tokens)
        return [head(tokens).float() for head in self.heads]


class Teller(nn.Module):
    """Each fact has a query of its own over a frame's tokens, and a linear head behind it."""

    def __init__(self, width: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(0.02 * torch.randn(len(sizes), width))
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(F, N, E) -> the scores of every fact, (F, its values) each."""
        tokens = self.norm(tokens)
        share = (tokens @ self.queries.T).float().softmax(1).to(tokens.dtype)  # (F, N, facts)
        pooled = torch.einsum("fne,fnk->kfe", tokens, share)
        return [head(own).float() for head, own in zip(self.heads, pooled, strict=True)]


def told_right(scores: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy over the frames in which there is something to tell; which are right; which those are."""
    there = wanted >= 0
    each = F.cross_entropy(scores, wanted.clamp(min=0), reduction="none")
    return (each * there).sum() / there.sum().clamp(min=1), (scores.argmax(1) == wanted) & there, there
