"""Segments whose checksums are right and whose records cannot be: typed errors, bounded memory, nothing else lost."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memdb.believed import LOST_MAX, believed_count, believed_events
from memdb.contents import SLICE_BYTES_MAX, keys_from, slice_bytes_max, stored_element_bytes
from memdb.database import CATALOG
from memdb.records import Kind, encode
from memdb.repair import repair
from memdb.schemas.errors import CorruptionError, MemdbError
from memdb.schemas.rows import Part
from memdb.store import Store
from memdb.verify import verify_path
from tests.store_cases import fill, new_store, spec
from tools.trust.hostile_records import Raw, put_together, take_apart

UNITS = 4
MEMORY_BYTES = 1 << 30  # above what the process has: half of what the smallest absurd table takes


@contextmanager
def bounded() -> Iterator[None]:
    """Within so much memory: what is allocated by an absurd number is an error."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def store(tmp_path: Path, bare: None) -> Path:
    """One recording in one file: an epoch, units, a gap and an end."""
    with new_store(tmp_path) as opened, opened.writer(spec("lobby")) as writer:
        writer.epoch(0, 0, "the beginning")
    with Store.open(tmp_path / "lobby.memdb", write=True) as opened:
        fill(opened, UNITS)
        with opened.writer(spec("lobby")) as writer:
            writer.gap(9 * 10**9, 10 * 10**9, "asleep")
            writer.end(10**10)
    return tmp_path / "lobby.memdb"


def forge(store: Path, kind: Kind, change: Callable[[Raw], Raw]) -> Path:
    """Change the last record of a kind under right checksums; the file."""
    for path in sorted((store / "segments").iterdir(), reverse=True):
        records = take_apart(path)
        places = [at for at, record in enumerate(records) if record.kind == kind]
        if places:
            records[places[-1]] = change(records[places[-1]])
            path.write_bytes(put_together(records, random.Random(4)))
            return path
    raise AssertionError(f"no {kind.name}")


def with_meta(**changes: object) -> Callable[[Raw], Raw]:
    return lambda record: replace(record, meta={**record.meta, **changes})


def drop_catalog(store: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (store / f"{CATALOG}{suffix}").unlink(missing_ok=True)


def units_of(store: Path) -> int:
    with Store.open(store) as opened:
        return opened.recording("lobby").units


EVENTS = [
    (Kind.EPOCH, "first_unit"),
    (Kind.END, "units"),
    (Kind.GAP, "start_ns"),
    (Kind.GAP, "reason"),
]


@pytest.mark.parametrize(("kind", "key"), EVENTS)
def test_an_event_that_claims_the_absurd_takes_no_memory_and_costs_no_unit(
    store: Path, tmp_path: Path, kind: Kind, key: str
) -> None:
    whole = tmp_path / "whole.memdb"
    shutil.copytree(store, whole)
    for value in (1 << 32, (1 << 63) - 1, 1 << 63, 10**30, None, [], "\ud800"):
        file = forge(store, kind, with_meta(**{key: value}))
        with bounded():
            problems = {problem.file for problem in verify_path(store).problems}
            assert problems & {f"segments/{file.name}", CATALOG}, value
            drop_catalog(store)
            repair(store)
            assert units_of(store) == UNITS, value
        shutil.rmtree(store)
        shutil.copytree(whole, store)


@pytest.mark.parametrize("kind", [Kind.EPOCH, Kind.GAP, Kind.END])
def test_an_event_with_an_absurd_number_leaves_no_places_behind(
    store: Path, tmp_path: Path, kind: Kind
) -> None:
    """A repair gave every number below it a stand-in."""
    for number in (LOST_MAX, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
        forge(store, kind, lambda record, number=number: replace(record, number=number))  # type: ignore[misc]
        drop_catalog(store)
        with bounded():
            report = repair(store)
            assert units_of(store) == UNITS
        assert len(report.notes) < 8
        assert sum(path.stat().st_size for path in (store / "segments").iterdir()) < 1 << 17


UNIT_VALUES: list[dict[str, Any]] = [
    {"digest": "no digits"},
    {"digest": "00"},
    {"first_digest": 7},
    {"start_ns": -1},
    {"end_ns": 0},
    {"layers": -1},
    {"layers": 1 << 40},
    {"epoch": -5},
    {"revision": 1 << 64},
    {"caption_tokens": -1},
    {"caption_tokens": None},
    {"caption_tokens": 1 << 32},
    {"caption_tokens": (1 << 63) - 1},
    {"codec": "\ud800"},
]


@pytest.mark.parametrize("changes", UNIT_VALUES, ids=str)
def test_a_unit_whose_numbers_cannot_be_is_damage(store: Path, changes: dict[str, Any]) -> None:
    file = forge(store, Kind.UNIT, with_meta(**changes))
    with bounded():
        assert f"segments/{file.name}" in {problem.file for problem in verify_path(store).problems} or (
            "codec" in changes  # the row differs
        )
        drop_catalog(store)
        repair(store)
        assert units_of(store) == UNITS, "its place is kept: an end was recorded behind it"


def test_a_unit_with_an_absurd_number_takes_no_memory(store: Path) -> None:
    for number in (1 << 32, (1 << 63) - 1, (1 << 64) - 1):
        forge(store, Kind.UNIT, lambda record, number=number: replace(record, number=number))  # type: ignore[misc]
        drop_catalog(store)
        with bounded():
            repair(store)
            assert units_of(store) == UNITS


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("slices", "raw_bytes", (1 << 32) - 1),
        ("slices", "layer", 65535),
        ("slices", "block", 65535),
        ("slices", "offset", (1 << 64) - 1),
        ("parts", "part", 9),
        ("parts", "part", int(Part.VECTOR)),
        ("parts", "offset", (1 << 64) - 1),
        ("parts", "length", (1 << 63) - 1),
    ],
)
def test_a_table_that_cannot_be_is_damage(store: Path, table: str, column: str, value: int) -> None:
    def change(record: Raw) -> Raw:
        changed = getattr(record, table).copy()
        changed[column] = value
        return replace(record, **{table: changed})

    file = forge(store, Kind.UNIT, change)
    with bounded():
        problems = {problem.file for problem in verify_path(store).problems}
        assert problems & {f"segments/{file.name}", CATALOG}
        drop_catalog(store)
        repair(store)
        assert units_of(store) == UNITS


