"""Sliding window over the stream with init tokens at the ceiling (ReKV, arXiv 2503.00540)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.models.decode import run_init
from memdb.models.places import LINE, Grid, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.schemas.params import at_least


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
