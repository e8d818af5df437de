"""Pages and tail together are what the segments hold, whatever the lag and whatever happened to the pages."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import store_cases
from fake_store import OTHER, RECORDING, SECOND_NS, FakeStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memdb.index.key_table import KeyTable
from memdb.index.page_sizes import KeySizes
from memdb.index.page_writer import PageWriter, index_recording, page_unit
from memdb.index.pages import PAGE_BLOCKS, page_path, verify_pages
from memdb.schemas.errors import LockedError

L, HD, E = 2, 6, 5


def add_unit(store: FakeStore, rng: np.random.Generator, *, blocks: int, caption: bool) -> None:
    keys = rng.standard_normal((L, blocks, HD)).astype(np.float16) if blocks else None
    vector = rng.standard_normal(E).astype(np.float32) if caption else None
    store.add(
        keys=keys, holds=rng.random((L, blocks)) < 0.8, text="a red star" if caption else None, vector=vector
    )


def filled(path: Path, units: int, *, seed: int = 0, blocks: int | None = None) -> FakeStore:
    store, rng = FakeStore(path), np.random.default_rng(seed)
    for _ in range(units):
        add_unit(
            store,
            rng,
            blocks=int(rng.integers(0, 5)) if blocks is None else blocks,
            caption=rng.random() < 0.6,
        )
    return store


def expect_all(table: KeyTable, store: FakeStore) -> None:
    """The table is exactly what a walk over the store's units gives."""
    rows = store.units(RECORDING)
    keyed = [row for row in rows if len(row.blocks)]
    captioned = [row for row in rows if row.has_caption]
    assert table.blocks["unit"].tolist() == [row.number for row in keyed for _ in row.blocks]
    assert table.blocks["block"].tolist() == [at for row in keyed for at in range(len(row.blocks))]
    for name in ("kind", "tokens", "start_ns", "end_ns"):
        assert table.blocks[name].tolist() == [value for row in keyed for value in row.blocks[name].tolist()]
    assert table.captions.tolist() == [(r.number, r.caption_tokens, r.start_ns, r.end_ns) for r in captioned]
    vectors = np.array([store.captions[RECORDING, row.number].vector for row in captioned], np.float32)
    np.testing.assert_array_equal(table.caption_vectors(), vectors.reshape(table.caption_vectors().shape))
    assert table.layers == (L if keyed else 0)
    for layer in range(table.layers):
        keys = np.concatenate([store.keys[RECORDING, row.number][layer] for row in keyed])
        np.testing.assert_array_equal(table.layer_keys(layer).view(np.uint16), keys.view(np.uint16))
        held = {(row.number, int(s["block"])) for row in keyed for s in row.slices if s["layer"] == layer}
        where = zip(table.blocks["unit"].tolist(), table.blocks["block"].tolist(), strict=True)
        assert table.holds(layer).tolist() == [place in held for place in where]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from(["nothing", "index", "flush", "refresh", "read"])),
        max_size=6,
    ),
)
def test_pages_and_tail_are_all_units_at_any_lag(tmp_path_factory, seed, steps):
    store = FakeStore(tmp_path_factory.mktemp("store"))
    rng = np.random.default_rng(seed)
    with KeyTable.open(store, RECORDING) as watching:
        for units, then in steps:
            for _ in range(units):
                add_unit(store, rng, blocks=int(rng.integers(0, 12)), caption=rng.random() < 0.5)
            if then in ("index", "flush"):
                index_recording(store, RECORDING, flush=then == "flush")
            elif then == "refresh":
                watching.refresh()
            elif then == "read" and watching.layers:
                watching.layer_keys(1)
        watching.refresh()
        expect_all(watching, store)
        assert watching.problems == []
    with KeyTable.open(store, RECORDING) as fresh:
        expect_all(fresh, store)
    if page_path(store, RECORDING).exists():
        assert verify_pages(page_path(store, RECORDING)) == []


