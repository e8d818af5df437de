"""Writing the pages of a recording: by the recording's own writer, from its segments."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from memdb.files import File, make_folder
from memdb.index.page_sizes import KeySizes, check_keys
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
from memdb.room import RESERVE_BYTES, require
from memdb.schemas.errors import CorruptionError, LockedError, StoreFull

if TYPE_CHECKING:
    from memdb.schemas.rows import UnitRow
    from memdb.store import Store

_log = logging.getLogger(__name__)
_OTHER_VECTOR = "pages of %s end early: unit %d has a vector of another size"
_PAGE_UNITS_MAX = 4096  # of units without keys or captions, which fill no page


class PageWriter:
    """Appends pages to the file of one recording. Raises LockedError where another process is at it.

    Opening cuts off what is torn, unfinished or damaged at the end; with `thorough`, keys and vectors are
    read and checked as well and the file is cut before the first bad page. `dropped` says what was found.
    """

    def __init__(
        self,
        path: Path,
        recording_id: str,
        *,
        thorough: bool = False,
        reserve_bytes: int = RESERVE_BYTES,
        sizes: KeySizes | None = None,
        unit_count: int | None = None,
    ) -> None:
        """`sizes` and `unit_count` are those of the recording: pages that do not fit them are cut off, too."""
        make_folder(path.parent)
        self.recording_id = recording_id
        self.dropped: PageProblem | None = None
        self._reserve_bytes = reserve_bytes
        self._sizes, self._unit_count = sizes, unit_count
        self._file = File(path, new=False)
        try:
            self._lock(path)
            self._open(path, thorough)
        except BaseException:
            self._file.close()
            raise

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"another process writes {path}: try again when it is done") from None

    def _open(self, path: Path, thorough: bool) -> None:
        scan = scan_pages(self._file.fd, self.recording_id, sizes=self._sizes)
        pages, self._end, self.dropped = scan.pages, scan.end, scan.problem
        for index, page in enumerate(pages):
            if self._unit_count is not None and page.header.last_unit >= self._unit_count:
                problem = page.problem(f"the page at byte {page.offset} holds units that are not there")
                pages, self._end, self.dropped = pages[:index], page.offset, problem
                break
        if thorough:
            for index, page in enumerate(pages):
                if found := damage(self._file.fd, page):
                    pages, self._end, self.dropped = pages[:index], page.offset, found[0]
                    break
        self.last_unit = pages[-1].header.last_unit if pages else -1
        sized = [page.header.vector_size for page in pages if page.header.captions]
        self.vector_size = sized[0] if sized else None
        if self.dropped:
            _log.warning(
                "%s: %s; it is written anew from unit %d on", path, self.dropped.what, self.last_unit + 1
            )
        if os.fstat(self._file.fd).st_size > self._end:
            self._file.truncate(self._end)

    def append(self, units: Sequence[PageUnit]) -> int:
        """Write one page of the units that are not yet in the file, in order; returns how many those were.

        Raises StoreFull where the disk has no room for it, before a byte is written.
        """
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
        require(
            self._file.path.parent, header.page_bytes, reserve_bytes=self._reserve_bytes, what="key pages"
        )
        sums = self._write_keys(header, keyed)
        self._write(vectors, self._end + header.vectors_offset)
        tables = _tables(header, units, keyed, sums)
        self._write(tables, self._end + HEADER_BYTES)
        head = replace(header, tables_xxh3=checksum(tables), vectors_xxh3=checksum(vectors))
        self._write(np.frombuffer(head.pack(), np.uint8), self._end)
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
            self._write(keys, self._end + header.keys_offset + layer * header.layer_bytes)
        return sums

    def _write(self, data: npt.NDArray[np.generic], offset: int) -> None:
        self._file.write([np.ascontiguousarray(data).reshape(-1).view(np.uint8).data], offset)

    def close(self) -> None:
        """Release the file. The writer is of no use afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def index_recording(store: Store, recording_id: str, *, flush: bool = False, thorough: bool = False) -> int:
    """Bring a recording's pages up to the store, a page for every PAGE_BLOCKS blocks (or captions).

    What is left over stays in the tail unless `flush`. Returns the units written; 0 at once where another
    process is at it. Only the writer of the recording calls it. A unit whose keys are damaged stops it
    there, as does a disk without room: from that unit on, searches read the segments.
    """
    try:
        row = store.recording_by_id(recording_id)
        sizes = KeySizes.of(row.spec.model.shape)
        with PageWriter(
            page_path(store, recording_id, row.generation),
            recording_id,
            thorough=thorough,
            sizes=sizes,
            unit_count=row.units,
        ) as writer:
            rows = store.units(recording_id, first=writer.last_unit + 1)
            return write_pages(writer, (page_unit(store, row, sizes) for row in rows), flush=flush)
    except LockedError:
        return 0
    except (StoreFull, OSError) as error:
        _log.warning("%s: its key pages wait: %s", recording_id, error)
        return 0


def write_pages(writer: PageWriter, units: Iterator[PageUnit], *, flush: bool) -> int:
    """Write units page by page; how many. What is left over for a full page waits, unless `flush`."""
    written, waiting, entries = 0, list[PageUnit](), 0
    while True:
        try:
            unit = next(units, None)
        except CorruptionError as error:
            _log.warning("pages of %s end early: %s", writer.recording_id, error)
            unit = None
        vector = unit.vector if unit is not None else None
        if unit is not None and vector is not None:
            if writer.vector_size not in (None, len(vector)):
                _log.warning(_OTHER_VECTOR, writer.recording_id, unit.number)
                unit = None
            else:
                writer.vector_size = len(vector)
        if unit is None:
            return written + (writer.append(waiting) if flush else 0)
        waiting.append(unit)
        entries += max(len(unit.blocks), unit.vector is not None)
        if entries >= PAGE_BLOCKS or len(waiting) >= _PAGE_UNITS_MAX:
            written += writer.append(waiting)
            waiting, entries = [], 0


def page_unit(store: Store, row: UnitRow, sizes: KeySizes) -> PageUnit:
    """What the pages keep of a unit, read from its segment. `sizes`: of its recording. Raises CorruptionError."""
    keys = store.read_keys(row) if len(row.blocks) else None
    check_keys(row, keys, sizes)
    if keys is None and len(row.blocks):
        # Nothing of its KV is left. Its rows stay in the page, held by no layer: rows are found by their number.
        keys = np.zeros((sizes.layers, len(row.blocks), sizes.key_size), np.float16)
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
    parts = [block_rows(unit.number, unit.blocks, unit.places).tobytes() for unit in keyed]
    if keyed:
        parts.append(np.packbits(np.concatenate([unit.holds for unit in keyed], axis=1), axis=1).tobytes())
    captioned = [unit for unit in units if unit.vector is not None]
    parts += [caption_row(u.number, u.caption_tokens, u.start_ns, u.end_ns).tobytes() for u in captioned]
    parts.append(sums.tobytes())
    tables = np.zeros(header.tables_bytes, np.uint8)
    joined = np.frombuffer(b"".join(parts), np.uint8)
    tables[: len(joined)] = joined
    return tables
