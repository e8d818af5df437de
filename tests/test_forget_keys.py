"""Key tables and their searches after a forget: open ones at their next refresh, pages and tail alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.forget import OPEN_END_NS, forget
from memdb.index.forgotten import forgotten_rows
from memdb.index.key_search import KeySearch, search_keys
from memdb.index.key_table import KeyTable
from memdb.index.page_writer import index_recording
from memdb.index.pages import PAGE_BLOCK_DTYPE, verify_pages
from memdb.schemas.recording import Tombstone
from memdb.store import Store
from tests import store_cases

UNIT_NS = store_cases.UNIT_NS

# The masks of a key table

spans = st.tuples(st.integers(0, 40), st.integers(0, 12), st.integers(0, 30))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3), st.integers(0, 4)), max_size=25),
    forgotten=st.lists(spans, max_size=6),
    ascending=st.booleans(),
)
def test_rows_are_masked_as_tombstones_say(rows, forgotten, ascending):
    """Against the rule itself, row by row: for frames, whose times ascend, and for blocks whose times do not."""
    table = np.zeros(len(rows), PAGE_BLOCK_DTYPE)
    table["unit"] = np.cumsum([step for step, _, _ in rows])
    table["start_ns"] = np.cumsum([abs(step) if ascending else step for _, step, _ in rows])
    length = [0 if ascending else size for _, _, size in rows]
    table["end_ns"] = table["start_ns"] + (2 if ascending else 0) + length
    tombstones = [
        Tombstone(number, start, OPEN_END_NS if size == 12 else start + size, below, 0)
        for number, (start, size, below) in enumerate(forgotten)
    ]
    truth = [
        any(stone.covers(int(row["unit"]), int(row["start_ns"]), int(row["end_ns"])) for stone in tombstones)
        for row in table
    ]
    assert forgotten_rows(table, tombstones).tolist() == truth


def check(table: KeyTable, store: Store, units: int, gone: set[tuple[int, int]], said: set[int]) -> None:
    """The table's rows are those of units 0 .. `units` - 1, each as it was written or forgotten."""
    truth = [store_cases.unit(number) for number in range(units)]
    places = [(unit.number, at) for unit in truth for at in range(len(unit.blocks))]
    assert list(zip(table.blocks["unit"].tolist(), table.blocks["block"].tolist(), strict=True)) == places
    left = np.array([place not in gone for place in places])
    assert table.blocks["tokens"].tolist() == (4 * left).tolist()
    for layer in range(table.layers):
        assert table.holds(layer).tolist() == left.tolist()
        keys = np.concatenate([unit.keys[layer] for unit in truth])
        np.testing.assert_array_equal(table.layer_keys(layer)[left], keys[left])
    with_caption = {int(row["unit"]) for row in table.captions if row["tokens"]}
    assert with_caption == set(range(units)) - said
    for row, vector in zip(table.captions, table.caption_vectors(), strict=True):
        caption = truth[int(row["unit"])].caption
        assert vector.tolist() == (caption.vector.tolist() if row["tokens"] else [0.0] * 8)
    assert table.problems == []


def exactly(table: KeyTable, search: KeySearch, units: int, gone: set[tuple[int, int]]) -> None:
    """Key search gives what an exact search over the remaining blocks alone gives."""
    truth = [store_cases.unit(number) for number in range(units)]
    left = [place for place, row in enumerate(table.blocks) if (row["unit"], row["block"]) not in gone]
    for layer in range(table.layers):
        query = np.random.default_rng(layer).normal(size=store_cases.KEY_SIZE).astype(np.float32)
        keys = np.concatenate([unit.keys[layer] for unit in truth])[left]
        want = search_keys(keys, query, 5)
        found = search.search(layer, query, 5)
        assert found.rows.tolist() == [left[row] for row in want.rows]
        np.testing.assert_array_equal(found.scores, want.scores)


