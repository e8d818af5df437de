"""Bringing a caption table up to the store: add, merge, make anew, and let nobody believe a step half done.

Whatever is written becomes part of the table by one rename, that of its manifest. Rows are added to the folder
that is live; everything else makes a new folder beside it and then switches:

    add            rows as a version of the live folder     -> manifest
    merge, make    a new folder, from the table or segments -> manifest -> the old folder is removed

A process that dies on the way leaves files that no manifest lists. Nobody reads them, and the next indexer
removes them first: that takes the folder back to the version of its manifest, for a few unlinks, where a
restored version would keep their bytes. All of this happens under the lock of derived data.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from memdb.caption_rows import Place, captions_between, read_said, recordings_of
from memdb.caption_table import CaptionEntry, CaptionTable, manifest_file, new_folder, table_name
from memdb.files import make_folder, point
from memdb.live_table import manifest_of
from memdb.room import RESERVE_BYTES, require
from memdb.schemas.errors import CorruptionError
from memdb.table_files import FOLDER, CheckedFiles, remove_tree
from memdb.table_manifest import MANIFEST_BYTES_MAX, TableManifest, read_manifest, write_manifest

if TYPE_CHECKING:
    from memdb.schemas.rows import UnitRow
    from memdb.store import Store

BATCH_ROWS = 32  # fewer wait for more, unless flushed
TAIL_UNITS_MAX = 512  # the writer keeps the tail below; more is worth a warning

_ADD_ROWS_MAX = 4096  # of one version
_FRAGMENTS_MAX = 50  # each version lists every fragment: unbounded, appends grow quadratic

_WHAT = "the table of captions"  # that asks for room

_log = logging.getLogger(__name__)


@dataclass
class _Own:
    """A table as this process left or found it."""

    packed: bytes
    manifest: TableManifest
    files: CheckedFiles
    table: CaptionTable | None = None  # its newest version, once it was needed


@dataclass
class _Backlog:
    """What the store has beyond a table, and what became of it."""

    store: Store
    rows: Iterator[UnitRow]
    last_commit: int
    units: dict[str, int]
    vector_size: int
    unread: list[Place]

    def entries(self) -> Iterator[list[CaptionEntry]]:
        """In pieces that make a version each."""
        while rows := list(islice(self.rows, _ADD_ROWS_MAX)):
            entries = [entry for row in rows if (entry := self._entry(row)) is not None]
            if entries:
                yield entries

    def _entry(self, row: UnitRow) -> CaptionEntry | None:
        try:
            said = read_said(self.store, row)
        except CorruptionError as error:
            _log.warning("a caption is left out: %s", error)
            said = None
        if said is not None:
            words, vector = said
            self.vector_size = self.vector_size or len(vector)
            if len(vector) == self.vector_size:
                return CaptionEntry(
                    row.recording_id, row.number, row.start_ns, row.end_ns, " ".join(words), vector
                )
            _log.warning("unit %d of %s has a vector of another size", row.number, row.recording_id)
        self.unread.append((row.recording_id, row.number))
        return None


class CaptionIndexer:
    """Writes the tables of a store. Every call is made by who holds the lock of derived data.

    Calls raise CorruptionError whose `file` lies in captions.lance for a table that cannot be used, OSError
    where the disk refuses, StoreFull where what it would leave is too little, MissingDependency.
    """

    def __init__(self, store_path: Path) -> None:
        self._path = store_path
        self._folder = store_path / FOLDER
        self._known: dict[str, _Own] = {}

    def index(self, store: Store, encoder: str, *, flush: bool) -> int:
        """Add what is missing once BATCH_ROWS captions wait, or on `flush`. Returns the captions added."""
        own = self._current(encoder, tidy=flush)
        backlog = self._backlog(store, encoder, own.manifest if own else None, flush)
        if backlog is None:
            return 0
        if own is None:
            return self._make(encoder, backlog)
        added = self._add(encoder, own, backlog)
        own = self._known[encoder]
        if own.manifest.fragments >= _FRAGMENTS_MAX:
            self._merge(encoder, own)
        return added

    def make_anew(self, store: Store, encoder: str) -> int:
        """Drop a table that cannot be used, and make it from the segments. Returns the captions in it."""
        self.drop(encoder)
        return self.rebuild(store, encoder)

    def rebuild(self, store: Store, encoder: str, *, reserve_bytes: int = RESERVE_BYTES) -> int:
        """Make a table from the segments, put it in the place of whatever there is, and remove that."""
        backlog = self._backlog(store, encoder, None, flush=True)
        return self._make(encoder, backlog, reserve_bytes) if backlog is not None else 0

    def drop(self, encoder: str) -> None:
        """Remove a table with everything of it; first what vouches for it."""
        self._known.pop(encoder, None)
        self.remove_orphans(table_name(encoder), keep="")

    def remove_orphans(self, name: str, *, keep: str) -> bool:
        """Remove what a table's name begins with but for the folder `keep` and its manifest. Raises OSError."""
        found = orphans(self._folder, name, keep)
        for path in found:
            remove_tree(path)
        return bool(found)

    # What there is

    def _current(self, encoder: str, *, tidy: bool) -> _Own | None:
        """The table as its manifest has it. Looked through, and tidied up, at first and with `tidy`."""
        file = manifest_file(encoder)
        packed = read_manifest(self._path / file, file=file)
        own = self._known.get(encoder)
        if packed is not None and own is not None and own.packed == packed and not tidy:
            return own
        if packed is None:
            self._known.pop(encoder, None)
            self.remove_orphans(table_name(encoder), keep="")
            return None
        if own is None or own.packed != packed:
            manifest = manifest_of(packed, encoder, file=file)
            own = self._known[encoder] = _Own(packed, manifest, CheckedFiles(self._path, manifest.folder))
        self._tidy(own)
        self.remove_orphans(table_name(encoder), keep=own.manifest.folder)
        return own

    def _tidy(self, own: _Own) -> None:
        """Compare the files with the list, and remove those that a killed indexer left."""
        own.files.check(own.manifest)
        if own.files.remove_strangers(own.manifest):
            own.table = None

    def _backlog(
        self, store: Store, encoder: str, manifest: TableManifest | None, flush: bool
    ) -> _Backlog | None:
        """What is to be added; None where that is nothing, or so little that it waits for more."""
        last_commit = store.last_commit()  # before the units are looked at: none of up to here is passed over
        recordings = recordings_of(store.recordings(), encoder)
        done = dict(manifest.units) if manifest else {}
        waiting = sum(max(0, row.units - done.get(row.id, 0)) for row in recordings.values())
        if not waiting or (waiting < BATCH_ROWS and not flush):
            return None
        rows = captions_between(store, recordings.values(), done)
        first = list(islice(rows, BATCH_ROWS))
        few = len(first) < BATCH_ROWS and not flush and waiting <= TAIL_UNITS_MAX
        if few or (manifest is None and not first):
            return None
        units = done | {row.id: max(row.units, done.get(row.id, 0)) for row in recordings.values()}
        return _Backlog(
            store,
            chain(first, rows),
            last_commit,
            units,
            manifest.vector_size if manifest else 0,
            list(manifest.unread) if manifest else [],
        )

    # What is written

    def _add(self, encoder: str, own: _Own, backlog: _Backlog) -> int:
        """Rows as versions of the live folder."""
        before = own.manifest
        require(self._path, 0, reserve_bytes=RESERVE_BYTES, what=_WHAT)
        self._tidy(own)
        try:
            table = own.table = own.table or self._newest(own)
            added = versions = 0
            for entries in backlog.entries():
                table.add(entries)
                added += len(entries)
                versions += 1
            if table.version != before.version + versions:
                raise CorruptionError(
                    f"{FOLDER}/{before.folder} came to another version than it should", file=FOLDER
                )
            point("captions added", self._folder / before.folder)
            self._publish(
                replace(before, encoder=encoder, version=table.version, rows=before.rows + added),
                backlog,
                own.files,
                table,
            )
        except Exception:
            # What has come through already is not listed: taken away, it takes no room on a full disk.
            own.table = None
            with suppress(OSError):
                own.files.remove_strangers(before)
            raise
        return added

    def _newest(self, own: _Own) -> CaptionTable:
        own.files.remove_hint()
        table = CaptionTable.open(self._path, own.manifest.folder)
        if (table.version, table.rows()) != (own.manifest.version, own.manifest.rows):
            file = f"{FOLDER}/{own.manifest.folder}"
            raise CorruptionError(f"{file} is of another version than its manifest says", file=file)
        return table

    def _merge(self, encoder: str, own: _Own) -> None:
        """The same rows in one piece. They are read once more against their checksums first."""
        size_bytes = sum(file.size_bytes for file in own.manifest.files)
        require(self._path, size_bytes, reserve_bytes=RESERVE_BYTES, what=_WHAT)
        own.files.check(own.manifest, anew=True)
        folder = new_folder(encoder)
        try:
            source = CaptionTable.open(self._path, own.manifest.folder, own.manifest.version)
            table = source.copy(self._path, folder)
            self._switch(own.manifest, None, folder, table)
        except Exception:
            self._abandon(folder)
            raise

    def _make(self, encoder: str, backlog: _Backlog, reserve_bytes: int = RESERVE_BYTES) -> int:
        """A table from the segments."""
        require(self._path, 0, reserve_bytes=reserve_bytes, what=_WHAT)
        make_folder(self._folder)
        folder = new_folder(encoder)
        table: CaptionTable | None = None
        rows = 0
        try:
            for entries in backlog.entries():
                if table is None:
                    table = CaptionTable.create(self._path, folder, entries)
                else:
                    table.add(entries)
                rows += len(entries)
            if table is None:
                return 0
            empty = TableManifest(encoder, folder, 0, backlog.vector_size, rows, 0)
            self._switch(empty, backlog, folder, table)
        except Exception:
            self._abandon(folder)
            raise
        return rows

    def _switch(
        self, manifest: TableManifest, backlog: _Backlog | None, folder: str, table: CaptionTable
    ) -> None:
        """Put a new folder in the place of the old one, and remove that."""
        table.make_indexes()
        point("captions made", self._folder / folder)
        files = CheckedFiles(self._path, folder)
        self._publish(
            replace(manifest, folder=folder, version=table.version, files=()), backlog, files, table
        )
        point("captions switched", self._folder / folder)
        self.remove_orphans(table_name(manifest.encoder), keep=folder)

    def _publish(
        self,
        manifest: TableManifest,
        backlog: _Backlog | None,
        files: CheckedFiles,
        table: CaptionTable,
    ) -> None:
        """Vouch for what lies there: from here on searches use it."""
        manifest = replace(manifest, files=files.listed(manifest))
        if backlog is not None:
            manifest = replace(
                manifest,
                last_commit=backlog.last_commit,
                units=backlog.units,
                unread=tuple(backlog.unread),
            )
        packed = manifest.pack()
        file = manifest_file(manifest.encoder)
        if len(packed) > MANIFEST_BYTES_MAX:
            raise OSError(errno.EFBIG, f"too many captions cannot be read for a table of the rest: {file}")
        write_manifest(self._path / file, packed)
        self._known[manifest.encoder] = _Own(packed, manifest, files, table)

    def _abandon(self, folder: str) -> None:
        """Remove a folder that did not become the table; if that fails, the next indexer does it."""
        manifests = (own.manifest.folder for own in self._known.values())
        if folder not in manifests:
            with suppress(OSError):
                remove_tree(self._folder / folder)


def orphans(captions: Path, name: str, keep: str) -> list[Path]:
    """What lies in captions.lance under the name of a table and is neither `keep` nor its manifest.

    With no folder to keep, the manifest goes too, and first: nothing is to vouch for a folder half removed.
    """
    kept = {keep, f"{name}.manifest"} if keep else set()
    try:
        found = sorted(path for path in captions.iterdir() if path.name.startswith(name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in found if path.name not in kept), key=lambda path: path.suffix == ".lance")


def tables_on_disk(captions: Path) -> Iterable[str]:
    """The names of all tables of which anything lies in captions.lance."""
    try:
        names = {path.name[: len(table_name(""))] for path in captions.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name.startswith("captions_"))
