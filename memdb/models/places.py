"""Where tokens stand: who comes before whom, and by what the rotation turns each of them.

In most families both are one number. Qwen2.5-VL has three ids a token, for time, row and column: the tokens of a
frame share a time, so the ids alone no longer say which of two tokens came first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Next:
    """The next place: where a token stands that is fed without a word about its place.

    `order` counts tokens: one more than any token so far, whatever the family. `id` is what the rotation turns
    by: one more than the largest id so far, over all tokens and over all axes, and it is the same on all axes.
    On a line the two are equal. On a grid they part: a frame of 120 tokens moves `order` by 120, and `id` only
    as far as its rows, columns and time reach. A frame may end below a row that an earlier one reached, so the
    next place is a maximum over the whole past and never "the last one plus one".
    """

    order: int
    id: int


@dataclass(frozen=True, eq=False)
class Places:
    """Places of T tokens: `order` (T,) decides who sees whom, `ids` (T,) or (3, T) are what they are turned by.

    Ids (T,) stand for the same id on every axis, as text has it. `end` is the next place behind them.
    """

    order: Tensor
    ids: Tensor
    end: Next

    @classmethod
    def line(cls, order: Tensor, end: int) -> Places:
        """One number a token, `end` one past the highest."""
        return cls(order, order, Next(end, end))

    @classmethod
    def text(cls, at: Next, tokens: int, device: torch.device) -> Places:
        """Tokens one after another from `at` on."""
        order = torch.arange(at.order, at.order + tokens, device=device)
        ids = order if at.id == at.order else torch.arange(at.id, at.id + tokens, device=device)
        return cls(order, ids, Next(at.order + tokens, at.id + tokens))

    def to(self, device: torch.device) -> Places:
        order = self.order.to(device)
        return Places(order, order if self.ids is self.order else self.ids.to(device), self.end)

    def after(self, tokens: int) -> Places:
        """These places behind those of `tokens` tokens of text that stand at 0, 1, ... ."""
        head = torch.arange(tokens, device=self.order.device)
        order = torch.cat((head, self.order))
        ids = order
        if self.ids is not self.order:
            ids = torch.cat((head.expand(*self.ids.shape[:-1], tokens), self.ids), -1)
        end = Next(max(self.end.order, tokens), max(self.end.id, tokens))
        return Places(order, ids, end)


class Placing(Protocol):
    """How a model gives ids to a sequence of texts and frames, for one sample rate."""

    def ids(self, start: int, sizes: Ints, visual: Bools, raster: Ints | None = None) -> tuple[Ints, int]:
        """Ids (T,) or (3, T) of segments that follow one another from the id `start` on, and the next id.

        sizes (S,): tokens of each segment; visual (S,): whether it is a frame, else it is text. raster (T,): at which
        place of its frame each token stands, where that is known; of text it says nothing.
        """
        ...

    def streamed(self, start: int, first: int, sizes: Sequence[int]) -> Tensor | None:
        """Ids (3, T) of frames in one endless run that begins at `start`; `first` is the number of the first.

        None on a line, where the place in the window is all there is to know.
        """
        ...

    def at(self, start: int, positions: Tensor, frame_tokens: int) -> Tensor:
        """Ids (T,) or (3, T) of tokens at `positions` (T,) in such a run, of frames of `frame_tokens` tokens each.

        The run begins at the position and the id `start`. What was dropped from it changes no other token's ids.
        """
        ...

    def ceiling(self, window: int) -> int:
        """The largest id that stands for "as far as the window reaches" (LM-Infinite's ceiling)."""
        ...


@dataclass(frozen=True)
class Line:
    """One id a token, text and frames alike: it is the token's place."""

    def ids(self, start: int, sizes: Ints, visual: Bools, raster: Ints | None = None) -> tuple[Ints, int]:
        end = start + int(sizes.sum())
        return np.arange(start, end), end

    def streamed(self, start: int, first: int, sizes: Sequence[int]) -> Tensor | None:
        return None

    def at(self, start: int, positions: Tensor, frame_tokens: int) -> Tensor:
        return positions

    def ceiling(self, window: int) -> int:
        return window - 1


LINE = Line()


@dataclass(frozen=True)
class Grid:
    """Three ids a token, (t, row, column), as Qwen2.5-VL has them (M-RoPE).

    A run of frames without text between begins at an id b, and its j-th frame stands at t = b + floor(j * step),
    row = b + row, column = b + column; `step` is the model's ids a second times the seconds from frame to frame.
    Text has one id on all three axes, and begins one past the largest id before it. Frames that a question brings
    back are renumbered in time alone: the j-th of a run stands where the j-th frame of a film would.

        2 x 3 tokens a frame, step 4, text of 2, two frames, text:
        t  0 1 | 2 2 2 2 2 2 | 6 6 6 6 6 6 | 7
        h  0 1 | 2 2 2 3 3 3 | 2 2 2 3 3 3 | 7
        w  0 1 | 2 3 4 2 3 4 | 2 3 4 2 3 4 | 7

    transformers 5.17 to 5.23 let the text behind a video begin at b + max(rows, columns), inside the video's own
    times where it is longer than that; their step is a whole number in 5.17. We follow the rule that the model was
    published with: one past the largest id. Where a film is short both rules give the same ids.

    A block that ageing thinned holds the tokens that `Uniform` chose and has their ids; one that was thinned twice
    has ids that differ from the true ones by less than one of the larger stretches. Frames that CTR reduced are given
    such ids as well, when they are encoded and ever after, unless the encoder is one that keeps where in the frame
    their tokens stood (encode `groups`).
    """

    rows: int
    columns: int
    step: Fraction

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def ids(self, start: int, sizes: Ints, visual: Bools, raster: Ints | None = None) -> tuple[Ints, int]:
        S = len(sizes)
        if not S:
            return np.zeros((3, 0), np.int64), start
        index = np.arange(S)
        begins = visual & ~np.concatenate(([False], visual[:-1]))
        ends = visual & ~np.concatenate((visual[1:], [False]))
        nth = index - np.maximum.accumulate(np.where(begins, index, 0))  # of its run
        t = nth * self.step.numerator // self.step.denominator
        # A run takes as many ids as its longest axis, and its last frame counts them.
        reach = np.maximum(t, max(self.rows, self.columns) - 1) + 1
        taken = np.where(visual, np.where(ends, reach, 0), sizes)
        base = start + np.cumsum(taken) - taken  # (S,)
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # (T,)
        if raster is None:
            raster = self._raster(within, np.repeat(sizes, sizes))
        axes = np.stack((np.repeat(t, sizes), raster // self.columns, raster % self.columns))  # (3, T)
        ids: Ints = np.repeat(base, sizes) + np.where(np.repeat(visual, sizes), axes, within)
        return ids, start + int(taken.sum())

    def streamed(self, start: int, first: int, sizes: Sequence[int]) -> Tensor | None:
        own = np.asarray(sizes, np.int64)
        nth = first + np.arange(len(own))
        t = nth * self.step.numerator // self.step.denominator
        within = np.arange(int(own.sum())) - np.repeat(np.cumsum(own) - own, own)
        raster = self._raster(within, np.repeat(own, own))
        axes = np.stack((np.repeat(t, own), raster // self.columns, raster % self.columns))
        return torch.from_numpy(start + axes)

    def at(self, start: int, positions: Tensor, frame_tokens: int) -> Tensor:
        behind = positions - start
        nth, within = behind // frame_tokens, behind % frame_tokens
        t = nth * self.step.numerator // self.step.denominator
        raster = (2 * within + 1) * self.tokens // (2 * frame_tokens)
        return start + torch.stack((t, raster // self.columns, raster % self.columns))

    def ceiling(self, window: int) -> int:
        """As far in time as the oldest frame of a full window (ours: the papers have one id a token)."""
        return int((window - 1) // self.tokens * self.step)

    def _raster(self, within: Ints, sizes: Ints) -> Ints:
        """Places in the frame (T,) of the tokens `within` blocks of `sizes` tokens: all of it, or `Uniform`'s."""
        raster: Ints = (2 * within + 1) * self.tokens // (2 * np.maximum(sizes, 1))
        return np.minimum(raster, self.tokens - 1)  # of text, which has no place in a frame


def closed_up(placing: Placing, start: int, positions: Tensor, frame_tokens: int) -> Tensor:
    """Positions (T,) of the same tokens without the gaps that others left, from `start` on.

    positions (T,): ascending, of a run that began at `start`. On a line one token follows the other. On a grid frames
    are renumbered, and a token keeps its place in its frame, whatever else is left of that.
    """
    if placing == LINE:
        return torch.arange(start, start + len(positions), device=positions.device)
    nth: Tensor = torch.unique((positions - start) // frame_tokens, return_inverse=True)[1]
    return start + nth * frame_tokens + (positions - start) % frame_tokens


def place_frames(
    placing: Placing, start: int, sizes: Sequence[int], device: torch.device, raster: Ints | None = None
) -> Places:
    """Places of frames of these sizes, one run from `start` on, behind as many tokens of text."""
    own = np.asarray(sizes, np.int64)
    return place(placing, start, own, np.ones(len(own), np.bool_), device, raster)


def place(
    placing: Placing,
    start: int,
    sizes: Ints,
    visual: Bools,
    device: torch.device,
    raster: Ints | None = None,
) -> Places:
    """Places of segments that follow one another behind `start` tokens of text (see `Placing.ids`)."""
    ids, end = placing.ids(start, sizes, visual, raster)
    stop = start + int(sizes.sum())
    order = torch.arange(start, stop, device=device)
    if ids.ndim == 1:
        return Places.line(order, stop)
    return Places(order, torch.from_numpy(ids).to(device), Next(stop, end))
