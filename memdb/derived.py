"""Derived data as a whole: key pages and caption tables of a store, dropped and made anew from its segments."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from memdb.files import sync_folder, unlink
from memdb.schemas.errors import MissingDependency, StoreError
from memdb.store import Store

logger = logging.getLogger(__name__)

KEYS, CAPTIONS = "keys", "captions.lance"
_PAGES = re.compile(r"([0-9a-f]{32})(?:-([0-9]+))?\.pages")


def next_generation(folder: Path, recording_id: str, known: int) -> int:
    """A generation of key pages that no file has and nobody had open: 0 where there never were any."""
    names = [path.name for path in (folder / KEYS).iterdir()] if (folder / KEYS).is_dir() else []
    found = [_PAGES.fullmatch(name) for name in names]
    used = [int(match[2] or 0) for match in found if match and match[1] == recording_id]
    return 1 + max([*used, known]) if used or known else 0


def drop_derived(folder: Path) -> None:
    """Remove all of it, so that nothing of it comes back after a power cut. Raises OSError."""
    from memdb.table_files import remove_tree

    for name in (KEYS, CAPTIONS):
        if not (folder / name).is_dir():
            continue
        inside = sorted((folder / name).iterdir())
        trees = [path for path in inside if path.is_dir() and not path.is_symlink()]
        for path in inside:
            if path not in trees:
                unlink(
                    path
                )  # a table's manifest goes before the table: without it a half removed one is no damage
        for path in trees:
            remove_tree(path)
        sync_folder(folder / name, "the removal of derived data, before a catalog is made anew")


def rebuild_derived(folder: Path) -> list[str]:
    """Make all of it; what could not be made, and why: searches scan the segments then.

    Nobody else writes the store meanwhile, or it is a copy that nobody knows of.
    """
    notes: list[str] = []
    with Store.open(folder) as store:
        for row in store.recordings():
            index(store, row.id, row.spec.caption_encoder, notes)
    return notes


def index(store: Store, recording_id: str, encoder: str, notes: list[str]) -> None:
    """The key pages of a recording, and the caption table that its captions are in."""
    from memdb.captions import CaptionIndex
    from memdb.index.page_writer import index_recording

    try:
        index_recording(store, recording_id, flush=True)
        if encoder:
            CaptionIndex(store.path).index_captions(store, encoder, flush=True)
    except (MissingDependency, StoreError, OSError) as error:
        logger.warning("not all could be indexed: %s", error)
        if (note := f"not all could be indexed, which costs searches time: {error}") not in notes:
            notes.append(note)
