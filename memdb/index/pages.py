"""Pages of representative keys: one append-only file a recording, derived from its segments.

A page holds the keys and caption vectors of a run of units. Keys lie layer by layer, so that a question that
asks for one layer reads one run a page:

    header   128 bytes: magic, recording, units, sizes, checksums; the last 8 bytes are its own xxh3
    tables   a row a block, the layers that hold each block as bits, a row a caption, an xxh3 a layer; zero
    padding keys     [L][blocks][H*D] fp16
    vectors  [captions][E] fp32

Everything can be made again from the segments, so nothing is synced. The header is written last: a page whose
header is zero was never finished. A page that is torn or damaged ends what counts as indexed; readers take
the units after it from the segments, and the next writer cuts it off and writes it anew.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from memdb.index.page_sizes import KeySizes, are_its_own, can_be
from memdb.schemas.units import SLICE_DTYPE, Table

if TYPE_CHECKING:
    from memdb.store import Store

PAGE_BLOCKS = 256  # a page is written once so many blocks (or captions) wait for it
FOLDER = "keys"

_MAGIC = b"MDBPAGE1"
_HEADER = struct.Struct("<8s16sQQQIIIIIIQQQ24x")
HEADER_BYTES = _HEADER.size + 8
_ALIGN_BYTES = 64
PAGE_BLOCK_DTYPE = np.dtype(
    [
        ("unit", "<u8"),
        ("block", "<u4"),
        ("kind", "<u2"),
        ("tokens", "<u4"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
    ]
)
PAGE_CAPTION_DTYPE = np.dtype([("unit", "<u8"), ("tokens", "<u4"), ("start_ns", "<i8"), ("end_ns", "<i8")])


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageProblem:
    """Something wrong in a pages file. Nothing is lost by it: the segments hold the same."""

    file: str  # relative to the store
    what: str
    first_unit: int  # of the stretch that it touches
    last_unit: int | None = None  # None: all that follow
    start_ns: int | None = None  # of the stretch, where the page's tables are whole
    end_ns: int | None = None


@dataclass(frozen=True, eq=False)
class PageUnit:
    """What a page keeps of one unit."""

    number: int
    commit_id: int
    start_ns: int
    end_ns: int
    blocks: Table  # (blocks,) BLOCK_DTYPE
    holds: npt.NDArray[np.bool_]  # (L, blocks): the layers that hold each block
    keys: npt.NDArray[np.float16] | None  # (L, blocks, H*D), None without KV
    caption_tokens: int
    vector: npt.NDArray[np.float32] | None  # (E,), None without a caption
    places: npt.NDArray[np.intp] | None = None  # (blocks,): their numbers in the unit, None: 0, 1, ...


@dataclass(frozen=True)
class PageHeader:
    recording_id: str
    first_unit: int
    last_unit: int
    last_commit: int
    layers: int  # L
    key_size: int  # H*D
    vector_size: int  # E
    blocks: int
    captions: int
    tables_xxh3: int = 0
    vectors_xxh3: int = 0

    @property
    def tables_bytes(self) -> int:
        tables = self.blocks * PAGE_BLOCK_DTYPE.itemsize + self.layers * -(-self.blocks // 8)
        tables += self.captions * PAGE_CAPTION_DTYPE.itemsize + self.layers * 8
        return -(-tables // _ALIGN_BYTES) * _ALIGN_BYTES

    @property
    def layer_bytes(self) -> int:
        return self.blocks * self.key_size * 2

    @property
    def keys_offset(self) -> int:
        return HEADER_BYTES + self.tables_bytes

    @property
    def vectors_offset(self) -> int:
        return self.keys_offset + self.layers * self.layer_bytes

    @property
    def page_bytes(self) -> int:
        return self.vectors_offset + self.captions * self.vector_size * 4

    def pack(self) -> bytes:
        head = _HEADER.pack(
            _MAGIC,
            bytes.fromhex(self.recording_id),
            self.first_unit,
            self.last_unit,
            self.last_commit,
            self.layers,
            self.key_size,
            self.vector_size,
            self.blocks,
            self.captions,
            0,
            self.page_bytes,
            self.tables_xxh3,
            self.vectors_xxh3,
        )
        return head + xxh3_64_intdigest(head).to_bytes(8, "little")

    @classmethod
    def unpack(cls, raw: bytes) -> PageHeader | None:
        """None where the bytes are no whole header."""
        if len(raw) != HEADER_BYTES or not raw.startswith(_MAGIC):
            return None
        head = raw[: _HEADER.size]
        if xxh3_64_intdigest(head) != int.from_bytes(raw[_HEADER.size :], "little"):
            return None
        fields = _HEADER.unpack(head)
        _, recording, first, last, commit, layers, key, vector, blocks, captions, _, size, tables, vectors = (
            fields
        )
        header = cls(
            recording.hex(), first, last, commit, layers, key, vector, blocks, captions, tables, vectors
        )
        return header if header.page_bytes == size else None


@dataclass(frozen=True, eq=False)
class Page:
    """A page whose header and tables were found whole; keys and vectors are checked when they are read."""

    offset: int
    header: PageHeader
    blocks: Table  # (blocks,) PAGE_BLOCK_DTYPE
    holds: npt.NDArray[np.bool_]  # (L, blocks)
    captions: Table  # (captions,) PAGE_CAPTION_DTYPE
    layer_xxh3: npt.NDArray[np.uint64]  # (L,)

    @property
    def end(self) -> int:
        return self.offset + self.header.page_bytes

    def layer_span(self, layer: int) -> tuple[int, int]:
        """Where a layer's keys lie in the file: offset and length in bytes."""
        return (
            self.offset + self.header.keys_offset + layer * self.header.layer_bytes,
            self.header.layer_bytes,
        )

    def read_layer(self, fd: int, layer: int, out: npt.NDArray[np.float16]) -> bool:
        """Fill `out` (blocks, H*D), C-contiguous, with the keys of a layer. False where they are damaged."""
        offset, _ = self.layer_span(layer)
        return read_into(fd, out, offset) and checksum(out) == int(self.layer_xxh3[layer])

    def read_vectors(self, fd: int, out: npt.NDArray[np.float32]) -> bool:
        """Fill `out` (captions, E) with the caption vectors. False where they are damaged."""
        offset = self.offset + self.header.vectors_offset
        return read_into(fd, out, offset) and checksum(out) == self.header.vectors_xxh3

    def problem(self, what: str) -> PageProblem:
        times = [table[name] for table in (self.blocks, self.captions) for name in ("start_ns", "end_ns")]
        joined = np.concatenate(times)
        start_ns, end_ns = (int(joined.min()), int(joined.max())) if len(joined) else (None, None)
        first, last = self.header.first_unit, self.header.last_unit
        return PageProblem(page_name(self.header.recording_id), what, first, last, start_ns, end_ns)


