"""Where an ingest goes on: from the last whole state, from the beginning, or behind the watermark as a new epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

from memdb.ingest.encoder import Counters, StreamEncoder
from memdb.ingest.sampling import slot_ns
from memdb.schemas.errors import CorruptionError
from memdb.schemas.frames import DecodedFrame
from memdb.schemas.recording import Gap
from memdb.schemas.times import format_time, to_s
from memdb.store import Store
from memdb.writer import RecordingWriter

log = logging.getLogger(__name__)


def resume(
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
        found = store.state(row.id).load_latest(
            row.spec.encoding_fingerprint, writer.next_unit, row.tombstones
        )
        if found is not None and live and found.unit < writer.next_unit:
            log.warning("the saved state is older than the last unit, and a live source cannot be replayed")
            found = None
        if found is not None:
            try:
                encoder.restore(found.payload)
                return found.unit
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


def reconnected(writer: RecordingWriter, taken_ns: int) -> Gap:
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
    log.info("%s: %s", row.name, told(gap))
    return gap


def told(gap: Gap) -> str:
    return f"nothing was seen from {format_time(to_s(gap.start_ns))} to {format_time(to_s(gap.end_ns))}"


def later(frames: Iterator[DecodedFrame], by_ns: int) -> Iterator[DecodedFrame]:
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
