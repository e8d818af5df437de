"""Repair of damaged segments: nothing is hidden behind damage, what is lost is told, and nothing else is."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from memdb.mend import DAMAGED, LOST, MENDED
from memdb.records import Kind
from memdb.repair import repair
from memdb.segments import OpenSegment, next_prologue
from memdb.store import Store
from memdb.verify import verify_path
from tests.repair_cases import (
    contents,
    digests,
    digests_after,
    files_of,
    find,
    go_on,
    lose_catalog,
    mended,
    records_of,
    spans,
    spoil,
    spoil_in,
    true_unit,
    wipe,
)
from tests.store_cases import UNIT_NS, fill, flip, new_store, spec, unit

# Segments


@pytest.mark.parametrize("part", ["prologue", "body", "footer"])
@pytest.mark.usefixtures("bare")
def test_a_damaged_unit_hides_none_behind_it(furnished: Path, copied: Path, part: str) -> None:
    path, record = find(copied, "lobby", Kind.UNIT, 3)
    spoil(path, record, part)
    report = mended(copied)
    assert spans(report) == [("lobby", 3, 3, DAMAGED if part == "body" else LOST)]
    assert (report.spans[0].start_s, report.spans[0].end_s) == (6, 8)
    good = digests(furnished)
    assert {name: found for name, found in digests(copied).items() if name != "lobby"} == {
        name: found for name, found in good.items() if name != "lobby"
    }
    with Store.open(copied) as opened, Store.open(furnished) as whole:
        rows, before = (at.units(at.recording("lobby").id) for at in (opened, whole))
        assert [row.number for row in rows] == list(range(9))
        for row, old in zip(rows, before, strict=True):
            if row.number != 3:
                assert (row.digest, row.segment, row.offset) == (old.digest, old.segment, old.offset)
                assert row.has_caption == old.has_caption
        assert (rows[3].start_ns, rows[3].end_ns) == (3 * UNIT_NS, 4 * UNIT_NS)
        assert bool(rows[3].parts) == (part == "body"), "what is whole of a damaged body is still served"
    problems = verify_path(copied).problems
    assert {problem.file for problem in problems} == {f"segments/{path.name}"}
    go_on(copied)


@pytest.mark.usefixtures("bare")
def test_units_are_found_behind_any_damage(furnished: Path, copied: Path) -> None:
    """Every kind of record in turn, in its every part: nothing else is touched."""
    good = contents(furnished)
    for name in ("lobby", "hall", "attic"):
        for at, (file, record) in enumerate(records_of(furnished, files_of(furnished, name))):
            for part in ("prologue", "footer")[at % 2 :: 2]:
                path = copied / "segments" / file
                shutil.copyfile(furnished / "segments" / file, path)
                spoil(path, record, part)
                lose_catalog(copied)
                report = repair(copied)
                found = contents(copied)
                hit = {(name, record.number)} if record.kind is Kind.UNIT else set()
                assert {key: value for key, value in found.items() if key not in hit} == {
                    key: value for key, value in good.items() if key not in hit
                }, (record.kind, part)
                assert {
                    (span.recording, span.first_unit) for span in report.spans if span.what == LOST
                } <= hit
                checked = verify_path(copied)
                assert {problem.file for problem in checked.problems} <= {f"segments/{file}"}
                # At the very end of a recording it may be a record that was never acknowledged.
                assert checked.problems or [what for what in (*report.dropped, *report.notes) if file in what]
                shutil.rmtree(copied)
                shutil.copytree(furnished, copied)


@pytest.mark.usefixtures("bare")
def test_a_run_of_lost_units_shares_the_time_between_its_neighbours(copied: Path) -> None:
    path, first = find(copied, "lobby", Kind.UNIT, 1)
    data = bytearray(path.read_bytes())
    last = find(copied, "lobby", Kind.UNIT, 3)[1]
    data[first.offset : last.end] = bytes(last.end - first.offset)
    path.write_bytes(data)
    report = mended(copied)
    assert spans(report) == [("lobby", 1, 3, LOST)]
    with Store.open(copied) as opened:
        rows = opened.units(opened.recording("lobby").id)
    assert [(row.start_ns, row.end_ns) for row in rows[1:4]] == [
        (number * UNIT_NS, (number + 1) * UNIT_NS) for number in (1, 2, 3)
    ]
    assert not any(row.parts or row.has_caption for row in rows[1:4])


@pytest.mark.usefixtures("bare")
def test_a_lost_file_leaves_husks_and_says_so(copied: Path) -> None:
    lost = files_of(copied, "lobby")[1]
    with Store.open(copied) as opened:
        numbers = [row.number for row in opened.units(opened.recording("lobby").id) if row.segment == lost]
    (copied / "segments" / lost).unlink()
    report = mended(copied)
    assert spans(report) == [("lobby", numbers[0], numbers[-1], LOST)]
    assert verify_path(copied).ok, "nothing that is there is damaged"
    go_on(copied)


@pytest.mark.usefixtures("bare")
def test_a_torn_tail_was_never_acknowledged(furnished: Path, copied: Path) -> None:
    """Whatever a killed writer left at the end takes nothing with it and brings nothing along."""
    name = files_of(copied, "attic")[-1]
    path = copied / "segments" / name
    whole, last = path.read_bytes(), find(copied, "attic", Kind.UNIT, 4)[1]
    torn = whole[last.offset :]
    for cut in (1, 64, len(torn) // 2, len(torn) - 1):
        path.write_bytes(whole + torn[:cut])
        lose_catalog(copied)
        report = repair(copied)
        assert digests(copied) == digests(furnished)
        assert report.spans == []
        assert [name for what in report.dropped if name in what]
        assert verify_path(copied).ok


@pytest.mark.usefixtures("bare")
def test_the_last_unit_damaged_is_left_out_and_written_again(furnished: Path, copied: Path) -> None:
    """Nobody can tell whether it was acknowledged: the report says so, and the next ingest has its number."""
    path, record = find(copied, "attic", Kind.UNIT, 4)
    spoil(path, record, "body")
    report = mended(copied)
    assert [what for what in report.dropped if path.name in what and "the last units of 'attic'" in what]
    with Store.open(copied, write=True) as opened, opened.writer(spec("attic", codec="raw")) as writer:
        assert writer.next_unit == 4
        writer.append([true_unit(4, "raw")])
    assert digests(copied) == digests(furnished)
    assert digests_after(copied) == digests(furnished), (
        "and a later repair takes the one that was written again"
    )


@pytest.mark.usefixtures("bare")
def test_damage_before_the_end_of_a_film_loses_no_unit(furnished: Path, copied: Path) -> None:
    """The end says how many units there were: the last ones are lost, and not left out."""
    for number in (7, 8):
        spoil_in(copied, find(furnished, "lobby", Kind.UNIT, number), "prologue")
    report = mended(copied)
    assert spans(report) == [("lobby", 7, 8, LOST)]
    with Store.open(copied) as opened:
        row = opened.recording("lobby")
        assert (row.units, row.finished) == (9, True)


@pytest.mark.usefixtures("bare")
def test_lost_gaps_and_epochs_leave_the_others_their_numbers(furnished: Path, copied: Path) -> None:
    with Store.open(furnished) as opened:
        before = opened.recording("lobby")
    for kind, number in ((Kind.GAP, 0), (Kind.EPOCH, 0)):
        spoil_in(copied, find(furnished, "lobby", kind, number), "footer")
    report = mended(copied)
    assert len(report.notes) == 2
    with Store.open(copied) as opened:
        row = opened.recording("lobby")
        assert (row.gaps[1], row.epochs[1]) == (before.gaps[1], before.epochs[1])
        assert row.gaps[0].start_ns == row.gaps[0].end_ns
        assert (row.epochs[0].number, row.epochs[0].first_unit) == (0, 0)
    go_on(copied)


@pytest.mark.usefixtures("bare")
def test_an_epoch_of_which_only_units_tell_is_put_on_record(tmp_path: Path) -> None:
    import dataclasses

    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0), unit(1)])
        writer.epoch(1, 2, "a fresh window")
        writer.append([dataclasses.replace(unit(number), epoch=1) for number in (2, 3)])
    path = tmp_path / "lobby.memdb"
    spoil(*find(path, "lobby", Kind.EPOCH, 0), "footer")
    mended(path)
    with Store.open(path) as opened:
        assert [(one.number, one.first_unit) for one in opened.recording("lobby").epochs] == [(1, 2)]


# Headers


@pytest.mark.usefixtures("bare")
def test_a_recording_is_described_by_any_of_its_headers(furnished: Path, copied: Path) -> None:
    names = files_of(copied, "lobby")
    for name in names[:-1]:
        wipe(copied / "segments" / name, 5)
    mended(copied)
    assert digests(copied) == digests(furnished)
    with Store.open(copied) as opened, Store.open(furnished) as whole:
        assert opened.recording("lobby").spec == whole.recording("lobby").spec


@pytest.mark.usefixtures("bare")
def test_no_flipped_bit_of_its_only_header_loses_a_recording(furnished: Path, copied: Path) -> None:
    """And from then on another file describes it as well."""
    [name] = files_of(copied, "attic")
    path = copied / "segments" / name
    whole = path.read_bytes()
    end = next(record.end for _, record in records_of(copied, [name]))
    for trial, byte in enumerate([*range(3, end, end // 12), end - 1]):
        path.write_bytes(whole)
        flip(path, byte, trial % 8)
        lose_catalog(copied)
        repair(copied)
        assert digests(copied) == digests(furnished), byte
        assert verify_path(copied).problems
        wipe(path, 9)
        assert digests_after(copied) == digests(furnished), byte
        shutil.rmtree(copied)
        shutil.copytree(furnished, copied)


@pytest.mark.usefixtures("bare")
def test_without_a_header_the_old_catalog_describes_it(furnished: Path, copied: Path) -> None:
    """And from then on a segment does: another repair needs no catalog."""
    wipe(copied / "segments" / files_of(copied, "attic")[0], 70)
    repair(copied)
    assert digests(copied) == digests(furnished)
    assert digests_after(copied) == digests(furnished)


@pytest.mark.usefixtures("bare")
def test_without_header_and_catalog_it_is_told_and_left_alone(furnished: Path, copied: Path) -> None:
    [name] = files_of(copied, "attic")
    wipe(copied / "segments" / name, 70)
    before = (copied / "segments" / name).read_bytes()
    report = mended(copied)
    assert [what for what in report.dropped if name in what and "5 units are left out" in what]
    assert (copied / "segments" / name).read_bytes() == before
    assert digests(copied) == {name: found for name, found in digests(furnished).items() if name != "attic"}


@pytest.mark.parametrize("part", ["prologue", "footer"])
@pytest.mark.usefixtures("bare")
def test_what_the_old_catalog_knows_of_a_damaged_record_is_not_lost(
    furnished: Path, copied: Path, part: str
) -> None:
    spoil(*find(copied, "lobby", Kind.UNIT, 4), part)
    report = repair(copied)
    assert spans(report) == [("lobby", 4, 4, MENDED)]
    assert digests(copied) == digests(furnished)
    assert digests_after(copied) == digests(furnished)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.usefixtures("bare")
def test_a_gap_that_the_old_catalog_knows_is_not_lost(furnished: Path, copied: Path, number: int) -> None:
    spoil_in(copied, find(furnished, "lobby", Kind.GAP, number), "footer")
    report = repair(copied)
    assert report.notes == []
    with Store.open(copied) as opened, Store.open(furnished) as whole:
        assert opened.recording("lobby").gaps == whole.recording("lobby").gaps
    assert digests_after(copied) == digests(furnished)
    with Store.open(copied) as opened, Store.open(furnished) as whole:
        assert opened.recording("lobby").gaps == whole.recording("lobby").gaps


@pytest.mark.usefixtures("bare")
def test_a_last_unit_that_the_old_catalog_knows_is_not_left_out(furnished: Path, copied: Path) -> None:
    spoil_in(copied, find(furnished, "attic", Kind.UNIT, 4), "body")
    assert spans(repair(copied)) == [("attic", 4, 4, DAMAGED)]
    with Store.open(copied) as opened:
        assert opened.recording("attic").units == 5


@pytest.mark.parametrize("harm", ["lost", "of another recording", "zeros"])
@pytest.mark.usefixtures("bare")
def test_what_the_old_catalog_says_is_forgotten_stays_so(furnished: Path, copied: Path, harm: str) -> None:
    """The files that say so are gone: they are written again."""
    with Store.open(copied) as opened:
        [forgotten] = opened.catalog.forgotten()
        names = [row.name for row in opened.catalog.segments(opened.recording("hall").id)]
        other = opened.catalog.segments(opened.recording("attic").id)[0].name
    stone = [name for name in sorted(os.listdir(copied / "segments")) if name.startswith(forgotten)][-1]
    for path in (copied / "segments" / names[-1], copied / "segments" / stone):
        if harm == "lost":
            path.unlink()
        else:
            strange = (copied / "segments" / other).read_bytes()
            path.write_bytes(strange if harm == "of another recording" else bytes(path.stat().st_size))
    repair(copied)
    assert digests(copied) == digests(furnished)
    assert digests_after(copied) == digests(furnished)
    with Store.open(copied) as opened, Store.open(furnished) as whole:
        assert opened.catalog.forgotten() == [forgotten]
        assert opened.recording("hall").tombstones == whole.recording("hall").tombstones


@pytest.mark.usefixtures("bare")
def test_files_of_another_store_are_left_out(furnished: Path, copied: Path, tmp_path: Path) -> None:
    with new_store(tmp_path / "other") as other:
        fill(other, 2, "stranger")
    for path in (tmp_path / "other" / "lobby.memdb" / "segments").iterdir():
        shutil.copy(path, copied / "segments")
    report = mended(copied)
    assert [what for what in report.dropped if "another recording or store" in what]
    assert digests(copied) == digests(furnished)


@pytest.mark.usefixtures("bare")
def test_names_that_clash_are_told_apart(copied: Path) -> None:
    """Two recordings of one name come from a file that was thought lost and is put back."""
    [name] = files_of(copied, "attic")
    (copied / "segments" / name).rename(copied / "attic.seg")
    lose_catalog(copied)
    repair(copied)
    with Store.open(copied, write=True) as opened:
        assert "attic" not in [row.name for row in opened.recordings()]
        fill(opened, 2, "attic", codec="raw")
    (copied / "attic.seg").rename(copied / "segments" / name)
    report = mended(copied)
    with Store.open(copied) as opened:
        assert (opened.recording("attic").units, opened.recording("attic-2").units) == (5, 2)
        assert opened.recording("attic").id == name[:32], "the one that was begun first keeps its name"
    assert [note for note in report.notes if "'attic-2'" in note]


def test_a_record_is_found_at_the_edge_of_every_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search reads window by window, wherever it begins."""
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = next((tmp_path / "lobby.memdb" / "segments").iterdir())
    monkeypatch.setattr("memdb.segments._WINDOW_BYTES", 128)
    offsets = [record.offset for _, record in records_of(tmp_path / "lobby.memdb", [path.name])]
    fd = os.open(path, os.O_RDONLY)
    segment = OpenSegment(fd, path.stat().st_size, path.name)
    for first, following in pairwise(offsets):
        assert next_prologue(segment, first + 1, segment.size_bytes) == following
    os.close(fd)