def test_a_page_waits_for_its_blocks_and_a_flush_does_not(tmp_path):
    store = filled(tmp_path, PAGE_BLOCKS // 4 + 10, blocks=4)
    path = page_path(store, RECORDING)
    assert index_recording(store, RECORDING) == PAGE_BLOCKS // 4
    assert index_recording(store, RECORDING) == 0
    assert index_recording(store, RECORDING, flush=True) == 10
    size = path.stat().st_size
    assert index_recording(store, RECORDING, flush=True) == 0
    assert path.stat().st_size == size


def sizes_of(store: FakeStore) -> KeySizes:
    return KeySizes.of(store.recording_by_id(RECORDING).spec.model.shape)


def test_units_that_are_there_already_are_skipped(tmp_path):
    store = filled(tmp_path, 20)
    units = [page_unit(store, row, sizes_of(store)) for row in store.units(RECORDING)]
    path = page_path(store, RECORDING)
    with PageWriter(path, RECORDING) as writer:
        assert writer.last_unit == -1
        assert writer.append(units[:12]) == 12
        assert writer.append(units[:12]) == 0
        assert writer.append(units) == 8
        assert writer.last_unit == 19
    assert verify_pages(path) == []
    with KeyTable.open(store, RECORDING) as table:
        expect_all(table, store)


def three_pages(path: Path) -> tuple[FakeStore, Path, bytes]:
    store = filled(path, 9, seed=3)
    pages = page_path(store, RECORDING)
    units = [page_unit(store, row, sizes_of(store)) for row in store.units(RECORDING)]
    with PageWriter(pages, RECORDING) as writer:
        for start in (0, 3, 6):
            writer.append(units[start : start + 3])
    return store, pages, pages.read_bytes()


def test_every_flipped_byte_is_reported_and_changes_no_answer(tmp_path):
    store, path, whole = three_pages(tmp_path)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        problems = verify_pages(path)
        assert problems, at
        assert all(problem.file == f"keys/{RECORDING}.pages" for problem in problems)
        with KeyTable.open(store, RECORDING) as table:
            expect_all(table, store)
            assert table.problems, at


def test_a_tail_torn_at_any_length_is_read_from_the_segments_and_written_anew(tmp_path):
    store, path, whole = three_pages(tmp_path)
    ends, offset = [], 0
    with PageWriter(path, RECORDING):
        pass
    with KeyTable.open(store, RECORDING) as table:
        for page in table._pages:
            offset = page.end
            ends.append(offset)
    assert ends[-1] == len(whole)
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        problems = verify_pages(path)
        assert bool(problems) == (length != 0 and length not in ends), length
        with KeyTable.open(store, RECORDING) as table:
            expect_all(table, store)
            assert [problem.what for problem in table.problems] == [problem.what for problem in problems]
        with PageWriter(path, RECORDING) as writer:
            assert writer.last_unit == 3 * sum(end <= length for end in ends) - 1
            assert (writer.dropped is not None) == bool(problems)
        index_recording(store, RECORDING, flush=True)
        assert verify_pages(path) == []
        with KeyTable.open(store, RECORDING) as table:
            expect_all(table, store)
            assert table._tail == []


def test_an_unfinished_page_is_no_damage(tmp_path):
    store, path, whole = three_pages(tmp_path)
    with KeyTable.open(store, RECORDING) as table:
        last = table._pages[-1]
    path.write_bytes(whole[: last.offset] + bytes(128) + whole[last.offset + 128 :])
    assert verify_pages(path) == []
    with KeyTable.open(store, RECORDING) as table:
        assert (len(table._pages), table.problems) == (2, [])
        expect_all(table, store)


def test_a_thorough_writer_cuts_damaged_keys_off(tmp_path):
    store, path, whole = three_pages(tmp_path)
    with KeyTable.open(store, RECORDING) as table:
        page = table._pages[1]
    damaged = bytearray(whole)
    damaged[page.offset + page.header.keys_offset] ^= 1
    path.write_bytes(damaged)
    assert index_recording(store, RECORDING) == 0
    assert len(verify_pages(path)) == 1
    assert index_recording(store, RECORDING, flush=True, thorough=True) == 6
    assert verify_pages(path) == []


def test_pages_of_another_recording_are_not_taken(tmp_path):
    store, path, whole = three_pages(tmp_path)
    other = page_path(store, OTHER)
    other.write_bytes(whole)
    assert "belongs elsewhere" in verify_pages(other)[0].what
    store.add(recording_id=OTHER, keys=np.ones((L, 1, HD), np.float16))
    with KeyTable.open(store, OTHER) as table:
        assert table.layer_keys(0).tolist() == [[1.0] * HD]
    first = whole[: len(whole)]
    path.write_bytes(first + first)  # the same pages once more: they do not follow
    assert len(verify_pages(path)) == 1


def test_an_absurd_size_in_a_header_allocates_nothing(tmp_path):
    store, path, whole = three_pages(tmp_path)
    with KeyTable.open(store, RECORDING) as table:
        header = replace(table._pages[0].header, blocks=2**31, key_size=2**20)
    path.write_bytes(header.pack() + whole[128:])
    assert "cut off" in verify_pages(path)[0].what


def test_one_writer_a_file(tmp_path):
    store = filled(tmp_path, 5)
    path = page_path(store, RECORDING)
    with PageWriter(path, RECORDING):
        with pytest.raises(LockedError):
            PageWriter(path, RECORDING)
        assert index_recording(store, RECORDING, flush=True) == 0
    assert index_recording(store, RECORDING, flush=True) == 5


def test_a_unit_damaged_in_its_segment_is_left_out_and_named(tmp_path):
    store = filled(tmp_path, 8, blocks=2)
    store.damaged.add((RECORDING, 5))
    assert index_recording(store, RECORDING, flush=True) == 5
    with KeyTable.open(store, RECORDING) as table:
        keys = table.layer_keys(0)
        assert not table.holds(0)[table.blocks["unit"] == 5].any()
        assert table.problems[0].file == "segments/fake"
        assert table.problems[0].first_unit == 5
        for number in (4, 6, 7):
            rows = table.blocks["unit"] == number
            np.testing.assert_array_equal(keys[rows], store.keys[RECORDING, number][0])


def test_damage_in_pages_and_segments_alike_hides_only_what_is_lost(tmp_path):
    store, path, whole = three_pages(tmp_path)
    with KeyTable.open(store, RECORDING) as table:
        page = table._pages[1]
        number = int(page.blocks["unit"][0])
        held = table.holds(0) & (table.blocks["unit"] != number)
    damaged = bytearray(whole)
    damaged[page.offset + page.header.keys_offset] ^= 1
    path.write_bytes(damaged)
    store.damaged.add((RECORDING, number))
    with KeyTable.open(store, RECORDING) as table:
        table.layer_keys(0)
        assert table.holds(0).tolist() == held.tolist()
        table.layer_keys(1)  # whole in the page
        assert table.holds(1)[table.blocks["unit"] == number].any()


def test_opening_reads_tables_only_and_a_layer_reads_itself(tmp_path, monkeypatch):
    store = filled(tmp_path, 300, blocks=4)
    index_recording(store, RECORDING, flush=True)
    read_bytes = 0
    pread, preadv = os.pread, os.preadv

    def counting_pread(fd, size, offset):
        nonlocal read_bytes
        data = pread(fd, size, offset)
        read_bytes += len(data)
        return data

    def counting_preadv(fd, buffers, offset):
        nonlocal read_bytes
        got = preadv(fd, buffers, offset)
        read_bytes += got
        return got

    monkeypatch.setattr(os, "pread", counting_pread)
    monkeypatch.setattr(os, "preadv", counting_preadv)
    with KeyTable.open(store, RECORDING) as table:
        tables_bytes = sum(128 + page.header.tables_bytes for page in table._pages)
        assert read_bytes == tables_bytes
        keys = table.layer_keys(1)
        assert read_bytes == tables_bytes + keys.nbytes
        assert table.layer_keys(1) is keys
        assert read_bytes == tables_bytes + keys.nbytes


def test_layers_are_kept_within_the_byte_budget(tmp_path):
    store = filled(tmp_path, 10, blocks=4)
    one_layer_bytes = 40 * HD * 2
    with KeyTable.open(store, RECORDING, cache_bytes_max=one_layer_bytes) as table:
        first = table.layer_keys(0)
        assert table.layer_keys(0) is first
        table.layer_keys(1)
        assert list(table._layers) == [1]
    with KeyTable.open(store, RECORDING, cache_bytes_max=one_layer_bytes - 1) as table:
        table.layer_keys(0)
        assert list(table._layers) == []


def test_times_select_what_overlaps(tmp_path):
    store = filled(tmp_path, 4, blocks=2)  # units of 2 s; blocks of 0.25 s at their beginning
    with KeyTable.open(store, RECORDING) as table:
        assert table.blocks["unit"][table.span(2 * SECOND_NS, 4 * SECOND_NS)].tolist() == [1, 1]
        assert table.blocks["unit"][table.span(end_ns=2 * SECOND_NS + 1)].tolist() == [0, 0, 1]
        assert table.span().all()
        assert not table.span(SECOND_NS, 2 * SECOND_NS).any()


def test_a_real_store_and_its_pages_agree(tmp_path):
    with store_cases.new_store(tmp_path) as store:
        writer = store_cases.fill(store, 40)
        recording_id = writer.recording.id
        index_recording(store, recording_id, flush=True)
        with store.writer(store_cases.spec()) as writer, KeyTable.open(store, recording_id) as table:
            writer.append([store_cases.unit(number) for number in range(40, 45)])
            assert table.refresh()
            units = [store_cases.unit(number) for number in range(45)]
            assert table.blocks["unit"].tolist() == [unit.number for unit in units for _ in unit.blocks]
            assert table.captions["tokens"].tolist() == [5] * 45
            for layer in range(store_cases.LAYERS):
                keys = np.concatenate([unit.keys[layer] for unit in units])
                np.testing.assert_array_equal(table.layer_keys(layer), keys)
                assert table.holds(layer).all()
            vectors = np.stack([unit.caption.vector for unit in units])
            np.testing.assert_array_equal(table.caption_vectors(), vectors)
            assert table.problems == []
