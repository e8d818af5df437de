"""Recipes without KV, and recipes without captions."""

from __future__ import annotations

from dataclasses import dataclass

from memdb.ingest.encode.base import ClipSeen, Said
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.models.protocol import VideoModel
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class NoKV:
    """Nothing but captions is kept. `chunk_frames`: frames that go through the vision tower together.

    As in SlidingWindow, a frame is what the model sees as one.
    """

    chunk_frames: int = 16
    init_prompt: str = ""

    def __post_init__(self) -> None:
        at_least("encode.chunk_frames", self.chunk_frames, 1)


@dataclass(frozen=True)
class NoCaption:
    @property
    def encoder(self) -> str:
        return ""

    def say(
        self, model: VideoModel, clip: ClipSeen, recurrent: Recurrent | None, *, profile: str
    ) -> Said | None:
        return None

    def recurrent(self, reduce: object) -> Recurrent | None:
        return None
