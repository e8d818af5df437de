"""A sampled frame on its way through the stages: ready for the model, then seen by it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from memdb.models.protocol import Pixels
from memdb.schemas.frames import Frame, Image
from memdb.schemas.units import BlockKind

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
    """A frame as the language model takes it, (N, E), with its JPEG if it opens a unit; or several merged into one.

    Where the model sees several raw frames as one, number and picture are the first one's and the span is theirs
    together, with what lies between. Where the last one lacks its partner it is alone in its span.

    saliency (N,): what the vision tower looks at, where a reducer asks for it. raster (G,): at which of the N places
    its tokens stood, None where none was taken away. count: frames that were merged. latest (E,): embedding of the
    newest of them as it came; None for a frame that is alone and that nobody compared. likeness: cosine with the frame
    before it in its unit. vector (E',): of its picture in one space with questions, where the index keeps that.
    is_summary: it stands for all frames of its unit.
    """

    number: int
    start_ns: int
    end_ns: int
    tokens: Tensor
    picture: Image | bytes
    saliency: Tensor | None = None
    raster: Tensor | None = None
    count: int = 1
    latest: Tensor | None = None
    likeness: float = 0.0
    vector: Tensor | None = None
    is_summary: bool = False

    @property
    def embedding(self) -> Tensor:
        """(E,) fp32, of the newest frame in it as it came: what a frame that follows is compared with."""
        return mean_token(self.tokens) if self.latest is None else self.latest

    @property
    def kind(self) -> BlockKind:
        """Of the block that it becomes."""
        if self.is_summary:
            return BlockKind.SUMMARY
        return BlockKind.FRAME if self.raster is None else BlockKind.GROUP

    def jpeg(self) -> bytes:
        return self.picture if isinstance(self.picture, bytes) else to_jpeg(self.picture)


def mean_token(tokens: Tensor) -> Tensor:
    """The embedding of a frame: the mean of its tokens, (N, E) -> (E,) fp32."""
    return tokens.float().mean(0)


def compared(frames: Sequence[SeenFrame]) -> list[SeenFrame]:
    """Frames that will be compared with one another, their embeddings on the host: a GPU is waited for once."""
    if not frames:
        return []
    own = torch.stack([frame.embedding for frame in frames]).cpu()
    return [replace(frame, latest=latest) for frame, latest in zip(frames, own, strict=True)]


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two embeddings (E,); in fp64, so that equal ones give 1. What has no length is like nothing."""
    one, other = (x.cpu().numpy().astype(np.float64) for x in (a, b))
    lengths = math.sqrt(float(one @ one) * float(other @ other))
    return min(1.0, float(one @ other) / lengths) if lengths else 0.0


def joined(first: SeenFrame, second: SeenFrame, share: float) -> SeenFrame:
    """Two neighbours as one frame over both spans: `share` of the second one's tokens, saliency, vector, in fp32."""
    tokens = torch.lerp(first.tokens.float(), second.tokens.float(), share).to(first.tokens.dtype)
    saliency, vector = (
        torch.lerp(one, other, share) if one is not None and other is not None else None
        for one, other in ((first.saliency, second.saliency), (first.vector, second.vector))
    )
    return replace(
        first,
        end_ns=second.end_ns,
        tokens=tokens,
        saliency=saliency,
        vector=vector,
        count=first.count + second.count,
        latest=second.embedding,
    )


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
