"""Drawn films as real H.264 files: pictures as the planes that are stored, and the stream that takes them."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from memdb.schemas.errors import BudgetError

Bytes = npt.NDArray[np.uint8]
FILM_S_MAX = 86_400
# RGB, 0 to 1, to Y, U and V less their offsets: the limited range of BT.601, as decoders assume it for films that
# do not say. Black is 0 in all three, so light and covers are factors.
YUV = np.array(
    [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], dtype=np.float64
)
OFFSETS = (16, 128, 128)


def yuv(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """One colour of 0 to 255 a channel as Y, U and V."""
    y, u, v = (float(part) for part in YUV @ np.array(colour) / 255)
    return round(16 + y), round(128 + u), round(128 + v)


class Canvas:
    """A picture as the planes that H.264 stores: drawing there saves turning each frame from RGB."""

    def __init__(self, planes: tuple[Bytes, Bytes, Bytes]) -> None:
        self.planes = planes  # Y (height, width), U and V (height / 2, width / 2)

    @classmethod
    def filled(cls, width: int, height: int, colour: tuple[int, int, int]) -> Canvas:
        y, u, v = yuv(colour)
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
        return np.concatenate([plane.ravel() for plane in planes]).reshape(-1, width)


def check_film(seconds: float, fps: int, width: int, height: int) -> None:
    """Raises BudgetError for lengths, rates and sizes that no film has."""
    if not (0 < seconds <= FILM_S_MAX and 1 <= fps <= 240):
        raise BudgetError("a film takes up to a day, at 1 to 240 frames a second")
    if not all(side % 2 == 0 and 32 <= side <= 4096 for side in (width, height)):
        raise BudgetError("a film is 32 to 4096 pixels wide and high, in even numbers")


def add_stream(container: Any, size: tuple[int, int], fps: int, keyframe_s: float) -> Any:
    """An H.264 stream of pictures of `size` (width, height) in an open PyAV container."""
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


def write_frames(container: Any, stream: Any, pictures: Iterable[Bytes], fps: int) -> None:
    """Encode pictures as `Canvas.turned` gives them, one every 1 / fps, and end the stream."""
    import av

    for number, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, fps)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _full(shape: tuple[int, int], value: int) -> Bytes:
    return np.full(shape, value, np.uint8)
