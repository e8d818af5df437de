"""A sliding window over groups as they are stored (StreamingTOM, arXiv 2510.18269).

What the window holds of older frames is what the codec keeps of them. So it is no part of a saved state: whoever goes
on reads the last groups back from the store. What is stored of a frame depends on the codec here, which is therefore
part of the encoding fingerprint. Profiles: see memdb/models/groups.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdb.codecs.base import Codec
from memdb.ingest.encode.base import no_kv
from memdb.models.decode import run_init
from memdb.models.groups import GroupContext
from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.schemas.errors import RecipeError
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class Groups:
    """`window_tokens`: of older groups in view, whole ones. `chunk_frames`: frames that are encoded in one forward.
    `init_prompt`: the system text that stands before it all; it is never quantised.
    """

    window_tokens: int = 4_800
    chunk_frames: int = 32
    init_prompt: str = "You are a helpful assistant."

    def __post_init__(self) -> None:
        at_least("encode.window_tokens", self.window_tokens, 1)
        at_least("encode.chunk_frames", self.chunk_frames, 1)

    def check_group(self, tokens: int) -> None:
        """Whether the window holds a group of so many tokens. Raises RecipeError."""
        if self.window_tokens < tokens:
            raise RecipeError(
                f"encode.window_tokens = {self.window_tokens} holds no whole group, which is {tokens} tokens here: "
                f"give at least {tokens}"
            )

    def open(
        self,
        model: VideoModel,
        init_ids: Sequence[int],
        codec: Codec,
        *,
        profile: str,
        placing: Placing = LINE,
        widths: Mapping[int, int] | None = None,
    ) -> GroupContext:
        """A fresh window behind the init prompt. `widths`: the recording's scale widths so far, a layer each."""
        first = WindowContext(model.rotary, window=1 << 30)
        run_init(model, init_ids, first)
        none = no_kv(model)
        return GroupContext(
            model.rotary,
            first.init or none,
            none,
            codec,
            self.window_tokens,
            profile=profile,
            placing=placing,
            widths=dict(widths or {}),
        )

    def encode(
        self,
        model: VideoModel,
        context: GroupContext,
        frames: Sequence[Tensor],
        rasters: Tensor | None = None,
    ) -> tuple[list[LayerKV], list[int]]:
        """Frames (G, E), in forwards of `chunk_frames`: per layer (H, F*G, D) at compute precision, and the position
        at which each frame is written where the profile keeps those, else none. rasters (F, G): where in their frames
        these tokens stand, where a reducer left some only.
        """
        parts: list[list[LayerKV]] = []
        places: list[int] = []
        with torch.inference_mode():
            for start in range(0, len(frames), self.chunk_frames):
                chunk = frames[start : start + self.chunk_frames]
                own = None if rasters is None else rasters[start : start + self.chunk_frames]
                context.expect_frames([len(frame) for frame in chunk], own)
                if context.keeps_places:
                    places += [context.place + nth * len(frame) for nth, frame in enumerate(chunk)]
                model.forward(torch.cat(list(chunk)), context)
                parts.append(context.fresh)
        whole = [
            LayerKV(torch.cat([kv.k for kv in layer], 1), torch.cat([kv.v for kv in layer], 1))
            for layer in zip(*parts, strict=True)
        ]
        return whole, places
