"""What the pipeline and the query engine ask of a Video-LLM. One implementation a model family.

Written for LLaVA-OneVision: a frame is N tokens, and a token's place is one number. Qwen2.5-VL changed four things:
- `frames_together`: two raw frames are seen as one (a temporal patch), so "frame" means, from stage 1 on, what the
  model sees as one frame. Its span runs from the first raw frame's start to the last one's end.
- `frame_grid`: a frame's tokens are as many as fit its shape, one grid a recording.
- `placing`: a token has three ids, which depend on grid and sample rate. Contexts are told where frames stand; text
  needs no word. The forward itself is as it was, at position 0, and stored keys are unrotated in both families.
- `frame_separator` may be no token at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.models.attention import Context
from memdb.models.joint import JointHead
from memdb.models.places import Placing
from memdb.models.rotary import Rotary
from memdb.models.sheet import ModelSheet
from memdb.schemas.fingerprint import ModelIdentity, ModelShape
from memdb.schemas.frames import Image

Pixels = npt.NDArray[np.uint8]  # (height, width, 3): a frame at the model's own size


class VideoModel(Protocol):
    """A Video-LLM whose language model runs against a context of ours. Batch size is always one.

    The same object serves one call at a time; the connection sees to that.
    """

    identity: ModelIdentity
    sheet: ModelSheet
    device: torch.device
    dtype: torch.dtype
    rotary: Rotary
    joint: JointHead | None  # frames and questions in one space, where a checkpoint has that

    @property
    def shape(self) -> ModelShape: ...

    @property
    def yarn_factor(self) -> float:
        """By how much a recipe stretches positions that wants YaRN and names no factor; 1 for not at all."""
        ...

    @property
    def frames_together(self) -> int:
        """Raw frames that the model sees as one: 1, or 2 where a temporal patch spans two."""
        ...

    def frame_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Rows and columns of the tokens of a recording whose pictures have this size; None where it is no matter.

        Decided once a recording, and kept in its spec.
        """
        ...

    def placing(self, sample_fps: float, grid: tuple[int, int] | None) -> Placing:
        """How tokens of a recording with this grid and rate (raw frames a second) are given places."""
        ...

    def prepare(self, image: Image, grid: tuple[int, int] | None = None) -> Pixels:
        """One frame at its recording's size, uint8: cheap, without torch, safe in the decoder's thread."""
        ...

    def visual_tokens(self, pixels: Sequence[Pixels]) -> Tensor:
        """Raw frames of one size to language-model inputs, (F, N, E) with F = ceil(len(pixels) / frames_together).

        Where the last frame lacks its partner it is seen twice.
        """
        ...

    def salient_tokens(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        """The same inputs (F, N, E), and how much the vision tower looks at each of them, (F, N) fp32.

        That is the mean, over heads and queries, of the attention probabilities on a patch in the last vision layer
        whose output is used, pooled as the inputs are (StreamingTOM, arXiv 2510.18269).
        """
        ...

    def frame_separator(self) -> Tensor:
        """The embedding that closes a run of frames, (1, E) (LLaVA's newline), or (0, E) for none."""
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
        """The ids before the first frame: system text, the opening of the user's turn, and of the video."""
        ...

    def prompt_ids(self, text: str) -> list[int]:
        """The ids after the last frame: the end of the video, the user's text, end of turn, the assistant's header."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]: ...
