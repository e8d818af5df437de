"""Limits of the disk and of the store, kept before a byte is written; and a disk that fills up all the same."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from memdb import room
from memdb.captions import CaptionIndex
from memdb.clock import set_policy
from memdb.compact import compact
from memdb.database import CATALOG, Database
from memdb.files import watched
from memdb.index.page_sizes import KeySizes
from memdb.index.page_writer import PageWriter, index_recording, page_unit
from memdb.index.pages import page_path
from memdb.oldest import KEPT_LIVE_NS
from memdb.policy import FORGET_OLDEST, STORE_BYTES_MIN, Policy
from memdb.quota import Quota
from memdb.room import RESERVE_BYTES, UPKEEP_RESERVE_BYTES, free_bytes, refused, require, used_bytes
from memdb.schemas.errors import StoreFull
from memdb.schemas.units import Unit
from memdb.segments import reading
from memdb.state import StateFiles
from memdb.store import Store, recording_digest
from memdb.verify import verify
from memdb.writer import RecordingWriter
from tests.kill_cases import copied, quick_disk
from tests.needle_cases import holders, needles
from tests.store_cases import (
    UNIT_NS,
    Steps,
    directory_digest,
    fill,
    flip,
    new_store,
    pack,
    raw_slices,
    spec,
    unit,
)

__all__ = ["quick_disk"]

HOUR_UNITS = KEPT_LIVE_NS // UNIT_NS
BIG_BYTES = 250_000  # of a slice of a big unit: a megabyte of KV each


def big(number: int, *, step: int = 1) -> Unit:
    """A unit of a megabyte; with `step`, so many times as far from the one before."""
    from dataclasses import replace

    made = unit(number)
    blocks = made.blocks.copy()
    shift = number * UNIT_NS * (step - 1)
    blocks["start_ns"] += shift
    blocks["end_ns"] += shift
    kv = pack(raw_slices(number, 2, "int4", raw_bytes=BIG_BYTES), 2, "int4")
    return replace(made, kv=kv, blocks=blocks, start_ns=made.start_ns + shift, end_ns=made.end_ns + shift)


def append_big(writer: RecordingWriter, units: int) -> None:
    for number in range(units):
        writer.append([big(number)])


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """A disk that has so many bytes free, whoever asks."""
    import os

    real = os.statvfs

    def statvfs(path: object) -> object:
        found = real(path)  # type: ignore[arg-type]

        class Found:
            f_frsize, f_bavail = 1, free
            f_bsize = found.f_bsize

        return Found()

    monkeypatch.setattr(os, "statvfs", statvfs)


# The disk


def test_free_bytes_are_those_of_this_user(tmp_path: Path) -> None:
    import os

    found = os.statvfs(tmp_path)
    assert free_bytes(tmp_path) == pytest.approx(found.f_bavail * found.f_frsize, rel=0.05)
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"4567")
    assert used_bytes(tmp_path) == 7


def test_what_a_failing_write_becomes() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert isinstance(refused(OSError(number, "full"), "cannot write"), StoreFull)
    assert not isinstance(refused(OSError(errno.EIO, "broken"), "cannot write"), StoreFull)


def test_a_batch_that_would_touch_the_reserve_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0)])
        before = directory_digest(store.path)
        disk_with(monkeypatch, RESERVE_BYTES)
        with pytest.raises(StoreFull, match="what was acknowledged is safe"):
            writer.append([unit(1)])
        assert directory_digest(store.path) == before
        disk_with(monkeypatch, RESERVE_BYTES + (1 << 20))
        writer.append([unit(1)])  # the same writer goes on
        assert store.recording("lobby").units == 2
        assert verify(store).problems == []


def test_the_reserve_grows_with_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_room(size_bytes: int) -> None:
        raise AssertionError("nobody asked for that")

    quota = Quota(tmp_path)
    batch = 100 << 20
    disk_with(monkeypatch, 5 * batch)
    quota.require(batch, make_room)
    disk_with(monkeypatch, 5 * batch - 1)
    with pytest.raises(StoreFull, match=f"{4 * batch:,} stay so"):
        quota.require(batch, make_room)


def test_states_pages_and_captions_leave_the_reserve_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with new_store(tmp_path) as store:
        fill(store, 8)
        row = store.recording("lobby")
        disk_with(monkeypatch, UPKEEP_RESERVE_BYTES)
        with pytest.raises(StoreFull, match="an encoder state"):
            store.state(row.id).save(8, b"a state")
        with caplog.at_level(logging.WARNING):
            assert index_recording(store, row.id, flush=True) == 0
            assert CaptionIndex(store.path).index_captions(store, "fake", flush=True) == 0
        assert caplog.text.count("no room") == 2
        assert verify(store).problems == []
        monkeypatch.undo()
        assert index_recording(store, row.id, flush=True) == 8


def test_require_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(monkeypatch, 1000)
    require(tmp_path, 500, reserve_bytes=500, what="x")
    with pytest.raises(StoreFull, match=r"no room for x: 1,000 bytes are free, it takes 501 .* memdb forget"):
        require(tmp_path, 501, reserve_bytes=500, what="x")


# A disk that fills up all the same


@pytest.mark.usefixtures("quick_disk")
def test_a_disk_that_fills_up_at_any_step_of_an_append(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 4)
    path = tmp_path / "lobby.memdb"

    def append(store_path: Path) -> None:
        with Store.open(store_path, write=True) as store, store.writer(spec()) as writer:
            writer.append([unit(writer.next_unit)])

    counted = Steps()
    other = copied(path, "counted")
    with watched(counted):
        append(other)
    steps = [at for at, step in enumerate(counted.seen) if step.what != "point"]
    assert len(steps) >= 5
    for number, at in enumerate(steps):
        copy = copied(path, f"full{number}")
        place = iter(range(10_000))
        with watched(Steps(lambda step, place=place, at=at: next(place) == at)), pytest.raises(StoreFull):  # type: ignore[misc]
            append(copy)
        with Store.open(copy) as store:
            assert store.recording("lobby").units in (4, 5)
            assert verify(store).problems == []
        append(copy)
        with Store.open(copy) as store:
            assert store.recording("lobby").units in (5, 6)
            assert verify(store).problems == []


def test_a_disk_that_fills_up_under_a_state_leaves_the_older_ones(tmp_path: Path) -> None:
    states = StateFiles(tmp_path, "a" * 32, "e" * 32)
    states.save(4, b"older")
    for what in ("create", "write", "sync", "replace", "sync_folder"):
        with watched(Steps(lambda step, what=what: step.what == what)), pytest.raises(StoreFull):  # type: ignore[misc]
            states.save(8, b"newer")
        found = states.load_latest("e" * 32, 100)
        assert found is not None
        assert (found.unit, found.payload) in ((4, b"older"), (8, b"newer"))
    states.save(8, b"newer")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_disk_that_fills_up_under_pages_costs_the_page_and_no_more(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 8)
        row = store.recording("lobby")
        for at in range(6):
            place = iter(range(1000))
            with watched(Steps(lambda step, place=place, at=at: next(place) == at)):  # type: ignore[misc]
                assert index_recording(store, row.id, flush=True) == 0
            assert verify(store).problems == []
        assert index_recording(store, row.id, flush=True) == 8
        sizes = KeySizes.of(row.spec.model.shape)
        with PageWriter(page_path(store, row.id), row.id) as writer:
            assert writer.dropped is None
            assert writer.append([page_unit(store, found, sizes) for found in store.units(row.id)]) == 0


def test_sqlite_says_that_the_disk_is_full(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 1)
    database = Database(tmp_path / "lobby.memdb" / CATALOG, write=True)
    pages = database.execute("PRAGMA page_count")[0][0]
    database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFull, match="no space left"), database.writing():
        database.insert("meta", ("big", "x" * 1_000_000))
    database.close()


# The store's own limit


def limited(store: Store, limit: int, when_full: str = "refuse") -> None:
    set_policy(store, Policy(limit, when_full))


def test_a_full_store_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        limited(store, STORE_BYTES_MIN)
        with pytest.raises(StoreFull, match="forget a span with memdb forget and run memdb compact"):
            append_big(writer, 100)
        number = store.recording("lobby").units
        assert number > 8
        assert used_bytes(store.path) <= STORE_BYTES_MIN
        assert verify(store).problems == []
        limited(store, 2 * STORE_BYTES_MIN)  # a policy may change while an ingest runs
        writer.append([big(number)])


def test_a_damaged_policy_is_a_warning_to_a_writer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with new_store(tmp_path) as store:
        limited(store, STORE_BYTES_MIN)
        flip(store.path / "policy.json", 9)
        with store.writer(spec()) as writer:
            for number in range(3):
                writer.append([unit(number)])
    assert caplog.text.count("policy.json is damaged") == 1


def test_the_oldest_goes_where_the_policy_says_so_and_the_store_stays_within_its_limit(
    tmp_path: Path,
) -> None:
    """A camera that writes five times what the store may hold: units of a megabyte, ten minutes each."""
    limit, step = 24 << 20, 300
    with new_store(tmp_path) as store:
        limited(store, limit, FORGET_OLDEST)
        with store.writer(spec(), segment_bytes_max=4_000_000) as writer:
            for number in range(120):
                writer.append([big(number, step=step)])
                if number % 20 == 0:
                    assert used_bytes(store.path) <= limit
        row = store.recording("lobby")
        assert row.units == 120
        kept = [found.number for found in store.units(row.id) if found.has_caption]
        assert kept == list(range(kept[0], 120))  # the newest, without holes
        assert len(kept) > 12
        assert 8 < len(row.tombstones) < 100
        assert verify(store).problems == []
        compact(store)
        assert len(store.catalog.database.select("tombstones", "")) == 1, "one stands for all the steps"
        assert used_bytes(store.path) <= limit
    assert holders(store.path, needles(big(3, step=step))) == {}


def test_whole_recordings_go_first_the_oldest_first(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        for name in ("second", "first", "third"):
            began_ns = 1_700_000_000_000_000_000 + {"first": 0, "second": 1, "third": 2}[name] * 10**15
            with store.writer(spec(name, started_at_ns=began_ns)) as writer:
                append_big(writer, 8)
        limited(store, used_bytes(store.path) + 5_000_000, FORGET_OLDEST)
        with store.writer(spec("fourth", started_at_ns=1_800_000_000_000_000_000)) as writer:
            append_big(writer, 16)
            assert {row.name for row in store.recordings()} == {"fourth", "third"}
        assert verify(store).problems == []


def test_the_last_hour_of_a_living_recording_stays(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        limited(store, STORE_BYTES_MIN, FORGET_OLDEST)
        with (
            store.writer(spec(), segment_bytes_max=1_000_000) as writer,
            pytest.raises(StoreFull, match="the store is full"),
        ):
            append_big(writer, 100)  # of two seconds each
        row = store.recording("lobby")
        assert all(found.has_caption for found in store.units(row.id))
        assert row.tombstones == ()
        assert row.units < HOUR_UNITS


def test_room_that_readers_hold_is_waited_for_and_nothing_more_is_forgotten(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        with store.writer(spec("old"), segment_bytes_max=3_000_000) as writer:
            append_big(writer, 20)
        with store.writer(spec("new", started_at_ns=1_800_000_000_000_000_000)) as writer:
            writer.append([big(0)])
            limited(store, used_bytes(store.path) + 2_000_000, FORGET_OLDEST)
            old = store.recording("old")
            first = store.unit(old.id, 0)
            with reading(store.segments_path, first.segment):
                with pytest.raises(StoreFull):
                    writer.append([big(1), big(2)])
                again = store.recording("old")
                with pytest.raises(StoreFull):
                    writer.append([big(1), big(2)])
                assert store.recording("old").tombstones == again.tombstones
            writer.append([big(1), big(2)])
        left = [found.has_caption for found in store.units(store.recording("old").id)]
        assert left == sorted(left)
        assert any(left)
        before = recording_digest(store, "new")
        compact(store)
        assert recording_digest(store, "new") == before
        assert verify(store).problems == []


def test_a_disk_with_little_room_is_made_room_on_by_the_same_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is far, the disk is not: what is oldest goes before the reserve is touched."""
    with new_store(tmp_path) as store:
        with store.writer(spec("old"), segment_bytes_max=3_000_000) as writer:
            append_big(writer, 20)
        set_policy(store, Policy(1 << 40, FORGET_OLDEST))
        disk = used_bytes(store.path) + RESERVE_BYTES + 4_000_000

        monkeypatch.setattr(room, "free_bytes", lambda folder: disk - used_bytes(store.path))
        monkeypatch.setattr("memdb.quota.free_bytes", lambda folder: disk - used_bytes(store.path))
        with store.writer(spec("new", started_at_ns=1_800_000_000_000_000_000)) as writer:
            append_big(writer, 8)
        assert store.recording("new").units == 8
        left = [found.has_caption for found in store.units(store.recording("old").id)]
        assert left == sorted(left)
        assert not left[0]
        assert left[-1]
        assert disk - used_bytes(store.path) >= RESERVE_BYTES
