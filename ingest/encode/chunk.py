"""Chunks against a compressed memory (InfiniPot-V 2506.15745, StreamMem 2508.15717, LiveVLM 2505.15269).

A unit's frames go through the language model in one forward in which they see the init tokens, everything that the
memory still holds, and each other. Then the retainer brings memory and chunk back under its budget.

Where we differ: keys are held unrotated and rotated to their original stream positions where they meet a query
(InfiniPot-V's released code holds rotated ones); positions count up with the stream, so that the length of the film
need not be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.ingest.encode.base import no_kv
from memdb.models.chunk import ChunkContext
from memdb.models.decode import run_init
from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least

PROBES = ("none", "text", "template", "recent")


@dataclass(frozen=True)
class Chunk:
    """`chunk_frames`: frames that go through the vision tower together; the forward is the unit's.

    `probe`: whose attention the retainer hears. `text`: of `probe_text`, a guidance prompt behind the chunk.
    `template`: of the chat template's end of turn and assistant header behind the chunk (StreamMem's proxy question).
    `recent`: of the chunk's last `probe_tokens` tokens (LiveVLM's observation window). `none`: nobody's.
    """

    chunk_frames: int = 16
    init_prompt: str = "You are a helpful assistant."
    probe: str = "none"
    probe_text: str = ""
    probe_tokens: int = 0

    def __post_init__(self) -> None:
        at_least("encode.chunk_frames", self.chunk_frames, 1)
        if self.probe not in PROBES:
            raise RecipeError(f"encode.probe = {self.probe!r}: choose one of {', '.join(PROBES)}")
        if (self.probe == "text") != bool(self.probe_text):
            raise RecipeError("encode.probe_text belongs to encode.probe = 'text': give both, or neither")
        if (self.probe == "recent") != bool(self.probe_tokens):
            raise RecipeError("encode.probe_tokens belongs to encode.probe = 'recent': give both, or neither")
        at_least("encode.probe_tokens", self.probe_tokens, 0)

    def open(self, model: VideoModel, init_ids: Sequence[int]) -> list[LayerKV]:
        """The init tokens' keys and values, a layer each: they stand before everything and are never dropped."""
        context = WindowContext(model.rotary, window=1 << 30)
        run_init(model, init_ids, context)
        return context.init or no_kv(model)

    def encode(
        self,
        model: VideoModel,
        init: Sequence[LayerKV],
        memory: Sequence[LayerKV],
        positions: Sequence[Tensor],
        chunk: Tensor,
        start: int,
        *,
        frame_tokens: int,
        placing: Placing = LINE,
    ) -> ChunkContext:
        """chunk (C, E) at the stream positions from `start` on, against the memory (a layer each) and its positions.

        `frame_tokens`: of each frame of the stream. The context afterwards: the chunk's keys and values, and the
        probe's attention.
        """
        tokens, text = len(chunk), self._probe_ids(model)
        rows = range(tokens, tokens + len(text)) if text else None
        if self.probe == "recent":
            rows = range(max(0, tokens - self.probe_tokens), tokens)
        context = ChunkContext(
            model.rotary,
            init,
            memory,
            positions,
            start=start,
            chunk_tokens=tokens,
            frame_tokens=frame_tokens,
            probe=rows,
            placing=placing,
        )
        with torch.inference_mode():
            model.forward(torch.cat((chunk, model.embed(text))) if text else chunk, context)
        return context

    def _probe_ids(self, model: VideoModel) -> list[int]:
        if self.probe == "text":
            return model.encode_text(self.probe_text)
        return model.prompt_ids("") if self.probe == "template" else []
