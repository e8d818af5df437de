"""Forgetting: exactly what overlaps is gone, at once, for good, whenever it dies. The bytes: tests/test_compact.py."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.compact import compact
from memdb.database import CATALOG
from memdb.digest import unit_digest
from memdb.files import watched
from memdb.forget import OPEN_END_NS, ForgetReport, forget
from memdb.locks import FileLock, commit_lock, rewrite_lock
from memdb.repair import repair
from memdb.schemas.errors import BudgetError, StoreError, StoreFull, UnknownRecording, UsageError
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import Unit
from memdb.sealed import FORGOTTEN_DIGEST, read_unit
from memdb.segments import segment_files
from memdb.store import Store, recording_digest
from memdb.verify import verify
from tests.kill_cases import copied, deaths, quick_disk
from tests.store_cases import LAYERS, UNIT_NS, Steps, fill, flip, new_store, spec, unit

__all__ = ["quick_disk"]

UNITS = 6
Span = tuple[int, int]


def stored(store: Store, name: str = "lobby") -> list[Unit]:
    """All units of a recording from the bytes on disk."""
    row = store.recording(name)
    return [read_unit(store.segments_path, row, found) for found in store.units(row.id)]


def left_of(made: Unit, spans: list[Span]) -> Unit:
    """What must be left of a unit, put together block by block, without memdb's own way to it."""
    spans = [(start, end) for start, end in spans if made.start_ns < end and made.end_ns > start]
    if not spans:
        return made
    blocks = made.blocks.copy()
    for row in blocks:
        if any(row["start_ns"] < end and row["end_ns"] > start for start, end in spans):
            row["tokens"] = 0
    kept = [block for block in range(len(blocks)) if blocks[block]["tokens"]]
    husk = replace(made, blocks=blocks, caption=None, keyframe=None)
    if not kept or made.kv is None or made.keys is None:
        return replace(husk, kv=None, keys=None)
    keys = np.zeros_like(made.keys)
    keys[:, kept] = made.keys[:, kept]
    return replace(husk, keys=keys)


def assert_left(found: Unit, expected: Unit, made: Unit) -> None:
    """`found` is `expected`, its slices those of `made` bit for bit."""
    assert (found.number, found.start_ns, found.end_ns, found.epoch) == (
        made.number,
        made.start_ns,
        made.end_ns,
        made.epoch,
    )
    assert found.blocks.tobytes() == expected.blocks.tobytes()
    assert (found.caption is None) == (expected.caption is None)
    assert found.keyframe == expected.keyframe
    kept = [block for block in range(len(expected.blocks)) if expected.blocks[block]["tokens"]]
    if expected.keys is None or expected.kv is None:
        assert found.keys is found.kv is None
        return
    assert found.kv is not None
    assert found.keys is not None
    assert np.array_equal(found.keys, expected.keys)
    assert sorted(zip(found.kv.slices["layer"], found.kv.slices["block"], strict=True)) == [
        (layer, block) for layer in range(LAYERS) for block in kept
    ]
    assert made.kv is not None
    for piece in found.kv.slices:
        (first,) = [
            row for row in made.kv.slices if (row["layer"], row["block"]) == (piece["layer"], piece["block"])
        ]
        for kv, row in ((found.kv, piece), (made.kv, first)):
            assert row["stored_bytes"] == piece["stored_bytes"], kv
        ours = found.kv.payload[int(piece["offset"]) :][: int(piece["stored_bytes"])]
        theirs = made.kv.payload[int(first["offset"]) :][: int(first["stored_bytes"])]
        assert np.array_equal(ours, theirs)


# What goes, and what stays


