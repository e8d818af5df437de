"""A plugin of pytest that takes the syncs of one reason out of memdb/files.py: see `without_sync.fails_without`.

It is loaded before anything else of memdb, so that every other module gets the functions from here.
"""

from __future__ import annotations

import os
from pathlib import Path

from memdb import files
from memdb.files import File

_WHY = os.environ["MEMDB_TRUST_WITHOUT_SYNC"]
_sync, _sync_folder, _sync_open = File.sync, files.sync_folder, files.sync_open


def sync(self: File, why: str) -> None:
    if why != _WHY:
        _sync(self, why)


def sync_folder(folder: Path, why: str) -> None:
    if why != _WHY:
        _sync_folder(folder, why)


def sync_open(fd: int, path: Path, why: str) -> None:
    if why != _WHY:
        _sync_open(fd, path, why)


File.sync, files.sync_folder, files.sync_open = sync, sync_folder, sync_open  # type: ignore[method-assign]
