"""A sampled frame on its way through the stages: ready for the model, then seen by it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from memdb.models.protocol import Pixels
from memdb.schemas.frames import Frame, Image

# Key frames are for people: large enough to recognise a face, small beside the KV of a clip.
KEYFRAME_LONG_SIDE = 640
KEYFRAME_QUALITY = 85


@dataclass(frozen=True, eq=False)
class ReadyFrame:
    """A frame at the model's size, and a small picture of it for people. No torch: made by the decoder's thread."""

    number: int
    start_ns: int
    end_ns: int
    pixels: Pixels
    picture: Image
    tombstones: int = 0  # how many spans had been forgotten when it was taken in


@dataclass(frozen=True, eq=False)
class SeenFrame:
    """A frame as the language model takes it, (N, E), with its JPEG if it opens a unit.

    Where the model sees several raw frames as one, number and picture are the first one's and the span is theirs
    together, with what lies between. Where the last one lacks its partner it is alone in its span.
    """

    number: int
    start_ns: int
    end_ns: int
    tokens: Tensor
    picture: Image | bytes

    def jpeg(self) -> bytes:
        return self.picture if isinstance(self.picture, bytes) else to_jpeg(self.picture)


def thumbnail(frame: Frame) -> Image:
    """The frame's picture, shrunk to at most `KEYFRAME_LONG_SIDE` pixels."""
    from PIL import Image as Pictures

    height, width = frame.image.shape[:2]
    scale = KEYFRAME_LONG_SIDE / max(height, width)
    if scale >= 1:
        return frame.image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Pictures.fromarray(frame.image).resize(size, Pictures.Resampling.BILINEAR))


def to_jpeg(picture: Image) -> bytes:
    from PIL import Image as Pictures

    out = io.BytesIO()
    Pictures.fromarray(picture).save(out, format="JPEG", quality=KEYFRAME_QUALITY)
    return out.getvalue()
