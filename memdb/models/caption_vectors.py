"""Vectors of captions and of the questions that look for them, by the encoder that the recipe names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memdb.models.protocol import VideoModel
from memdb.models.text_encoder import TextEncoder, load_text_encoder

INPUT_EMBEDDINGS = "input-embeddings"
Vector = npt.NDArray[np.float32]


class CaptionVectors(Protocol):
    """`name` says encoder and revision: vectors of two names are never compared."""

    name: str

    def of_caption(self, text: str, ids: Sequence[int]) -> Vector:
        """(E,) fp32 of one caption. One at a time, so that bits do not depend on what else is in hand."""
        ...

    def of_question(self, text: str) -> Vector: ...


class InputEmbeddings:
    """The mean of the Video-LLM's own input embeddings (rLiVS, arXiv 2510.17364)."""

    def __init__(self, model: VideoModel) -> None:
        self._model = model
        self.name = f"{INPUT_EMBEDDINGS}@{model.identity.fingerprint}"

    def of_caption(self, text: str, ids: Sequence[int]) -> Vector:
        if not ids:
            return np.zeros(self._model.shape.embedding_size, np.float32)
        vector: Vector = self._model.embed(ids).float().mean(0).cpu().numpy()
        return vector

    def of_question(self, text: str) -> Vector:
        return self.of_caption(text, self._model.encode_text(text))


class SentenceVectors:
    """A sentence encoder's vectors, of length one."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self.name = encoder.name

    def of_caption(self, text: str, ids: Sequence[int]) -> Vector:
        vector: Vector = self._encoder.encode([text])[0]
        return vector

    def of_question(self, text: str) -> Vector:
        vector: Vector = self._encoder.encode([text])[0]
        return vector


def caption_vectors(encoder: str, model: Callable[[], VideoModel]) -> CaptionVectors:
    """The encoder that a recipe names: `input-embeddings` loads the model, any other is a sentence encoder."""
    if encoder == INPUT_EMBEDDINGS:
        return InputEmbeddings(model())
    return SentenceVectors(load_text_encoder(encoder))
