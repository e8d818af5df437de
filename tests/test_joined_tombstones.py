"""Tombstones that follow each other become one at compaction, and forget what they forgot, no less and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memdb.compact import compact
from memdb.forget import OPEN_END_NS, forget
from memdb.records import Kind
from memdb.repair import repair
from memdb.schemas.recording import Tombstone
from memdb.store import Store, recording_digest
from memdb.transfer import export_recording, import_recording
from memdb.verify import verify
from tests.kill_cases import deaths, quick_disk
from tests.needle_cases import holders, needles
from tests.repair_cases import bare, files_of, lose_catalog, put, records_of
from tests.store_cases import UNIT_NS, fill, new_store, spec, unit

__all__ = ["bare", "quick_disk"]

UNITS, STEPS = 8, 4
Span = tuple[int, int]


def forgotten(path: Path, spans: list[Span], *, now_ns: int = 1) -> None:
    with Store.open(path, write=True) as store:
        for start_ns, end_ns in spans:
            forget(store, "lobby", start_ns=start_ns, end_ns=end_ns, now_ns=now_ns)


def compacted(path: Path) -> list[str]:
    with Store.open(path, write=True) as store:
        return [what for done in compact(store).recordings for what in done.left]


def stones(path: Path) -> tuple[Tombstone, ...]:
    with Store.open(path) as store:
        return store.recording("lobby").tombstones


def rows(path: Path) -> int:
    """Of tombstones in the catalog."""
    with Store.open(path) as store:
        return len(store.catalog.database.select("tombstones", ""))


def records(path: Path) -> set[tuple[int, object]]:
    """Number and first number of the tombstones in files that count."""
    found = records_of(path, files_of(path, "lobby"))
    return {(record.number, record.meta["first"]) for _, record in found if record.kind is Kind.TOMBSTONE}


def content(path: Path) -> object:
    with Store.open(path) as store:
        assert verify(store).problems == []
        return recording_digest(store, "lobby"), [
            found.digest for found in store.units(store.recording("lobby").id)
        ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Forgotten step by step from its beginning, as a store that is full forgets."""
    with new_store(tmp_path) as opened:
        put(opened, "lobby", UNITS)
    path = tmp_path / "lobby.memdb"
    forgotten(path, [(number * UNIT_NS, (number + 1) * UNIT_NS) for number in range(STEPS)])
    return path


@pytest.mark.usefixtures("quick_disk", "bare")
def test_a_row_of_steps_is_one_and_stands_for_each(store: Path) -> None:
    before, whole = stones(store), content(store)
    assert (len(before), rows(store)) == (STEPS, STEPS)
    assert compacted(store) == []
    one = Tombstone(STEPS - 1, 0, STEPS * UNIT_NS, UNITS, 1)
    assert stones(store) == (one,) * STEPS, "who has seen so many counts on"
    assert (rows(store), records(store)) == (1, {(STEPS - 1, 0)})
    assert content(store) == whole
    for number in range(STEPS):
        assert holders(store, needles(unit(number))) == {}
    forgotten(store, [(STEPS * UNIT_NS, (STEPS + 1) * UNIT_NS)], now_ns=2)
    assert (len(stones(store)), rows(store)) == (STEPS + 1, 2)
    whole = content(store)
    lose_catalog(store)
    assert repair(store).spans == []
    assert content(store) == whole
    assert (len(stones(store)), rows(store)) == (STEPS + 1, 2)
    assert compacted(store) == []
    assert stones(store) == (Tombstone(STEPS, 0, (STEPS + 1) * UNIT_NS, UNITS, 2),) * (STEPS + 1)
    assert content(store) == whole
    lose_catalog(store)
    assert repair(store).spans == []
    assert stones(store) == (Tombstone(STEPS, 0, (STEPS + 1) * UNIT_NS, UNITS, 2),) * (STEPS + 1)
    assert content(store) == whole


@pytest.mark.usefixtures("quick_disk", "bare")
def test_it_can_die_at_any_step_and_nothing_comes_back(store: Path) -> None:
    whole = content(store)
    trials = 0
    for copy, when in deaths(store, compacted, every=4):
        trials += 1
        assert content(copy) == whole, when
        if trials % 2:
            lose_catalog(copy)
            assert repair(copy).spans == [], when
            assert content(copy) == whole, when
        assert len(stones(copy)) == STEPS, when
        assert compacted(copy) == [], when
        assert (rows(copy), records(copy)) == (1, {(STEPS - 1, 0)}), when
        assert content(copy) == whole, when
    assert trials > 10