@dataclass(frozen=True)
class Scan:
    """The whole pages from some offset on, where they end, and what ended them before the file does."""

    pages: list[Page]
    end: int
    problem: PageProblem | None


def page_name(recording_id: str, generation: int = 0) -> str:
    """The file of a recording's pages, relative to the store.

    A generation is pages that were made anew without what was forgotten: with other rows, in another file.
    """
    assert len(recording_id) == 32
    assert not set(recording_id) - set("0123456789abcdef"), recording_id
    return f"{FOLDER}/{recording_id}{f'-{generation}' if generation else ''}.pages"


def page_path(store: Store, recording_id: str, generation: int | None = None) -> Path:
    """The file itself: of the generation that counts, unless one is named."""
    if generation is None:
        generation = store.recording_by_id(recording_id).generation
    return Path(store.path) / page_name(recording_id, generation)


def checksum(array: npt.NDArray[np.generic]) -> int:
    """xxh3 of a C-contiguous array's bytes."""
    return int(xxh3_64_intdigest(array.data))


def read_into(fd: int, out: npt.NDArray[np.generic], offset: int) -> bool:
    """Fill a C-contiguous array from a file. False where the file ends before it is full."""
    view = out.reshape(-1).view(np.uint8).data
    while view:
        got = os.preadv(fd, [view], offset)
        if got == 0:
            return False
        view, offset = view[got:], offset + got
    return True


def scan_pages(
    fd: int, recording_id: str, *, sizes: KeySizes | None = None, offset: int = 0, before: Page | None = None
) -> Scan:
    """Read headers and tables from `offset` on, where the page that follows `before` is expected.

    A checksum tells that a page is what was written, and not that it makes sense: what does not fit `sizes`, its
    file or itself is refused before anything is allocated by it.
    """
    pages: list[Page] = []
    next_unit = before.header.last_unit + 1 if before is not None else 0
    vector_size = before.header.vector_size if before is not None and before.header.captions else None
    file_bytes = os.fstat(fd).st_size
    while offset < file_bytes:
        raw = os.pread(fd, HEADER_BYTES, offset)
        if not any(raw):
            break  # being written, or its writer was killed: no damage
        page = _read_page(fd, raw, offset, file_bytes, sizes)
        if isinstance(page, str):
            return Scan(pages, offset, PageProblem(page_name(recording_id), page, next_unit))
        if page.header.recording_id != recording_id or page.header.first_unit != next_unit:
            what = f"the page at byte {offset} does not follow: it belongs elsewhere"
            return Scan(pages, offset, PageProblem(page_name(recording_id), what, next_unit))
        if page.header.captions:
            if vector_size not in (None, page.header.vector_size):
                what = f"the page at byte {offset} holds vectors of another size than those before it"
                return Scan(pages, offset, PageProblem(page_name(recording_id), what, next_unit))
            vector_size = page.header.vector_size
        pages.append(page)
        offset, next_unit = page.end, page.header.last_unit + 1
    return Scan(pages, offset, None)


