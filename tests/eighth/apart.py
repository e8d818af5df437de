"""Each unit on its own: it sees the init prompt and itself, and no other unit (no paper's; a floor for windows).

So nothing of the stream is carried, and what is forgotten takes nothing with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from memdb.ingest.encode.base import Encoded, no_kv, numbers
from memdb.ingest.encode.window import SlidingWindow
from memdb.ingest.encoder_state import Saved
from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Timed
from memdb.ingest.terms import Terms
from memdb.models.window import WindowContext
from memdb.schemas.params import at_least
from memdb.schemas.recording import Tombstone


@dataclass(frozen=True)
class Apart:
    """`chunk_frames`, `init_prompt`: as in SlidingWindow."""

    chunk_frames: int = 16
    init_prompt: str = "You are a helpful assistant."

    def __post_init__(self) -> None:
        at_least("encode.chunk_frames", self.chunk_frames, 1)

    def begin(self, terms: Terms, widths: Mapping[int, int]) -> OpenApart:
        return OpenApart(self, terms)


class OpenApart:
    held: Sequence[Timed] = ()
    state_bytes = 0

    def __init__(self, method: Apart, terms: Terms) -> None:
        self._window = SlidingWindow(1 << 20, method.chunk_frames)
        self._terms = terms
        self.init = self._fresh().init or no_kv(terms.model)

    def _fresh(self) -> WindowContext:
        terms = self._terms
        return self._window.open(terms.model, terms.init_ids, profile=terms.profile, placing=terms.placing)

    def encode(self, groups: Sequence[Sequence[SeenFrame]], unit: int, position: int) -> Iterator[Encoded]:
        for group in groups:
            with self._terms.laps("encode"):
                tokens = [frame.tokens for frame in group]
                kv = self._window.encode(self._terms.model, self._fresh(), tokens)
            yield Encoded(group, kv)

    def without(self, tombstones: Sequence[Tombstone]) -> OpenApart:
        return self

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def numbers(self) -> Mapping[str, object]:
        return numbers()

    def restore(self, saved: Saved) -> None:
        pass
