"""A Video-LLM's joint head: frames and questions in one space, from what the model computes of them anyway.

Two perceptrons of two layers with GELU. A frame is the mean of its tokens' final states in the stream, a question the
mean of its words' input embeddings. It stands beside a checkpoint as `joint.safetensors`, named by its memdb.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from memdb.models.weights import module_digest
from memdb.schemas.errors import ModelError
from memdb.schemas.frames import Image

RANDOM_SIZE = 32  # E of a head drawn for a random model


class JointHead(nn.Module):
    """`name` says which weights: vectors of two names are never compared."""

    reads_states = True  # a frame's vector comes of its final states in the stream

    def __init__(self, width: int, inner: int, size: int) -> None:
        super().__init__()
        self.joint_clip = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, size))
        self.joint_text = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, size))
        self.name = ""

    def ready(self, device: torch.device) -> JointHead:
        """In fp32 whatever the model computes in, so that one head gives one kind of vector."""
        self.eval().requires_grad_(False).float()
        self.name = f"joint@{module_digest(self)}"
        return self.to(device)

    def of_seen(self, pictures: Sequence[Image]) -> Sequence[Tensor | None]:
        """What is known of frames before they are encoded: nothing."""
        return [None] * len(pictures)

    def of_encoded(self, seen: Sequence[Tensor | None], states: Sequence[Tensor]) -> list[Tensor]:
        """(J,) each, of the final states (N, E) of frames."""
        return [self.of_frame(own) for own in states]

    @torch.inference_mode()
    def of_frame(self, states: Tensor) -> Tensor:
        """Final states of a frame's tokens (N, E) -> (J,) fp32."""
        vector: Tensor = self.joint_clip(states.float().mean(0))
        return vector

    @torch.inference_mode()
    def of_words(self, embeddings: Tensor) -> Tensor:
        """Input embeddings of a question's words (T, E) -> (J,) fp32."""
        vector: Tensor = self.joint_text(embeddings.float().mean(0))
        return vector


def random_head(width: int, seed: int, device: torch.device) -> JointHead:
    """Drawn from the seed alone, for a random model: what it finds means as little as the model's words."""
    generator = torch.Generator().manual_seed(seed)
    head = JointHead(width, width, RANDOM_SIZE)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * width**-0.5)
    return head.ready(device)


def load_head(path: Path, width: int, device: torch.device) -> JointHead:
    """The head in a file beside a checkpoint, whose model is so wide. Raises ModelError."""
    try:
        found = {name: part for name, part in load_file(path).items() if name.startswith("joint_")}
        inner, size = found["joint_clip.0.weight"].shape[0], found["joint_clip.2.weight"].shape[0]
        head = JointHead(width, inner, size)
        head.load_state_dict(found)
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"{path} holds no joint head for states of {width} numbers ({str(error).strip().splitlines()[0]:.200}): "
            "copy the model's folder again, or take `joint` out of its memdb.json"
        ) from error
    return head.ready(device)
