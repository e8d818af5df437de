"""Repair: the catalog made anew from the segments says what the old one said; what is lost is told, and no more is."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memdb.applying import FORGET
from memdb.captions import CaptionIndex
from memdb.catalog import Catalog
from memdb.compact import compact
from memdb.database import CATALOG
from memdb.files import Step, watched
from memdb.forget import forget
from memdb.locks import FileLock, rewrite_lock
from memdb.mend import DAMAGED, HIDDEN, LOST, MENDED
from memdb.records import Kind
from memdb.repair import repair
from memdb.repair_report import RepairReport
from memdb.schemas.errors import (
    CorruptionError,
    FormatVersionError,
    LockedError,
    NotAStore,
    StoreError,
    StoreFull,
)
from memdb.schemas.rows import Part
from memdb.sealed import SealedSegment
from memdb.segments import OpenSegment, next_prologue
from memdb.store import Store
from memdb.swap import NEW
from memdb.verify import verify_path
from tests.repair_cases import (
    UNITS,
    Axe,
    Killed,
    digest,
    digests,
    facts,
    files_of,
    find,
    furnish,
    records_of,
    rewrite,
    spoil,
    spoil_in,
    true_unit,
)
from tests.store_cases import UNIT_NS, Steps, directory_digest, fill, flip, new_store, spec, unit

Harm = Callable[[Path], None]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("house"))


@pytest.fixture
def store(house: Path, tmp_path: Path) -> Path:
    """A copy of the furnished store, which nobody has open."""
    shutil.copytree(house, tmp_path / "lobby.memdb")
    return tmp_path / "lobby.memdb"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair without making derived data anew, which takes most of its time."""
    monkeypatch.setattr("memdb.repair.rebuild_derived", lambda folder: [])


def lose_catalog(store: Path) -> None:
    for path in store.glob(f"{CATALOG}*"):
        path.unlink()


def mended(store: Path) -> RepairReport:
    """What a repair of a store without a catalog says. A second one finds nothing more to do."""
    lose_catalog(store)
    report = repair(store)
    known, files = facts(store), sorted(os.listdir(store / "segments"))
    again = repair(store)
    assert again.spans == [span for span in report.spans if span.what == DAMAGED]
    assert facts(store) == known
    assert sorted(os.listdir(store / "segments")) == files
    return report


def contents(store: Path) -> dict[tuple[str, int], tuple[bytes, int, int]]:
    """Recording and unit to the digest and the times."""
    with Store.open(store) as opened:
        return {
            (row.name, one.number): (one.digest, one.start_ns, one.end_ns)
            for row in opened.recordings()
            for one in opened.units(row.id)
        }


def spans(report: RepairReport) -> list[tuple[str, int, int, str]]:
    return [(span.recording, span.first_unit, span.last_unit, span.what) for span in report.spans]


