"""An ingest on one screen: decode, encode and write overlap; batches are cut at fixed frame numbers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from memdb.digest import unit_digest
from memdb.ingest.encoder import Counters, StreamEncoder
from memdb.ingest.frames import ReadyFrame, thumbnail
from memdb.ingest.queues import Sink, Stream
from memdb.ingest.sampling import sample, slot_ns
from memdb.ingest.sources.base import Source
from memdb.ingest.stages import IngestStages
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import CorruptionError, Interrupted, SourceError
from memdb.schemas.frames import DecodedFrame, Frame
from memdb.schemas.recording import Gap
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.times import format_time, to_s
from memdb.schemas.units import Unit
from memdb.store import Store
from memdb.timing import Laps
from memdb.writer import RecordingWriter

log = logging.getLogger(__name__)

# Batches that may wait for the writer, and frames that may wait for the model: enough to overlap, flat in memory.
BATCHES_AHEAD = 2


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


def ingest(
    store: Store,
    source: Source,
    spec: RecordingSpec,
    model: VideoModel,
    stages: IngestStages,
    vectors: CaptionVectors | None,
    *,
    index: Callable[[bool], None],
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    new_epoch: str = "",
    turn: AbstractContextManager[object] = nullcontext(),  # noqa: B008
) -> IngestReport:
    """Put a source into the store, from where an earlier ingest of it ended.

    `index(flush)` brings the derived indexes up; the writer's thread calls it after commits, with flush at the
    end. `stop` ends the ingest after the batch in hand, with Interrupted. `new_epoch` is a reason not to resume
    but to go on from a fresh window. `turn` is held while the model works on a batch, so that questions over the
    same model have theirs in between. Raises Diverged where the replay differs from what was written first.

    A live source has no beginning to go back to: connected again it goes on behind what was seen, after a gap.
    """
    live = source.info.live
    laps = Laps(torch.cuda.synchronize if model.device.type == "cuda" else None)
    size = stages.encode.chunk_frames
    with store.writer(spec) as writer:
        with turn:
            encoder = StreamEncoder(model, stages, spec.init_ids, vectors, laps)
            resumed = _resume(store, writer, encoder, new_epoch, live=live)
        gap = _reconnected(writer, encoder.counters.taken_ns) if live and writer.recording.epochs else None
        run = _Run(store, writer, encoder, index, progress, source.info.duration_ns, laps)
        counters = encoder.counters
        decoded = _later(source.frames(), gap.end_ns) if gap is not None else source.frames()
        frames = sample(decoded, spec.sample_fps, after_ns=counters.taken_ns, number=counters.frame)
        ready = Stream(
            (_ready(frame, model) for frame in frames), ahead=2 * size, name="memdb-decode", stop=stop
        )
        sink = Sink(run.commit, ahead=BATCHES_AHEAD, name="memdb-write")
        waiting = 0
        try:
            if gap is not None:
                with turn:
                    encoded = run.ending(flush=True)  # no clip spans a gap
                sink.put(encoded)
            for batch in _batches(iter(ready), size):
                if len(batch) < size and (ready.stopped or live):
                    waiting = len(batch)  # whoever goes on cuts the same batches: a partial one is the last
                    break
                with turn:
                    encoded = run.encode(batch)
                sink.put(encoded)
            with turn:
                encoded = run.ending(flush=not ready.stopped and not live)
            sink.put(encoded)
        finally:
            ready.close()
            sink.finish()
        warnings = list(source.warnings)
        if gap is not None:
            warnings.append(f"{spec.name} was connected again: {_told(gap)}")
        if live and waiting:
            warnings.append(f"the last {waiting} frames make no full batch of {size} and were not kept")
        report = run.report(resumed, warnings)
        if ready.stopped:
            raise Interrupted(
                f"stopped at {format_time(report.watermark_s)}: everything up to there is kept; run the same "
                "command again to go on"
            )
        if writer.next_unit == 0 and not live:
            raise SourceError(f"{spec.source_name} gave no frame: is it a film with a picture track?")
        if source.media_end_ns is not None and not live:
            writer.end(source.media_end_ns)
        return report


def _resume(
    store: Store, writer: RecordingWriter, encoder: StreamEncoder, new_epoch: str, *, live: bool
) -> int | None:
    """Bring the encoder to the last whole state; the unit from which it goes on, None at the very start.

    Without a state a file is encoded again from its beginning; what cannot be replayed goes on as a new epoch.
    """
    row = writer.recording
    if writer.next_unit == 0:
        writer.epoch(0, 0, "the beginning")
        if not live:
            return None
    if not new_epoch:
        found = store.state(row.id).load_latest(row.spec.encoding_fingerprint, writer.next_unit)
        if found is not None and live and found[0] < writer.next_unit:
            log.warning("the saved state is older than the last unit, and a live source cannot be replayed")
            found = None
        if found is not None:
            try:
                encoder.restore(found[1])
                return found[0]
            except CorruptionError as error:
                log.warning("%s", error)
        if row.spec.source.digest and len(row.epochs) < 2 and not live:
            encoder.start_fresh(Counters())
            return 0
        new_epoch = "no encoder state was left, and the stretch before cannot be encoded again"
    if writer.next_unit == 0:
        encoder.start_fresh(Counters())
        return None
    _start_epoch(store, writer, encoder, new_epoch)
    return writer.next_unit


def _reconnected(writer: RecordingWriter, taken_ns: int) -> Gap:
    """Where a live source goes on that is connected again, on record as a gap.

    Its own times begin anew, the recording's never go back: it goes on as much later as the wall clock says,
    and at least one slot behind the last frame, for how long nobody looked is not known any better.
    """
    row = writer.recording
    slot = slot_ns(row.spec.sample_fps)
    lost_ns = max([writer.watermark_ns, (taken_ns // slot + 1) * slot, *(gap.end_ns for gap in row.gaps)])
    passed_ns = time.time_ns() - row.created_ns
    gap = Gap(lost_ns, max(lost_ns + slot, -(-passed_ns // slot) * slot), "the source was not connected")
    writer.gap(gap.start_ns, gap.end_ns, gap.reason)
    log.info("%s: %s", row.name, _told(gap))
    return gap


def _told(gap: Gap) -> str:
    return f"nothing was seen from {format_time(to_s(gap.start_ns))} to {format_time(to_s(gap.end_ns))}"


def _later(frames: Iterator[DecodedFrame], by_ns: int) -> Iterator[DecodedFrame]:
    for frame in frames:
        yield replace(frame, pts_ns=frame.pts_ns + by_ns)


def _start_epoch(store: Store, writer: RecordingWriter, encoder: StreamEncoder, reason: str) -> None:
    """Go on behind the watermark from a fresh window, and put that on record."""
    row = writer.recording
    last = store.unit(row.id, writer.next_unit - 1)
    position = int(last.blocks[-1]["position"] + last.blocks[-1]["tokens"]) if len(last.blocks) else 0
    number = last.epoch + 1
    encoder.start_fresh(
        Counters(
            unit=writer.next_unit,
            taken_ns=writer.watermark_ns - 1,  # inside the slot of the last frame
            position=position,
            epoch=number,
            widths=writer.scale_widths(),
        )
    )
    writer.epoch(number, writer.next_unit, reason)
    log.warning(
        "%s goes on from %s as epoch %d: %s",
        row.spec.name,
        format_time(to_s(row.watermark_ns)),
        number,
        reason,
    )


def _ready(frame: Frame, model: VideoModel) -> ReadyFrame:
    return ReadyFrame(
        frame.number, frame.start_ns, frame.end_ns, model.prepare(frame.image), thumbnail(frame)
    )


def _batches(frames: Iterator[ReadyFrame], size: int) -> Iterator[list[ReadyFrame]]:
    while batch := list(islice(frames, size)):
        yield batch


@dataclass(frozen=True, eq=False)
class _Commit:
    """What goes to the writer's thread: units that the store has not, and a state to save behind them."""

    units: Sequence[Unit]
    state: tuple[int, bytes] | None
    flush: bool = False


