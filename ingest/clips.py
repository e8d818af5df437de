"""What is said of each unit, and what past clips leave for the next one's caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memdb.ingest.encode.base import Captioner, ClipSeen
from memdb.ingest.encoder_state import Saved, tensor_size
from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Held, Timed
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.ingest.terms import Terms
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.window import LayerKV
from memdb.schemas.units import Caption


class Clips:
    """A captioner at work. `queue`: the recurrent tokens of past clips, oldest first."""

    def __init__(
        self, terms: Terms, captioner: Captioner, recurrent: Recurrent | None, vectors: CaptionVectors | None
    ) -> None:
        self.queue: list[Tensor] = []
        self._spans: list[Held] = []  # the clip of each entry of the queue
        self._terms, self._captioner, self._recurrent, self._vectors = terms, captioner, recurrent, vectors

    def say(
        self, clip: Sequence[SeenFrame], kv: Sequence[LayerKV] | None, init: Sequence[LayerKV]
    ) -> Caption | None:
        """kv: of the clip's tokens, a layer each; init: of the init prompt."""
        terms, recurrent = self._terms, self._recurrent
        if self._vectors is None:
            return None
        with terms.laps("caption"):
            tokens = torch.cat([frame.tokens for frame in clip])
            sizes = [len(frame.tokens) for frame in clip]
            seen = ClipSeen(tokens, kv, init, terms.init_ids, self.queue, sizes, terms.placing)
            said = self._captioner.say(terms.model, seen, recurrent, profile=terms.profile)
            if said is None:
                return None
            if recurrent is not None and said.attention is not None:
                chosen = recurrent.select(tokens, said.attention)
                self.queue = recurrent.remember(self.queue, chosen)
                came = Held(clip[0].start_ns, clip[-1].end_ns, len(chosen))
                self._spans = [*self._spans, came][len(self._spans) + 1 - len(self.queue) :]
            return Caption(said.text, said.ids, self._vectors.of_caption(said.text, said.ids))

    @property
    def held(self) -> Sequence[Timed]:
        return self._spans

    # Its part of a saved state

    def tensors(self) -> Mapping[str, Tensor]:
        return {f"queue.{index}": kept for index, kept in enumerate(self.queue)}

    def numbers(self) -> Mapping[str, object]:
        return {"queue": [held.row for held in self._spans]}

    @property
    def state_bytes(self) -> int:
        return tensor_size(*self.queue)

    def restore(self, saved: Saved) -> None:
        device = self._terms.model.device
        self._spans = [Held.of_row(row) for row in saved.numbers["queue"]]
        self.queue = [saved.tensors[f"queue.{index}"].to(device) for index in range(len(self._spans))]