def go_on(store: Path, name: str = "lobby") -> None:
    """Write one more unit and forget something: what is there can be gone on with."""
    with Store.open(store, write=True) as opened:
        row = opened.recording(name)
        with opened.writer(row.spec) as writer:
            writer.append([unit(writer.next_unit, codec=row.spec.recipe.codec)])
        forget(opened, name, start_ns=UNIT_NS // 2, end_ns=UNIT_NS)
        assert opened.recording(name).units == row.units + 1


# Catalogs


def harms() -> dict[str, Harm]:
    def scramble(store: Path) -> None:
        size = (store / CATALOG).stat().st_size
        lose_catalog(store)
        (store / CATALOG).write_bytes(random.Random(1).randbytes(size))

    def cut(store: Path) -> None:
        with (store / CATALOG).open("r+b") as file:
            file.truncate(20_000)

    def strange_wal(store: Path) -> None:
        (store / f"{CATALOG}-wal").write_bytes(random.Random(2).randbytes(50_000))

    def half_done(store: Path) -> None:
        (store / NEW).write_bytes(b"left by a repair that was killed" * 300)
        (store / f"{NEW}-wal").write_bytes(b"and its WAL" * 300)
        lose_catalog(store)

    return {
        "missing": lose_catalog,
        "empty": lambda store: (store / CATALOG).write_bytes(b"") and None,  # type: ignore[dict-item]
        "of random bytes": scramble,
        "cut off": cut,
        "beside a WAL of random bytes": strange_wal,
        "missing, with a half made one": half_done,
    }


@pytest.mark.parametrize("harm", harms())
@pytest.mark.usefixtures("bare")
def test_a_catalog_is_made_anew_as_it_was(house: Path, store: Path, harm: str) -> None:
    harms()[harm](store)
    report = repair(store)
    assert facts(store) == facts(house)
    assert (report.spans, report.forgotten) == ([], 1)
    assert {row.name: row.units for row in report.recordings} == UNITS
    assert verify_path(store).ok
    assert not [path.name for path in store.iterdir() if path.name.startswith(NEW)]
    go_on(store)


@pytest.mark.usefixtures("bare")
def test_a_catalog_with_any_byte_damaged_is_made_anew(house: Path, store: Path) -> None:
    """Whatever opens or does not before, all is as it was after."""
    good, whole = facts(house), (store / CATALOG).read_bytes()
    for trial, byte in enumerate(range(7, len(whole), len(whole) // 25)):
        lose_catalog(store)
        (store / CATALOG).write_bytes(whole)
        flip(store / CATALOG, byte, trial % 8)
        repair(store)
        assert facts(store) == good, byte


def test_commit_ids_are_the_same_each_time_and_grow_with_time(store: Path) -> None:
    def commits() -> list[tuple[str, int, int]]:
        with Store.open(store) as opened:
            rows = opened.units_after(0)
            assert [row.commit_id for row in rows] == list(range(1, len(rows) + 1))
            assert opened.last_commit() == len(rows) == sum(UNITS.values())
            assert (
                opened.recording("lobby").last_commit
                == opened.unit(opened.recording("lobby").id, 8).commit_id
            )
            return [(row.recording_id, row.number, row.commit_id) for row in rows]

    repair(store)
    first = commits()
    repair(store)
    assert commits() == first
    with Store.open(store) as opened:
        began = {row.id: row.created_ns for row in opened.recordings()}
        moments = [began[row.recording_id] + row.end_ns for row in opened.units_after(0)]
    assert moments == sorted(moments)


def test_derived_data_is_made_anew_and_old_pages_never_count(house: Path, store: Path) -> None:
    with Store.open(store) as opened:
        row = opened.recording("lobby")
    (store / "keys").mkdir(exist_ok=True)
    for name in (f"{row.id}.pages", f"{row.id}-4.pages"):
        (store / "keys" / name).write_bytes(b"pages with other commit ids" * 9)
    (store / "captions.lance" / "captions_77").mkdir(parents=True)
    (store / "captions.lance" / "captions_77" / "data").write_bytes(b"rows with other commit ids")
    lose_catalog(store)
    repair(store)
    with Store.open(store) as opened:
        assert opened.recording("lobby").generation == 5
        assert f"{row.id}-5.pages" in os.listdir(store / "keys")
        assert not {f"{row.id}.pages", f"{row.id}-4.pages"} & set(os.listdir(store / "keys"))
        hits = CaptionIndex(store).search(opened, "fake", text="unit 8").hits
        assert (hits[0].recording_id, hits[0].unit) in {(one.id, 8) for one in opened.recordings()}
    assert not (store / "captions.lance" / "captions_77").exists()
    assert verify_path(store).ok


def test_an_opening_that_fails_says_what_to_type(store: Path) -> None:
    for harm in ("empty", "of random bytes", "missing"):
        harms()[harm](store)
        for write in (False, True):
            with pytest.raises(CorruptionError, match="run memdb repair"):
                Store.open(store, write=write)


# Segments


@pytest.mark.parametrize("part", ["prologue", "body", "footer"])
@pytest.mark.usefixtures("bare")
def test_a_damaged_unit_hides_none_behind_it(house: Path, store: Path, part: str) -> None:
    path, record = find(store, "lobby", Kind.UNIT, 3)
    spoil(path, record, part)
    report = mended(store)
    assert spans(report) == [("lobby", 3, 3, DAMAGED if part == "body" else LOST)]
    assert (report.spans[0].start_s, report.spans[0].end_s) == (6, 8)
    good = digests(house)
    assert {name: found for name, found in digests(store).items() if name != "lobby"} == {
        name: found for name, found in good.items() if name != "lobby"
    }
    with Store.open(store) as opened, Store.open(house) as whole:
        rows, before = (at.units(at.recording("lobby").id) for at in (opened, whole))
        assert [row.number for row in rows] == list(range(9))
        for row, old in zip(rows, before, strict=True):
            if row.number != 3:
                assert (row.digest, row.segment, row.offset) == (old.digest, old.segment, old.offset)
                assert row.has_caption == old.has_caption
        assert (rows[3].start_ns, rows[3].end_ns) == (3 * UNIT_NS, 4 * UNIT_NS)
        assert bool(rows[3].parts) == (part == "body"), "what is whole of a damaged body is still served"
    problems = verify_path(store).problems
    assert {problem.file for problem in problems} == {f"segments/{path.name}"}
    go_on(store)


@pytest.mark.usefixtures("bare")
def test_units_are_found_behind_any_damage(house: Path, store: Path) -> None:
    """Every kind of record in turn, in its every part: nothing else is touched."""
    good = contents(house)
    for name in ("lobby", "hall", "attic"):
        for at, (file, record) in enumerate(records_of(house, files_of(house, name))):
            for part in ("prologue", "footer")[at % 2 :: 2]:
                path = store / "segments" / file
                shutil.copyfile(house / "segments" / file, path)
                spoil(path, record, part)
                lose_catalog(store)
                report = repair(store)
                found = contents(store)
                hit = {(name, record.number)} if record.kind is Kind.UNIT else set()
                assert {key: value for key, value in found.items() if key not in hit} == {
                    key: value for key, value in good.items() if key not in hit
                }, (record.kind, part)
                assert {
                    (span.recording, span.first_unit) for span in report.spans if span.what == LOST
                } <= hit
                checked = verify_path(store)
                assert {problem.file for problem in checked.problems} <= {f"segments/{file}"}
                # At the very end of a recording it may be a record that was never acknowledged.
                assert checked.problems or [what for what in (*report.dropped, *report.notes) if file in what]
                shutil.rmtree(store)
                shutil.copytree(house, store)


@pytest.mark.usefixtures("bare")
def test_a_run_of_lost_units_shares_the_time_between_its_neighbours(store: Path) -> None:
    path, first = find(store, "lobby", Kind.UNIT, 1)
    data = bytearray(path.read_bytes())
    last = find(store, "lobby", Kind.UNIT, 3)[1]
    data[first.offset : last.end] = bytes(last.end - first.offset)
    path.write_bytes(data)
    report = mended(store)
    assert spans(report) == [("lobby", 1, 3, LOST)]
    with Store.open(store) as opened:
        rows = opened.units(opened.recording("lobby").id)
    assert [(row.start_ns, row.end_ns) for row in rows[1:4]] == [
        (number * UNIT_NS, (number + 1) * UNIT_NS) for number in (1, 2, 3)
    ]
    assert not any(row.parts or row.has_caption for row in rows[1:4])


@pytest.mark.usefixtures("bare")
def test_a_lost_file_leaves_husks_and_says_so(store: Path) -> None:
    lost = files_of(store, "lobby")[1]
    with Store.open(store) as opened:
        numbers = [row.number for row in opened.units(opened.recording("lobby").id) if row.segment == lost]
    (store / "segments" / lost).unlink()
    report = mended(store)
    assert spans(report) == [("lobby", numbers[0], numbers[-1], LOST)]
    assert verify_path(store).ok, "nothing that is there is damaged"
    go_on(store)


@pytest.mark.usefixtures("bare")
def test_a_torn_tail_was_never_acknowledged(house: Path, store: Path) -> None:
    """Whatever a killed writer left at the end takes nothing with it and brings nothing along."""
    name = files_of(store, "attic")[-1]
    path = store / "segments" / name
    whole, last = path.read_bytes(), find(store, "attic", Kind.UNIT, 4)[1]
    torn = whole[last.offset :]
    for cut in (1, 64, len(torn) // 2, len(torn) - 1):
        path.write_bytes(whole + torn[:cut])
        lose_catalog(store)
        report = repair(store)
        assert digests(store) == digests(house)
        assert report.spans == []
        assert [name for what in report.dropped if name in what]
        assert verify_path(store).ok


@pytest.mark.usefixtures("bare")
def test_the_last_unit_damaged_is_left_out_and_written_again(house: Path, store: Path) -> None:
    """Nobody can tell whether it was acknowledged: the report says so, and the next ingest has its number."""
    path, record = find(store, "attic", Kind.UNIT, 4)
    spoil(path, record, "body")
    report = mended(store)
    assert [what for what in report.dropped if path.name in what and "the last units of 'attic'" in what]
    with Store.open(store, write=True) as opened, opened.writer(spec("attic", codec="raw")) as writer:
        assert writer.next_unit == 4
        writer.append([true_unit(4, "raw")])
    assert digests(store) == digests(house)
    assert digests_after(store) == digests(house), "and a later repair takes the one that was written again"


def wipe(path: Path, at: int) -> None:
    """Damage more than one bit."""
    flip(path, at, 1)
    flip(path, at, 6)


def digests_after(store: Path) -> dict[str, str]:
    lose_catalog(store)
    repair(store)
    return digests(store)


@pytest.mark.usefixtures("bare")
def test_damage_before_the_end_of_a_film_loses_no_unit(house: Path, store: Path) -> None:
    """The end says how many units there were: the last ones are lost, and not left out."""
    for number in (7, 8):
        spoil_in(store, find(house, "lobby", Kind.UNIT, number), "prologue")
    report = mended(store)
    assert spans(report) == [("lobby", 7, 8, LOST)]
    with Store.open(store) as opened:
        row = opened.recording("lobby")
        assert (row.units, row.finished) == (9, True)


@pytest.mark.usefixtures("bare")
def test_lost_gaps_and_epochs_leave_the_others_their_numbers(house: Path, store: Path) -> None:
    with Store.open(house) as opened:
        before = opened.recording("lobby")
    for kind, number in ((Kind.GAP, 0), (Kind.EPOCH, 0)):
        spoil_in(store, find(house, "lobby", kind, number), "footer")
    report = mended(store)
    assert len(report.notes) == 2
    with Store.open(store) as opened:
        row = opened.recording("lobby")
        assert (row.gaps[1], row.epochs[1]) == (before.gaps[1], before.epochs[1])
        assert row.gaps[0].start_ns == row.gaps[0].end_ns
        assert (row.epochs[0].number, row.epochs[0].first_unit) == (0, 0)
    go_on(store)


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
def test_a_recording_is_described_by_any_of_its_headers(house: Path, store: Path) -> None:
    names = files_of(store, "lobby")
    for name in names[:-1]:
        wipe(store / "segments" / name, 5)
    mended(store)
    assert digests(store) == digests(house)
    with Store.open(store) as opened, Store.open(house) as whole:
        assert opened.recording("lobby").spec == whole.recording("lobby").spec


@pytest.mark.usefixtures("bare")
def test_no_flipped_bit_of_its_only_header_loses_a_recording(house: Path, store: Path) -> None:
    """And from then on another file describes it as well."""
    [name] = files_of(store, "attic")
    path = store / "segments" / name
    whole = path.read_bytes()
    end = next(record.end for _, record in records_of(store, [name]))
    for trial, byte in enumerate([*range(3, end, end // 12), end - 1]):
        path.write_bytes(whole)
        flip(path, byte, trial % 8)
        lose_catalog(store)
        repair(store)
        assert digests(store) == digests(house), byte
        assert verify_path(store).problems
        wipe(path, 9)
        assert digests_after(store) == digests(house), byte
        shutil.rmtree(store)
        shutil.copytree(house, store)


@pytest.mark.usefixtures("bare")
def test_without_a_header_the_old_catalog_describes_it(house: Path, store: Path) -> None:
    """And from then on a segment does: another repair needs no catalog."""
    wipe(store / "segments" / files_of(store, "attic")[0], 70)
    repair(store)
    assert digests(store) == digests(house)
    assert digests_after(store) == digests(house)


@pytest.mark.usefixtures("bare")
def test_without_header_and_catalog_it_is_told_and_left_alone(house: Path, store: Path) -> None:
    [name] = files_of(store, "attic")
    wipe(store / "segments" / name, 70)
    before = (store / "segments" / name).read_bytes()
    report = mended(store)
    assert [what for what in report.dropped if name in what and "5 units are left out" in what]
    assert (store / "segments" / name).read_bytes() == before
    assert digests(store) == {name: found for name, found in digests(house).items() if name != "attic"}


@pytest.mark.parametrize("part", ["prologue", "footer"])
@pytest.mark.usefixtures("bare")
def test_what_the_old_catalog_knows_of_a_damaged_record_is_not_lost(
    house: Path, store: Path, part: str
) -> None:
    spoil(*find(store, "lobby", Kind.UNIT, 4), part)
    report = repair(store)
    assert spans(report) == [("lobby", 4, 4, MENDED)]
    assert digests(store) == digests(house)
    assert digests_after(store) == digests(house)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.usefixtures("bare")
def test_a_gap_that_the_old_catalog_knows_is_not_lost(house: Path, store: Path, number: int) -> None:
    spoil_in(store, find(house, "lobby", Kind.GAP, number), "footer")
    report = repair(store)
    assert report.notes == []
    with Store.open(store) as opened, Store.open(house) as whole:
        assert opened.recording("lobby").gaps == whole.recording("lobby").gaps
    assert digests_after(store) == digests(house)
    with Store.open(store) as opened, Store.open(house) as whole:
        assert opened.recording("lobby").gaps == whole.recording("lobby").gaps


@pytest.mark.usefixtures("bare")
def test_a_last_unit_that_the_old_catalog_knows_is_not_left_out(house: Path, store: Path) -> None:
    spoil_in(store, find(house, "attic", Kind.UNIT, 4), "body")
    assert spans(repair(store)) == [("attic", 4, 4, DAMAGED)]
    with Store.open(store) as opened:
        assert opened.recording("attic").units == 5


@pytest.mark.parametrize("harm", ["lost", "of another recording", "zeros"])
@pytest.mark.usefixtures("bare")
def test_what_the_old_catalog_says_is_forgotten_stays_so(house: Path, store: Path, harm: str) -> None:
    """The files that say so are gone: they are written again."""
    with Store.open(store) as opened:
        [forgotten] = opened.catalog.forgotten()
        names = [row.name for row in opened.catalog.segments(opened.recording("hall").id)]
        other = opened.catalog.segments(opened.recording("attic").id)[0].name
    stone = [name for name in sorted(os.listdir(store / "segments")) if name.startswith(forgotten)][-1]
    for path in (store / "segments" / names[-1], store / "segments" / stone):
        if harm == "lost":
            path.unlink()
        else:
            strange = (store / "segments" / other).read_bytes()
            path.write_bytes(strange if harm == "of another recording" else bytes(path.stat().st_size))
    repair(store)
    assert digests(store) == digests(house)
    assert digests_after(store) == digests(house)
    with Store.open(store) as opened, Store.open(house) as whole:
        assert opened.catalog.forgotten() == [forgotten]
        assert opened.recording("hall").tombstones == whole.recording("hall").tombstones


@pytest.mark.usefixtures("bare")
def test_files_of_another_store_are_left_out(house: Path, store: Path, tmp_path: Path) -> None:
    with new_store(tmp_path / "other") as other:
        fill(other, 2, "stranger")
    for path in (tmp_path / "other" / "lobby.memdb" / "segments").iterdir():
        shutil.copy(path, store / "segments")
    report = mended(store)
    assert [what for what in report.dropped if "another recording or store" in what]
    assert digests(store) == digests(house)


@pytest.mark.usefixtures("bare")
def test_names_that_clash_are_told_apart(store: Path) -> None:
    """Two recordings of one name come from a file that was thought lost and is put back."""
    [name] = files_of(store, "attic")
    (store / "segments" / name).rename(store / "attic.seg")
    lose_catalog(store)
    repair(store)
    with Store.open(store, write=True) as opened:
        assert "attic" not in [row.name for row in opened.recordings()]
        fill(opened, 2, "attic", codec="raw")
    (store / "attic.seg").rename(store / "segments" / name)
    report = mended(store)
    with Store.open(store) as opened:
        assert (opened.recording("attic").units, opened.recording("attic-2").units) == (5, 2)
        assert opened.recording("attic").id == name[:32], "the one that was begun first keeps its name"
    assert [note for note in report.notes if "'attic-2'" in note]


# What was forgotten


@pytest.mark.parametrize("part", ["prologue", "body", "footer"])
@pytest.mark.usefixtures("bare")
def test_a_damaged_husk_brings_nothing_back(house: Path, store: Path, part: str) -> None:
    """The older revision is whole; the tombstone says what of it may not be seen."""
    path, record = find(store, "hall", Kind.UNIT, 5)
    spoil(path, record, part)
    good = digests(house)
    report = mended(store)
    if record.body_bytes:
        assert [span[:2] for span in spans(report)] == [("hall", 5)]
        assert spans(report)[0][3] in (HIDDEN, MENDED)
    assert digests(store) == good, "it is what the forgetting had left of it"
    with Store.open(store) as opened:
        row = opened.unit(opened.recording("hall").id, 5)
        assert not row.has_caption
        assert Part.KEYFRAME not in row.parts
        assert row.blocks["tokens"].tolist() == [4, 0]


@pytest.mark.usefixtures("bare")
def test_one_of_two_tombstones_is_enough(house: Path, store: Path) -> None:
    for last in (False, True):
        spoil_in(store, find(house, "hall", Kind.TOMBSTONE, 1, last=last), "footer")
        spoil_in(store, find(house, "hall", Kind.UNIT, 5), "prologue")
        mended(store)
        assert digests(store) == digests(house)
        with Store.open(store) as opened, Store.open(house) as whole:
            assert opened.recording("hall").tombstones == whole.recording("hall").tombstones
        shutil.rmtree(store)
        shutil.copytree(house, store)


@pytest.mark.usefixtures("bare")
def test_a_forgetting_without_a_readable_tombstone_is_told_and_hides_what_it_can(
    house: Path, store: Path
) -> None:
    for last in (False, True):
        spoil_in(store, find(house, "hall", Kind.TOMBSTONE, 1, last=last), "footer")
    spoil_in(store, find(house, "hall", Kind.UNIT, 5), "footer")
    report = mended(store)
    assert [note for note in report.notes if "no tombstone in it can be read" in note]
    with Store.open(store) as opened:
        row = opened.unit(opened.recording("hall").id, 5)
        assert not row.parts, "that a forgetting touched this unit is known from its number alone"
        assert not row.has_caption


@pytest.mark.usefixtures("bare")
def test_a_forgotten_recording_stays_forgotten(house: Path, store: Path) -> None:
    with Store.open(house) as opened:
        [forgotten] = opened.catalog.forgotten()
    stones = [name for name in sorted(os.listdir(store / "segments")) if name.startswith(forgotten)]
    [(_, first), (_, second)] = [item for item in records_of(store, stones) if item[1].kind is Kind.TOMBSTONE]
    path = store / "segments" / stones[-1]
    whole = path.read_bytes()
    for record in (first, second):
        path.write_bytes(whole)
        spoil(path, record, "footer")
        assert digests_after(store) == digests(house)
        with Store.open(store) as opened:
            assert opened.catalog.forgotten() == [forgotten]
    spoil(path, first, "footer")
    lose_catalog(store)
    report = repair(store)
    assert [note for note in report.notes if stones[-1] in note and "no tombstone" in note]


@pytest.mark.parametrize("role", ["forget", "rewrite"])
@pytest.mark.usefixtures("bare")
def test_a_damaged_seal_costs_nothing(house: Path, store: Path, role: str) -> None:
    """Of a forgetting, what it forgot stays forgotten; of a rewriting, what it replaced is gone from the disk."""
    for name, path in ((name, store / "segments" / name) for name in files_of(store, "hall")):
        header, *_, seal = (record for _, record in records_of(store, [name]))
        if header.meta["role"] == role:
            spoil(path, seal, "footer")
    if role == "rewrite":
        with Store.open(store) as opened:
            for name in opened.catalog.replaced(opened.recording("hall").id):
                (store / "segments" / name).unlink()
    report = mended(store)
    assert digests(store) == digests(house)
    assert report.spans
    assert LOST not in {span.what for span in report.spans}
    with Store.open(store) as opened:
        assert len(opened.recording("hall").tombstones) == 2
    go_on(store, "hall")


@pytest.mark.usefixtures("bare")
def test_what_was_never_sealed_does_not_count(store: Path) -> None:
    """A rewriting and a forgetting that died on the way: the files that they would have replaced count."""
    with Store.open(store, write=True) as opened:
        left = rewrite(opened, "lobby", seal=False)
        segment = SealedSegment(opened.catalog, opened.segments_path, opened.recording("attic"), FORGET)
        stone: dict[str, object] = {"start_ns": 0, "end_ns": UNIT_NS, "below_unit": 5, "at_ns": 1}
        segment.event(Kind.TOMBSTONE, 0, stone)
        segment.close()
    before = facts(store)
    report = mended(store)
    assert facts(store) == before
    assert [what for what in report.dropped if left in what and "never finished" in what]
    assert report.spans == []


@pytest.mark.usefixtures("bare")
def test_a_rewriting_that_was_never_sealed_is_good_to_mend_from(house: Path, store: Path) -> None:
    with Store.open(store, write=True) as opened:
        rewrite(opened, "lobby", seal=False)
    spoil_in(store, find(house, "lobby", Kind.UNIT, 2), "body")
    spoil_in(store, find(house, "lobby", Kind.UNIT, 5), "prologue")
    report = mended(store)
    assert spans(report) == [("lobby", 2, 2, MENDED), ("lobby", 5, 5, MENDED)]
    assert digests(store) == digests(house)


@pytest.mark.usefixtures("bare")
def test_a_replaced_file_mends_what_replaced_it_and_stays_forgotten(house: Path, store: Path) -> None:
    spoil_in(store, find(house, "hall", Kind.UNIT, 0), "footer")
    spoil_in(store, find(house, "hall", Kind.UNIT, 2), "footer")  # forgotten before it was rewritten
    report = mended(store)
    assert {span[1] for span in spans(report)} == {0, 2}
    assert LOST not in {span.what for span in report.spans}
    assert digests(store) == digests(house)


@pytest.mark.usefixtures("bare")
def test_states_that_do_not_fit_any_more_are_removed(store: Path) -> None:
    with Store.open(store) as opened:
        ids = {name: opened.recording(name).id for name in UNITS}
        opened.state(ids["attic"]).save(5, b"behind unit 4", reach_ns=0)
        opened.state(ids["attic"]).save(4, b"behind unit 3", reach_ns=0)
    spoil(*find(store, "attic", Kind.UNIT, 4), "body")  # left out: the state behind it is ahead
    mended(store)
    with Store.open(store) as opened:
        assert [path.name[-16:-6] for path in opened.state(ids["attic"]).files()] == ["0000000004"]
        assert len(opened.state(ids["lobby"]).files()) == 1


# Who may, and when


@pytest.mark.usefixtures("bare")
def test_a_writer_that_is_alive_is_not_disturbed(store: Path) -> None:
    before = (
        [directory_digest(store / name) for name in ("segments", "state")],
        (store / CATALOG).read_bytes(),
    )
    with Store.open(store) as opened:
        row = opened.recording("attic")
    for lock in (
        store / "locks" / f"{row.id}.lock",
        rewrite_lock(store, row.id),
        store / "locks" / "names.lock",
    ):
        with FileLock(lock), pytest.raises(LockedError, match="run memdb repair again"):
            repair(store)
    after = [directory_digest(store / name) for name in ("segments", "state")], (store / CATALOG).read_bytes()
    assert after == before


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "film.mp4"):
        with pytest.raises(NotAStore):
            repair(folder)
    assert os.listdir(tmp_path) == ["film.mp4"]


@pytest.mark.usefixtures("bare")
def test_a_link_in_a_store_is_refused(store: Path, tmp_path: Path) -> None:
    shutil.move(store / "state", tmp_path / "elsewhere")
    (store / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        repair(store)


@pytest.mark.usefixtures("bare")
def test_whoever_had_the_old_catalog_open_commits_nothing_to_it(store: Path) -> None:
    catalog = Catalog(store / CATALOG, write=True)
    repair(store)
    with pytest.raises(StoreError, match="open the store again"), catalog.database.writing():
        catalog.database.upsert("meta", ("last_commit", 77))
    catalog.close()
    with Store.open(store) as opened:
        assert opened.last_commit() == sum(UNITS.values())


@pytest.mark.usefixtures("bare")
def test_whoever_reads_goes_on_with_the_new_catalog(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memdb.store._LOOK_S", 0.0)
    with Store.open(store) as reader:
        assert reader.recording("attic").units == 5
        repair(store)
        with Store.open(store, write=True) as opened, opened.writer(spec("attic", codec="raw")) as writer:
            writer.append([true_unit(5, "raw")])
        assert reader.recording("attic").units == 6
        assert reader.last_commit() == sum(UNITS.values()) + 1


@pytest.mark.usefixtures("bare")
def test_compaction_writes_damaged_files_anew_after_a_repair(house: Path, store: Path) -> None:
    """What is damaged goes from the disk, with what a forgetting would not find in it."""
    spoil_in(store, find(house, "lobby", Kind.UNIT, 1), "footer")
    mended(store)
    before = digests(store)
    assert verify_path(store).problems
    with Store.open(store, write=True) as opened:
        compact(opened)
    checked = verify_path(store)
    assert (checked.problems, checked.notes) == ([], [])
    assert digests(store) == before


@pytest.mark.usefixtures("bare")
def test_a_disk_without_room_leaves_all_as_it_was(house: Path, store: Path) -> None:
    def full(step: Step) -> bool:
        return step.what in ("write", "sync") and (step.path.name == NEW or step.path.suffix == ".seg")

    spoil(*find(store, "lobby", Kind.UNIT, 3), "footer")
    before = facts(store)
    with watched(Steps(full)), pytest.raises(StoreFull, match="make room"):
        repair(store)
    assert facts(store) == before


# Kills


@pytest.mark.usefixtures("bare")
def test_a_kill_at_any_step_leaves_a_store_that_opens_or_repairs(house: Path, tmp_path: Path) -> None:
    """A unit is lost and a WAL lies there, full of commits that the segments have, too."""
    broken = tmp_path / "broken.memdb"
    shutil.copytree(house, broken)
    leave_wal(broken)
    spoil(*find(broken, "lobby", Kind.UNIT, 3), "footer")
    flip(broken / CATALOG, 30_000, 2)
    whole = tmp_path / "whole.memdb"
    shutil.copytree(broken, whole)
    counting = Axe(0, True)
    with watched(counting):
        repair(whole)
    good = facts(whole)
    assert counting.steps > 20
    for at in range(1, counting.steps + 1):
        for before in (at % 3 > 0,):
            store = tmp_path / "trial.memdb"
            shutil.copytree(broken, store)
            with watched(Axe(at, before)), pytest.raises(Killed):
                repair(store)
            opened_or_told(store)
            repair(store)
            found = facts(store)
            for key, value in good.items():
                if key not in ("files of lobby", "lobby 3"):  # in another file where one lies unsealed
                    assert found[key] == value, (at, before, key)
            shutil.rmtree(store)


def leave_wal(store: Path) -> None:
    """As a writer that was killed does."""
    with Store.open(store, write=True) as opened, opened.writer(spec("attic", codec="raw")) as writer:
        writer.append([true_unit(5, "raw")])
        copies = {path.name: path.read_bytes() for path in store.glob(f"{CATALOG}*")}
        assert copies[f"{CATALOG}-wal"]
    for name, data in copies.items():
        (store / name).write_bytes(data)


def opened_or_told(store: Path) -> None:
    """A store either says that it wants repair, or what it says is of its own segments."""
    try:
        with Store.open(store) as opened:
            for row in opened.recordings():
                if row.name != "lobby":
                    assert digest(opened, row.name).isalnum() or "memdb repair" in digest(opened, row.name)
    except CorruptionError:
        pass


def test_no_catalog_is_ever_beside_the_wal_of_another(store: Path) -> None:
    """In whatever order names reach the disk between two syncs of the folder."""
    leave_wal(store)
    for name in ("keys", "captions.lance"):
        (store / name).mkdir()
    steps = Steps()
    with watched(steps):
        repair(store)
    seen = [
        (step.what, (step.target or step.path).name)
        for step in steps.seen
        if step.what in ("unlink", "replace", "sync_folder", "sync")
        and (step.path == store or step.path.parent == store)
    ]
    swap = seen[seen.index(("sync", NEW)) :]
    assert swap == [
        ("sync", NEW),
        ("unlink", CATALOG),
        ("sync_folder", store.name),
        *(("unlink", f"{CATALOG}{suffix}") for suffix in ("-wal", "-shm", "-journal")),
        ("sync_folder", store.name),
        ("replace", CATALOG),
        ("sync_folder", store.name),
    ]
    whys = [step.name for step in steps.seen if step.what in ("sync", "sync_folder")]
    assert whys.index("the removal of derived data, before a catalog is made anew") < whys.index(
        "the name of a catalog made anew"
    )


def test_what_is_mended_is_safe_before_the_catalog_names_it(store: Path) -> None:
    spoil(*find(store, "lobby", Kind.UNIT, 3), "footer")
    lose_catalog(store)
    steps = Steps()
    with watched(steps):
        repair(store)
    names = [step.name for step in steps.seen if step.what in ("sync", "sync_folder")]
    written = max(
        i for i, step in enumerate(steps.seen) if step.what == "write" and step.path.suffix == ".seg"
    )
    syncs = [i for i, step in enumerate(steps.seen) if step.name == "what a repair writes anew"]
    assert len(syncs) == 1
    assert syncs[0] > written
    assert names.index("the name of what a repair writes anew") < names.index(
        "the name of a catalog made anew"
    )


# Formats


@pytest.mark.usefixtures("bare")
def test_a_newer_format_is_refused(store: Path) -> None:
    connection = sqlite3.connect(store / CATALOG)
    connection.close()
    from memdb.database import Database
    from memdb.schemas.format import FORMAT_VERSION

    database = Database(store / CATALOG, write=True)
    with database.writing():
        database.upsert("meta", ("format", FORMAT_VERSION + 1))
    database.checkpoint()
    database.close()
    before = directory_digest(store)
    with pytest.raises(FormatVersionError, match="newer"):
        repair(store)
    assert directory_digest(store) == before


# Anything


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_is_an_exception_and_nothing_else_suffers(
    house: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Stretches of random bytes anywhere in segments, with the catalog or without: typed errors and notes only.

    What no damage touched has its content; nothing that was forgotten comes back where a tombstone is left.
    """
    store = tmp_path_factory.mktemp("any") / "s.memdb"
    shutil.copytree(house, store)
    names = sorted(path.name for path in (store / "segments").iterdir())
    hit: set[str] = set()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        path = store / "segments" / name
        whole = bytearray(path.read_bytes())
        start = data.draw(st.integers(0, len(whole) - 1))
        length = data.draw(st.sampled_from([1, 64, 700]))
        noise = random.Random(start).randbytes(min(length, len(whole) - start))
        whole[start : start + length] = noise
        path.write_bytes(whole)
        hit.add(name[:32])
    if data.draw(st.booleans()):
        lose_catalog(store)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("memdb.repair.rebuild_derived", lambda folder: [])
        report = repair(store)
    good = digests(house)
    with Store.open(house) as whole_store, Store.open(store) as opened:
        ids = {row.name: row.id for row in whole_store.recordings()}
        [forgotten] = whole_store.catalog.forgotten()
        for name, found in digests(store).items():
            if name in ids and ids[name] not in hit:
                assert found == good[name]
        if forgotten not in hit:
            assert opened.catalog.forgotten() == [forgotten]
        if not any("tombstone" in note or "nothing of its" in note for note in report.notes):
            hall = next((row for row in opened.recordings() if row.name == "hall"), None)
            for row in opened.units(hall.id) if hall else []:
                if row.number in (2, 3, 5):
                    assert not row.has_caption
                    assert Part.KEYFRAME not in row.parts
    problems = verify_path(store).problems
    assert {problem.file[9:41] for problem in problems} <= hit, problems


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
