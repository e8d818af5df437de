"""Making the key pages of a recording anew, without what was forgotten or aged away: the next generation.

Readers that have the old file open go on in it; who opens the recording afterwards finds other rows in a file
of another name. Until the catalog names the new generation the new file counts for nothing.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import numpy as np

from memdb.applying import new_generation
from memdb.catalog import Catalog
from memdb.files import unlink
from memdb.index.forgotten import forgotten_rows
from memdb.index.page_sizes import KeySizes
from memdb.index.page_writer import PageWriter, page_unit, write_pages
from memdb.index.pages import Page, PageUnit, page_path, scan_pages
from memdb.room import UPKEEP_RESERVE_BYTES
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.store import Store

_log = logging.getLogger(__name__)

_STALE_SHARE = 4  # big files are made anew once a quarter of their rows is out of date
_SMALL_BYTES = 64 << 20  # small ones at once
_SAMPLED = 64  # of so many units of big files one is looked at for tokens that were thinned


def is_due(store: Store, catalog: Catalog, row: RecordingRow) -> bool:
    """Whether the pages hold anything forgotten, or too much that ageing has taken from the units."""
    path = page_path(store, row.id, row.generation)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        scan = scan_pages(fd, row.id, sizes=KeySizes.of(row.spec.model.shape))
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if row.tombstones and size > scan.end:
        return True  # damaged or unfinished pages: nobody can say what is in them
    if any(_holds_forgotten(page, row) for page in scan.pages):
        return True
    rows = sum(len(page.blocks) for page in scan.pages)
    sampled = 1 if size < _SMALL_BYTES else _SAMPLED
    stale = sum(_stale_rows(catalog, page, row, sampled) for page in scan.pages)
    return stale > 0 and (size < _SMALL_BYTES or rows <= stale * _STALE_SHARE)


def _holds_forgotten(page: Page, row: RecordingRow) -> bool:
    blocks = forgotten_rows(page.blocks, row.tombstones) & (page.blocks["tokens"] > 0)
    return bool(blocks.any() or forgotten_rows(page.captions, row.tombstones).any())


def _stale_rows(catalog: Catalog, page: Page, row: RecordingRow, sampled: int) -> int:
    """Rows of units without KV, and about how many hold another number of tokens than their blocks do now."""
    gone = int((page.blocks["unit"] < row.kv_from_unit).sum())
    kept = page.blocks[page.blocks["unit"] >= row.kv_from_unit]
    differing = looked_at = 0
    for number in np.unique(kept["unit"])[::sampled].tolist():
        own = kept[kept["unit"] == number]
        now = catalog.unit(row.id, number).blocks["tokens"]
        there = own[own["block"] < len(now)]
        differing += len(own) - len(there) + int((now[there["block"]] != there["tokens"]).sum())
        looked_at += len(own)
    return gone + (len(kept) * differing // looked_at if looked_at else 0)


def rebuild(store: Store, catalog: Catalog, row: RecordingRow) -> int:
    """Write the next generation from the segments, and let it count; the units in it.

    The recording's rewrite lock is held. The old file is the caller's to remove. Raises StoreFull, OSError.
    """
    generation = row.generation + 1
    path = page_path(store, row.id, generation)
    unlink(path)  # what a killed process left of it
    with PageWriter(path, row.id, reserve_bytes=UPKEEP_RESERVE_BYTES) as writer:
        sizes = KeySizes.of(row.spec.model.shape)
        units = (live_page_unit(store, unit, sizes) for unit in catalog.units(row.id, 0, row.units))
        written = write_pages(writer, units, flush=True)
    new_generation(catalog, row.id, generation)
    _log.info("%s: key pages of %d units were made anew", row.name, written)
    return written


def live_page_unit(store: Store, row: UnitRow, sizes: KeySizes) -> PageUnit:
    """What pages keep of a unit, without blocks of which nothing is left. Raises CorruptionError."""
    kept = np.flatnonzero(row.blocks["tokens"] > 0)
    unit = page_unit(store, row, sizes)
    if len(kept) == len(row.blocks):
        return unit
    keys = unit.keys[:, kept] if unit.keys is not None and len(kept) else None
    return replace(unit, blocks=row.blocks[kept], holds=unit.holds[:, kept], keys=keys, places=kept)