@pytest.mark.parametrize("paged", [0, 12, 20])
def test_a_table_that_is_open_sees_a_forget_at_its_next_refresh(tmp_path, paged):
    """Whether units lie in pages, in the tail or in both; and rows keep their numbers when a husk goes to a page."""
    with store_cases.new_store(tmp_path) as store:
        recording = store_cases.fill(store, paged or 20).recording.id
        if paged:
            index_recording(store, recording, flush=True)
            with store.writer(store_cases.spec()) as writer:
                for number in range(paged, 20):
                    writer.append([store_cases.unit(number)])
        with Store.open(store.path) as reading, KeyTable.open(reading, recording) as table:
            search = KeySearch(table, backend="exact")
            check(table, reading, 20, set(), set())
            exactly(table, search, 20, set())
            # Half of unit 3, all of 4 and 5, half of 6; then the whole of unit 14, by a span inside one of its blocks.
            half = UNIT_NS // 2
            forget(store, "lobby", start_ns=3 * UNIT_NS + half, end_ns=6 * UNIT_NS + half)
            gone, said = {(3, 1), (4, 0), (4, 1), (5, 0), (5, 1), (6, 0)}, {3, 4, 5, 6}
            assert not table.refresh()
            check(table, reading, 20, gone, said)
            exactly(table, search, 20, gone)
            forget(store, "lobby", start_ns=14 * UNIT_NS + 1, end_ns=14 * UNIT_NS + 2)
            gone |= {(14, 0)}
            said |= {14}
            table.refresh()
            check(table, reading, 20, gone, said)
            # What comes later under the same times is not meant; the tail's husks go into a page.
            with store.writer(store_cases.spec()) as writer:
                for number in range(20, 26):
                    writer.append([store_cases.unit(number)])
            index_recording(store, recording, flush=True)
            assert table.refresh()
            check(table, reading, 26, gone, said)
            exactly(table, search, 26, gone)
        with KeyTable.open(store, recording) as fresh:
            check(fresh, store, 26, gone, said)
            exactly(fresh, KeySearch(fresh, backend="exact"), 26, gone)
        assert verify_pages(store.path / "keys" / f"{recording}.pages") == []


def test_a_page_of_husks_alone_is_a_page(tmp_path):
    """Everything forgotten before it was indexed, and more to come: rows keep their numbers."""
    with store_cases.new_store(tmp_path) as store:
        recording = store_cases.fill(store, 4).recording.id
        forget(store, "lobby", start_ns=0)
        gone = {(number, block) for number in range(4) for block in range(2)}
        with KeyTable.open(store, recording) as table:
            search = KeySearch(table, backend="exact")
            check(table, store, 4, gone, set(range(4)))
            assert index_recording(store, recording, flush=True) == 4
            table.refresh()
            check(table, store, 4, gone, set(range(4)))
            assert search.search(0, np.ones(store_cases.KEY_SIZE, np.float32), 3).rows.tolist() == []
            with store.writer(store_cases.spec()) as writer:
                writer.append([store_cases.unit(4), store_cases.unit(5)], tombstones_seen=1)
            table.refresh()
            check(table, store, 6, gone, set(range(4)))
            exactly(table, search, 6, gone)


def test_a_unit_that_was_in_hand_is_a_husk_in_the_pages_too(tmp_path):
    """Its number is not below the tombstone's: only its own row says that something of it is gone."""
    with store_cases.new_store(tmp_path) as store:
        with store.writer(store_cases.spec()) as writer:
            writer.append([store_cases.unit(0), store_cases.unit(1)])
            forget(store, "lobby", start_ns=UNIT_NS)
            writer.append([store_cases.unit(2)], tombstones_seen=0)
            writer.append([store_cases.unit(3)], tombstones_seen=1)
        gone = {(number, block) for number in (1, 2) for block in range(2)}
        recording = writer.recording.id
        for flush in (False, True):
            index_recording(store, recording, flush=flush)
            with KeyTable.open(store, recording) as table:
                check(table, store, 4, gone, {1, 2})
                exactly(table, KeySearch(table, backend="exact"), 4, gone)
