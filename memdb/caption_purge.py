"""Ridding captions.lance of what was forgotten: text, words and vectors, in every version and index.

A search leaves out what was forgotten from the commit on. The bytes go when the store is compacted: tables
that hold any are made anew from the segments in new folders, and the old folders are removed whole, with all
versions and indexes of LanceDB's.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from memdb.caption_indexer import CaptionIndexer, orphans, tables_on_disk
from memdb.caption_rows import captions_between, recordings_of, unit_now
from memdb.caption_table import table_name
from memdb.room import UPKEEP_RESERVE_BYTES
from memdb.schemas.errors import CorruptionError, MissingDependency, StoreFull
from memdb.table_files import FOLDER, CheckedFiles
from memdb.table_manifest import TableManifest, read_manifest

if TYPE_CHECKING:
    from memdb.store import Store

_log = logging.getLogger(__name__)


def holds_forgotten(store: Store) -> bool:
    """Whether any file of captions.lance may hold a caption that the catalog has no more."""
    folder = store.path / FOLDER
    for name in tables_on_disk(folder):
        manifest = _manifest(store.path, name)
        if manifest is None or orphans(folder, name, manifest.folder) or _is_stale(store, manifest):
            return True
    return False


def purge(store: Store, indexer: CaptionIndexer) -> None:
    """Make it so that none does, up to a power cut (`sweep.make_removals_safe`). Under the lock of derived data.

    Raises OSError.
    """
    folder = store.path / FOLDER
    for name in tables_on_disk(folder):
        manifest = _manifest(store.path, name)
        if manifest is None:
            indexer.remove_orphans(name, keep="")
        elif _is_stale(store, manifest):
            _replace(store, indexer, manifest)
        else:
            indexer.remove_orphans(name, keep=manifest.folder)


def _replace(store: Store, indexer: CaptionIndexer, manifest: TableManifest) -> None:
    """Make a table anew from the segments; where that fails, be without one."""
    try:
        indexer.rebuild(store, manifest.encoder, reserve_bytes=UPKEEP_RESERVE_BYTES)
    except (CorruptionError, MissingDependency, OSError, StoreFull) as error:
        _log.warning("the caption table is dropped until somebody indexes: %s", error)
    rebuilt = _manifest(store.path, table_name(manifest.encoder))
    if rebuilt is None or rebuilt.folder == manifest.folder:
        indexer.drop(manifest.encoder)


def _is_stale(store: Store, manifest: TableManifest) -> bool:
    """Whether a table has rows beyond the captions that the catalog has, or files that it should not have.

    A row was made for every caption below the marks but for those that could not be read, and captions only
    ever go: equal counts are equal sets.
    """
    if CheckedFiles(store.path, manifest.folder).strangers(manifest):
        return True
    recordings = recordings_of(store.recordings(), manifest.encoder)
    alive = sum(1 for _ in captions_between(store, recordings.values(), {}, manifest.units))
    unread = sum(unit_now(store, place) is not None for place in manifest.unread)
    return manifest.rows != alive - unread


def _manifest(store_path: Path, name: str) -> TableManifest | None:
    """The manifest of a table by its name; None where nothing vouches for it."""
    file = f"{FOLDER}/{name}.manifest"
    try:
        packed = read_manifest(store_path / file, file=file)
        manifest = TableManifest.parse(packed, file=file) if packed is not None else None
    except CorruptionError:
        return None
    return manifest if manifest is not None and table_name(manifest.encoder) == name else None
