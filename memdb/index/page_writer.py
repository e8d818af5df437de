"""Writing the pages of a recording: by the recording's own writer, from its segments."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from memdb.index.pages import (
    HEADER_BYTES,
    PAGE_BLOCKS,
    PageHeader,
    PageProblem,
    PageUnit,
    block_rows,
    caption_row,
    checksum,
    damage,
    held_by,
    page_path,
    scan_pages,
)
from memdb.schemas.errors import CorruptionError, LockedError

if TYPE_CHECKING:
    from memdb.schemas.rows import UnitRow
    from memdb.store import Store

_log = logging.getLogger(__name__)


class PageWriter:
    """Appends pages to the file of one recording. Raises LockedError where another process is at it.

    Opening cuts off what is torn, unfinished or damaged at the end; with `thorough`, keys and vectors are
    read and checked as well and the file is cut before the first bad page. `dropped` says what was found.
    """

    def __init__(self, path: Path, recording_id: str, *, thorough: bool = False) -> None:
        path.parent.mkdir(exist_ok=True)
        self.recording_id = recording_id
        self.dropped: PageProblem | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock(path)
            self._open(path, thorough)
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"another process writes {path}: try again when it is done") from None

    def _open(self, path: Path, thorough: bool) -> None:
        scan = scan_pages(self._fd, self.recording_id)
        pages, self._end, self.dropped = scan.pages, scan.end, scan.problem
        if thorough:
            for index, page in enumerate(pages):
                if found := damage(self._fd, page):
                    pages, self._end, self.dropped = pages[:index], page.offset, found[0]
                    break
        self.last_unit = pages[-1].header.last_unit if pages else -1
        if self.dropped:
            _log.warning(
                "%s: %s; it is written anew from unit %d on", path, self.dropped.what, self.last_unit + 1
            )
        os.ftruncate(self._fd, self._end)

    def append(self, units: Sequence[PageUnit]) -> int:
        """Write one page of the units that are not yet in the file, in order; returns how many those were."""
        units = [unit for unit in units if unit.number > self.last_unit]
        if not units:
            return 0
        assert all(a.number < b.number for a, b in pairwise(units))
        keyed = [unit for unit in units if unit.keys is not None and len(unit.blocks)]
        vectors = _vectors(units)
        layers, _, key_size = keyed[0].keys.shape if keyed and keyed[0].keys is not None else (0, 0, 0)
        header = PageHeader(
            self.recording_id,
            self.last_unit + 1,
            units[-1].number,
            max(unit.commit_id for unit in units),
            layers,
            key_size,
            vectors.shape[1],
            sum(len(unit.blocks) for unit in keyed),
            len(vectors),
        )
        sums = self._write_keys(header, keyed)
        _write(self._fd, vectors, self._end + header.vectors_offset)
        tables = _tables(header, units, keyed, sums)
        _write(self._fd, tables, self._end + HEADER_BYTES)
        head = replace(header, tables_xxh3=checksum(tables), vectors_xxh3=checksum(vectors))
        _write(self._fd, np.frombuffer(head.pack(), np.uint8), self._end)
        self._end += head.page_bytes
        self.last_unit = head.last_unit
        return len(units)

    def _write_keys(self, header: PageHeader, keyed: list[PageUnit]) -> npt.NDArray[np.uint64]:
        sums = np.zeros(header.layers, "<u8")
        for layer in range(header.layers):
            keys = np.concatenate(
                [unit.keys[layer] for unit in keyed if unit.keys is not None]
            )  # (blocks, H*D)
            assert keys.shape == (header.blocks, header.key_size)
            sums[layer] = checksum(keys)
            _write(self._fd, keys, self._end + header.keys_offset + layer * header.layer_bytes)
        return sums

    def close(self) -> None:
        """Release the file. The writer is of no use afterwards."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def index_recording(store: Store, recording_id: str, *, flush: bool = False, thorough: bool = False) -> int:
    """Bring a recording's pages up to the store, a page for every PAGE_BLOCKS blocks (or captions).

    What is left over stays in the tail unless `flush`. Returns the units written; 0 at once where another
    process is at it. Only the writer of the recording calls it. A unit whose keys are damaged stops it
    there: from that unit on, searches read the segments.
    """
    try:
        writer = PageWriter(page_path(store, recording_id), recording_id, thorough=thorough)
    except LockedError:
        return 0
    written, waiting, entries = 0, [], 0
    with writer:
        for row in store.units(recording_id, first=writer.last_unit + 1):
            try:
                unit = page_unit(store, row)
            except CorruptionError as error:
                _log.warning("pages of %s end before unit %d: %s", recording_id, row.number, error)
                break
            waiting.append(unit)
            entries += max(len(unit.blocks), unit.vector is not None)
            if entries >= PAGE_BLOCKS:
                written += writer.append(waiting)
                waiting, entries = [], 0
        if flush:
            written += writer.append(waiting)
    return written


def page_unit(store: Store, row: UnitRow) -> PageUnit:
    """What the pages keep of a unit, read from its segment. Raises CorruptionError."""
    keys = store.read_keys(row) if len(row.blocks) else None
    if keys is None and len(row.blocks):
        # Nothing of its KV is left. Its rows stay in the page, held by no layer: rows are found by their number.
        shape = store.recording_by_id(row.recording_id).spec.model.shape
        keys = np.zeros((shape.layers, len(row.blocks), shape.kv_heads * shape.head_size), np.float16)
    layers = keys.shape[0] if keys is not None else 0
    vector = np.asarray(store.read_caption(row).vector, np.float32) if row.has_caption else None
    return PageUnit(
        row.number,
        row.commit_id,
        row.start_ns,
        row.end_ns,
        row.blocks,
        held_by(row.slices, layers, len(row.blocks)),
        keys,
        row.caption_tokens or 0,
        vector,
    )


def _vectors(units: Sequence[PageUnit]) -> npt.NDArray[np.float32]:
    vectors = [unit.vector for unit in units if unit.vector is not None]
    return np.ascontiguousarray(np.stack(vectors), "<f4") if vectors else np.zeros((0, 0), "<f4")


def _tables(
    header: PageHeader, units: Sequence[PageUnit], keyed: list[PageUnit], sums: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint8]:
    parts = [block_rows(unit.number, unit.blocks).tobytes() for unit in keyed]
    if keyed:
        parts.append(np.packbits(np.concatenate([unit.holds for unit in keyed], axis=1), axis=1).tobytes())
    captioned = [unit for unit in units if unit.vector is not None]
    parts += [caption_row(u.number, u.caption_tokens, u.start_ns, u.end_ns).tobytes() for u in captioned]
    parts.append(sums.tobytes())
    tables = np.zeros(header.tables_bytes, np.uint8)
    joined = np.frombuffer(b"".join(parts), np.uint8)
    tables[: len(joined)] = joined
    return tables


def _write(fd: int, data: npt.NDArray[np.generic], offset: int) -> None:
    view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    while view:
        put = os.pwrite(fd, view, offset)
        view, offset = view[put:], offset + put
