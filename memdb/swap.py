"""Putting a catalog that was made anew in the place of the old one, with nothing beside it that does not fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from memdb.database import CATALOG
from memdb.files import File, replace, sync_folder, unlink
from memdb.folder import BESIDE
from memdb.schemas.rows import RecordingRow
from memdb.state import StateFiles, read_state, recording_of, state_files

NEW = f"{CATALOG}.new"


def drop_states(folder: Path, rows: Sequence[RecordingRow], forgotten: Collection[str]) -> int:
    """Remove encoder states that do not fit any more: ahead of the units, or with what was forgotten; how many."""
    known = {row.id: row for row in rows}
    removed = 0
    for recording_id in sorted({recording_of(path) for path in state_files(folder / "state")}):
        row = known.get(recording_id)
        states = StateFiles(folder / "state", recording_id, "")
        if row is None:
            removed += states.remove_all() if recording_id in forgotten else 0
            continue
        removed += states.remove_forgotten(row.tombstones)
        for path in states.files():
            state = read_state(path)
            if state.unit > row.units or state.tombstones > len(row.tombstones):
                unlink(path)
                removed += 1
    if removed:
        sync_folder(folder / "state", "the removal of states that fit a repaired catalog no more")
    return removed


def swap(folder: Path) -> None:
    """The old catalog goes before its WAL, and both before the new one comes: none is ever read with the other's,
    whatever reaches the disk.
    """
    old, new = folder / CATALOG, folder / NEW
    with File(new, new=False) as file:
        file.sync("a catalog made anew, before it gets its name")
    unlink(old)
    sync_folder(folder, "the removal of a catalog, before that of its WAL")
    for suffix in BESIDE:
        unlink(old.with_name(CATALOG + suffix))
    sync_folder(folder, "the removal of a WAL, before another catalog comes")
    replace(new, old)
    sync_folder(folder, "the name of a catalog made anew")
