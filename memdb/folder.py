"""The directory of a store: what belongs into it, and how an empty one is made."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from memdb.catalog import Catalog
from memdb.database import CATALOG
from memdb.files import File, make_folder, sync_folder, unlink
from memdb.network import check_locks_hold
from memdb.schemas.errors import CorruptionError, NotAStore, StoreError

POLICY = "policy.json"
TRUTH = ("segments", "state", "locks")
FOLDERS = (*TRUTH, "keys", "captions.lance")
FILES = (CATALOG, POLICY)
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite may put beside a catalog
_PAGE_BYTES = 4096  # of SQLite


def open_folder(path: str | os.PathLike[str], *, create: bool) -> Path:
    """The absolute path of a store's directory; made first with `create`, where it is missing or empty.

    Raises NotAStore, CorruptionError, StoreError.
    """
    folder = Path(path).absolute()
    if not has_catalog(folder):
        if not create:
            raise NotAStore(_how_to_get_a_store(folder))
        _create(folder)
    for name in (*FILES, *FOLDERS):
        if (folder / name).is_symlink():
            raise StoreError(f"{folder / name} is a symbolic link: a store holds none")
    return folder


def has_catalog(folder: Path) -> bool:
    """Whether a directory holds a store. Raises CorruptionError where only its catalog is gone.

    A catalog of one page has no tables: whoever made it died. (By its size, for nobody may open the file beside
    SQLite: at the close, the system would drop the locks that this process has on it.)
    """
    try:
        size_bytes = (folder / CATALOG).stat().st_size
    except FileNotFoundError:
        size_bytes = 0
    except NotADirectoryError:
        return False
    except OSError as error:
        raise NotAStore(f"{folder} cannot be opened: {error.strerror}") from None
    if size_bytes <= _PAGE_BYTES and has_segments(folder):
        raise CorruptionError(
            f"{folder}: its {CATALOG} is missing: run memdb repair --store {folder}", file=CATALOG
        )
    return size_bytes > _PAGE_BYTES


def has_segments(folder: Path) -> bool:
    return (folder / "segments").is_dir() and any((folder / "segments").iterdir())


def _how_to_get_a_store(folder: Path) -> str:
    if folder.is_dir():
        return f"{folder} holds no store: name one, or make it with memdb ingest FILM --store {folder}"
    if folder.exists():
        return f"{folder} is a file, not a store: name the folder of a store"
    return f"there is no store at {folder}: make one with memdb ingest FILM --store {folder}"


def _create(folder: Path) -> None:
    """Make an empty store. Taken up again where a process died in between; refused beside foreign files.

    All names are safe before the catalog holds anything, so that whoever finds a store need not see to them.
    """
    try:
        _make_folders(folder)
        foreign = sorted(
            name
            for name in os.listdir(folder)
            if name not in FOLDERS and not name.startswith((CATALOG, POLICY))
        )
        if foreign:
            raise NotAStore(
                f"{folder} is not empty and holds no store ({foreign[0]!r} lies in it): name a new folder"
            )
        for name in TRUTH:
            make_folder(folder / name)
        check_locks_hold(folder)
        try:
            _create_catalog(folder)
        except CorruptionError:
            if has_catalog(folder):
                raise
            for suffix in ("", *BESIDE):  # a power cut left a page of noise, of a store that never was
                unlink(folder / f"{CATALOG}{suffix}")
            _create_catalog(folder)
    except OSError as error:
        raise StoreError(f"cannot make a store at {folder}: {error.strerror}") from error


def _create_catalog(folder: Path) -> None:
    if not (folder / CATALOG).exists():
        File(folder / CATALOG, new=False).close()
    sync_folder(folder, "the names of a new store's catalog and folders")
    sync_folder(folder.parent, "the name of a new store")
    Catalog.create(folder / CATALOG, store_id=uuid.uuid4().hex, created_ns=time.time_ns())


def _make_folders(folder: Path) -> None:
    """Make a folder, and those above it that are not there: their names are safe when this returns."""
    if not folder.parent.is_dir():
        _make_folders(folder.parent)
        sync_folder(folder.parent.parent, "the name of a folder above a new store")
    make_folder(folder)
