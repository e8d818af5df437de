"""The representative keys of a whole recording: its pages, and the units after them from the segments."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from memdb.index.forgotten import forgotten_rows
from memdb.index.page_sizes import KeySizes, check_keys, check_vector
from memdb.index.pages import (
    PAGE_BLOCK_DTYPE,
    PAGE_CAPTION_DTYPE,
    Page,
    PageProblem,
    block_rows,
    caption_row,
    held_by,
    page_name,
    page_path,
    scan_pages,
)
from memdb.schemas.errors import CorruptionError, UsageError
from memdb.schemas.units import Table

if TYPE_CHECKING:
    from memdb.schemas.rows import RecordingRow, UnitRow
    from memdb.store import Store

CACHE_BYTES_MAX = 1 << 30
_CAPTIONS_TRIED = 16

_log = logging.getLogger(__name__)


class KeyTable:
    """All blocks and captions of a recording, in the order of its units, whatever the lag of its pages.

    Opening reads the tables of the pages and the catalog rows of the tail; keys and vectors are read when
    they are asked for. Damaged keys in a page are taken from the segments; damaged ones there are zero and
    count as held by no layer. `problems` names both. A refresh only ever adds rows at the end of `blocks`,
    unless the pages were made anew: then `generation` is another one.

    What is forgotten keeps its row, of 0 tokens, and no layer holds it: pages have it still, until they are made
    anew. Its caption has 0 tokens and a zero vector, or no row any more.
    """

    def __init__(self, store: Store, recording_id: str, cache_bytes_max: int) -> None:
        self._store = store
        self._cache_bytes_max = cache_bytes_max
        self.recording_id = recording_id
        self.generation = 0  # of the pages: with another one all rows are others
        self.problems: list[PageProblem] = []
        self.blocks: Table = np.zeros(0, PAGE_BLOCK_DTYPE)
        self.captions: Table = np.zeros(0, PAGE_CAPTION_DTYPE)
        self.captions_gone = np.zeros(0, bool)  # (captions,): those that are forgotten
        self._blocks_gone = np.zeros(0, bool)  # (n,)
        self._fd = -1
        self._pages: list[Page] = []
        self._starts = np.zeros(
            1, np.int64
        )  # the row of `blocks` with which each page begins, and the tail's
        self._tail: list[UnitRow] = []
        self._tail_keys: dict[int, npt.NDArray[np.float16]] = {}  # unit -> (L, blocks, H*D)
        self._lost: dict[int, set[int]] = {}  # unit -> layers whose keys no file holds whole any more
        self._layers: OrderedDict[int, npt.NDArray[np.float16]] = OrderedDict()
        self._vector_size = 0  # E, 0 while it is not known
        self._vectors: npt.NDArray[np.float32] | None = None
        self._vectors_of: npt.NDArray[np.int64] | None = None  # see _vector_rows
        self.refresh()

    @classmethod
    def open(cls, store: Store, recording_id: str, *, cache_bytes_max: int = CACHE_BYTES_MAX) -> Self:
        return cls(store, recording_id, cache_bytes_max)

    def refresh(self) -> bool:
        """See units and pages that were committed since. True where there are new rows."""
        before = len(self.blocks), len(self.captions)
        row = self._store.recording_by_id(self.recording_id)
        self._sizes, generation = KeySizes.of(row.spec.model.shape), row.generation
        if generation != self.generation:
            self._start_over(generation)
        self._refresh_pages()
        next_unit = self._last_paged_unit + 1
        # Asked after the pages were scanned, so that what lies in neither is newer than this refresh.
        self._tail = self._store.units(self.recording_id, first=next_unit)
        wanted = {row.number for row in self._tail}
        self._tail_keys = {number: keys for number, keys in self._tail_keys.items() if number in wanted}
        self._build_tables()
        self._mask_forgotten()
        return (len(self.blocks), len(self.captions)) > before

    def _refresh_pages(self) -> None:
        path = page_path(self._store, self.recording_id, self.generation)
        end = self._pages[-1].end if self._pages else 0
        try:
            status = os.stat(path)
        except FileNotFoundError:
            self._drop_pages()
            return
        if self._fd >= 0:
            known = os.fstat(self._fd)
            if (known.st_ino, known.st_dev) != (status.st_ino, status.st_dev) or status.st_size < end:
                self._drop_pages()  # made anew by a writer: the rows stay the same, their places do not
        if self._fd < 0:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            end = 0
        before = self._pages[-1] if self._pages else None
        scan = scan_pages(self._fd, self.recording_id, sizes=self._sizes, offset=end, before=before)
        # Asked after the pages were scanned: one beyond that belongs to a later moment than this look at the store.
        units = self._store.recording_by_id(self.recording_id).units
        self._pages += [page for page in scan.pages if page.header.last_unit < units]
        if scan.problem and scan.problem not in self.problems:
            self._report(scan.problem)

    @property
    def _last_paged_unit(self) -> int:
        return self._pages[-1].header.last_unit if self._pages else -1

    def _drop_pages(self) -> None:
        self._pages = []
        self.close()

    def _start_over(self, generation: int) -> None:
        """Pages were made anew with other rows: nothing that is known of rows holds any more."""
        self._drop_pages()
        self.generation = generation
        self._lost.clear()
        self._layers.clear()
        self._vectors = self._vectors_of = None

    def _build_tables(self) -> None:
        blocks = [page.blocks for page in self._pages]
        captions = [page.captions for page in self._pages]
        for row in self._tail:
            blocks.append(block_rows(row.number, row.blocks))
            if row.has_caption:
                captions.append(caption_row(row.number, row.caption_tokens or 0, row.start_ns, row.end_ns))
        self._starts = np.cumsum([0, *(len(page.blocks) for page in self._pages)], dtype=np.int64)
        self.blocks = np.concatenate([np.zeros(0, PAGE_BLOCK_DTYPE), *blocks])
        self.captions = np.concatenate([np.zeros(0, PAGE_CAPTION_DTYPE), *captions])

    def _mask_forgotten(self) -> None:
        """Asked after pages and tail were read: what was forgotten by then has no tokens, whoever held it."""
        row = self._store.recording_by_id(self.recording_id)
        before = self._vectors_of
        gone = forgotten_rows(self.blocks, row.tombstones) | (self.blocks["unit"] < row.kv_from_unit)
        self._blocks_gone = gone | np.isin(self.blocks["unit"], self._bare(row, ~gone))
        self.captions_gone = forgotten_rows(self.captions, row.tombstones)
        self.blocks["tokens"][self._blocks_gone] = 0
        self.captions["tokens"][self.captions_gone] = 0
        if before is not None and not np.array_equal(before, self._vector_rows()):
            self._vectors = self._vectors_of = None

    def _bare(self, row: RecordingRow, left: npt.NDArray[np.bool_]) -> list[int]:
        """Units of blocks that are `left` whose KV ageing took: it goes by files, which hold units in any order."""
        held = set(np.unique(self.blocks["unit"][left & (self.blocks["tokens"] > 0)]).tolist())
        found = []
        for number in held.intersection(self._store.units_without_kv(row)):
            with suppress(
                CorruptionError
            ):  # a row that is damaged says nothing: its block is missed when it is read
                if not len(self._store.unit(row.id, number).slices):
                    found.append(number)
        return found

    def _vector_rows(self) -> npt.NDArray[np.int64]:
        """(captions,): the unit of each caption vector, -1 where it is zero because it is forgotten."""
        return np.where(self.captions_gone, -1, self.captions["unit"].astype(np.int64))

    def __len__(self) -> int:
        """Blocks, over pages and tail."""
        return len(self.blocks)

    @property
    def layers(self) -> int:
        """L; 0 where no unit holds keys."""
        return self._shape()[0]

    @property
    def key_size(self) -> int:
        """H*D; 0 where no unit holds keys."""
        return self._shape()[1]

    def _shape(self) -> tuple[int, int]:
        for page in self._pages:
            if page.header.blocks:
                return page.header.layers, page.header.key_size
        for row in self._tail:
            keys = self._segment_keys(row) if len(row.blocks) else None
            if keys is not None:
                return keys.shape[0], keys.shape[2]
        return 0, 0

    def layer_keys(self, layer: int) -> npt.NDArray[np.float16]:
        """(n, H*D): one key a row of `blocks`, verified. Kept for the next call within the byte budget."""
        known = self._layers.pop(layer, None)
        keys = self.read_rows(layer) if known is None else known
        if known is not None and len(known) < len(self):
            keys = np.concatenate([known, self.read_rows(layer, len(known))])
        if keys.nbytes <= self._cache_bytes_max:
            self._layers[layer] = keys
            while sum(kept.nbytes for kept in self._layers.values()) > self._cache_bytes_max:
                self._layers.popitem(last=False)
        keys.flags.writeable = False
        return keys

    def read_rows(
        self,
        layer: int,
        first_row: int = 0,
        last_row: int | None = None,
        out: npt.NDArray[np.float16] | None = None,
    ) -> npt.NDArray[np.float16]:
        """(rows, H*D): the keys of the rows from `first_row` to before `last_row`, verified, past the cache.

        They go into `out` where it is given. Several threads may read at the same time.
        """
        layers, key_size = self._shape()
        if not 0 <= layer < max(layers, 1):
            raise IndexError(f"layer {layer} of {layers}")
        last_row = len(self) if last_row is None else last_row
        if out is None:
            out = np.empty((last_row - first_row, key_size), np.float16)
        for page, start in zip(self._pages, self._starts[:-1].tolist(), strict=True):
            end = start + page.header.blocks
            low, high = max(start, first_row), min(end, last_row)
            if low < high:
                whole = (low, high) == (start, end)
                own = out[low - first_row : high - first_row]
                keys = own if whole else np.empty((end - start, key_size), np.float16)
                self._read_page(page, layer, keys)
                if not whole:
                    own[:] = keys[low - start : high - start]
        start = int(self._starts[-1])
        for row in self._tail:
            end = start + len(row.blocks)
            low, high = max(start, first_row), min(end, last_row)
            if low < high:
                held = self._segment_keys(row)
                if held is None and row.layers:  # a unit without keys has lost none: nothing of it is left
                    self._lost.setdefault(row.number, set()).add(layer)
                out[low - first_row : high - first_row] = (
                    0 if held is None else held[layer][low - start : high - start]
                )
            start = end
        return out

    def stretches(self, rows: int) -> list[tuple[int, int]]:
        """The rows in stretches of at least so many, whole pages each: from which row to before which."""
        found: list[tuple[int, int]] = []
        first = 0
        for end in [*self._starts[1:].tolist(), len(self)]:
            if end - first >= rows or (end == len(self) and end > first):
                found.append((first, end))
                first = end
        return found

    def prefetch(self, layer: int) -> None:
        """Ask the system to read a layer's keys in the background, for a `read_rows` that will follow."""
        for page in self._pages:
            if page.header.blocks and 0 <= layer < page.header.layers:
                offset, length = page.layer_span(layer)
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _read_page(self, page: Page, layer: int, out: npt.NDArray[np.float16]) -> None:
        if not len(out) or page.read_layer(self._fd, layer, out):
            return
        self._report(page.problem(f"the keys of layer {layer} at byte {page.offset} are damaged"))
        out[:] = 0
        missing = set(page.blocks["unit"].tolist())
        for row in self._store.units(
            self.recording_id, first=page.header.first_unit, last=page.header.last_unit
        ):
            keys = self._segment_keys(row)
            own = page.blocks["unit"] == row.number
            places = page.blocks["block"][own]
            if keys is not None and len(places) and int(places.max()) < keys.shape[1]:
                out[own] = keys[layer][places]
                missing.discard(row.number)
        for number in missing:
            self._lost.setdefault(number, set()).add(layer)

    def _segment_keys(self, row: UnitRow) -> npt.NDArray[np.float16] | None:
        """(L, blocks, H*D), kept while the unit is in the tail. None where its segment is damaged."""
        if row.number in self._tail_keys:
            return self._tail_keys[row.number]
        try:
            keys: npt.NDArray[np.float16] | None = self._store.read_keys(row)
            check_keys(row, keys, self._sizes)
        except CorruptionError as error:
            self._report(
                PageProblem(error.file, str(error), row.number, row.number, row.start_ns, row.end_ns)
            )
            return None
        if keys is not None and row.number > self._last_paged_unit:
            self._tail_keys[row.number] = keys
        return keys

    def lost_units(self, layer: int) -> int:
        """Of how many units no file holds this layer's keys whole any more, as far as they were read."""
        return sum(layer in bad for bad in list(self._lost.values()))

    def holds(self, layer: int) -> npt.NDArray[np.bool_]:
        """(n,): rows of `blocks` that `layer` holds and whose keys, as far as they were read, are whole."""
        layers, _ = self._shape()
        if not 0 <= layer < layers:
            return np.zeros(len(self), bool)
        parts = [page.holds[layer] for page in self._pages if len(page.blocks)]
        parts += [
            held_by(row.slices, layers, len(row.blocks))[layer] for row in self._tail if len(row.blocks)
        ]
        held: npt.NDArray[np.bool_] = np.concatenate([np.zeros(0, bool), *parts]) & ~self._blocks_gone
        lost = [number for number, bad in self._lost.items() if layer in bad]
        return held & ~np.isin(self.blocks["unit"], lost) if lost else held

    def span(self, start_ns: int | None = None, end_ns: int | None = None) -> npt.NDArray[np.bool_]:
        """(n,): the rows of `blocks` that overlap `[start_ns, end_ns)`."""
        return overlaps(self.blocks, start_ns, end_ns)

    def caption_vectors(self) -> npt.NDArray[np.float32]:
        """(captions, E): the vectors of `captions`, verified; zero where pages and segments are damaged."""
        if self._vectors is not None and len(self._vectors) == len(self.captions):
            return self._vectors
        size = self._vector_size = self._vector_size or self._true_vector_size()
        vectors = np.zeros((len(self.captions), size), np.float32)
        first = 0
        for page in self._pages:
            out = vectors[first : first + page.header.captions]
            first += len(out)
            if not len(out) or (page.header.vector_size == size and page.read_vectors(self._fd, out)):
                continue
            self._report(page.problem(f"the caption vectors of the page at byte {page.offset} are damaged"))
            rows = self._store.units(
                self.recording_id, first=page.header.first_unit, last=page.header.last_unit
            )
            known = {row.number: row for row in rows if row.has_caption}
            for at, number in enumerate(page.captions["unit"].tolist()):
                out[at] = self._segment_vector(known.get(number), size)
        for at, row in enumerate((row for row in self._tail if row.has_caption), first):
            vectors[at] = self._segment_vector(row, size)
        vectors[self.captions_gone] = 0
        vectors.flags.writeable = False
        self._vectors, self._vectors_of = vectors, self._vector_rows()
        return vectors

    def _true_vector_size(self) -> int:
        """E, as the first caption has it that a segment gives; 0 without captions."""
        pages = [int(page.captions["unit"][0]) for page in self._pages if len(page.captions)]
        for number in [*pages, *(row.number for row in self._tail if row.has_caption)][:_CAPTIONS_TRIED]:
            with suppress(CorruptionError, UsageError):
                row = self._store.unit(self.recording_id, number)
                if row.has_caption:
                    return len(self._store.read_caption(row).vector)
        return next((page.header.vector_size for page in self._pages if page.header.captions), 0)

    def _segment_vector(self, row: UnitRow | None, size: int) -> npt.NDArray[np.float32]:
        if row is not None:
            try:
                vector = np.asarray(self._store.read_caption(row).vector, np.float32)
                check_vector(row, vector, size)
                return vector
            except CorruptionError as error:
                self._report(
                    PageProblem(error.file, str(error), row.number, row.number, row.start_ns, row.end_ns)
                )
        return np.zeros(size, np.float32)

    def _report(self, problem: PageProblem) -> None:
        if problem not in self.problems:
            _log.warning("%s: %s", problem.file or page_name(self.recording_id), problem.what)
            self.problems.append(problem)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def overlaps(table: Table, start_ns: int | None, end_ns: int | None) -> npt.NDArray[np.bool_]:
    """Which rows overlap `[start_ns, end_ns)`. A row without length lies where its start lies."""
    mask = np.ones(len(table), bool)
    if end_ns is not None:
        mask &= table["start_ns"] < end_ns
    if start_ns is not None:
        mask &= (table["end_ns"] > start_ns) | (table["start_ns"] >= start_ns)
    return mask