@settings(max_examples=25, deadline=None)
@given(
    spans=st.lists(
        st.tuples(st.integers(0, 2 * UNITS), st.integers(1, 5), st.booleans()), min_size=1, max_size=4
    ),
    codec=st.sampled_from(["int4", "raw"]),
)
def test_exactly_what_overlaps_goes_whatever_the_spans(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int, bool]], codec: str
) -> None:
    """Spans in steps of half a unit, which is a block, and some of them a little longer."""
    wanted: list[Span] = []
    with new_store(tmp_path_factory.mktemp("store")) as store:
        fill(store, UNITS, codec=codec)
        for start, length, longer in spans:
            start_ns, end_ns = start * UNIT_NS // 2, (start + length) * UNIT_NS // 2 + (7 if longer else 0)
            report = forget(store, "lobby", start_ns=start_ns, end_ns=end_ns)
            touched = [n for n in range(UNITS) if n * UNIT_NS < end_ns and (n + 1) * UNIT_NS > start_ns]
            assert report.units == len(touched)
            wanted.append((start_ns, end_ns))
        for made, found in zip([unit(n, codec=codec) for n in range(UNITS)], stored(store), strict=True):
            assert_left(found, left_of(made, wanted), made)
        assert verify(store).problems == []
        before = recording_digest(store, "lobby")
        compact(store)
        assert recording_digest(store, "lobby") == before
        for made, found in zip([unit(n, codec=codec) for n in range(UNITS)], stored(store), strict=True):
            assert_left(found, left_of(made, wanted), made)


