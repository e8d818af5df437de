"""Key pages whose checksums are right and whose sizes or rows cannot be: refused, reported, and no answer differs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from memdb.index.key_table import KeyTable
from memdb.index.page_sizes import KeySizes
from memdb.index.page_writer import index_recording
from memdb.index.pages import (
    _HEADER,
    HEADER_BYTES,
    PAGE_BLOCK_DTYPE,
    PAGE_CAPTION_DTYPE,
    PageHeader,
    page_path,
    verify_pages,
)
from tests.fake_store import RECORDING, FakeStore

L, HD, E, UNITS, BLOCKS = 2, 6, 5, 8, 3
SIZES = KeySizes(L, HD)
NUMBERS = (
    0,
    1,
    3,
    255,
    1 << 16,
    1 << 24,
    (1 << 32) - 1,
    1 << 40,
    (1 << 62) - 1,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
FIELDS = ("first_unit", "last_unit", "layers", "key_size", "vector_size", "blocks", "captions")


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    store, random = FakeStore(tmp_path), np.random.default_rng(5)
    for _ in range(UNITS):
        keys = random.standard_normal((L, BLOCKS, HD)).astype(np.float16)
        store.add(keys=keys, text="a red star", vector=random.standard_normal(E).astype(np.float32))
    assert index_recording(store, RECORDING, flush=True) == UNITS  # type: ignore[arg-type]
    return store


def page(store: FakeStore) -> tuple[Path, PageHeader, bytes]:
    path = page_path(store, RECORDING)  # type: ignore[arg-type]
    data = path.read_bytes()
    header = PageHeader.unpack(data[:HEADER_BYTES])
    assert header is not None
    return path, header, data[HEADER_BYTES:]


def problems(path: Path) -> list[str]:
    return [problem.what for problem in verify_pages(path, SIZES, lambda: UNITS)]


def expect_all(store: FakeStore) -> None:
    """What is asked of the table is what the units hold."""
    with KeyTable.open(store, RECORDING) as table:  # type: ignore[arg-type]
        rows = store.rows_of(RECORDING)
        assert table.blocks["unit"].tolist() == [row.number for row in rows for _ in range(BLOCKS)]
        for layer in range(L):
            truth = np.concatenate([store.keys[RECORDING, row.number][layer] for row in rows])
            assert np.array_equal(table.layer_keys(layer), truth)
            assert table.holds(layer).all()
        vectors = np.stack([np.asarray(store.captions[RECORDING, row.number].vector) for row in rows])
        assert np.array_equal(table.caption_vectors(), vectors)


def sealed(header: PageHeader, tables: bytes) -> bytes:
    """A header with the checksum of these tables."""
    fields = list(_HEADER.unpack(header.pack()[: _HEADER.size]))
    fields[11:13] = [header.page_bytes % (1 << 64), xxh3_64_intdigest(tables)]
    head = _HEADER.pack(*fields)
    return head + xxh3_64_intdigest(head).to_bytes(8, "little")


def absurd(header: PageHeader) -> Iterator[PageHeader]:
    for name in FIELDS:
        for number in NUMBERS:
            changed = PageHeader(**(vars(header) | {name: number}))
            try:
                changed.pack()
            except struct.error:
                continue  # the field has no room for it
            if number != getattr(header, name):
                yield changed


def test_no_size_in_a_header_is_believed(store: FakeStore) -> None:
    path, header, rest = page(store)
    assert problems(path) == []
    tried = 0
    for changed in absurd(header):
        if changed.page_bytes > 1 << 26:
            data = changed.pack() + rest
        else:  # it is as long as it says, and its tables are under their checksum
            body = rest.ljust(changed.page_bytes - HEADER_BYTES, b"\0")
            data = sealed(changed, body[: changed.tables_bytes]) + body
        path.write_bytes(data)
        assert problems(path), changed
        if changed.blocks < header.blocks or changed.captions < header.captions:
            with KeyTable.open(store, RECORDING) as table:  # type: ignore[arg-type]
                table.layer_keys(0)  # a smaller page is a page: only verify reads what is behind it
                table.caption_vectors()
        else:
            expect_all(store)
        tried += 1
    assert tried > 40


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("blocks", "unit", UNITS),
        ("blocks", "unit", 1 << 63),
        ("blocks", "block", 1 << 16),
        ("captions", "unit", 1 << 40),
        ("captions", "unit", 0),
    ],
)
def test_no_row_of_another_unit_is_believed(store: FakeStore, table: str, column: str, value: int) -> None:
    path, header, rest = page(store)
    tables = bytearray(rest[: header.tables_bytes])
    at = header.blocks * PAGE_BLOCK_DTYPE.itemsize
    offset = 0 if table == "blocks" else at + header.layers * -(-header.blocks // 8)
    dtype, count = (
        (PAGE_BLOCK_DTYPE, header.blocks) if table == "blocks" else (PAGE_CAPTION_DTYPE, header.captions)
    )
    rows: Any = np.frombuffer(tables, dtype, count, offset)
    rows[column][-1] = value
    path.write_bytes(sealed(header, bytes(tables)) + bytes(tables) + rest[header.tables_bytes :])
    assert any("speak of units" in what for what in problems(path))
    expect_all(store)


def test_a_page_beyond_its_recording_waits_for_it_and_is_cut_off_by_a_writer(store: FakeStore) -> None:
    """A reader may look at the store before, and at the pages after a commit."""
    path, _, _ = page(store)
    last = store.rows.pop()
    keys, said = store.keys.pop((RECORDING, last.number)), store.captions.pop((RECORDING, last.number))
    expect_all(store)
    assert [problem.what for problem in verify_pages(path, SIZES, lambda: UNITS - 1)] == [
        "the last page holds units that its recording does not have"
    ]
    store.rows.append(last)
    store.keys[RECORDING, last.number], store.captions[RECORDING, last.number] = keys, said
    expect_all(store)
    store.rows.pop()
    assert index_recording(store, RECORDING, flush=True) == UNITS - 1  # type: ignore[arg-type]
    expect_all(store)


@pytest.mark.parametrize("what", ["layers", "key size", "vector"])
def test_a_unit_of_other_sizes_than_the_model_is_left_out_and_named(store: FakeStore, what: str) -> None:
    shape = {"layers": (L + 1, BLOCKS, HD), "key size": (L, BLOCKS, HD + 1)}.get(what, (L, BLOCKS, HD))
    vector = np.ones(E + 1 if what == "vector" else E, np.float32)
    store.add(keys=np.ones(shape, np.float16), text="odd", vector=vector)
    assert index_recording(store, RECORDING, flush=True) == 0, "pages end before it"  # type: ignore[arg-type]
    with KeyTable.open(store, RECORDING) as table:  # type: ignore[arg-type]
        keys, vectors = table.layer_keys(0), table.caption_vectors()
        assert len(keys) == (UNITS + 1) * BLOCKS
        assert vectors.shape == (UNITS + 1, E)
        assert np.array_equal(vectors[:UNITS], [store.captions[RECORDING, n].vector for n in range(UNITS)])
        assert [problem.first_unit for problem in table.problems] == [UNITS]
        assert not (vectors[UNITS] if what == "vector" else keys[UNITS * BLOCKS :]).any()
        assert table.holds(0)[: UNITS * BLOCKS].all()
        assert table.holds(0)[UNITS * BLOCKS :].any() == (what == "vector")
