"""Sliding window over the stream with init tokens at the ceiling (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.index.frame_embedding import unit_vectors
from memdb.ingest.encode.base import Encoded, apart, no_kv, numbers
from memdb.ingest.encoder_state import Saved, tensor_size
from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Held, Timed, newest
from memdb.ingest.terms import Terms
from memdb.models.decode import run_init
from memdb.models.places import LINE, Grid, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.schemas.params import at_least
from memdb.schemas.recording import Tombstone


@dataclass(frozen=True)
class SlidingWindow:
    """`window_tokens`: W, how far back a token sees. `chunk_frames`: frames that are encoded in one forward, a
    frame being what the model sees as one (of Qwen2.5-VL two raw frames); it changes speed, and results by rounding
    only. `init_prompt`: the system text that stands before it all.
    """

    window_tokens: int = 15_000
    chunk_frames: int = 16
    init_prompt: str = "You are a helpful assistant."

    def __post_init__(self) -> None:
        at_least("encode.window_tokens", self.window_tokens, 1)
        at_least("encode.chunk_frames", self.chunk_frames, 1)

    def begin(self, terms: Terms, widths: Mapping[int, int]) -> OpenWindow:
        return OpenWindow(self, terms)

    def open(
        self, model: VideoModel, init_ids: Sequence[int], *, profile: str, placing: Placing = LINE
    ) -> WindowContext:
        """A fresh window that begins with the init prompt."""
        # The released code walks frame by frame; elsewhere more is faster.
        walk = placing.tokens if isinstance(placing, Grid) else model.shape.frame_tokens
        if profile != "code":
            walk *= max(1, 1024 // walk)
        context = WindowContext(
            model.rotary,
            self.window_tokens,
            walk_tokens=walk,
            counts_init_twice=profile == "code",
            placing=placing,
        )
        run_init(model, init_ids, context)
        return context

    def encode(
        self,
        model: VideoModel,
        context: WindowContext,
        frames: Sequence[Tensor],
        states: list[Tensor] | None = None,
    ) -> list[LayerKV]:
        """Frames (N, E) through the language model, in forwards of `chunk_frames`; per layer (H, F*N, D).

        `states` gets the final states of each frame, (N, E).
        """
        parts: list[list[LayerKV]] = []
        with torch.inference_mode():
            for start in range(0, len(frames), self.chunk_frames):
                chunk = frames[start : start + self.chunk_frames]
                context.expect_frames([len(frame) for frame in chunk])
                final = model.forward(torch.cat(list(chunk)), context)
                parts.append(context.fresh)
                if states is not None:
                    states += torch.split(final, [len(frame) for frame in chunk])
        if len(parts) == 1:
            return parts[0]
        return [
            LayerKV(torch.cat([kv.k for kv in layer], 1), torch.cat([kv.v for kv in layer], 1))
            for layer in zip(*parts, strict=True)
        ]


class OpenWindow:
    """The window over a recording. Units that close with one batch share its forwards."""

    def __init__(self, method: SlidingWindow, terms: Terms) -> None:
        self.context = method.open(terms.model, terms.init_ids, profile=terms.profile, placing=terms.placing)
        self._method, self._terms = method, terms
        self._frames: list[Held] = []  # in the window, oldest first

    @property
    def init(self) -> Sequence[LayerKV]:
        return self.context.init or no_kv(self._terms.model)

    def encode(self, groups: Sequence[Sequence[SeenFrame]], unit: int, position: int) -> Iterator[Encoded]:
        frames, states = [frame for group in groups for frame in group], list[Tensor]()
        kv = self.extend(frames, states)
        embeddings, first = self._embeddings(frames, states), 0
        sizes = [sum(len(frame.tokens) for frame in group) for group in groups]
        for group, own in zip(groups, apart(kv, sizes), strict=True):
            found = None if embeddings is None else embeddings[first : first + len(group)]
            first += len(group)
            yield Encoded(group, own, embeddings=found)

    def extend(self, frames: Sequence[SeenFrame], states: list[Tensor]) -> list[LayerKV]:
        """Frames into the window: their keys and values, a layer each, and their states, where somebody reads them."""
        embeds = self._terms.frames
        asked = states if embeds is not None and embeds.reads_states else None
        with self._terms.laps("encode"):
            kv = self._method.encode(
                self._terms.model, self.context, [frame.tokens for frame in frames], asked
            )
        came = [Held(frame.start_ns, frame.end_ns, len(frame.tokens)) for frame in frames]
        self._frames = newest([*self._frames, *came], self.context.local[0].tokens)
        return kv

    def _embeddings(
        self, frames: Sequence[SeenFrame], states: Sequence[Tensor]
    ) -> npt.NDArray[np.float16] | None:
        """(F, E) of frames, where the index keeps them."""
        if self._terms.frames is None:
            return None
        with self._terms.laps("index"):
            return unit_vectors(self._terms.frames.of_encoded([frame.vector for frame in frames], states))

    def without(self, tombstones: Sequence[Tombstone]) -> None:
        """Every token was computed beside those before it."""
        return

    @property
    def held(self) -> Sequence[Timed]:
        return self._frames

    # Its part of a saved state

    def tensors(self) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.context.local:
            found["window.k"] = torch.stack([kv.k for kv in self.context.local])  # (L, H, w, D)
            found["window.v"] = torch.stack([kv.v for kv in self.context.local])
            if self.context.ids is not None:
                found["window.ids"] = self.context.ids  # (3, w), as they were given
                found["window.frames"] = torch.tensor(self.context.frames)
        return found

    def numbers(self) -> Mapping[str, object]:
        return numbers(seen=self.context.seen, window=[held.row for held in self._frames])

    @property
    def state_bytes(self) -> int:
        return sum(tensor_size(kv.k, kv.v) for kv in self.context.local)

    def restore(self, saved: Saved) -> None:
        device = self._terms.model.device
        if "window.k" in saved.tensors:
            k, v = (saved.tensors[name].to(device) for name in ("window.k", "window.v"))
            self.context.local = [LayerKV(*pair) for pair in zip(k, v, strict=True)]
            self.context.seen = int(saved.numbers["seen"])
            if self._terms.placing != LINE:
                self.context.ids = saved.tensors["window.ids"]
                self.context.frames = int(saved.tensors["window.frames"])
        self._frames = [Held.of_row(row) for row in saved.numbers["window"]]