class _Run:
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

    def encode(self, batch: Sequence[ReadyFrame]) -> _Commit:
        return self._package(self._encoder.step(batch))

    def ending(self, *, flush: bool) -> _Commit:
        """The last commit: with `flush` the unit that is still open; in any case the state."""
        units = self._fresh(self._encoder.finish() if flush else [])
        return _Commit(units, (self._encoder.counters.unit, self._encoder.state()), flush=True)

    def _package(self, units: Sequence[Unit]) -> _Commit:
        """A state is saved once as many unit bytes came as a state takes, so it at most doubles the writes."""
        fresh = self._fresh(units)
        self._since_state_bytes += sum(unit.payload_bytes for unit in fresh)
        if not fresh or self._since_state_bytes < self._encoder.state_bytes:
            return _Commit(fresh, None)
        self._since_state_bytes = 0
        return _Commit(fresh, (self._encoder.counters.unit, self._encoder.state()))

    def _fresh(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that are not in the store. Those that are must come out as they were first written."""
        fresh = [unit for unit in units if unit.number >= self._known]
        for unit in units[: len(units) - len(fresh)]:
            first = self._store.unit(self._writer.recording.id, unit.number)
            if unit_digest(unit) != first.digest:
                raise Diverged(
                    f"unit {unit.number} of {self._writer.recording.spec.name!r} came out otherwise than at first"
                )
            self._replayed += 1
        return fresh

    def commit(self, item: _Commit) -> None:
        if item.units:
            with self._laps("write"):
                self._writer.append(item.units)
            self._written += len(item.units)
            self._written_bytes += sum(unit.payload_bytes for unit in item.units)
        if item.state is not None:
            with self._laps("state"):
                self._store.state(self._writer.recording.id).save(*item.state)
        with self._laps("index"):
            self._index(item.flush)
        if self._progress is not None:
            media_s = to_s(self._writer.watermark_ns)
            self._progress(Progress(media_s, self._duration_s, self._writer.next_unit, self._written_bytes))

    def report(self, resumed: int | None, warnings: Sequence[str]) -> IngestReport:
        return IngestReport(
            recording=self._writer.recording.spec.name,
            units=self._written,
            watermark_s=to_s(self._writer.watermark_ns),
            resumed_from_unit=resumed,
            replayed_units=self._replayed,
            epoch=self._encoder.counters.epoch,
            written_bytes=self._written_bytes,
            timings_ms={**self._laps.ms, "total": self._laps.total_ms},
            warnings=list(warnings),
        )
