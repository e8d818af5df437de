"""What the pipeline and the query engine ask of a Video-LLM. One implementation a model family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.models.attention import Context
from memdb.models.rotary import Rotary
from memdb.models.sheet import ModelSheet
from memdb.schemas.fingerprint import ModelIdentity, ModelShape
from memdb.schemas.frames import Image

Pixels = npt.NDArray[np.uint8]  # (S, S, 3): a frame at the model's own size


class VideoModel(Protocol):
    """A Video-LLM whose language model runs against a context of ours. Batch size is always one.

    The same object serves one call at a time; the connection sees to that.
    """

    identity: ModelIdentity
    sheet: ModelSheet
    device: torch.device
    dtype: torch.dtype
    rotary: Rotary

    @property
    def shape(self) -> ModelShape: ...

    def prepare(self, image: Image) -> Pixels:
        """One frame at the model's size, uint8: cheap, without torch, safe in the decoder's thread."""
        ...

    def visual_tokens(self, pixels: Sequence[Pixels]) -> Tensor:
        """Frames to language-model inputs, (F, N, E)."""
        ...

    def salient_tokens(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        """The same inputs (F, N, E), and how much the vision tower looks at each of them, (F, N) fp32.

        That is the mean, over heads and queries, of the attention probabilities on a patch in the last vision layer
        whose output is used, pooled as the inputs are (StreamingTOM, arXiv 2510.18269).
        """
        ...

    def frame_separator(self) -> Tensor:
        """The embedding that closes a run of frames, (1, E) (LLaVA's newline)."""
        ...

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings of token ids, (T, E)."""
        ...

    def forward(self, embeddings: Tensor, context: Context) -> Tensor:
        """Run (T, E) input embeddings against a context, which takes up their keys; final states (T, E)."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Scores over the vocabulary, (T, V), fp32."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, no special tokens added."""
        ...

    def decode_text(self, ids: Sequence[int]) -> str: ...

    def init_ids(self, prompt: str) -> list[int]:
        """The ids before the first frame: system text and the opening of the user's turn."""
        ...

    def prompt_ids(self, text: str) -> list[int]:
        """The ids after the last frame: the user's text, end of turn, the assistant's header."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]: ...
