"""Greedy decoding by our own loop: transformers' generate cannot start from a rebuilt cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memdb.models.attention import Context
from memdb.models.protocol import VideoModel


@torch.inference_mode()
def prefill(model: VideoModel, embeddings: Tensor, context: Context) -> Tensor:
    """Feed (T, E) embeddings; the scores (V,) of the token that follows them."""
    states = model.forward(embeddings, context)
    return model.logits(states[-1:])[0]


def greedy(model: VideoModel, scores: Tensor, context: Context, tokens_max: int) -> Iterator[int]:
    """Token ids, one at a time, as they are decided; the stop token ends the stream and is not given.

    `scores` (V,) decide the first token. At most `tokens_max` are given, and no forward is run for a token
    that nobody will see the successor of.
    """
    for count in range(1, tokens_max + 1):
        token = int(scores.argmax())
        if token in model.stop_ids:
            return
        yield token
        if count < tokens_max:
            scores = prefill(model, model.embed([token]), context)


class TextStream:
    """Turns token ids into pieces of text as they arrive, holding back what is not a whole character yet.

    Space around the text is no part of it; the pieces, one after another, are the text.
    """

    def __init__(self, model: VideoModel) -> None:
        self._model = model
        self._given = 0
        self.ids: list[int] = []

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self.text
        if text.endswith("\ufffd"):
            return ""
        piece, self._given = text[self._given :], len(text)
        return piece

    def flush(self) -> str:
        """What was held back, at the end."""
        piece = self.text[self._given :]
        self._given += len(piece)
        return piece

    @property
    def text(self) -> str:
        return self._model.decode_text(self.ids).strip()


def run_init(model: VideoModel, ids: Sequence[int], context: Context) -> None:
    """Feed the init prompt into a fresh context."""
    if ids:
        with torch.inference_mode():
            model.forward(model.embed(ids), context)
