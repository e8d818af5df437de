"""Reading slices: the order asked for, no copies, and damage as an answer."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memdb.reader
from memdb.reader import SliceReader
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.store import Store
from tests.store_cases import LAYERS, fill, flip, new_store, pack, raw_slices, spec, unit

UNITS = 6


@pytest.fixture(scope="module", params=["int4", "raw"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Six units; int4 is stored as it is, raw compresses."""
    with new_store(tmp_path_factory.mktemp("store")) as store:
        fill(store, UNITS, codec=request.param)
        yield store


def rows_of(store: Store) -> list[UnitRow]:
    return store.units(store.recording("lobby").id)


def codec_of(store: Store) -> str:
    return store.recording("lobby").spec.recipe.codec


every = np.arange(2 * LAYERS)


def expected(store: Store, wanted: Sequence[tuple[UnitRow, np.ndarray]]) -> np.ndarray:  # type: ignore[type-arg]
    raw = [raw_slices(row.number, 2, codec_of(store))[index] for row, indices in wanted for index in indices]
    return np.stack(raw) if raw else np.zeros((0, 0), np.uint8)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, UNITS - 1), st.lists(st.integers(0, 2 * LAYERS - 1), max_size=5)), max_size=6
    )
)
def test_slices_come_in_the_order_asked_for(store: Store, asked: list[tuple[int, list[int]]]) -> None:
    rows = rows_of(store)
    wanted = [(rows[number], np.array(indices, np.intp)) for number, indices in asked]
    with SliceReader(store, threads=2) as reader:
        batch = reader.read(wanted)
        assert batch.bad == []
        assert np.array_equal(batch.stacked(), expected(store, wanted))
        for index, raw in enumerate(expected(store, wanted)):
            assert np.array_equal(batch.raw(index), raw)


def test_stacked_is_a_view_of_the_reused_buffer(store: Store) -> None:
    rows = rows_of(store)
    with SliceReader(store) as reader:
        first = reader.read([(row, every) for row in rows])
        assert np.shares_memory(first.stacked(), first.buffer)
        assert np.array_equal(first.stacked(4, 8), expected(store, [(rows[1], every)]))
        second = reader.read([(rows[0], every)])
        assert second.buffer is first.buffer
        assert second.buffer.ctypes.data % 64 == 0


def test_slices_side_by_side_are_read_by_one_call(store: Store) -> None:
    calls: list[int] = []

    def counted(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return os.preadv(fd, buffers, offset)

    row = rows_of(store)[2]
    with SliceReader(store, preadv=counted) as reader:
        batch = reader.read([(row, every[::-1])])
        assert np.array_equal(batch.stacked(), expected(store, [(row, every[::-1])]))
        assert len(calls) == 1
        reader.read([(row, every[[0, 2]])])
        assert len(calls) == 3
    assert batch.bytes_read >= int(row.slices["stored_bytes"].sum())


def test_short_reads_are_gone_on_with(store: Store) -> None:
    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, [buffers[0][:7]], offset)

    wanted = [(row, every) for row in rows_of(store)]
    with SliceReader(store, preadv=short) as reader:
        batch = reader.read(wanted)
        assert batch.bad == []
        assert np.array_equal(batch.stacked(), expected(store, wanted))


def test_an_error_of_one_sector_costs_one_slice(store: Store) -> None:
    row = rows_of(store)[1]
    lost = row.payload_offset + int(row.slices["offset"][2])

    def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= lost < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "Input/output error")
        return os.preadv(fd, buffers, offset)

    with SliceReader(store, preadv=failing) as reader:
        batch = reader.read([(row, every)])
        assert [(bad.index, bad.unit, bad.layer, bad.block) for bad in batch.bad] == [(2, 1, 1, 0)]
        assert "Input/output" in batch.bad[0].reason
        assert batch.whole.tolist() == [True, True, False, True]
        good = expected(store, [(row, every)])
        good[2] = 0
        assert np.array_equal(batch.stacked(), good)
        with pytest.raises(CorruptionError):
            batch.raw(2)


def test_a_reader_can_be_slowed_down(store: Store) -> None:
    with SliceReader(store, delay_s=0.02) as reader:
        began_s = time.perf_counter()
        batch = reader.read([(rows_of(store)[0], every)])
        assert time.perf_counter() - began_s >= 0.02
        assert batch.read_s >= 0.02


