"""Removing files that count no more: replaced segments, unfinished ones, invalid states, forgotten recordings.

Each function can be killed at any step and called again. The order is always the same: first the catalog says,
on the disk and not in its WAL alone, that a file is not needed; then the file goes; then its row.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memdb import applying
from memdb.applying import FORGET, STREAM, removed, role_of
from memdb.catalog import Catalog
from memdb.files import sync_folder, unlink
from memdb.folder import POLICY
from memdb.index.pages import FOLDER as KEYS
from memdb.locks import FileLock, commit_lock, rewrite_lock, writer_lock
from memdb.records import Kind
from memdb.roll_forward import first_header, is_whole_tombstone
from memdb.schemas.errors import LockedError
from memdb.schemas.rows import RecordingRow
from memdb.segments import next_prologue, reading, remove_segments, scan, segment_files, unlink_segments
from memdb.state import StateFiles, recording_of, state_files
from memdb.store import Store
from memdb.table_files import FOLDER as CAPTIONS

logger = logging.getLogger(__name__)

_PAGES = re.compile(r"([0-9a-f]{32})(?:-[0-9]+)?\.pages")
_STATE_TMP = re.compile(r"([0-9a-f]{32})-[0-9]{10}\.state\.tmp")
POLICY_LOCK = "policy.lock"


def remove_replaced(store: Store, catalog: Catalog, recording_id: str) -> list[str]:
    """Remove the segments that were written anew; what is left, and why."""
    names = catalog.replaced(recording_id)
    if not names:
        return []
    if not catalog.database.checkpoint():
        return [f"{len(names)} segments: a reader holds the catalog: run it again"]
    gone = remove_segments(store.segments_path, names, "the removal of segments that were written anew")
    removed(catalog, recording_id, gone)
    return _kept(store, [name for name in names if name not in gone])


def remove_unfinished(store: Store, catalog: Catalog, recording_id: str) -> list[str]:
    """Remove files that a killed forgetting, rewriting or writer began and that never counted."""
    folder = store.segments_path
    if not _unknown(store, catalog, recording_id):
        return []
    left: list[str] = []
    names: list[str] = []
    with _alone(store, recording_id) as alone:
        for name in _unknown(store, catalog, recording_id):
            match _begun_by(store, catalog, name):
                case "":
                    left.append(
                        f"segments/{name}: it is not of this store, or lost its header: see memdb verify"
                    )
                case applying.STREAM if not alone:
                    pass  # perhaps the file that a writer is just making
                case _:
                    names.append(name)
        gone = unlink_segments(folder, names)  # one that a power cut brings back still does not count
    return left + _kept(store, [name for name in names if name not in gone])


def _unknown(store: Store, catalog: Catalog, recording_id: str) -> list[str]:
    known = {row.name for row in catalog.segments(recording_id)} | set(catalog.replaced(recording_id))
    return [name for _, name in segment_files(store.segments_path).get(recording_id, []) if name not in known]


def remove_invalid_states(store: Store, recording: RecordingRow) -> int:
    """Remove encoder states that hold what was forgotten; how many."""
    states = StateFiles(store.path / "state", recording.id, recording.spec.encoding_fingerprint)
    return states.remove_forgotten(recording.tombstones)


def remove_forgotten(store: Store, catalog: Catalog, recording_id: str) -> list[str]:
    """Remove all files of a forgotten recording, and at last its row; what is left, and why.

    The tombstone goes last, when nothing is there any more that it keeps from coming back.
    """
    folder = store.segments_path
    with _alone(store, recording_id) as alone:
        if not alone:
            return ["a forgotten recording is still being written: end that ingest, then run it again"]
        if not catalog.database.checkpoint():
            return ["a forgotten recording: a reader holds the catalog: run it again"]
        names = [name for _, name in segment_files(folder).get(recording_id, [])]
        stones = [name for name in names if _is_tombstone(store, name)]
        data = [name for name in names if name not in stones]
        StateFiles(store.path / "state", recording_id, "").remove_all()
        remove_pages(store, lambda owner, _: owner == recording_id)
        gone = remove_segments(folder, data, "the removal of a forgotten recording's segments")
        if len(gone) < len(data):
            return _kept(store, [name for name in data if name not in gone])
        gone = unlink_segments(folder, stones)  # one that a power cut brings back forgets nothing more
        if len(gone) < len(stones):
            return _kept(store, [name for name in stones if name not in gone])
        with catalog.database.writing():
            catalog.database.delete("forgotten", "WHERE recording = ?", (recording_id,))
            catalog.database.upsert("meta", ("forgotten", catalog.count_of("forgotten") - 1))
    for lock in (writer_lock, rewrite_lock, commit_lock):  # nobody takes them again: its id is gone for good
        unlink(lock(store.path, recording_id))
    return []


def remove_pages(store: Store, unwanted: Callable[[str, str], bool]) -> None:
    """Remove the key pages of which `unwanted(recording id, file name)` holds."""
    folder = store.path / KEYS
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (found := _PAGES.fullmatch(path.name)) and unwanted(found[1], path.name):
            unlink(path)


def remove_strangers(store: Store, catalog: Catalog) -> None:
    """Remove states and pages of recordings that there are not, and files that a killed process left half done."""
    segments = segment_files(store.segments_path)
    known = {row.id for row in catalog.recordings()} | set(segments) | set(catalog.forgotten())
    for path in state_files(store.path / "state"):
        if recording_of(path) not in known:
            unlink(path)
    remove_pages(store, lambda owner, _: owner not in known)
    for path in sorted((store.path / "state").iterdir()):
        found = _STATE_TMP.fullmatch(path.name)
        if found is not None:
            with _alone(store, found[1]) as alone:
                if alone:
                    unlink(path)
    with FileLock(store.path / "locks" / POLICY_LOCK, wait=True):
        unlink(store.path / f"{POLICY}.tmp")


def make_removals_safe(store: Store) -> None:
    """Whatever was removed stays removed, also by those before whom a kill kept from seeing to it."""
    sync_folder(store.segments_path, "the removal of unfinished segments and of tombstones")
    sync_folder(store.path / "state", "the removal of states")
    if (store.path / KEYS).is_dir():
        sync_folder(store.path / KEYS, "the removal of key pages")
    if (store.path / CAPTIONS).is_dir():
        sync_folder(store.path / CAPTIONS, "the removal of caption tables")


@contextmanager
def _alone(store: Store, recording_id: str) -> Iterator[bool]:
    """Whether nobody writes the recording; while this lasts nobody begins to. Take it for moments only."""
    try:
        lock = FileLock(writer_lock(store.path, recording_id))
    except LockedError:
        yield False
        return
    with lock:
        yield True


def _begun_by(store: Store, catalog: Catalog, name: str) -> str:
    """The role of a file that the catalog does not know and that is not whole; "" for one that may hold more."""
    with reading(store.segments_path, name) as segment:
        header = first_header(segment, catalog.store_id)
        if header is None:
            # Without records behind it, not even its header became whole.
            return STREAM if next_prologue(segment, 1, segment.size_bytes) is None else ""
        role, records = role_of(header), scan(segment, 0).records
        return role if len(records) == 1 or (role != STREAM and records[-1].kind is not Kind.SEAL) else ""


def _is_tombstone(store: Store, name: str) -> bool:
    with reading(store.segments_path, name) as segment:
        header = first_header(segment, store.store_id)
        if header is None or role_of(header) != FORGET:
            return False
        return any(is_whole_tombstone(record) for record in scan(segment, 0).records)


def _kept(store: Store, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    size = sum(path.stat().st_size for name in names if (path := store.segments_path / name).exists())
    return [f"{len(names)} segments of {size:,} bytes are being read or written: run it again"]


def size_of(store: Store, recording_id: str) -> int:
    """Bytes of a recording's segments, states and key pages."""
    folders = [store.segments_path, store.path / "state", store.path / KEYS]
    return sum(_size(path) for folder in folders if folder.is_dir() for path in _own(folder, recording_id))


def _own(folder: Path, recording_id: str) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name.startswith(recording_id))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
