"""Compaction: nothing that counts is lost, nothing that was forgotten is left, whenever it dies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memdb import room
from memdb.applying import REWRITE
from memdb.captions import CaptionIndex
from memdb.compact import CompactProgress, CompactReport, compact
from memdb.digest import unit_digest
from memdb.files import watched
from memdb.forget import forget
from memdb.index.key_table import KeyTable
from memdb.index.page_writer import index_recording
from memdb.index.pages import page_path
from memdb.locks import FileLock, rewrite_lock
from memdb.page_check import check_pages
from memdb.records import Kind
from memdb.schemas.errors import StoreFull
from memdb.schemas.units import Unit
from memdb.segments import reading, scan
from memdb.store import Store, recording_digest
from memdb.verify import verify
from tests.kill_cases import Death, Killed, copied, deaths, quick_disk
from tests.needle_cases import holders, needles
from tests.store_cases import UNIT_NS, Steps, fill, flip, new_store, spec, unit

__all__ = ["quick_disk"]

UNITS = 12
SPAN = (4, 6)  # units that are forgotten in most tests


def forgotten_store(folder: Path, *, units: int = UNITS, derived: bool = True, captions: bool = True) -> Path:
    """A closed store of two recordings with all that is derived; a span of one and all of the other are forgotten.

    `captions`: with LanceDB's table of them, which takes its time.
    """
    path = folder / "lobby.memdb"
    with new_store(folder) as store:
        for name in ("lobby", "yard"):
            fill(store, units, name)
            row = store.recording(name)
            if derived:
                index_recording(store, row.id, flush=True)
        if derived and captions:
            CaptionIndex(store.path).index_captions(store, "fake", flush=True)
        states = [store.state(store.recording(name).id) for name in ("lobby", "yard")]
        forget_span(store)
        forget(store, "yard")
        for state in states:  # as an ingest might that took no note yet
            state.save(units, needles(unit(SPAN[0]))["vector"] * 3, reach_ns=0)
    return path


def forget_span(store: Store) -> None:
    forget(store, "lobby", start_ns=SPAN[0] * UNIT_NS, end_ns=SPAN[1] * UNIT_NS)


def gone() -> list[Unit]:
    return [unit(number) for number in range(*SPAN)]


def compacted(path: Path, **options: object) -> CompactReport:
    with Store.open(path, write=True) as store:
        return compact(store, **options)  # type: ignore[arg-type]


def digest_of(path: Path) -> str:
    with Store.open(path) as store:
        return recording_digest(store, "lobby")


def assert_whole(path: Path) -> None:
    with Store.open(path) as store:
        report = verify(store, checkers=[check_pages])
        assert report.problems == []


def left_of(path: Path) -> dict[str, list[str]]:
    """What of the forgotten units is found, and where."""
    found: dict[str, list[str]] = {}
    for number, one in zip(range(*SPAN), gone(), strict=True):
        found |= {f"unit {number}: {name}": files for name, files in holders(path, needles(one)).items()}
    return found


# What goes, and what stays


def test_no_file_holds_what_was_forgotten_and_the_same_search_found_it_before(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path)
    before = left_of(path)
    named = {name.split(": ")[1].split(" ")[0] for name in before}
    assert named == {"caption", "vector", "picture", "key", "slice"}
    files = {file.split("/")[0] for found in before.values() for file in found}
    assert files == {"segments", "keys", "state", "captions.lance"}
    digest = digest_of(path)
    report = compacted(path)
    assert left_of(path) == {}
    assert report.left == [left for done in report.recordings for left in done.left] == []
    assert digest_of(path) == digest
    assert_whole(path)


def test_all_files_of_a_forgotten_recording_go_and_its_name_is_free(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path)
    with Store.open(path) as store:
        (yard,) = store.catalog.forgotten()
    assert any(yard in file.name for file in path.rglob("*"))
    compacted(path)
    assert not [file for file in path.rglob("*") if yard in file.name or yard.encode() in _bytes(file)]
    with Store.open(path, write=True) as store:
        assert store.catalog.forgotten() == []
        fill(store, 2, "yard")
        assert store.recording("yard").units == 2
    assert_whole(path)


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_what_stays_is_found_as_before_in_every_tier(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path)
    compacted(path)
    with Store.open(path) as store:
        row = store.recording("lobby")
        assert [found.number for found in store.units(row.id)] == list(range(UNITS))
        assert [found.commit_id for found in store.units(row.id)] == list(range(1, UNITS + 1))
        table = KeyTable.open(store, row.id)
        kept = [number for number in range(UNITS) if number not in range(*SPAN)]
        assert sorted(set(table.blocks["unit"].tolist())) == kept
        assert table.blocks["block"].tolist() == [0, 1] * len(kept)
        for layer in range(2):
            keys = table.layer_keys(layer).reshape(len(kept), 2, -1)
            for at, number in enumerate(kept):
                made = unit(number).keys
                assert made is not None
                assert np.array_equal(keys[at], made[layer])
        assert table.captions["unit"].tolist() == kept
        table.close()
        for number in kept:
            found = store.read_caption(store.unit(row.id, number))
            assert found.text == unit(number).caption.text  # type: ignore[union-attr]
        hits = CaptionIndex(path).search(store, "fake", text="red star", limit=UNITS)
        assert sorted(hit.unit for hit in hits.hits) == kept


def test_events_are_carried_over(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        with store.writer(spec()) as writer:
            writer.epoch(0, 0, "the beginning")
            writer.append([unit(number) for number in range(UNITS)])
            writer.gap(UNITS * UNIT_NS, (UNITS + 1) * UNIT_NS, "the camera slept")
            writer.end((UNITS + 2) * UNIT_NS)
        forget_span(store)
        before = store.recording("lobby")
        compact(store)
        after = store.recording("lobby")
        rewritten = [row.name for row in store.catalog.segments(after.id) if row.role == REWRITE]
        with reading(store.segments_path, *rewritten) as segment:
            kinds = [record.kind for record in scan(segment, 0, previous=b"", bodies=True).records]
    assert (after.gaps, after.epochs, after.end_ns, after.tombstones) == (
        before.gaps,
        before.epochs,
        before.end_ns,
        before.tombstones,
    )
    assert kinds.count(Kind.TOMBSTONE) == 2  # so that no single flip brings back what it means
    assert [kinds.count(kind) for kind in (Kind.GAP, Kind.EPOCH, Kind.END)] == [1, 1, 1]
    assert kinds[0] is Kind.HEADER
    assert kinds[-1] is Kind.SEAL


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path)
    compacted(path)
    files = sorted(file.name for file in path.rglob("*.seg"))
    again = compacted(path)
    assert [done.segments for done in again.recordings] == [0]
    assert sorted(file.name for file in path.rglob("*.seg")) == files


def test_small_files_are_merged_once_they_are_many_and_big_ones_are_left(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        for number in range(7):
            with store.writer(spec()) as writer:
                writer.append([unit(number)])
        assert sum(done.segments for done in compact(store).recordings) == 0
        with store.writer(spec()) as writer:
            writer.append([unit(7)])
        before = recording_digest(store, "lobby")
        assert sum(done.segments for done in compact(store).recordings) == 1
        (segment,) = store.catalog.segments(store.recording("lobby").id)
        assert segment.role == REWRITE
        assert recording_digest(store, "lobby") == before
    with new_store(tmp_path / "big") as store:
        for number in range(16):
            with store.writer(spec()) as writer:
                writer.append([unit(number)])
        size = max(path.stat().st_size for path in store.segments_path.iterdir())
        assert sum(done.segments for done in compact(store, segment_bytes_max=4 * size).recordings) == 0


def test_a_group_makes_a_file_of_at_most_the_size_that_is_wanted(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        for number in range(16):
            with store.writer(spec()) as writer:
                writer.append([unit(number, codec="int4")])
        forget(store, "lobby", start_ns=0, end_ns=UNIT_NS)
        size = max(path.stat().st_size for path in store.segments_path.iterdir())
        report = compact(store, segment_bytes_max=100 * size)  # all 17 are small, and too big together
        rows = store.catalog.segments(store.recording("lobby").id)
    assert sum(done.segments for done in report.recordings) == len(rows)
    assert max(row.end_bytes for row in rows) <= 100 * size


def test_progress_grows_to_its_total(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path)
    told: list[CompactProgress] = []
    compacted(path, progress=told.append)
    assert {now.recording for now in told} == {"lobby"}
    assert [now.done_bytes for now in told] == sorted(now.done_bytes for now in told)
    assert told[0].done_bytes == 0
    assert 0.8 * told[-1].total_bytes < told[-1].done_bytes <= told[-1].total_bytes


def test_the_report_says_what_was_freed(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path)
    before = sum(file.stat().st_size for file in path.rglob("*.seg"))
    report = compacted(path)
    after = sum(file.stat().st_size for file in path.rglob("*.seg"))
    assert {done.recording for done in report.recordings} == {"lobby", ""}
    assert report.freed_bytes > before - after > 0


def test_torn_tails_and_files_that_were_never_begun_go(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path, derived=False)
    with Store.open(path, write=True) as store:
        row = store.recording("lobby")
        (stream,) = [held for held in store.catalog.segments(row.id) if held.role == "stream"]
        with (store.segments_path / stream.name).open("ab") as file:
            file.write(needles(unit(SPAN[0]))["vector"] * 4)  # what a killed writer had in hand
        (store.segments_path / f"{row.id}-000099.seg").write_bytes(b"")
        (path / "state" / f"{row.id}-0000000099.state.tmp").write_bytes(b"half a state")
        (path / "policy.json.tmp").write_bytes(b"half a policy")
        (path / "keys").mkdir()
        (path / "keys" / f"{'0' * 32}.pages").write_bytes(b"of nobody")
        (path / "keys" / f"{row.id}-7.pages").write_bytes(b"of another generation")
        (path / "state" / f"{'0' * 32}-0000000001.state").write_bytes(b"of nobody")
        report = compact(store)
    assert [left for done in report.recordings for left in done.left] == []
    assert left_of(path) == {}
    names = {file.name for file in path.rglob("*") if file.is_file()}
    assert not {name for name in names if name.endswith((".tmp", ".pages")) or "0" * 31 in name}
    assert not {name for name in names if "000099" in name}
    assert_whole(path)


def test_a_file_of_another_store_is_left_where_it_is(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path, derived=False)
    with Store.open(path) as store:
        lobby = store.recording("lobby").id
    with new_store(tmp_path / "other") as other:
        fill(other, 2)
        (found,) = other.segments_path.iterdir()
        foreign = path / "segments" / f"{lobby}-000050.seg"
        foreign.write_bytes(found.read_bytes())
    report = compacted(path)
    assert any("000050" in left for done in report.recordings for left in done.left)
    assert foreign.exists()


# Damage


def test_a_file_with_damage_in_what_counts_is_left_alone_and_reported(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path, derived=False)
    with Store.open(path) as store:
        row = store.recording("lobby")
        kept = store.unit(row.id, 0)
    flip(path / "segments" / kept.segment, kept.payload_offset)
    before = (path / "segments" / kept.segment).read_bytes()
    report = compacted(path)
    (done,) = [done for done in report.recordings if done.recording == "lobby"]
    assert done.segments == 0
    assert any(kept.segment in left for left in done.left)
    assert (path / "segments" / kept.segment).read_bytes() == before
    assert not [file for file in path.rglob("*.seg") if file.name > kept.segment.replace("000000", "000001")]
    flip(path / "segments" / kept.segment, kept.payload_offset)
    compacted(path)
    assert left_of(path) == {}


@pytest.mark.parametrize("where", ["body", "footer"])
def test_damage_in_what_was_forgotten_does_not_keep_it(tmp_path: Path, where: str) -> None:
    with new_store(tmp_path) as store:
        fill(store, UNITS)
        dead = store.unit(store.recording("lobby").id, SPAN[0])
        forget_span(store)
    path = tmp_path / "lobby.memdb"
    flip(
        path / "segments" / dead.segment,
        dead.body_offset if where == "body" else dead.offset + dead.length - 1,
    )
    report = compacted(path)
    assert [left for done in report.recordings for left in done.left] == []
    assert left_of(path) == {}
    assert_whole(path)


# Beside readers and writers


def test_what_a_reader_has_open_stays_readable_and_goes_with_the_next_run(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path)
    with Store.open(path) as reader:
        row = reader.unit(reader.recording("lobby").id, SPAN[1])
        with reading(reader.segments_path, row.segment) as segment:
            report = compacted(path)
            (done,) = [done for done in report.recordings if done.recording == "lobby"]
            assert any("being read" in left for left in done.left)
            assert (path / "segments" / row.segment).exists()
            assert segment.size_bytes == (path / "segments" / row.segment).stat().st_size
        assert_whole(path)
        moved = reader.unit(row.recording_id, row.number)
        assert moved.segment != row.segment
        assert reader.read_caption(moved).text == unit(row.number).caption.text  # type: ignore[union-attr]
    compacted(path)
    assert left_of(path) == {}


def test_pages_that_a_reader_has_open_go_on_until_it_looks_again(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path)
    with Store.open(path) as reader:
        lobby = reader.recording("lobby").id
        table = KeyTable.open(reader, lobby)
        rows = len(table)
        compacted(path)
        assert len(table.layer_keys(0)) == rows  # the old rows, of the old file
        table.refresh()
        assert table.generation == 1
        assert len(table) == rows - 2 * (SPAN[1] - SPAN[0])
        assert page_path(reader, lobby).name.endswith("-1.pages")
        table.close()


def test_a_living_writer_keeps_its_file_and_the_next_run_has_it(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(number) for number in range(UNITS)])
        forget_span(store)
        (done,) = compact(store).recordings
        assert done.segments == 0
        assert any("is being written" in left for left in done.left)
        writer.append([unit(UNITS)])  # it reads the tombstone, and goes on in a new file
        (done,) = compact(store).recordings
        assert (done.segments, done.left) == (1, [])
        writer.append([unit(UNITS + 1)])
        assert writer.recording.id == store.recording("lobby").id
        assert store.recording("lobby").units == UNITS + 2
    path = tmp_path / "lobby.memdb"
    assert left_of(path) == {}
    assert_whole(path)


def test_writers_and_readers_go_on_while_it_runs(tmp_path: Path) -> None:
    """Appends, reads and forgettings against one compaction after another: nothing is missing, all is verified."""
    path = tmp_path / "lobby.memdb"
    troubles: list[BaseException] = []
    ends = threading.Event()

    def told(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            troubles.append(error)
            ends.set()

    def write() -> None:
        with Store.open(path, write=True) as store, store.writer(spec(), segment_bytes_max=20_000) as writer:
            for number in range(4, 100):
                writer.append([unit(number)])
        ends.set()

    def look() -> None:
        with Store.open(path) as store:
            while not ends.is_set():
                row = store.recording("lobby")
                for number in (0, row.units // 2, row.units - 1):
                    for tries in range(3):
                        found = store.unit(row.id, number)
                        try:
                            if found.has_caption:
                                assert store.read_caption(found).text == unit(number).caption.text  # type: ignore[union-attr]
                            break
                        except Exception:
                            if tries == 2:
                                raise

    with new_store(tmp_path) as store:
        fill(store, 4)
        threads = [threading.Thread(target=told, args=(work,)) for work in (write, look)]
        for thread in threads:
            thread.start()
        runs = 0
        while not ends.is_set():
            row = store.recording("lobby")
            if row.units > 8:
                forget(store, "lobby", start_ns=(row.units - 6) * UNIT_NS, end_ns=(row.units - 5) * UNIT_NS)
            compact(store, segment_bytes_max=50_000)
            runs += 1
        for thread in threads:
            thread.join()
        assert troubles == []
        assert runs > 2
        compact(store)
        assert store.recording("lobby").units == 100
        report = verify(store, checkers=[check_pages])
        assert report.problems == []
        gone_units = [row.number for row in store.units(store.recording("lobby").id) if not row.has_caption]
    found = [number for number in gone_units if holders(path, needles(unit(number)))]
    assert found == []


def test_another_compaction_at_work_is_not_waited_for(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path, derived=False)
    with Store.open(path) as store:
        lobby = store.recording("lobby").id
    with FileLock(rewrite_lock(path, lobby)):
        report = compacted(path)
    (done,) = [done for done in report.recordings if done.recording == "lobby"]
    assert any("another process" in left for left in done.left)
    compacted(path)
    assert left_of(path) == {}


# No room


def test_a_file_that_the_disk_has_no_room_for_is_left_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forgotten_store(tmp_path, derived=False)
    monkeypatch.setattr(room, "free_bytes", lambda folder: room.UPKEEP_RESERVE_BYTES + 100)
    digest, before = digest_of(path), left_of(path)
    report = compacted(path)
    (done,) = [done for done in report.recordings if done.recording == "lobby"]
    assert any("no room" in left for left in done.left)
    assert done.segments == 0
    assert {name for name in before if "slice" in name} <= set(left_of(path))
    monkeypatch.undo()
    compacted(path)
    assert left_of(path) == {}
    assert digest_of(path) == digest


@pytest.mark.usefixtures("quick_disk")
def test_a_disk_that_fills_up_at_any_write_is_a_typed_error_and_costs_nothing(tmp_path: Path) -> None:
    path = forgotten_store(tmp_path, units=8, captions=False)
    digest = digest_of(path)
    counted = Steps()
    copy = copied(path, "counted")
    with watched(counted):
        compacted(copy)
    kinds = ("create", "write", "sync", "sync_folder", "truncate")
    steps = [at for at, step in enumerate(counted.seen) if step.what in kinds]
    assert len(steps) > 10
    typed = 0
    for number, at in enumerate(steps):
        copy = copied(path, f"full{number}")
        place = iter(range(len(counted.seen) + 1000))
        full = Steps(lambda step, place=place, at=at: next(place) == at and step.what in kinds)  # type: ignore[misc]
        try:
            with watched(full):
                compacted(copy)
        except StoreFull:
            typed += 1
        assert digest_of(copy) == digest
        assert_whole(copy)
        compacted(copy)
        assert left_of(copy) == {}
        assert digest_of(copy) == digest
    assert typed > len(steps) // 2  # key pages are derived: there it is told as left


# Deaths


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_it_can_die_at_any_step(tmp_path: Path, every: int) -> None:
    path = forgotten_store(tmp_path, units=8, captions=False)
    digest = digest_of(path)
    assert left_of(path)
    trials = 0
    for copy, when in deaths(path, compacted, every=every):
        trials += 1
        assert digest_of(copy) == digest, when
        with Store.open(copy) as store:
            assert [row.name for row in store.recordings()] == ["lobby"], when
            assert verify(store).problems == [], when
        report = compacted(copy)
        assert [left for done in report.recordings for left in done.left] == [], when
        assert left_of(copy) == {}, when
        assert digest_of(copy) == digest, when
        assert_whole(copy)
        assert [done.segments for done in compacted(copy).recordings] == [0], when
    assert trials > 30


def test_watch_sees_its_pages(tmp_path: Path) -> None:
    """The deaths above are worth nothing where a step goes past the watch."""
    path = forgotten_store(tmp_path)
    steps = Steps()
    with watched(steps):
        compacted(path)
    written = {step.path.suffix for step in steps.seen if step.what == "write"}
    assert {".seg", ".pages"} <= written
    removed = {step.path.suffix for step in steps.seen if step.what == "unlink"}
    assert {".seg", ".pages", ".state"} <= removed


def test_a_file_that_is_too_big_becomes_several_and_a_kill_costs_one_of_them(tmp_path: Path) -> None:
    """As an import may bring one: a file of all units, far above the size of ours."""
    with new_store(tmp_path) as store:
        fill(store, 40, batch=40)
        forget_span(store)
        size = sum(path.stat().st_size for path in store.segments_path.iterdir())
    path = tmp_path / "lobby.memdb"
    before, most = digest_of(path), size // 5
    counted = Steps()
    other = copied(path, "counted")
    with watched(counted):
        report = compacted(other, segment_bytes_max=most)
    assert [done.segments for done in report.recordings] == [4]
    assert max(file.stat().st_size for file in other.rglob("*.seg")) < 1.5 * most
    assert digest_of(other) == before
    seals = [
        at for at, step in enumerate(counted.seen) if step.name == "a sealed segment, before it is committed"
    ]
    assert len(seals) == 4
    death = Death(seals[2], "before")
    with pytest.raises(Killed), watched(death):
        compacted(path, segment_bytes_max=most)
    assert digest_of(path) == before
    (done,) = compacted(path, segment_bytes_max=most).recordings
    assert done.segments < 4  # what was done is done
    assert digest_of(path) == before
    assert left_of(path) == {}
    assert_whole(path)


def test_not_even_digests_and_names_of_what_was_forgotten_stay(tmp_path: Path) -> None:
    """Who has the film could tell by a digest that it was here; free pages of SQLite and its WAL count, too."""
    with new_store(tmp_path) as store:
        for name in ("lobby", "backyard"):
            fill(store, UNITS, name)
    path = tmp_path / "lobby.memdb"
    digests = [unit_digest(unit(number)) for number in range(*SPAN)]
    wanted = {f"digest {at}": digest for at, digest in enumerate(digests)}
    wanted |= {f"hex {at}": digest.hex().encode() for at, digest in enumerate(digests)} | {
        "name": b"backyard"
    }
    before = holders(path, wanted)
    assert set(before) == set(wanted)
    assert any("catalog" in file for file in before["digest 0"])
    with Store.open(path, write=True) as store:
        for name in ("lobby", "backyard"):
            forget_span(store) if name == "lobby" else forget(store, name)
        compact(store)
    assert holders(path, wanted) == {}
