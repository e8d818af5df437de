"""The two halves of an ingest, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from memdb.digest import unit_digest
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.schemas.recording import Gap
from memdb.schemas.times import to_s
from memdb.schemas.units import Unit
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
    """What goes to the writer's thread: units that the store has not, a gap and a state to save behind them."""

    units: Sequence[Unit]
    state: tuple[int, bytes] | None
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
        self._since_state_bytes = 0
        self._replayed = self._written = self._written_bytes = 0

    def encode(self, batch: Sequence[ReadyFrame]) -> Commit:
        return self._package(self._encoder.step(batch))

    def ending(self, *, flush: bool) -> Commit:
        """The last commit: with `flush` the unit that is still open; in any case the state."""
        units = self._fresh(self._encoder.finish() if flush else [])
        return Commit(units, (self._encoder.counters.unit, self._encoder.state()), flush=True)

    def at_gap(self, gap: Gap) -> Commit:
        """No clip spans a gap: the open unit closes. Where a gap only begins, everything is made safe."""
        if gap.end_ns == gap.start_ns:
            return self.ending(flush=True)
        return replace(self._package(self._encoder.finish()), gap=gap)

    def _package(self, units: Sequence[Unit]) -> Commit:
        """A state is saved once as many unit bytes came as a state takes, so it at most doubles the writes."""
        fresh = self._fresh(units)
        self._since_state_bytes += sum(unit.payload_bytes for unit in fresh)
        if not fresh or self._since_state_bytes < self._encoder.state_bytes:
            return Commit(fresh, None)
        self._since_state_bytes = 0
        return Commit(fresh, (self._encoder.counters.unit, self._encoder.state()))

    def _fresh(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that are not in the store. Those that are must come out as they were first written."""
        fresh = [unit for unit in units if unit.number >= self._known]
        for unit in units[: len(units) - len(fresh)]:
            first = self._store.unit(self._writer.recording.id, unit.number)
            if unit_digest(unit) != first.first_digest:
                raise Diverged(
                    f"unit {unit.number} of {self._writer.recording.spec.name!r} came out otherwise than at first"
                )
            self._replayed += 1
        return fresh

    def commit(self, item: Commit) -> None:
        if item.units:
            with self._laps("write"):
                self._writer.append(item.units)
            self._written += len(item.units)
            self._written_bytes += sum(unit.payload_bytes for unit in item.units)
        if item.gap is not None:
            self._writer.gap(item.gap.start_ns, item.gap.end_ns, item.gap.reason)
        if item.state is not None:
            with self._laps("state"):
                self._store.state(self._writer.recording.id).save(*item.state)
        with self._laps("index"):
            self._index(item.flush)
        if self._progress is not None:
            media_s = to_s(self._writer.watermark_ns)
            self._progress(Progress(media_s, self._duration_s, self._writer.next_unit, self._written_bytes))

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
