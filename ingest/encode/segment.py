"""Segments with a summary behind their frames, in a sliding window (StreamKV, arXiv 2511.07278, stage 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memdb.ingest.encode.base import Encoded
from memdb.ingest.encode.window import OpenWindow, SlidingWindow
from memdb.ingest.frames import SeenFrame
from memdb.ingest.terms import Terms
from memdb.models.guidance import GuidanceContext
from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV


@dataclass(frozen=True)
class SegmentWithSummary(SlidingWindow):
    """A unit is encoded when it closes: its frames, then their mean as one frame more.

    `window_tokens`, `chunk_frames`, `init_prompt`: as in SlidingWindow. `summary`: whether there is that frame. It is
    the mean of the segment's frames place by place, (F, N, E) -> (N, E), so N tokens and no single vector; it takes
    N places of the window as any frame does, also where a retainer drops the frames that it stands for.

    Where it differs: a segment is read by a question once it has closed, not while it is open.
    """

    summary: bool = True

    def begin(self, terms: Terms, widths: Mapping[int, int]) -> OpenSegments:
        return OpenSegments(self, terms)

    def summary_of(self, frames: Sequence[SeenFrame]) -> SeenFrame | None:
        """The frame that stands for all of them, over their span; merged ones count once, as the code has it."""
        if not self.summary:
            return None
        tokens = torch.stack([frame.tokens for frame in frames])  # (F, N, E)
        mean = tokens.float().mean(0).to(tokens.dtype)
        first, last = frames[0], frames[-1]
        return replace(
            first, end_ns=last.end_ns, tokens=mean, picture=b"", saliency=None, latest=None, is_summary=True
        )

    def guided(
        self,
        model: VideoModel,
        segment: Sequence[LayerKV],
        frames: Sequence[int],
        prompt: str,
        placing: Placing = LINE,
    ) -> list[Tensor]:
        """The queries (Hq, T, D), unrotated, a layer each, of a prompt that reads this segment alone.

        segment: its keys and values, the summary's included; frames: tokens of each of its frames.
        """
        context = GuidanceContext(
            model.rotary, segment, window=self.window_tokens, frames=frames, placing=placing
        )
        with torch.inference_mode():
            model.forward(model.embed(model.encode_text(prompt)), context)
        return context.queries


class OpenSegments(OpenWindow):
    """The window, one segment at a time, and what the retainer's guidance prompt asks of each."""

    def __init__(self, method: SegmentWithSummary, terms: Terms) -> None:
        super().__init__(method, terms)
        self._segments = method

    def encode(self, groups: Sequence[Sequence[SeenFrame]], unit: int, position: int) -> Iterator[Encoded]:
        for group in groups:
            summary = self._segments.summary_of(group)
            frames = [*group, *([summary] if summary is not None else ())]
            kv = self.extend(frames, [])
            yield Encoded(group, kv, summary=summary, queries=self._queries(frames, kv))

    def _queries(self, frames: Sequence[SeenFrame], kv: Sequence[LayerKV]) -> Sequence[Tensor]:
        terms = self._terms
        if not terms.retain.prompt:
            return ()
        with terms.laps("retain"):
            sizes = [len(frame.tokens) for frame in frames]
            return self._segments.guided(terms.model, kv, sizes, terms.retain.prompt, terms.placing)
