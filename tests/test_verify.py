"""verify sees every flipped bit, names what is touched, and tells a torn tail from damage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from memdb.database import CATALOG
from memdb.forget import forget
from memdb.records import Kind, encode
from memdb.schemas.errors import MemdbError
from memdb.segments import segment_name
from memdb.stats import stats
from memdb.store import Store
from memdb.verify import Problem, VerifyReport, verify, verify_path
from tests.store_cases import UNIT_NS, directory_digest, fill, flip, new_store, spec, unit


@pytest.fixture(params=["int4", "raw"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two recordings, three segments, a gap, an epoch, an end, two states; closed."""
    with new_store(tmp_path) as store:
        fill(store, 2, codec=request.param)
        with store.writer(spec(codec=request.param)) as writer:
            writer.gap(2 * UNIT_NS, 3 * UNIT_NS, "the camera slept")
            writer.epoch(1, 2, "after the gap")
            writer.append([unit(2, codec=request.param)])
            writer.end(3 * UNIT_NS)
            store.state(writer.recording.id).save(2, b"two")
            store.state(writer.recording.id).save(3, b"three")
        fill(store, 1, "door", codec="none")
    return tmp_path / "lobby.memdb"


def check(folder: Path) -> VerifyReport:
    with Store.open(folder) as store:
        return verify(store)


def segment_paths(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def test_a_whole_store_is_whole(folder: Path) -> None:
    before = directory_digest(folder)
    steps: list[tuple[int, int]] = []
    with Store.open(folder) as store:
        report = verify(store, progress=lambda done, total: steps.append((done, total)))
    assert report == VerifyReport(checked_bytes=report.checked_bytes)
    sizes = [path.stat().st_size for path in (*segment_paths(folder), folder / CATALOG)]
    assert report.checked_bytes >= sum(sizes)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] <= steps[-1][1]
    assert directory_digest(folder) == before


def test_every_flipped_bit_of_a_segment_is_reported(folder: Path) -> None:
    with Store.open(folder) as store:
        for path in segment_paths(folder):
            size = path.stat().st_size
            for byte in range(0, size, 61):
                flip(path, byte, byte % 8)
                files = {problem.file for problem in verify(store).problems}
                assert files == {f"segments/{path.name}"}, (path.name, byte)
                flip(path, byte, byte % 8)
        assert verify(store).ok


def test_a_problem_names_recording_and_time(folder: Path) -> None:
    with Store.open(folder) as store:
        row = store.unit(store.recording("lobby").id, 1)
        flip(store.segments_path / row.segment, row.payload_offset + 70)
        problems = verify(store).problems
    assert len(problems) == 1
    assert (problems[0].recording, problems[0].start_s, problems[0].end_s) == ("lobby", 2.0, 4.0)


def test_damage_of_one_record_hides_no_other(folder: Path) -> None:
    """Also where the prologue, by which one goes forward, is what was damaged."""
    with Store.open(folder) as store:
        rows = store.units(store.recording("lobby").id)
        path = store.segments_path / rows[0].segment
        assert rows[0].segment == rows[1].segment
        for byte in (rows[0].offset + 9, rows[0].offset + rows[0].length - 1):
            flip(path, byte)
            flip(path, rows[1].payload_offset)
            assert sorted(problem.start_s or 0 for problem in verify(store).problems) == [0, 2]
            flip(path, byte)
            flip(path, rows[1].payload_offset)


def test_a_flipped_bit_of_a_state_is_reported(folder: Path) -> None:
    with Store.open(folder) as store:
        path = store.state(store.recording("lobby").id).files()[0]
        for byte in range(0, path.stat().st_size, 7):
            flip(path, byte)
            problems = verify(store).problems
            assert [(problem.file, problem.recording) for problem in problems] == [
                (f"state/{path.name}", "lobby")
            ]
            flip(path, byte)


def test_a_missing_and_a_cut_segment_are_reported(folder: Path) -> None:
    with Store.open(folder) as store:
        row = store.units(store.recording("lobby").id)[1]
        path = store.segments_path / row.segment
        data = path.read_bytes()
        os.truncate(path, row.offset + row.length - 64)
        problems = verify(store).problems
        assert [(problem.file, problem.start_s) for problem in problems] == [(f"segments/{row.segment}", 2.0)]
        path.unlink()
        assert f"segments/{row.segment}" in {problem.file for problem in verify(store).problems}
        path.write_bytes(data)
        assert verify(store).ok


