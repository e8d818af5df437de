"""What a store holds and what it takes on disk. Imports nothing heavy and reads no unit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from memdb.schemas.rows import RecordingRow
from memdb.schemas.times import to_s
from memdb.segments import parse_segment_name
from memdb.state import recording_of, state_files
from memdb.store import FOLDERS, Store

_OWN = ("segments", "state", "locks")


@dataclass(frozen=True)
class RecordingStats:
    name: str
    units: int
    duration_s: float  # media time from the first unit to the watermark
    watermark_s: float
    recipe: str
    # By tier: kv, keys, captions, keyframes, keep_sets, overhead (padding, footers), state, and dead: what was
    # forgotten or written anew and lies there until memdb compact.
    bytes: dict[str, int]
    started_at_ns: int | None  # wall clock
    finished: bool
    gaps: int
    # Bytes that the ingest wrote, encoder states included, over those of its units as they were encoded, up to the
    # newest state; None where there is none.
    written_ratio: float | None = None


@dataclass(frozen=True)
class StoreStats:
    recordings: list[RecordingStats]
    model: str | None  # as the user named it
    model_fingerprint: str | None
    derived_bytes: dict[str, int]  # by folder or file: captions.lance, keys, catalog.sqlite
    total_bytes: int  # everything in the directory


def stats(store: Store) -> StoreStats:
    """Sizes count everything. Raises CorruptionError where the catalog is damaged."""
    model = store.model
    segment_bytes: dict[str, int] = {}
    for path in (store.path / "segments").iterdir():
        parsed = parse_segment_name(path.name)
        if parsed:
            segment_bytes[parsed[0]] = segment_bytes.get(parsed[0], 0) + size_bytes(path)
    state_bytes: dict[str, int] = {}
    for path in state_files(store.path / "state"):
        owner = recording_of(path)
        state_bytes[owner] = state_bytes.get(owner, 0) + size_bytes(path)
    derived = {name: _tree_bytes(store.path / name) for name in FOLDERS if name not in _OWN}
    derived["catalog.sqlite"] = sum(size_bytes(path) for path in store.path.glob("catalog.sqlite*"))
    with store.snapshot():  # a recording that is listed may be forgotten before it is looked at
        rows = [(row, store.catalog.dead_bytes(row.id), store.state(row.id)) for row in store.recordings()]
    return StoreStats(
        recordings=[
            _recording(
                row,
                segment_bytes.get(row.id, 0),
                state_bytes.get(row.id, 0),
                dead_bytes,
                state.written().ratio,
            )
            for row, dead_bytes, state in rows
        ],
        model=model.spec if model else None,
        model_fingerprint=model.fingerprint if model else None,
        derived_bytes=derived,
        total_bytes=_tree_bytes(store.path),
    )


def _recording(
    row: RecordingRow, segment_bytes: int, state_bytes: int, dead_bytes: int, written_ratio: float | None
) -> RecordingStats:
    tiers = row.tier_bytes
    held = tiers.kv + tiers.keys + tiers.captions + tiers.keyframes + tiers.keep_sets + dead_bytes
    return RecordingStats(
        name=row.name,
        units=row.units,
        duration_s=to_s(row.seen_until_ns - row.start_ns),
        watermark_s=to_s(row.seen_until_ns),
        recipe=row.spec.recipe.name,
        bytes={
            "kv": tiers.kv,
            "keys": tiers.keys,
            "captions": tiers.captions,
            "keyframes": tiers.keyframes,
            "keep_sets": tiers.keep_sets,
            "overhead": segment_bytes - held,
            "state": state_bytes,
            "dead": dead_bytes,
        },
        started_at_ns=row.spec.started_at_ns,
        finished=row.finished,
        gaps=len(row.gaps),
        written_ratio=written_ratio,
    )


def _tree_bytes(folder: Path) -> int:
    return sum(size_bytes(Path(root) / name) for root, _, names in os.walk(folder) for name in names)


def size_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0  # a file that another process just removed