@pytest.mark.usefixtures("quick_disk", "bare")
def test_an_export_carries_it_and_an_import_takes_it_in(store: Path, tmp_path: Path) -> None:
    compacted(store)
    file = tmp_path / "lobby.export"
    export_recording(store, "lobby", file)
    (tmp_path / "other").mkdir()
    with new_store(tmp_path / "other") as other:
        import_recording(other, file)
        path = other.path
    assert stones(path) == stones(store)
    assert content(path) == content(store)
    forgotten(path, [(STEPS * UNIT_NS, (STEPS + 1) * UNIT_NS)])
    assert compacted(path) == []
    assert rows(path) == 1


@pytest.mark.usefixtures("quick_disk", "bare")
@pytest.mark.parametrize(
    ("spans", "left"),
    [
        ([(0, UNIT_NS), (2 * UNIT_NS, 3 * UNIT_NS)], 2),  # a unit between them is kept
        ([(UNIT_NS, 2 * UNIT_NS), (0, UNIT_NS)], 2),  # backwards
        ([(0, 2 * UNIT_NS), (UNIT_NS, 3 * UNIT_NS), (3 * UNIT_NS, 4 * UNIT_NS)], 1),
        ([(UNIT_NS, 2 * UNIT_NS), (0, 3 * UNIT_NS)], 1),  # the later one holds all of the older one
        ([(0, OPEN_END_NS), (0, OPEN_END_NS)], 2),  # of what comes later nothing is meant
        ([(0, UNIT_NS), (UNIT_NS, 2 * UNIT_NS), (5 * UNIT_NS, 6 * UNIT_NS)], 2),
    ],
)
def test_only_what_is_one_span_is_joined(tmp_path: Path, spans: list[Span], left: int) -> None:
    with new_store(tmp_path) as opened:
        fill(opened, UNITS)
    path = tmp_path / "lobby.memdb"
    forgotten(path, spans)
    with Store.open(path, write=True) as opened, opened.writer(spec()) as writer:
        writer.append([unit(UNITS)])
    whole = content(path)
    assert compacted(path) == []
    assert (rows(path), len(stones(path))) == (left, len(spans))
    assert content(path) == whole
    lose_catalog(path)
    repair(path)
    assert content(path) == whole
    assert (rows(path), len(stones(path))) == (left, len(spans))


@pytest.mark.usefixtures("quick_disk")
def test_a_span_that_reaches_into_what_came_in_later_is_not_joined(tmp_path: Path) -> None:
    """The first forgets up to unit 6's end, when there were 4 units; unit 5 came later, and stays."""
    with new_store(tmp_path) as opened:
        fill(opened, 4)
    path = tmp_path / "lobby.memdb"
    forgotten(path, [(0, 6 * UNIT_NS)])
    with Store.open(path, write=True) as opened, opened.writer(spec()) as writer:
        writer.append([unit(number) for number in range(4, UNITS)])
    forgotten(path, [(6 * UNIT_NS, 7 * UNIT_NS)])
    assert compacted(path) == []
    assert rows(path) == 2
    assert not any(stone.covers(5, 5 * UNIT_NS, 6 * UNIT_NS) for stone in stones(path))


@pytest.mark.usefixtures("quick_disk")
def test_a_stretch_in_which_there_is_nothing_is_no_hindrance(tmp_path: Path) -> None:
    """A camera that was dark between two units."""
    with new_store(tmp_path) as opened, opened.writer(spec()) as writer:
        for number in range(UNITS):
            made, shift = unit(number), number * UNIT_NS
            blocks = made.blocks.copy()
            blocks["start_ns"] += shift
            blocks["end_ns"] += shift
            times = {"start_ns": made.start_ns + shift, "end_ns": made.end_ns + shift}
            writer.append([replace(made, blocks=blocks, **times)])
    path = tmp_path / "lobby.memdb"
    forgotten(path, [(0, UNIT_NS), (2 * UNIT_NS, 3 * UNIT_NS)])
    assert compacted(path) == []
    assert stones(path) == (Tombstone(1, 0, 3 * UNIT_NS, UNITS, 1),) * 2


@pytest.mark.usefixtures("quick_disk")
def test_a_writer_and_a_state_that_took_note_of_the_steps_go_on(store: Path) -> None:
    with Store.open(store, write=True) as opened:
        row = opened.recording("lobby")
        opened.state(row.id).save(UNITS, b"held", reach_ns=0, tombstones=STEPS)
        with opened.writer(spec()) as writer:
            writer.append([unit(UNITS)])
            compact(opened)
            assert rows(store) == 1, "a unit came in behind them"
            assert len(writer.tombstones()) == STEPS
            assert writer.append([unit(UNITS + 1)], tombstones_seen=STEPS)
        row = opened.recording("lobby")
        state = opened.state(row.id).load_latest(row.spec.encoding_fingerprint, row.units, row.tombstones)
        assert state is not None
        assert (state.unit, state.tombstones) == (UNITS, STEPS)
        assert row.units == UNITS + 2
