"""Forgetting: a span, or a whole recording, is gone from every answer from one commit on, in all tiers.

A tombstone goes into a segment of its own, with the units that it touches as later revisions of themselves:
without their caption and key frame, and without the blocks that overlap the span. So a catalog that is built
anew from the segments finds nothing of it either. The bytes themselves stay until `compact`.

What was taken in before the tombstone and overlaps the span goes, also from the hands of a writer: from units on
their way, from its encoder, from frames that are sampled and wait. What is taken in later stays, whatever its times.

What later frames took from the span while it was in the window, in their hidden states, cannot be taken back.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from memdb.applying import FORGET, forget_recording
from memdb.catalog import Catalog
from memdb.contents import husk, overlapping, stored_element_bytes
from memdb.database import CATALOG
from memdb.locks import FileLock, commit_lock, rewrite_lock
from memdb.records import Kind
from memdb.roll_forward import lost_recording, roll_forward
from memdb.room import refused
from memdb.schemas.errors import CorruptionError, UsageError
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.times import to_s
from memdb.schemas.units import Unit
from memdb.sealed import FORGOTTEN_DIGEST, SealedSegment, empty_husk, read_unit
from memdb.state import StateFiles
from memdb.store import Store

logger = logging.getLogger(__name__)

OPEN_END_NS = (1 << 63) - 1  # a span without an end: everything up to now, what a writer has in hand included


@dataclass(frozen=True)
class ForgetReport:
    recording: str
    whole: bool  # the recording itself is gone
    start_s: float
    end_s: float
    units: int  # of which something was forgotten
    captions: int
    blocks: int
    states: int  # encoder states that reached into the span, and are gone


def forget(
    store: Store,
    name: str,
    *,
    start_ns: int | None = None,
    end_ns: int | None = None,
    now_ns: int | None = None,
) -> ForgetReport:
    """Forget what overlaps `[start_ns, end_ns)` of a recording, or all of it where neither is given.

    Waits for a compaction at work. A writer at work takes note before its next batch. `store` is open for
    writing. Raises UnknownRecording, UsageError, StoreError.
    """
    if start_ns is not None and end_ns is not None and end_ns <= start_ns:
        raise UsageError(
            f"the span from {to_s(start_ns):g} s to {to_s(end_ns):g} s is empty: let it end after it starts"
        )
    catalog = Catalog(store.path / CATALOG, write=True)
    try:
        known = catalog.find(name)
        recording_id = known.id if known else lost_recording(catalog, store.segments_path, name)
        if recording_id is None:
            recording_id = store.recording(name).id  # raises, and lists the names that there are
        with (
            FileLock(rewrite_lock(store.path, recording_id), wait=True),
            FileLock(commit_lock(store.path, recording_id), wait=True),
        ):
            roll_forward(catalog, store.segments_path, recording_id)
            if catalog.is_forgotten(
                recording_id
            ):  # by a call that died on its way, and was carried out just now
                return _finished(store, name, recording_id, whole=start_ns is None and end_ns is None)
            run = _Forgetting(store, catalog, catalog.by_id(recording_id), now_ns or time.time_ns())
            if start_ns is None and end_ns is None:
                return run.all()
            return run.span(start_ns or 0, OPEN_END_NS if end_ns is None else end_ns)
    except OSError as error:
        raise refused(error, "cannot forget") from error
    finally:
        catalog.close()


def _finished(store: Store, name: str, recording_id: str, *, whole: bool) -> ForgetReport:
    """The rest of a forgetting that another call had begun. Raises UnknownRecording where a span of it was meant."""
    if not whole:
        store.recording(name)
    states = StateFiles(store.path / "state", recording_id, "").remove_all()
    return ForgetReport(name, True, 0.0, 0.0, 0, 0, 0, states)


class _Forgetting:
    def __init__(self, store: Store, catalog: Catalog, recording: RecordingRow, now_ns: int) -> None:
        self._store, self._catalog, self._row, self._now_ns = store, catalog, recording, now_ns
        self._folder = store.segments_path
        self._captions = self._blocks = 0

    def span(self, start_ns: int, end_ns: int) -> ForgetReport:
        row, catalog = self._row, self._catalog
        low = catalog.first_unit(row, lambda unit: unit.end_ns > start_ns)
        high = max(low, catalog.first_unit(row, lambda unit: unit.start_ns >= end_ns))
        number = len(row.tombstones)
        tombstone: dict[str, object] = {
            "start_ns": start_ns,
            "end_ns": end_ns,
            "below_unit": row.units,
            "at_ns": self._now_ns,
            "first": number,
        }
        segment = SealedSegment(catalog, self._folder, row, FORGET)
        try:
            segment.event(Kind.TOMBSTONE, number, tombstone)
            for unit in catalog.units(row.id, low, high):
                segment.unit(self._without(unit, start_ns, end_ns), unit, first_digest=FORGOTTEN_DIGEST)
            segment.event(Kind.TOMBSTONE, number, tombstone)  # twice, so that no single flip brings it back
            segment.seal()
        finally:
            segment.close()
        states = self._store.state(row.id).remove_forgotten(catalog.by_id(row.id).tombstones)
        catalog.database.checkpoint()
        end_s = to_s(min(end_ns, max(row.seen_until_ns, start_ns)))
        return self._report(False, to_s(start_ns), end_s, high - low, states)

    def all(self) -> ForgetReport:
        row, catalog = self._row, self._catalog
        for unit in catalog.units(row.id, 0, row.units):
            self._count(unit)
        segment = SealedSegment(catalog, self._folder, row, FORGET)
        try:
            segment.event(Kind.TOMBSTONE, 0, {"whole": True, "at_ns": self._now_ns})
            segment.event(Kind.TOMBSTONE, 1, {"whole": True, "at_ns": self._now_ns})
            segment.seal_whole()
        finally:
            segment.close()
        states = self._store.state(row.id)
        forget_recording(catalog, row.id, self._now_ns)
        removed = states.remove_all()
        catalog.database.checkpoint()
        return self._report(True, to_s(row.start_ns), to_s(row.seen_until_ns), row.units, removed)

    def _without(self, row: UnitRow, start_ns: int, end_ns: int) -> Unit:
        self._count(row)
        kept = (row.blocks["tokens"] > 0) & ~overlapping(row.blocks, start_ns, end_ns)
        if not kept.any():
            return empty_husk(row)  # as nearly always: only at the span's edges is something kept
        try:
            unit = read_unit(self._folder, self._row, row)
            unit = husk(unit, start_ns, end_ns, stored_element_bytes(self._row.spec, row))
        except CorruptionError as error:
            logger.warning("%s; what was left of it is forgotten as a whole", error)
            return empty_husk(row)
        self._blocks -= int(kept.sum())
        return unit

    def _count(self, row: UnitRow) -> None:
        self._captions += row.has_caption
        self._blocks += int((row.blocks["tokens"] > 0).sum())

    def _report(self, whole: bool, start_s: float, end_s: float, units: int, states: int) -> ForgetReport:
        logger.info("%s: forgot %d units from %g s to %g s", self._row.name, units, start_s, end_s)
        return ForgetReport(
            self._row.name, whole, start_s, end_s, units, self._captions, self._blocks, states
        )
