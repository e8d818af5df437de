"""Chunks against a compressed memory (InfiniPot-V 2506.15745, StreamMem 2508.15717, LiveVLM 2505.15269).

A unit's frames go through the language model in one forward in which they see the init tokens, everything that the
memory still holds, and each other. Then the retainer brings memory and chunk back under its budget.

Where we differ: keys are held unrotated and rotated to their original stream positions where they meet a query
(InfiniPot-V's released code holds rotated ones); positions count up with the stream, so that the length of the film
need not be known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.ingest.encode.base import Encoded, no_kv, numbers
from memdb.ingest.encoder_state import Saved, tensor_size
from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Timed
from memdb.ingest.layer_tokens import layers_together
from memdb.ingest.memory import EncoderMemory, grid_of
from memdb.ingest.terms import Terms
from memdb.models.chunk import ChunkContext
from memdb.models.decode import run_init
from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.retain.base import Bounded
from memdb.schemas.errors import RecipeError
from memdb.schemas.keep import KeepSet
from memdb.schemas.params import at_least
from memdb.schemas.recording import Tombstone

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

    def begin(self, terms: Terms, widths: Mapping[int, int]) -> OpenMemory:
        return OpenMemory(self, terms)

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


class OpenMemory:
    """The memory of a recording: each unit is encoded against what the one before it left."""

    def __init__(self, method: Chunk, terms: Terms) -> None:
        assert isinstance(terms.retain, Bounded), "rule R8b sees to it"
        self.memory = EncoderMemory(method.open(terms.model, terms.init_ids), terms.retain)
        self._method, self._terms, self._retain = method, terms, terms.retain

    @property
    def init(self) -> Sequence[LayerKV]:
        return self.memory.init

    def encode(self, groups: Sequence[Sequence[SeenFrame]], unit: int, position: int) -> Iterator[Encoded]:
        for number, group in enumerate(groups, unit):
            yield self._remember(group, number, position)
            position += sum(len(frame.tokens) for frame in group)

    def _remember(self, group: Sequence[SeenFrame], number: int, start: int) -> Encoded:
        """Encode a unit, and let the retainer decide what of memory and unit stays."""
        terms, memory = self._terms, self.memory
        with terms.laps("encode"):
            context = self._method.encode(
                terms.model,
                memory.init,
                memory.kv,
                memory.positions,
                torch.cat([frame.tokens for frame in group]),
                start,
                frame_tokens=len(group[0].tokens),
                placing=terms.placing,
            )
        with terms.laps("retain"):
            number_of = [frame.number for frame in group for _ in range(len(frame.tokens))]
            fresh = layers_together(context.fresh)
            made = self._retain.prototypes_of(fresh, context.heard, number_of, start)
            grid = grid_of(terms.placing, terms.model.shape.frame_tokens)
            memory.take(number, group, fresh, made, context.heard, start, grid)
        own = [LayerKV(k, v) for k, v in zip(fresh.k, fresh.v, strict=True)]
        return Encoded(group, own, keep=self._keep_set, prototypes=made)

    def _keep_set(self) -> KeepSet:
        with self._terms.laps("retain"):
            return self.memory.keep_set()

    def without(self, tombstones: Sequence[Tombstone]) -> OpenMemory:
        """The rest stays: it is all that there is of the past, and the store keeps those tokens too."""
        self.memory.forget(tombstones)
        return self

    @property
    def held(self) -> Sequence[Timed]:
        return self.memory.frames

    # Its part of a saved state

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.memory.tensors())

    def numbers(self) -> Mapping[str, object]:
        return numbers(memory=self.memory.frame_rows())

    @property
    def state_bytes(self) -> int:
        return tensor_size(*(part for _, part in self.memory.tensors()))

    def restore(self, saved: Saved) -> None:
        self.memory.restore(saved.tensors, saved.numbers["memory"], self._terms.model.device)
