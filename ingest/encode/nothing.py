"""Recipes without KV, and recipes without captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from memdb.ingest.encode.base import ClipSeen, Encoded, Said, no_kv, numbers
from memdb.ingest.encoder_state import Saved
from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Timed
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.ingest.terms import Terms
from memdb.models.protocol import VideoModel
from memdb.schemas.params import at_least
from memdb.schemas.recording import Tombstone


@dataclass(frozen=True)
class NoKV:
    """Nothing but captions is kept. `chunk_frames`: frames that go through the vision tower together.

    As in SlidingWindow, a frame is what the model sees as one.
    """

    chunk_frames: int = 16
    init_prompt: str = ""

    def __post_init__(self) -> None:
        at_least("encode.chunk_frames", self.chunk_frames, 1)

    def begin(self, terms: Terms, widths: Mapping[int, int]) -> OpenNothing:
        return OpenNothing(terms)


class OpenNothing:
    """Units pass as they are, and nothing stays of them."""

    held: Sequence[Timed] = ()
    state_bytes = 0

    def __init__(self, terms: Terms) -> None:
        self.init = no_kv(terms.model)

    def encode(self, groups: Sequence[Sequence[SeenFrame]], unit: int, position: int) -> Iterator[Encoded]:
        yield from map(Encoded, groups)

    def without(self, tombstones: Sequence[Tombstone]) -> None:
        return None

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def numbers(self) -> Mapping[str, object]:
        return numbers()

    def restore(self, saved: Saved) -> None:
        pass


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
