"""Making room by forgetting what is oldest, whole files at a time, so that little is written to free much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memdb.age import wall_clock_ns
from memdb.applying import STREAM
from memdb.catalog import Catalog
from memdb.compact import compact
from memdb.forget import forget
from memdb.room import used_bytes
from memdb.schemas.errors import UnknownRecording
from memdb.schemas.rows import RecordingRow
from memdb.schemas.times import NS_PER_S
from memdb.stats import size_bytes
from memdb.store import Store

logger = logging.getLogger(__name__)

# Of a recording that is being written, the last hour is never forgotten to make room.
KEPT_LIVE_NS = 3600 * NS_PER_S
# A step frees at least this share of the store: each leaves a tombstone behind for good.
STEP_SHARE = 64
_STEPS_MAX = 256


@dataclass(frozen=True)
class Span:
    """The oldest stretch of a recording that holds anything: whole units."""

    recording: RecordingRow
    began_ns: int  # on the wall clock
    start_ns: int
    end_ns: int
    is_all: bool  # nothing is left of the recording afterwards, and nobody writes it


def make_room(store_path: Path, size_bytes: int, *, own: str, move_on: Callable[[], None]) -> None:
    """Forget the oldest footage until `size_bytes` are free, as far as there is any that may go.

    `own` is the recording that the caller writes; `move_on` lets its writer go on in a new file, so that the
    one in hand can be compacted. Raises StoreError.
    """
    with Store.open(store_path, write=True) as store:
        before, known = used_bytes(store_path), -1
        for recording_id in _waiting(store):
            compact(store, only=recording_id)  # perhaps nobody reads it any more
        for _ in range(_STEPS_MAX):
            done = before - used_bytes(store_path) + sum(_waiting(store).values())
            missing = size_bytes - done
            if missing <= 0 or done == known:
                return  # or nothing came of the last step, and more of the same would forget for nothing
            known = done
            with store.snapshot():
                span = _oldest(store, max(missing, before // STEP_SHARE), own)
            if span is None:
                return
            name = span.recording.name
            try:
                if span.is_all:
                    forget(store, name)
                else:
                    forget(store, name, start_ns=span.start_ns, end_ns=span.end_ns)
            except UnknownRecording:  # somebody else made room with it just now
                continue
            logger.warning("%s: forgot what was oldest, to make room", name)
            if span.recording.id == own:
                move_on()
            compact(store, only=span.recording.id)


def _waiting(store: Store) -> dict[str, int]:
    """Recording id to bytes that are on their way out, once nobody reads them any more."""
    catalog = store.catalog
    names = {name for row in catalog.recordings() for name in catalog.replaced(row.id)}
    gone = set(catalog.forgotten())
    found: dict[str, int] = {}
    for path in store.segments_path.iterdir():
        if path.name in names or path.name[:32] in gone:
            found[path.name[:32]] = found.get(path.name[:32], 0) + size_bytes(path)
    return found


def _oldest(store: Store, step_bytes: int, own: str) -> Span | None:
    spans = [
        span for row in store.recordings() if (span := _oldest_of(store, row, step_bytes, own)) is not None
    ]
    return min(spans, key=lambda span: span.began_ns, default=None)


def _oldest_of(store: Store, row: RecordingRow, step_bytes: int, own: str) -> Span | None:
    catalog = store.catalog
    written = row.id == own or store.is_written(row.id)
    stop = row.units
    if written:
        kept_ns = row.watermark_ns - KEPT_LIVE_NS
        stop = catalog.first_unit(row, lambda unit: unit.end_ns > kept_ns)
    open_segment = _open_segment(catalog, row) if written and row.id != own else ""
    first, last, size = -1, -1, 0
    files = list(_contents(catalog, row))
    for name, low, high, held_bytes in files:
        if low >= stop or name == open_segment or size >= step_bytes:
            break
        first = low if first < 0 else first
        last, size = max(last, min(high, stop - 1)), size + held_bytes
    if first < 0:
        return None
    is_all = not written and last >= max(high for _, _, high, _ in files)
    start_ns = catalog.unit(row.id, first).start_ns
    end_ns = catalog.unit(row.id, last).end_ns
    return Span(row, wall_clock_ns(row) + start_ns, start_ns, end_ns, is_all)


def _contents(catalog: Catalog, row: RecordingRow) -> Iterator[tuple[str, int, int, int]]:
    """Of each segment that holds anything: name, first and last unit of which something is left, bytes; in order."""
    rows = catalog.database.execute(
        "SELECT segment, min(number), max(number), sum(length) FROM units "
        "WHERE recording = ? AND length(parts) > 0 GROUP BY segment ORDER BY min(number)",
        (row.id,),
    )
    return ((str(name), int(low or 0), int(high or 0), int(size or 0)) for name, low, high, size in rows)


def _open_segment(catalog: Catalog, row: RecordingRow) -> str:
    streams = [segment for segment in catalog.segments(row.id) if segment.role == STREAM]
    return max(streams, key=lambda segment: segment.sequence).name if streams else ""
