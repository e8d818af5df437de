"""Where an ingest goes on: from the last whole state, from the beginning, or behind the watermark as a new epoch."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.encoder_state import Counters
from memdb.ingest.sampling import slot_ns
from memdb.ingest.sources.times import told
from memdb.schemas.errors import CorruptionError
from memdb.schemas.recording import Gap
from memdb.schemas.rows import RecordingRow
from memdb.schemas.times import NS_PER_S, format_time, to_s
from memdb.store import Store
from memdb.writer import RecordingWriter

log = logging.getLogger(__name__)

_DAY_NS = 86_400 * NS_PER_S
GAP_NS_MAX = (
    366 * _DAY_NS
)  # whoever was away for longer has a clock that was never set, or begins a new recording


def resume(
    store: Store, writer: RecordingWriter, encoder: StreamEncoder, new_epoch: str, *, live: bool
) -> int | None:
    """Bring the encoder to the last whole state; the unit from which it goes on, None at the very start.

    Without a state a file is encoded again from its beginning; what cannot be replayed goes on as a new epoch. So
    does what was forgotten in part: a replay would see it again.
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
        if row.spec.source.digest and len(row.epochs) < 2 and not live and not row.tombstones:
            encoder.start_fresh(Counters())
            return 0
        new_epoch = "no encoder state was left, and the stretch before cannot be encoded again"
        if row.tombstones:
            new_epoch = "something was forgotten, and no encoder state was left that lies behind it"
    if writer.next_unit == 0:
        encoder.start_fresh(Counters())
        return None
    start_epoch(store, writer, encoder, new_epoch)
    return writer.next_unit


def reconnected(store: Store, writer: RecordingWriter, taken_ns: int) -> Gap:
    """Where a live source goes on in another process than before, on record as a gap.

    Its own times begin anew, the recording's never go back. The wall clock is the only one that two processes
    share, and it may have been set in between. So the recording goes on as much later as it says since the
    recording began, but no more than it says since a state was last saved, which a clock that was set while the
    recording ran does not change; and one slot behind the last frame where it says nothing that can be true.
    """
    row = writer.recording
    slot = slot_ns(row.spec.sample_fps)
    lost_ns = max([writer.watermark_ns, (taken_ns // slot + 1) * slot, *(gap.end_ns for gap in row.gaps)])
    now_ns = time.time_ns()
    passed_ns = min(now_ns - row.created_ns, lost_ns + now_ns - _last_ingest_ns(store, row))
    why = "the source was not connected"
    if passed_ns - lost_ns > GAP_NS_MAX:
        why += f"; the clock says for {(passed_ns - lost_ns) // _DAY_NS} days, which is not believed"
        passed_ns = 0
    gap = Gap(lost_ns, max(lost_ns + slot, -(-passed_ns // slot) * slot), why)
    writer.gap(gap.start_ns, gap.end_ns, gap.reason)
    log.info("%s: nothing was seen from %s: %s", row.name, told(gap), why)
    return gap


def _last_ingest_ns(store: Store, row: RecordingRow) -> int:
    """When an ingest last saved its state, on the wall clock of that moment.

    Segments do not tell: compaction writes them anew.
    """
    found = row.created_ns
    for path in store.state(row.id).files():
        with suppress(FileNotFoundError):
            found = max(found, path.stat().st_mtime_ns)
    return found


def start_epoch(store: Store, writer: RecordingWriter, encoder: StreamEncoder, reason: str) -> None:
    """Go on behind the watermark from a fresh window, and put that on record."""
    tombstones = writer.tombstones()
    row = store.recording_by_id(writer.recording.id)
    number = store.unit(row.id, writer.next_unit - 1).epoch + 1
    if row.epochs:  # the newest may have no unit yet: then this is that one
        newest = row.epochs[-1]
        number = max(number, newest.number + (newest.first_unit < writer.next_unit))
    encoder.start_fresh(
        Counters(
            unit=writer.next_unit,
            taken_ns=writer.watermark_ns - 1,  # inside the slot of the last frame
            until_ns=writer.watermark_ns,
            position=_next_position(store, row),
            epoch=number,
            tombstones=len(tombstones),
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


def _next_position(store: Store, row: RecordingRow) -> int:
    """Behind every token so far. What is forgotten keeps its position and had a frame's tokens at most."""
    if row.spec.recipe.keeps_kv:
        for number in range(row.units - 1, -1, -1):
            if len(blocks := store.unit(row.id, number).blocks):
                tokens = max(int(blocks[-1]["tokens"]), row.spec.model.shape.frame_tokens)
                return int(blocks[-1]["position"]) + tokens
    return 0
