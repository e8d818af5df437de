"""A sliding window over groups as they are stored (StreamingTOM, arXiv 2510.18269).

What the window holds of older frames is what the codec keeps of them. So it is no part of a saved state: whoever goes
on reads the last groups back from the store. What is stored of a frame depends on the codec here, which is therefore
part of the encoding fingerprint. Profiles: see memdb/models/groups.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from memdb.codecs.base import Codec
from memdb.ingest.encode.base import Encoded, apart, no_kv, numbers
from memdb.ingest.encoder_state import Saved
from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Held, Timed, newest
from memdb.ingest.terms import Terms
from memdb.models.decode import run_init
from memdb.models.groups import GroupContext
from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.schemas.errors import RecipeError
from memdb.schemas.keep import KeepSet, token_ids
from memdb.schemas.params import at_least
from memdb.schemas.recording import Tombstone


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

    def begin(self, terms: Terms, widths: Mapping[int, int]) -> OpenGroups:
        return OpenGroups(self, terms, widths)

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


class OpenGroups:
    """The window over a recording's groups: each unit is one frame (rule R16b)."""

    state_bytes = 0

    def __init__(self, method: Groups, terms: Terms, widths: Mapping[int, int]) -> None:
        assert terms.codec is not None, "rule R10 sees to it"
        self.context = method.open(
            terms.model,
            terms.init_ids,
            terms.codec,
            profile=terms.profile,
            placing=terms.placing,
            widths=widths,
        )
        self._method, self._terms = method, terms
        self._frames: list[Held] = []  # in the window, oldest first

    @property
    def init(self) -> Sequence[LayerKV]:
        return self.context.init

    def encode(self, groups: Sequence[Sequence[SeenFrame]], unit: int, position: int) -> Iterator[Encoded]:
        frames = [frame for group in groups for frame in group]
        tokens = [frame.tokens for frame in frames]
        with self._terms.laps("encode"):
            known = [frame.raster for frame in frames if frame.raster is not None]
            rasters = torch.stack(known) if known else None
            kv, places = self._method.encode(self._terms.model, self.context, tokens, rasters)
        came = [Held(frame.start_ns, frame.end_ns, len(frame.tokens)) for frame in frames]
        self._frames = newest([*self._frames, *came], self.context.held_tokens)
        for nth, own in enumerate(apart(kv, [len(one) for one in tokens])):
            place = places[nth] if places else None
            yield Encoded(
                groups[nth], own, position=place, keep=partial(self._stood, frames[nth], unit + nth)
            )

    def _stood(self, frame: SeenFrame, unit: int) -> KeepSet | None:
        """Where in their frame the tokens of a unit stood, if ids depend on it and some were left out."""
        if self._terms.placing == LINE or frame.raster is None:
            return None
        ids = token_ids(unit, 0, np.arange(len(frame.raster)))
        places = frame.raster.cpu().numpy().astype(np.int64)
        L = self._terms.model.shape.layers
        return KeepSet((ids,) * L, (places,) * L)

    def without(self, tombstones: Sequence[Tombstone]) -> None:
        """Every token was computed beside those before it."""
        return

    @property
    def held(self) -> Sequence[Timed]:
        return self._frames

    # Its part of a saved state: no more than how many groups to read back.

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def numbers(self) -> Mapping[str, object]:
        return numbers(frames=self.context.frames, window=[held.row for held in self._frames])

    def restore(self, saved: Saved) -> None:
        self._frames = [Held.of_row(row) for row in saved.numbers["window"]]
        if self._frames:
            assert self._terms.stored is not None, "whoever goes on says where from"
            # Each of its groups is a unit; the newest is the one before the next.
            units = range(saved.counters.unit - len(self._frames), saved.counters.unit)
            self.context.take_back(*self._terms.stored.read(units), frames=int(saved.numbers["frames"]))
