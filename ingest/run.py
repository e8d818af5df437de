"""The two halves of an ingest, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from memdb.digest import unit_digest
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.held import is_meant
from memdb.ingest.resume import start_epoch
from memdb.locks import FileLock, commit_lock
from memdb.schemas.errors import UnknownRecording
from memdb.schemas.recording import Epoch, Gap, Tombstone
from memdb.schemas.times import to_s
from memdb.schemas.units import Unit
from memdb.sealed import FORGOTTEN_DIGEST
from memdb.state import SavedState
from memdb.store import Store
from memdb.timing import Laps
from memdb.writer import RecordingWriter


@dataclass(frozen=True)
class Progress:
    """How far an ingest is: what is committed, not what is in hand."""

    media_s: float
    duration_s: float | None  # of the whole source, where it is known
    units: int
    written_bytes: int


@dataclass(frozen=True)
class IngestReport:
    recording: str
    units: int  # committed by this call
    watermark_s: float
    resumed_from_unit: int | None
    replayed_units: int  # encoded again and found equal, not written
    epoch: int
    written_bytes: int
    timings_ms: dict[str, float]
    warnings: list[str] = field(default_factory=list)


class Diverged(Exception):
    """Encoding again gave other bits than the first time: another library version, device or thread count."""


@dataclass(frozen=True, eq=False)
class Commit:
    """What goes to the writer's thread: an epoch, units of it that the store has not, a gap, a state to save."""

    units: Sequence[Unit]
    state: SavedState | None
    tombstones: int  # how many spans had been forgotten when the units were encoded
    epoch: Epoch | None = None
    flush: bool = False
    gap: Gap | None = None


