"""Frames and questions in one space: ReKV's external index (arXiv 2503.00540; there SigLIP-SO400M).

Beside the representative keys, which are there as ever, a unit holds a unit vector a block, fp16 (blocks, E), under the
unit's checksums and digest. One list of frames then serves all layers (rule R14): what a layer would have found by its
own queries is not asked.

encoder = joint: the model's own joint head over the final states that the frames had in the stream, which costs two
small products a frame. Any other name or folder: a CLIP or SigLIP of transformers over the picture itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.index.mean_key import MeanKey
from memdb.models.frame_encoder import FrameEncoder, load_frame_encoder
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import RecipeError


@dataclass(frozen=True)
class FrameEmbedding(MeanKey):
    """`encoder`: joint, or the name or folder of a CLIP or SigLIP."""

    encoder: str = "joint"

    def __post_init__(self) -> None:
        if not self.encoder.strip():
            raise RecipeError("index.encoder is empty: give joint, or the name or folder of a CLIP or SigLIP")

    def open(self, model: VideoModel) -> FrameEncoder:
        return load_frame_encoder(self.encoder, model)


def unit_vectors(vectors: Sequence[Tensor]) -> npt.NDArray[np.float16]:
    """(E,) each -> (n, E) of length one; what has no length stays zero and is like nothing."""
    rows = torch.stack([vector.float() for vector in vectors])
    return torch.nn.functional.normalize(rows, dim=-1).to(torch.float16).cpu().numpy()
