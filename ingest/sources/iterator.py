"""Frames that a program hands over: arrays at a rate, or pairs of seconds and array."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from memdb.ingest.sampling import checked_fps
from memdb.ingest.sources.base import Source, Timeline, check_size, fitted
from memdb.schemas.errors import SourceError, UsageError
from memdb.schemas.frames import DecodedFrame, Image, SourceIdentity, SourceInfo
from memdb.schemas.times import NS_PER_S, TIME_S_MAX, to_ns


class FrameIterator(Source):
    """Arrays (height, width, 3) of RGB uint8, given as `(seconds, array)` or, with `fps`, alone.

    The first frame is taken when the source is opened; an iterator can be gone through once. Seconds count
    from the recording's start. Raises SourceError where there is no frame or something else than a frame,
    UsageError where arrays come without `fps` or pairs with it, BudgetError for an absurd rate.
    """

    def __init__(self, frames: Iterable[Any], *, fps: float | None = None) -> None:
        self._fps = None if fps is None else checked_fps(fps, "fps")
        self._closed = False
        self._items: Iterator[Any] | None = iter(frames)
        self.warnings: list[str] = []
        self.media_end_ns: int | None = None
        try:
            first = next(self._items)
        except StopIteration:
            raise SourceError("the iterator gives no frames: give at least one") from None
        height, width, _ = self._timed(0, first)[1].shape
        self._items = chain([first], self._items)
        width, height = fitted(width, height)
        self.info = SourceInfo(
            identity=SourceIdentity("frames", 0, ""),
            name="frames",
            live=False,
            started_at_ns=None,
            duration_ns=None,
            width=width,
            height=height,
        )

    def frames(self) -> Iterator[DecodedFrame]:
        """Raises SourceError for a second pass, and at anything that is not a frame."""
        if self._items is None:
            raise SourceError("an iterator of frames can be gone through once: give a new one")
        items, self._items = self._items, None
        timeline = Timeline(0 if self._fps is None else round(NS_PER_S / self._fps))
        try:
            for index, item in enumerate(items):
                if self._closed:
                    return
                pts_ns, array = self._timed(index, item)
                if timeline.accepts(pts_ns):
                    yield DecodedFrame(pts_ns, partial(_shrunk, array))
            self.media_end_ns = timeline.end_ns
        finally:
            self.warnings += timeline.warnings("the iterator")

    def close(self) -> None:
        self._closed = True

    def _timed(self, index: int, item: Any) -> tuple[int, Image]:
        is_pair = isinstance(item, tuple | list) and len(item) == 2
        if is_pair and self._fps is not None:
            raise UsageError("the frames carry their own seconds: leave fps out")
        if not is_pair and self._fps is None:
            raise UsageError("arrays without times need a rate: give fps, or pairs of (seconds, array)")
        if self._fps is not None:
            return round(index * NS_PER_S / self._fps), _checked(index, item)
        seconds, array = item
        try:
            valid = math.isfinite(seconds) and 0 <= seconds <= TIME_S_MAX
        except TypeError:
            valid = False
        if not valid:
            raise SourceError(f"frame {index} stands at {seconds!r}: give seconds from the start on, >= 0")
        return to_ns(float(seconds)), _checked(index, array)


def _checked(index: int, array: Any) -> Image:
    if not (
        isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
    ):
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise SourceError(f"frame {index} is {what}: give NumPy arrays (height, width, 3) of RGB uint8")
    check_size(array.shape[1], array.shape[0], f"frame {index}")
    return array


def _shrunk(array: Image) -> Image:
    """A copy (the caller may use its buffer again), no longer than sources allow."""
    height, width, _ = array.shape
    size = fitted(width, height)
    if size == (width, height):
        return array.copy()
    import PIL.Image

    return np.array(PIL.Image.fromarray(array).resize(size, PIL.Image.Resampling.BOX))