def test_a_swapped_segment_is_reported(folder: Path) -> None:
    """Every byte is whole, and it is another file."""
    first, second = segment_paths(folder)[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert not check(folder).ok


def test_rows_of_the_catalog_are_compared_with_the_segments(folder: Path, tmp_path: Path) -> None:
    """A row that is whole and wrong, as an older copy of the catalog would hold it."""
    from memdb.catalog import Catalog

    catalog = Catalog(folder / CATALOG, write=True)
    recording = catalog.find("lobby")
    assert recording is not None
    row = catalog.unit(recording.id, 1)
    values = [getattr(row, name) for name in row.__dataclass_fields__]
    values[list(row.__dataclass_fields__).index("end_ns")] += 1
    with catalog.database.writing():
        catalog.database.upsert("units", values)
    catalog.close()
    problems = check(folder).problems
    assert len(problems) == 1
    assert "differs from its row" in problems[0].what


def test_flipped_bits_of_the_catalog_are_reported_or_harmless(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.memdb"
    shutil.copytree(folder, copy)
    whole = (folder / CATALOG).read_bytes()
    reported = 0
    for trial, byte in enumerate(range(0, len(whole), len(whole) // 60)):
        flip(copy / CATALOG, byte, trial % 8)
        try:
            report = verify_path(copy)
        except MemdbError:  # a format that it cannot know
            reported += 1
        else:
            reported += not report.ok
            assert all(problem.file == CATALOG for problem in report.problems)
        (copy / CATALOG).write_bytes(whole)
    assert reported > 0


def test_a_torn_tail_is_told_and_is_no_problem(folder: Path) -> None:
    path = segment_paths(folder)[0]
    with path.open("ab") as file:
        file.write(b"torn")
    report = check(folder)
    assert report.ok
    assert any("4 torn bytes" in note and path.name in note for note in report.notes)


def test_whole_records_behind_the_end_are_told(folder: Path) -> None:
    path = segment_paths(folder)[0]
    buffers, _ = encode(Kind.GAP, 9, {}, offset=path.stat().st_size, previous=b"")
    with path.open("ab") as file:
        file.write(b"".join(buffers))
    report = check(folder)
    assert report.ok
    assert any("1 whole records" in note for note in report.notes)


def test_foreign_files_are_told(folder: Path) -> None:
    (folder / "segments" / "notes.txt").write_text("mine")
    (folder / "segments" / segment_name("c" * 32, 0)).write_bytes(b"x" * 10)
    report = check(folder)
    assert report.ok
    assert len(report.notes) == 2


def test_a_live_writer_is_no_damage(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0)])
        path = store.segments_path / store.unit(writer.recording.id, 0).segment
        with path.open("ab") as file:
            file.write(b"half a record, being written")
        assert verify(store) == VerifyReport(checked_bytes=verify(store).checked_bytes)


def test_checkers_of_others_are_asked(folder: Path) -> None:
    problem = Problem("keys/one.keys", "is damaged", "lobby", 0.0, 1.0)
    with Store.open(folder) as store:
        assert verify(store, checkers=[lambda path: [problem] if path == folder else []]).problems == [
            problem
        ]


def test_a_store_too_damaged_to_open_is_reported(folder: Path) -> None:
    (folder / CATALOG).write_bytes(b"\0" * 8192)
    report = verify_path(folder)
    assert [problem.file for problem in report.problems] == [CATALOG]


def test_stats_count_every_byte(folder: Path) -> None:
    with Store.open(folder) as store:
        found = stats(store)
        rows = {row.name: row for row in store.recordings()}
        units = {name: store.units(row.id) for name, row in rows.items()}
    on_disk = {
        name: sum(path.stat().st_size for path in segment_paths(folder) if path.name.startswith(row.id))
        for name, row in rows.items()
    }
    assert [item.name for item in found.recordings] == ["door", "lobby"]
    for item in found.recordings:
        assert sum(item.bytes.values()) - item.bytes["state"] == on_disk[item.name]
        assert item.bytes["kv"] == sum(row.payload_bytes for row in units[item.name] if len(row.slices))
        assert item.units == len(units[item.name])
        assert item.watermark_s == 2.0 * item.units
    lobby = found.recordings[1]
    assert (lobby.gaps, lobby.finished, lobby.recipe) == (1, True, "fake")
    assert lobby.bytes["state"] == sum(path.stat().st_size for path in (folder / "state").iterdir())
    everything = [path for path in folder.rglob("*") if path.is_file()]
    assert found.total_bytes == sum(path.stat().st_size for path in everything)
    assert found.model == "random:0"


def test_every_unit_of_a_file_that_is_another_ones_is_named(folder: Path) -> None:
    """Whole records, whole rows, and they have nothing to do with each other."""
    with Store.open(folder, write=True) as store:
        fill(store, 3, "hall")
        forget(store, "hall", start_ns=0, end_ns=UNIT_NS)
        with store.writer(spec("hall", codec="int4")) as writer:
            writer.append([unit(3), unit(4)])
        rows = [row for recording in store.recordings() for row in store.units(recording.id)]
        segments = sorted(store.segments_path.iterdir())
    every = {segment: [row for row in rows if row.segment == segment.name] for segment in segments}
    held = {segment: own for segment, own in every.items() if own}
    assert len(held) > 2
    for segment, own in held.items():
        before = segment.read_bytes()
        for other in held.keys() - {segment}:
            segment.write_bytes(other.read_bytes())
            problems = verify_path(folder).problems
            named = {problem.start_s for problem in problems if problem.file == f"segments/{segment.name}"}
            assert {row.start_ns / 1e9 for row in own} <= named or None in named
        segment.write_bytes(before)
    assert verify_path(folder).ok