def test_slices_that_share_bytes_are_damage(store: Path) -> None:
    """A few bytes that are said to lie in many slices would be unpacked, and copied, as often."""
    with Store.open(store) as opened:
        row = opened.unit(opened.recording("lobby").id, 0)
    times = row.length // int(row.slices["stored_bytes"][0]) + 1
    many = np.repeat(row.slices[:1], times)
    with pytest.raises(CorruptionError, match="slices"):
        _ = replace(row, slices_table=many.tobytes()).slices
    assert len(replace(row, slices_table=many[:2].tobytes()).slices) == 2


def test_a_header_of_no_recording_is_told(store: Path) -> None:
    for changes in ({"spec": {}}, {"spec": None}, {"created_ns": 10**30}, {"spec": {"name": "../x"}}):
        for file in sorted((store / "segments").iterdir()):
            records = take_apart(file)
            records[0] = replace(records[0], meta={**records[0].meta, **changes})
            file.write_bytes(put_together(records, random.Random(4)))
        drop_catalog(store)
        with bounded():
            try:
                repair(store)
            except MemdbError:
                continue
            with Store.open(store) as opened:
                opened.recordings()


def test_slices_are_bounded_by_the_model_and_keys_by_their_unit(store: Path) -> None:
    with Store.open(store) as opened:
        recording = opened.recording("lobby")
        row = opened.unit(recording.id, 0)
    slices = row.slices.copy()
    slices["raw_bytes"] = slice_bytes_max(recording.spec) + 1
    with pytest.raises(CorruptionError, match="cannot be"):
        stored_element_bytes(recording.spec, replace(row, slices_table=slices.tobytes()))
    assert slice_bytes_max(recording.spec) <= SLICE_BYTES_MAX
    for odd in (replace(row, layers=-1), replace(row, layers=-1, block_count=-2), replace(row, layers=0)):
        with pytest.raises(CorruptionError):
            keys_from(odd, bytes(48))
    for size in (1, 7, 50):
        with pytest.raises(CorruptionError):
            keys_from(row, bytes(size))


def test_a_number_is_believed_as_far_as_what_is_missing_can_have_been_there() -> None:
    there = np.array([0, 1, 2, 5, 9], np.int64)
    record, few = 192, 16
    assert believed_count([3, few + 10, few + 11, 1 << 60], there, 5 * record) == few + 10
    assert believed_count([3, few + 10, few + 11, 1 << 60], there, 6 * record) == few + 11
    assert believed_count([few + 6, 3], there, 0) == 3
    assert believed_count([few + 6, 3], there, 0, told=5) == few + 6
    assert believed_count([1 << 60, LOST_MAX + 1], there[:1], 1 << 60) == LOST_MAX + 1
    assert believed_count([], there, 0) == 0


def test_a_tombstone_is_obeyed_whatever_its_number() -> None:
    def stone(number: int, first: int, end_ns: int) -> Any:
        meta = {"start_ns": 0, "end_ns": end_ns, "below_unit": 4, "at_ns": 9, "first": first}
        return encode(Kind.TOMBSTONE, number, meta, offset=0, previous=b"")[1]

    events = {
        (Kind.TOMBSTONE, record.number): record for record in (stone(2, 0, 5), stone(900_000, 900_000, 7))
    }
    believed, doubted = believed_events(events, 0)
    assert [record.number for record in doubted] == [900_000]
    assert sorted(number for _, number in believed) == [2, 3]
    moved = believed[Kind.TOMBSTONE, 3]
    assert (moved.meta["end_ns"], moved.meta["first"]) == (7, 3)
    assert believed_events({**events, (Kind.TOMBSTONE, 3): moved}, 0)[0] == {
        (Kind.TOMBSTONE, 2): events[Kind.TOMBSTONE, 2],
        (Kind.TOMBSTONE, 3): moved,
    }, "once is enough"
