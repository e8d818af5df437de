"""What puts frames and questions into one space: the model's own joint head, or a CLIP or SigLIP beside it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from memdb.models.image_text import ImageText
from memdb.models.joint import JointHead
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import UnsupportedModel

JOINT = "joint"
FrameEncoder = JointHead | ImageText


def load_frame_encoder(name: str, model: VideoModel) -> FrameEncoder:
    """`joint`, or a CLIP or SigLIP by name or folder. Raises UnsupportedModel, ModelNotFound."""
    if name != JOINT:
        return _image_text(name, model.device)
    if model.joint is None:
        raise UnsupportedModel(
            f"{model.identity.spec!r} has no joint head for frames and questions: set index.encoder to a CLIP or "
            "SigLIP (a name such as google/siglip-so400m-patch14-384, or a folder), or retrieve = 'topk'"
        )
    return model.joint


def question_vector(encoder: FrameEncoder, model: VideoModel, text: str) -> Tensor:
    """(E,) fp32 of a question."""
    if isinstance(encoder, JointHead):
        return encoder.of_words(model.embed(model.encode_text(text)))
    return encoder.of_text(text)


@lru_cache(maxsize=2)
def _image_text(name: str, device: torch.device) -> ImageText:
    return ImageText.load(name, device=device)
