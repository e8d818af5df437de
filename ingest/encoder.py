"""Stages 1 to 6 over one batch of frames, and everything that is carried from one batch to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from torch import Tensor

from memdb.codecs.pack import pack_unit
from memdb.ingest.blocks import add_prototypes, block_rows, split
from memdb.ingest.clips import Clips
from memdb.ingest.encode.base import Encoded
from memdb.ingest.encoder_state import Counters, Part, from_bytes, reading, to_bytes
from memdb.ingest.frames import ReadyFrame, SeenFrame
from memdb.ingest.held import is_meant
from memdb.ingest.read_back import StoredGroups
from memdb.ingest.stages import IngestStages
from memdb.ingest.terms import Terms
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.protocol import VideoModel
from memdb.models.yarn import stretched
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import PackedKV, Table, Unit, no_blocks
from memdb.timing import Laps


class StreamEncoder:
    """The encoder state of one recording: the encoder's context, the reducer's open unit, recurrent tokens, counters.

    `step` takes a batch of frames and gives the units that closed. The same batches give the same bits; where
    batches are cut is the caller's, at fixed frame numbers. `state` and `restore` are exact.
    """

    def __init__(
        self,
        model: VideoModel,
        stages: IngestStages,
        init_ids: Sequence[int],
        vectors: CaptionVectors | None,
        laps: Laps | None = None,
        *,
        sample_fps: float = 1.0,
        grid: tuple[int, int] | None = None,
        seed: int = 0,
        stored: StoredGroups | None = None,
    ) -> None:
        """`sample_fps`, raw frames a second, and `grid`: the recording's, for models whose ids count them. `seed`:
        the recording's, for reducers that draw. `stored`: the recording, for encoders whose window is what it holds.
        """
        model = stretched(model, stages.scaling)
        self.laps = laps or Laps()
        self._stages, self._vectors = stages, vectors
        self._terms = Terms(
            model=model,
            init_ids=tuple(init_ids),
            placing=model.placing(sample_fps, grid),
            profile=stages.profile,
            seed=seed,
            codec=stages.codec,
            retain=stages.retain,
            frames=stages.index.open(model),
            stored=stored,
            laps=self.laps,
        )
        self.start_fresh(Counters())

    def start_fresh(self, counters: Counters) -> None:
        """A fresh window that begins with the init tokens, at the beginning or as a new epoch."""
        self.counters = counters
        stages, terms = self._stages, self._terms
        self._encoding = stages.encode.begin(terms, counters.widths)
        self._carried = stages.reduce.begin(terms, stages.unit)
        self._clips = Clips(terms, stages.captioner, stages.recurrent, self._vectors)
        counters.position = max(counters.position, self._encoding.init[0].tokens)

    @property
    def _parts(self) -> tuple[Part, ...]:
        """Everything that outlives a batch, in the order of a saved state."""
        return self._encoding, self._clips, self._carried

    # One batch

    def step(self, frames: Sequence[ReadyFrame]) -> list[Unit]:
        """One batch: see, cut units, reduce, encode, caption, pack."""
        closed: list[list[SeenFrame]] = []
        for seen in self._carried.arrived(self._see(frames)):
            closed += self._carried.extend(seen)
        self._took(frames[-1])
        return self._close(closed)

    def finish(self) -> list[Unit]:
        """The unit that is still open when the stream ends."""
        return self._close(self._carried.finish())

    def _see(self, frames: Sequence[ReadyFrame]) -> list[SeenFrame]:
        """What the model sees as one frame is `frames_together` raw ones; batches are cut at multiples of that, so
        that only a stream's end, a gap and what is forgotten leave a frame without its partner.
        """
        together = self._terms.model.frames_together
        seen_as_one = [frames[first : first + together] for first in range(0, len(frames), together)]
        with self.laps("vision"):
            tokens, saliency = self._carried.see([frame.pixels for frame in frames])
        vectors: Sequence[Tensor | None] = [None] * len(seen_as_one)
        if self._terms.frames is not None:
            with self.laps("index"):
                vectors = self._terms.frames.of_seen([raw[0].picture for raw in seen_as_one])
        return [
            SeenFrame(
                raw[0].number,
                raw[0].start_ns,
                raw[-1].end_ns,
                seen,
                raw[0].picture,
                saliency=looked_at,
                vector=vector,
            )
            for raw, seen, looked_at, vector in zip(seen_as_one, tokens, saliency, vectors, strict=True)
        ]

    def _took(self, last: ReadyFrame) -> None:
        self.counters.frame = last.number + 1
        self.counters.taken_ns, self.counters.until_ns = last.start_ns, last.end_ns

    def _close(self, groups: Sequence[Sequence[SeenFrame]]) -> list[Unit]:
        if not groups:
            return []
        groups = self._carried.reduce(groups)
        encoded = self._encoding.encode(groups, self.counters.unit, self.counters.position)
        return [self._unit(one) for one in encoded]

    def _unit(self, encoded: Encoded) -> Unit:
        """The commit of a unit."""
        frames, counters = encoded.frames, self.counters
        caption = self._clips.say(frames, encoded.own_kv, self._encoding.init)
        blocks, packed, keys = self._pack(encoded)
        unit = Unit(
            number=counters.unit,
            start_ns=frames[0].start_ns,
            end_ns=frames[-1].end_ns,
            epoch=counters.epoch,
            blocks=blocks,
            kv=packed,
            keys=keys,
            caption=caption,
            keyframe=frames[0].jpeg(),
            keep=encoded.keep(),
            embeddings=encoded.embeddings,
        )
        counters.unit += 1
        return unit

    def _pack(self, encoded: Encoded) -> tuple[Table, PackedKV | None, npt.NDArray[np.float16] | None]:
        """Its blocks, what each layer stores of them, and by what they are found."""
        stages, counters = self._stages, self.counters
        if encoded.kv is None or stages.codec is None:
            return no_blocks(), None, None
        with self.laps("pack"):
            sizes = [len(frame.tokens) for frame in encoded.stored]
            whole = [split(layer, sizes) for layer in encoded.kv]
            layers = stages.retain.select(whole, encoded.queries, len(encoded.frames))
            start = counters.position if encoded.position is None else encoded.position
            blocks = block_rows(encoded.stored, start)
            counters.position = start + sum(sizes)
            if encoded.prototypes is not None:
                blocks = add_prototypes(encoded.frames, blocks, layers, encoded.prototypes)
            means = stages.index.means(layers)
            packed = pack_unit(stages.codec, layers, counters.widths, self._terms.model.dtype)
            keys = stages.index.checked(means)
            counters.widths = {
                int(row["layer"]): int(row["scale_bytes"]) for row in packed.slices if row["scale_bytes"]
            }
        return blocks, packed, keys

    # What is forgotten

    @property
    def reach_ns(self) -> int:
        """It holds nothing of the stream from before this media time."""
        starts = [item.start_ns for part in self._parts for item in part.held]
        return min(starts, default=self.counters.until_ns)

    def holds(self, tombstones: Sequence[Tombstone]) -> bool:
        """Whether a span overlaps something that it holds: a frame in window or memory, a queued clip, an open frame,
        the frame beside which the next one is reduced.
        """
        return any(is_meant(item, tombstones) for part in self._parts for item in part.held)

    def forget(self, tombstones: Sequence[Tombstone]) -> list[Unit]:
        """Let go of what overlaps these spans, and of all that was computed beside it: a new epoch begins.

        Open frames that do not overlap stay. No unit spans what was between them: returns the units that close.
        """
        opened, rest = self._carried.opened, self._encoding.without(tombstones)
        self.counters.epoch += 1
        self.start_fresh(self.counters)
        self._encoding = rest or self._encoding
        runs = [
            list(frames) for gone, frames in groupby(opened, lambda x: is_meant(x, tombstones)) if not gone
        ]
        if runs and runs[-1][-1] is opened[-1]:
            self._carried.opened = runs.pop()
        return self._close(runs)

    def pass_over(self, frames: Sequence[ReadyFrame]) -> list[Unit]:
        """Frames that were forgotten before they came here: no unit spans them."""
        units = self.finish()
        self._took(frames[-1])
        return units

    # The exact byte form of everything above that outlives a batch

    def state(self) -> bytes:
        return to_bytes(self.counters, self._parts)

    def restore(self, payload: bytes) -> None:
        """Inverse of `state`. Raises CorruptionError for bytes that are no state of this encoder."""
        with reading():
            saved = from_bytes(payload)
            self.start_fresh(saved.counters)
            for part in self._parts:
                part.restore(saved)

    @property
    def state_bytes(self) -> int:
        """About what `state` takes, without making it."""
        return 4096 + sum(part.state_bytes for part in self._parts)