def test_the_buffer_can_be_given(store: Store) -> None:
    given_buffers: list[np.ndarray] = []  # type: ignore[type-arg]

    def allocate(size: int) -> np.ndarray:  # type: ignore[type-arg]
        given_buffers.append(np.full(size + 100, 7, np.uint8))
        return given_buffers[-1]

    wanted = [(rows_of(store)[0], every)]
    with SliceReader(store, allocate=allocate) as reader:
        batch = reader.read(wanted)
        assert batch.buffer is given_buffers[0]
        assert np.array_equal(batch.stacked(), expected(store, wanted))


def test_slices_of_different_sizes_are_read_but_not_stacked(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        raw = [*raw_slices(0, 1, "int4"), *raw_slices(1, 1, "int4", raw_bytes=100)]
        made = unit(0)
        kv = pack(raw, 2, "int4")
        with store.writer(spec()) as writer:
            writer.append(
                [type(made)(0, made.start_ns, made.end_ns, 0, made.blocks, kv, made.keys, None, None)]
            )
        with SliceReader(store) as reader:
            batch = reader.read([(rows_of(store)[0], every)])
            assert [batch.raw(index).tobytes() for index in range(4)] == [data.tobytes() for data in raw]
            with pytest.raises(ValueError, match="sizes"):
                batch.stacked()
            assert batch.stacked(2, 4).shape == (2, 100)


@pytest.mark.parametrize("codec", ["int4", "raw"])
def test_every_flipped_bit_of_a_slice_is_a_bad_slice(tmp_path: Path, codec: str) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2, codec=codec)
        row = rows_of(store)[1]
        path = store.segments_path / row.segment
        piece = row.slices[3]
        start = row.payload_offset + int(piece["offset"])
        wanted = [(row, every)]
        with SliceReader(store) as reader:
            for byte in range(start, start + int(piece["stored_bytes"]), 5):
                flip(path, byte, byte % 8)
                batch = reader.read(wanted)
                assert [(bad.index, bad.file) for bad in batch.bad] == [(3, f"segments/{row.segment}")]
                assert np.array_equal(batch.stacked()[:3], expected(store, wanted)[:3])
                assert not batch.stacked()[3].any()
                flip(path, byte, byte % 8)
            assert reader.read(wanted).bad == []


def test_a_file_that_is_cut_or_gone_gives_bad_slices(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 3)
        wanted = [(row, every) for row in rows_of(store)]
        path = store.segments_path / wanted[0][0].segment
        with SliceReader(store) as reader:
            os.truncate(path, wanted[2][0].payload_offset + int(wanted[2][0].slices["offset"][1]) + 10)
            batch = reader.read(wanted)
            assert [bad.index for bad in batch.bad] == [9, 10, 11]
            assert np.array_equal(batch.stacked()[:9], expected(store, wanted)[:9])
            path.unlink()
            batch = reader.read(wanted)
            assert [bad.index for bad in batch.bad] == list(range(12))
            assert batch.bytes_read == 0


def test_a_question_over_many_files_holds_few_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memdb.reader, "PINNED_MAX", 3)
    with new_store(tmp_path) as store:
        with store.writer(spec(), segment_bytes_max=1) as writer:
            for number in range(12):
                writer.append([unit(number)])
        rows = rows_of(store)
        assert len({row.segment for row in rows}) == 12
        before = len(os.listdir("/proc/self/fd"))
        with SliceReader(store) as reader:
            with reader.pinned():
                for row in [*rows, *rows]:
                    assert np.array_equal(
                        reader.read([(row, every)]).stacked(), expected(store, [(row, every)])
                    )
                    assert len(os.listdir("/proc/self/fd")) <= before + 5
            assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("column", "value"), [("raw_bytes", 2**31), ("stored_bytes", 2**31)])
def test_sizes_that_cannot_be_are_refused_before_anything_is_allocated(
    store: Store, column: str, value: int
) -> None:
    row = rows_of(store)[1]
    slices = row.slices.copy()
    slices[column][2] = value
    with SliceReader(store) as reader, pytest.raises(CorruptionError, match="cannot be"):
        reader.read([(replace(row, slices_table=slices.tobytes()), every)])


def test_nothing_asked_is_nothing_read(store: Store) -> None:
    with SliceReader(store) as reader:
        batch = reader.read([])
        assert (len(batch), batch.stacked().size, batch.bytes_read, batch.bad) == (0, 0, 0, [])
