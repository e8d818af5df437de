"""From a frame of ffmpeg's to a picture: upright, with square pixels, opaque, 8-bit RGB, no larger than needed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from memdb.ingest.sources.base import fitted, on_black
from memdb.schemas.frames import Image

_Matrix = tuple[int, int, int, int]  # a, b, c, d: the pixel (x, y) is shown at (a x + c y, b x + d y)
_UPRIGHT: _Matrix = (1, 0, 0, 1)


def pixel_aspect(stream: Any) -> Fraction:
    """Width over height of a pixel; 1 where it is unknown, or nonsense in a header."""
    aspect: Fraction | None = stream.sample_aspect_ratio
    return aspect if aspect is not None and 0.1 <= aspect <= 10 else Fraction(1)


def shown_size(frame: Any, aspect: Fraction) -> tuple[int, int]:
    """Width and height of what `to_rgb` gives."""
    width, height = _fitted(frame, aspect)
    return (height, width) if _is_transposed(_display_matrix(frame)) else (width, height)


def to_rgb(frame: Any, aspect: Fraction) -> Image:
    """(height, width, 3), whatever the depth and the layout of its pixels. Raises FFmpegError."""
    width, height = _fitted(frame, aspect)
    pixels: Image = frame.to_ndarray(
        format="rgba" if _has_alpha(frame.format) else "rgb24", width=width, height=height
    )
    return np.ascontiguousarray(oriented(on_black(pixels), _display_matrix(frame)))


def _has_alpha(format: Any) -> bool:
    return format.has_palette or any(component.is_alpha for component in format.components)


def _fitted(frame: Any, aspect: Fraction) -> tuple[int, int]:
    return fitted(max(1, round(frame.width * aspect)), frame.height)


def _display_matrix(frame: Any) -> _Matrix:
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return _UPRIGHT
    a, b, _, c, d = (int(v) for v in np.frombuffer(data, np.int32, 5))
    return a, b, c, d


def _is_transposed(matrix: _Matrix) -> bool:
    a, b, _, _ = matrix
    return abs(b) > abs(a)


def oriented(pixels: Image, matrix: _Matrix) -> Image:
    """The picture as it is meant to be shown: turned by quarters and mirrored, (h, w, 3) or (w, h, 3)."""
    a, b, c, d = matrix
    if _is_transposed(matrix):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    if d < 0:
        pixels = pixels[::-1]
    return pixels