def test_the_report_counts_what_went(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        report = forget(store, "lobby", start_ns=UNIT_NS, end_ns=2 * UNIT_NS + UNIT_NS // 2)
    assert report == ForgetReport("lobby", False, 2.0, 5.0, units=2, captions=2, blocks=3, states=0)


def test_units_keep_their_numbers_commits_and_times(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        row = store.recording("lobby")
        before = [(u.number, u.commit_id, u.start_ns, u.end_ns, u.epoch) for u in store.units(row.id)]
        firsts = [u.first_digest for u in store.units(row.id)]
        forget(store, "lobby", start_ns=2 * UNIT_NS, end_ns=4 * UNIT_NS)
        after = store.units(row.id)
        assert [(u.number, u.commit_id, u.start_ns, u.end_ns, u.epoch) for u in after] == before
        assert [u.revision for u in after] == [0, 0, 1, 1, 0, 0]
        # Whether a guess at what was forgotten is right must not be told by its digest.
        firsts[2:4] = [FORGOTTEN_DIGEST] * 2
        assert [u.first_digest for u in after] == firsts
        digests = {unit_digest(unit(number)) for number in (2, 3)}
        assert not digests & {u.digest for u in after}
        moved = store.recording("lobby")
        assert (moved.units, moved.watermark_ns, moved.last_commit) == (
            row.units,
            row.watermark_ns,
            row.last_commit,
        )
        assert moved.tier_bytes.kv < row.tier_bytes.kv
        assert moved.tier_bytes.captions < row.tier_bytes.captions


def test_a_caption_goes_with_a_span_that_only_its_clip_overlaps(tmp_path: Path) -> None:
    """A unit may reach beyond its blocks: its caption speaks of all of it."""
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        made = unit(0)
        blocks = made.blocks.copy()
        blocks["end_ns"] = blocks["start_ns"] + 1
        writer.append([replace(made, blocks=blocks)])
        forget(store, "lobby", start_ns=UNIT_NS - 10, end_ns=UNIT_NS)
        (left,) = stored(store)
    assert left.caption is left.keyframe is None
    assert left.kv is not None
    assert left.blocks["tokens"].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("start_s", "end_s", "units"),
    [(None, 4, [0, 1]), (8, None, [4, 5]), (0, 1000, range(6)), (100, 200, []), (None, None, range(6))],
)
def test_spans_may_be_open_and_lie_outside(
    tmp_path: Path, start_s: int | None, end_s: int | None, units: list[int]
) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        start_ns = None if start_s is None else start_s * 10**9
        report = forget(store, "lobby", start_ns=start_ns, end_ns=None if end_s is None else end_s * 10**9)
        assert report.units == len(units)
        if report.whole:
            assert store.recordings() == []
            return
        assert [n for n, left in enumerate(stored(store)) if left.caption is None] == list(units)
        (stone,) = store.recording("lobby").tombstones
        assert (stone.start_ns, stone.below_unit) == (start_ns or 0, UNITS)
        assert stone.end_ns == (OPEN_END_NS if end_s is None else end_s * 10**9)


def test_an_open_end_does_not_forget_what_comes_later(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        forget(store, "lobby", start_ns=4 * UNIT_NS)
        fill_on(store, UNITS, UNITS + 2)
        lefts = stored(store)
    assert [n for n, left in enumerate(lefts) if left.caption is None] == [4, 5]


def fill_on(store: Store, first: int, stop: int) -> None:
    with store.writer(spec()) as writer:
        writer.append([unit(number) for number in range(first, stop)])


def test_forgetting_the_same_again_changes_nothing_more(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        forget(store, "lobby", start_ns=0, end_ns=3 * UNIT_NS)
        before = recording_digest(store, "lobby")
        again = forget(store, "lobby", start_ns=0, end_ns=3 * UNIT_NS)
        assert (again.captions, again.blocks) == (0, 0)
        assert recording_digest(store, "lobby") == before
        assert len(store.recording("lobby").tombstones) == 2
        assert verify(store).problems == []


def test_a_forgotten_recording_is_gone_and_its_name_is_free_at_once(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        fill(store, 2, "yard")
        old = store.recording("lobby").id
        store.state(old).save(4, b"a state")
        report = forget(store, "lobby")
        assert report.whole
        assert (report.units, report.captions, report.blocks, report.states) == (6, 6, 12, 1)
        assert [row.name for row in store.recordings()] == ["yard"]
        assert list((store.path / "state").iterdir()) == []
        with pytest.raises(UnknownRecording, match="'yard'"):
            forget(store, "lobby")
        fill(store, 1)
        assert store.recording("lobby").id != old
        assert verify(store).problems == []


# Wrong calls


def test_a_span_that_is_empty_says_so(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 1)
        for end_ns in (5, 4):
            with pytest.raises(UsageError, match="is empty"):
                forget(store, "lobby", start_ns=5, end_ns=end_ns)
        assert store.recording("lobby").tombstones == ()


def test_a_store_that_is_open_for_reading_forgets_nothing_in_silence(tmp_path: Path) -> None:
    """The store is opened for writing by the client; whoever opens it otherwise forgets all the same."""
    from memdb.client import connect

    with new_store(tmp_path) as store:
        fill(store, UNITS)
    with connect(tmp_path / "lobby.memdb") as client:
        report = client.forget("lobby", start_s="00:00:02", end_s=4.0)
        assert (report.start_s, report.end_s, report.units) == (2.0, 4.0, 1)
        assert client.store.unit(client.recordings()[0].id, 1).caption_tokens is None
        with pytest.raises(BudgetError):
            client.forget("lobby", start_s="yesterday")
        moment = "2023-11-14T22:13:30Z"  # 10 s after the recording's start
        assert client.forget("lobby", start_s=moment).units == 1


# States


def test_only_states_that_hold_nothing_of_it_stay(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        row = store.recording("lobby")
        states = store.state(row.id)
        states.save(4, b"reaches in", reach_ns=3 * UNIT_NS)
        states.save(6, b"does not", reach_ns=4 * UNIT_NS)
        report = forget(store, "lobby", start_ns=2 * UNIT_NS, end_ns=4 * UNIT_NS)
        assert report.states == 1
        stones = store.recording("lobby").tombstones
        found = states.load_latest(row.spec.encoding_fingerprint, 10, stones)
        assert found is not None
        assert found.unit == 6
        assert [path.name[-16:-6] for path in states.files()] == ["0000000006"]


# Damage


def test_a_unit_that_is_damaged_is_forgotten_as_a_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        row = store.unit(store.recording("lobby").id, 2)
        flip(store.segments_path / row.segment, row.payload_offset)
        with caplog.at_level(logging.WARNING):
            forget(store, "lobby", start_ns=row.start_ns, end_ns=row.start_ns + 1)
        assert "forgotten as a whole" in caplog.text
        left = stored(store)[2]
        assert left.kv is left.caption is None
        assert left.blocks["tokens"].tolist() == [0, 0]
        compact(store)
        assert verify(store).problems == []  # the damage went with it


# Writers and readers beside it


def test_units_in_hand_lose_what_was_forgotten_meanwhile(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0), unit(1)])
        forget(store, "lobby", start_ns=UNIT_NS, end_ns=3 * UNIT_NS)  # unit 2 is in hand
        writer.append([unit(2), unit(3)], tombstones_seen=0)
        lefts = stored(store)
        assert [left.caption is None for left in lefts] == [False, True, True, False]
        assert writer.tombstones() == (Tombstone(0, UNIT_NS, 3 * UNIT_NS, 2, writer.tombstones()[0].at_ns),)
        writer.append([unit(4)], tombstones_seen=1)
        assert verify(store).problems == []


def test_a_writer_ends_whose_recording_is_forgotten(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        with store.writer(spec()) as writer:
            writer.append([unit(0)])
            forget(store, "lobby")
            with pytest.raises(StoreError, match="was forgotten while it was written"):
                writer.append([unit(1)])
            report = compact(store)
            assert any("still being written" in left for done in report.recordings for left in done.left)
        assert store.recordings() == []
        compact(store)
        assert segment_files(store.segments_path) == {}


def test_a_reader_that_is_open_sees_it_at_once(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        with Store.open(store.path) as reader:
            row = reader.recording("lobby")
            assert reader.unit(row.id, 2).has_caption
            forget(store, "lobby", start_ns=2 * UNIT_NS, end_ns=3 * UNIT_NS)
            assert not reader.unit(row.id, 2).has_caption
            assert len(reader.recording("lobby").tombstones) == 1
            forget(store, "lobby")
            assert reader.recordings() == []


def test_it_waits_for_a_compaction_and_for_a_commit(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        row = store.recording("lobby")
        for lock in (rewrite_lock, commit_lock):
            done = threading.Event()
            worker = threading.Thread(
                target=lambda done=done: (forget(store, "lobby", start_ns=0, end_ns=1), done.set())
            )
            with FileLock(lock(store.path, row.id)):
                worker.start()
                assert not done.wait(0.1)
            worker.join()
            assert done.is_set()


def test_many_forget_at_once_and_all_of_it_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "lobby.memdb"
    with new_store(tmp_path) as store:
        fill(store, 8)

    def work(number: int) -> None:
        with Store.open(path, write=True) as own:
            forget(own, "lobby", start_ns=number * UNIT_NS, end_ns=(number + 1) * UNIT_NS)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(0, 8, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Store.open(path) as store:
        assert [left.caption is None for left in stored(store)] == [True, False] * 4
        assert sorted(stone.number for stone in store.recording("lobby").tombstones) == [0, 1, 2, 3]
        assert verify(store).problems == []


# For good


def test_a_catalog_made_anew_from_the_segments_does_not_bring_it_back(tmp_path: Path) -> None:
    path = tmp_path / "lobby.memdb"
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        fill(store, 2, "yard")
        forget(store, "lobby", start_ns=UNIT_NS, end_ns=2 * UNIT_NS + 1)
        forget(store, "yard")
        before = recording_digest(store, "lobby")
        stones = store.recording("lobby").tombstones
    for _ in range(2):  # before a compaction and after it
        (path / CATALOG).unlink()
        repair(path)
        with Store.open(path, write=True) as store:
            assert [row.name for row in store.recordings()] == ["lobby"]
            assert recording_digest(store, "lobby") == before
            assert store.recording("lobby").tombstones == stones
            assert verify(store).problems == []
            compact(store)


def test_a_catalog_from_before_does_not_bring_it_back(tmp_path: Path) -> None:
    """As after damage to the WAL: SQLite forgets commits, the segments do not."""
    path = tmp_path / "lobby.memdb"
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        fill(store, 2, "yard")
    shutil.copy(path / CATALOG, tmp_path / "older")
    with Store.open(path, write=True) as store:
        forget(store, "lobby", start_ns=UNIT_NS, end_ns=3 * UNIT_NS)
        forget(store, "yard")
        before = recording_digest(store, "lobby")
    shutil.copy(tmp_path / "older", path / CATALOG)
    with Store.open(path) as store:
        assert [row.name for row in store.recordings()] == ["lobby"]
        assert recording_digest(store, "lobby") == before
    with Store.open(path, write=True) as store:
        compact(store)
    with Store.open(path) as store:
        assert recording_digest(store, "lobby") == before
        assert verify(store).problems == []


def span_of(path: Path) -> ForgetReport:
    with Store.open(path, write=True) as store:
        return forget(store, "lobby", start_ns=UNIT_NS, end_ns=2 * UNIT_NS + 1)


def all_of(path: Path) -> ForgetReport | None:
    with Store.open(path, write=True) as store:
        if not store.recordings():
            return None
        return forget(store, "lobby")


def digest_of(path: Path) -> str:
    with Store.open(path) as store:
        assert verify(store).problems == []
        return recording_digest(store, "lobby") if store.recordings() else "gone"


def closed(tmp_path: Path) -> Path:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        row = store.recording("lobby")
        store.state(row.id).save(UNITS, b"a state", reach_ns=0)
        return store.path


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("work", [span_of, all_of])
def test_it_can_die_at_any_step(tmp_path: Path, work: object) -> None:
    assert callable(work)
    path = closed(tmp_path)
    before = digest_of(path)
    other = copied(path, "undisturbed")
    work(other)
    after = digest_of(other)
    assert before != after
    outcomes = []
    for copy, when in deaths(path, work):
        outcomes.append(digest_of(copy))
        assert outcomes[-1] in (before, after), when
        with Store.open(copy) as reader:
            for row in reader.recordings():
                state = reader.state(row.id).load_latest(row.spec.encoding_fingerprint, 99, row.tombstones)
                assert (state is None) == (outcomes[-1] == after), when
        work(copy)
        assert digest_of(copy) == after, when
        with Store.open(copy, write=True) as store:
            compact(store)
        assert digest_of(copy) == after, when
    assert set(outcomes) == {before, after}


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("work", [span_of, all_of])
def test_a_disk_that_fills_up_at_any_write_is_a_typed_error(tmp_path: Path, work: object) -> None:
    assert callable(work)
    path = closed(tmp_path)
    before = digest_of(path)
    counted = Steps()
    other = copied(path, "counted")
    with watched(counted):
        work(other)
    after = digest_of(other)
    kinds = ("create", "write", "sync", "sync_folder")
    steps = [at for at, step in enumerate(counted.seen) if step.what in kinds]
    assert len(steps) >= 5
    for number, at in enumerate(steps):
        copy = copied(path, f"full{number}")
        place = iter(range(10_000))
        full = Steps(lambda step, place=place, at=at: next(place) == at)  # type: ignore[misc]
        with watched(full), pytest.raises(StoreFull):
            work(copy)
        assert digest_of(copy) in (before, after)
        work(copy)
        assert digest_of(copy) == after


def test_a_failing_disk_is_not_said_to_be_full(tmp_path: Path) -> None:
    path = closed(tmp_path)
    broken = Steps(lambda step: step.what == "write", OSError(5, "Input/output error"))
    with watched(broken), pytest.raises(StoreError, match="Input/output error") as caught:
        span_of(path)
    assert not isinstance(caught.value, StoreFull)


def test_time_of_the_tombstone_is_the_wall_clock(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
        before = time.time_ns()
        forget(store, "lobby", start_ns=0, end_ns=1)
        forget(store, "lobby", start_ns=0, end_ns=1, now_ns=77)
        first, second = store.recording("lobby").tombstones
    assert before <= first.at_ns <= time.time_ns()
    assert second.at_ns == 77