def _read_page(fd: int, raw: bytes, offset: int, file_bytes: int, sizes: KeySizes | None) -> Page | str:
    header = PageHeader.unpack(raw)
    if header is None:
        return f"the page header at byte {offset} is damaged or cut off"
    if offset + header.page_bytes > file_bytes:
        return f"the page at byte {offset} is cut off"
    if not can_be(header, sizes):
        return f"the page at byte {offset} has sizes that no page of this recording has"
    tables = np.empty(header.tables_bytes, np.uint8)
    whole = read_into(fd, tables, offset + HEADER_BYTES)
    if not whole or checksum(tables) != header.tables_xxh3:
        return f"the tables of the page at byte {offset} are damaged"
    layers, blocks = header.layers, header.blocks
    parts = (
        blocks * PAGE_BLOCK_DTYPE.itemsize,
        layers * -(-blocks // 8),
        header.captions * PAGE_CAPTION_DTYPE.itemsize,
    )
    block_rows, bits, caption_rows, rest = np.split(tables, np.cumsum(parts))
    holds = np.unpackbits(bits.reshape(layers, -(-blocks // 8)), axis=1, count=blocks).astype(bool)
    page = Page(
        offset,
        header,
        block_rows.view(PAGE_BLOCK_DTYPE),
        holds,
        caption_rows.view(PAGE_CAPTION_DTYPE),
        np.frombuffer(rest[: layers * 8].tobytes(), "<u8"),
    )
    if not are_its_own(page):
        return f"the tables of the page at byte {offset} speak of units that it does not have"
    return page


def verify_pages(
    path: Path, sizes: KeySizes | None = None, unit_count: Callable[[], int] | None = None
) -> list[PageProblem]:
    """Read every byte of a pages file and say what is wrong. An unfinished last page is not wrong.

    `unit_count`: how many units its recording has, asked once the pages are read, for they grow with it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        scan = scan_pages(fd, path.name[:32], sizes=sizes)
        problems = [problem for page in scan.pages for problem in damage(fd, page)]
    finally:
        os.close(fd)
    problems += [scan.problem] if scan.problem else []
    if scan.pages and unit_count is not None and scan.pages[-1].header.last_unit >= unit_count():
        problems.append(scan.pages[-1].problem("the last page holds units that its recording does not have"))
    return [replace(problem, file=f"{FOLDER}/{path.name}") for problem in problems]


def damage(fd: int, page: Page) -> list[PageProblem]:
    header = page.header
    keys = np.empty((header.blocks, header.key_size), np.float16)
    bad = [layer for layer in range(header.layers) if not page.read_layer(fd, layer, keys)]
    problems = [page.problem(f"the keys of layer {layer} at byte {page.offset} are damaged") for layer in bad]
    if not page.read_vectors(fd, np.empty((header.captions, header.vector_size), np.float32)):
        problems.append(page.problem(f"the caption vectors of the page at byte {page.offset} are damaged"))
    return problems


def held_by(slices: Table, layers: int, blocks: int) -> npt.NDArray[np.bool_]:
    """(L, blocks): which layers hold which blocks, from the slices that exist."""
    assert slices.dtype == SLICE_DTYPE
    holds = np.zeros((layers, blocks), bool)
    if layers:
        held = slices[
            (slices["layer"] < layers) & (slices["block"] < blocks)
        ]  # a hostile unit may name others
        holds[held["layer"], held["block"]] = True
    return holds


def block_rows(unit: int, blocks: Table, places: npt.NDArray[np.intp] | None = None) -> Table:
    """A unit's blocks as rows of PAGE_BLOCK_DTYPE; `places` are their numbers in it, by default 0, 1, ..."""
    rows = np.zeros(len(blocks), PAGE_BLOCK_DTYPE)
    rows["unit"], rows["block"] = unit, np.arange(len(blocks)) if places is None else places
    for name in ("kind", "tokens", "start_ns", "end_ns"):
        rows[name] = blocks[name]
    return rows


def caption_row(unit: int, tokens: int, start_ns: int, end_ns: int) -> Table:
    return np.array([(unit, tokens, start_ns, end_ns)], PAGE_CAPTION_DTYPE)