class Run:
    """The two halves of an ingest: `encode` in the caller's thread, `commit` in the writer's."""

    def __init__(
        self,
        store: Store,
        writer: RecordingWriter,
        encoder: StreamEncoder,
        index: Callable[[bool], None],
        progress: Callable[[Progress], None] | None,
        duration_ns: int | None,
        laps: Laps,
    ) -> None:
        self._store, self._writer, self._encoder = store, writer, encoder
        self._index, self._progress, self._laps = index, progress, laps
        self._duration_s = None if duration_ns is None else to_s(duration_ns)
        self._known = writer.next_unit  # units below are in the store already
        self._tombstones: Sequence[Tombstone] = ()  # all that are taken note of
        self._new_epoch: Epoch | None = None  # begun by the encoder, not yet handed over
        self._since_state_bytes = 0
        self._replayed = self._written = self._written_bytes = 0
        self._counted_bytes = 0  # of units, that a state tells of

    def encode(self, batch: Sequence[ReadyFrame]) -> Commit:
        units = self._take_note()
        # Of a replay that was given up, frames may come that lie behind the watermark already.
        batch = [frame for frame in batch if frame.start_ns > self._encoder.counters.taken_ns]
        for gone, frames in groupby(batch, self._is_forgotten):
            take = self._encoder.pass_over if gone else self._encoder.step
            units += take(list(frames))
        return self._package(units)

    def ending(self, *, flush: bool) -> Commit:
        """The last commit: with `flush` the unit that is still open; in any case the state."""
        units = self._take_note()
        if flush:
            units += self._encoder.finish()
        return self._commit(self._fresh(units), save=True, flush=True)

    def at_gap(self, gap: Gap) -> Commit:
        """No clip spans a gap: the open unit closes. Where a gap only begins, everything is made safe."""
        if gap.end_ns == gap.start_ns:
            return self.ending(flush=True)
        return replace(self._package(self._take_note() + self._encoder.finish()), gap=gap)

    def forgotten(self) -> int:
        """How many spans were forgotten by now: one look at the catalog, past a writer that waits for the disk."""
        return self._store.catalog.tombstones(self._writer.recording.id)

    def _is_forgotten(self, frame: ReadyFrame) -> bool:
        """Whether a frame in hand was taken in before something was forgotten that overlaps it."""
        return is_meant(frame, self._tombstones[frame.tombstones :])

    def _take_note(self) -> list[Unit]:
        """Let the encoder go of what was forgotten since it took note last. Returns units that close by that."""
        encoder, writer = self._encoder, self._writer
        state = self._store.catalog.state(writer.recording.id)
        if state is not None and state.tombstones == len(self._tombstones) == encoder.counters.tombstones:
            return []
        self._tombstones = writer.tombstones()
        new = self._tombstones[encoder.counters.tombstones :]
        encoder.counters.tombstones = len(self._tombstones)
        if encoder.counters.unit < self._known and any(encoder.reach_ns < stone.end_ns for stone in new):
            start_epoch(self._store, writer, encoder, "something was forgotten that was to be encoded again")
        elif encoder.holds(new):
            first = encoder.counters.unit
            units = encoder.forget(new)
            self._new_epoch = Epoch(encoder.counters.epoch, first, "what the encoder held was forgotten")
            return units
        return []

    def _package(self, units: Sequence[Unit]) -> Commit:
        """A state is saved once as many unit bytes came as a state takes, so it at most doubles the writes."""
        fresh = self._fresh(units)
        self._since_state_bytes += sum(unit.payload_bytes for unit in fresh)
        save = bool(fresh) and self._since_state_bytes >= self._encoder.state_bytes
        if save:
            self._since_state_bytes = 0
        return self._commit(fresh, save=save)

    def _commit(self, units: Sequence[Unit], *, save: bool, flush: bool = False) -> Commit:
        encoder, epoch = self._encoder, self._new_epoch
        self._new_epoch, state, counters = None, None, encoder.counters
        if save:
            recording = self._writer.recording
            state = SavedState(
                recording.id,
                counters.unit,
                recording.spec.encoding_fingerprint,
                encoder.reach_ns,
                counters.tombstones,
                encoder.state(),
            )
        return Commit(units, state, counters.tombstones, epoch, flush)

    def _fresh(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that are not in the store. Those that are must come out as they were first written."""
        fresh = [unit for unit in units if unit.number >= self._known]
        for unit in units[: len(units) - len(fresh)]:
            first = self._store.unit(self._writer.recording.id, unit.number)
            if first.first_digest == FORGOTTEN_DIGEST:
                continue  # just now: before the next batch the encoder takes note
            if unit_digest(unit) != first.first_digest:
                raise Diverged(
                    f"unit {unit.number} of {self._writer.recording.spec.name!r} came out otherwise than at first"
                )
            self._replayed += 1
        return fresh

    def commit(self, item: Commit) -> None:
        if item.epoch is not None:
            self._writer.epoch(item.epoch.number, item.epoch.first_unit, item.epoch.reason)
        if item.units:
            with self._laps("write"):
                self._writer.append(item.units, tombstones_seen=item.tombstones)
            self._written += len(item.units)
            self._written_bytes += sum(unit.payload_bytes for unit in item.units)
        if item.gap is not None:
            self._writer.gap(item.gap.start_ns, item.gap.end_ns, item.gap.reason)
        if item.state is not None:
            with self._laps("state"):
                self._save(item.state)
        with self._laps("index"):
            try:
                self._index(item.flush)
            except UnknownRecording:
                self._writer.tombstones()  # says so where all of it was forgotten
                raise
        if self._progress is not None:
            media_s = to_s(self._writer.watermark_ns)
            self._progress(Progress(media_s, self._duration_s, self._writer.next_unit, self._written_bytes))

    def _save(self, state: SavedState) -> None:
        """Keep a state, unless something that it holds was forgotten since: nobody forgets meanwhile."""
        recording_id = self._writer.recording.id
        with FileLock(commit_lock(self._store.path, recording_id), wait=True):
            if not state.holds_forgotten(self._writer.tombstones()):
                files = self._store.state(recording_id)
                files.save(
                    state.unit,
                    state.payload,
                    reach_ns=state.reach_ns,
                    tombstones=state.tombstones,
                    units_bytes=self._writer.units_bytes - self._counted_bytes,
                )
                self._counted_bytes = self._writer.units_bytes

    def report(self, resumed: int | None, warnings: Sequence[str], media_end_ns: int | None) -> IngestReport:
        """`media_end_ns`: where the source ended, if it did."""
        watermark_ns = self._writer.watermark_ns
        return IngestReport(
            recording=self._writer.recording.spec.name,
            units=self._written,
            watermark_s=to_s(watermark_ns if media_end_ns is None else min(watermark_ns, media_end_ns)),
            resumed_from_unit=resumed,
            replayed_units=self._replayed,
            epoch=self._encoder.counters.epoch,
            written_bytes=self._written_bytes,
            timings_ms={**self._laps.ms, "total": self._laps.total_ms},
            warnings=list(warnings),
        )
