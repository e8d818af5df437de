"""A caption table as searches open it: the version that the manifest names, its files compared with the list."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from memdb.caption_table import CaptionTable, manifest_file
from memdb.schemas.errors import CorruptionError
from memdb.table_files import FOLDER, CheckedFiles
from memdb.table_manifest import TableManifest, read_manifest


@dataclass(frozen=True, eq=False)
class LiveTable:
    """One version of a table that was whole when it was last looked at."""

    packed: bytes  # the manifest as it lies on disk
    manifest: TableManifest
    files: CheckedFiles
    table: CaptionTable


class LiveTables:
    """The tables of a store, one an encoder, as this process has them open. Thread-safe; changes nothing."""

    def __init__(self, store_path: Path) -> None:
        self._path = store_path
        self._lock = threading.Lock()
        self._open: dict[str, LiveTable] = {}
        self._files: dict[str, CheckedFiles] = {}  # of each encoder's folder: what was hashed stays known

    def get(self, encoder: str) -> LiveTable | None:
        """The table of an encoder as its manifest has it now; None where there is none.

        Its files are compared with the list: byte by byte by the process that sees them first, by a look at
        size and time afterwards. Raises CorruptionError where anything differs, MissingDependency.
        """
        file = manifest_file(encoder)
        with self._lock:
            packed = read_manifest(self._path / file, file=file)
            if packed is None:
                self._open.pop(encoder, None)
                return None
            live = self._open.get(encoder)
            if live is None or live.packed != packed:
                live = self._opened(encoder, packed, file)
            else:
                live.files.check(live.manifest)
            self._open[encoder] = live
            return live

    def confirm(self, encoder: str, live: LiveTable) -> None:
        """Called after a search: its files were there all the while. Raises CorruptionError.

        An indexer may have put another table in its place meanwhile and be removing this one, and what LanceDB
        makes of a folder that misses some files nobody has promised. Files go only after the manifest changed.
        """
        file = manifest_file(encoder)
        if read_manifest(self._path / file, file=file) != live.packed:
            with self._lock:
                live.files.check(live.manifest)

    def forget(self, encoder: str) -> None:
        """Begin anew with this table: nothing that is known of it is believed."""
        with self._lock:
            self._open.pop(encoder, None)
            self._files.pop(encoder, None)

    def _opened(self, encoder: str, packed: bytes, file: str) -> LiveTable:
        manifest = manifest_of(packed, encoder, file=file)
        files = self._files.get(encoder)
        if files is None or files.path.name != manifest.folder:
            files = self._files[encoder] = CheckedFiles(self._path, manifest.folder)
        files.check(manifest)
        table = CaptionTable.open(self._path, manifest.folder, manifest.version)
        if table.rows() != manifest.rows:
            raise CorruptionError(
                f"{FOLDER}/{manifest.folder} has other rows than its manifest says", file=file
            )
        return LiveTable(packed, manifest, files, table)


def manifest_of(packed: bytes, encoder: str, *, file: str) -> TableManifest:
    """A manifest that is whole and of this encoder. Raises CorruptionError."""
    manifest = TableManifest.parse(packed, file=file)
    if manifest.encoder != encoder:
        raise CorruptionError(f"{file} is of another encoder: {manifest.encoder!r}", file=file)
    return manifest
