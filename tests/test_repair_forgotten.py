"""Repair obeys tombstones, seals and replacements: what was forgotten stays so, whatever is damaged."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memdb.applying import FORGET
from memdb.files import watched
from memdb.mend import HIDDEN, LOST, MENDED
from memdb.records import Kind
from memdb.repair import repair
from memdb.schemas.rows import Part
from memdb.sealed import SealedSegment
from memdb.store import Store
from memdb.verify import verify_path
from tests.repair_cases import (
    UNITS,
    digests,
    digests_after,
    facts,
    files_of,
    find,
    go_on,
    lose_catalog,
    mended,
    records_of,
    rewrite,
    spans,
    spoil,
    spoil_in,
)
from tests.store_cases import UNIT_NS, Steps

# What was forgotten


@pytest.mark.parametrize("part", ["prologue", "body", "footer"])
@pytest.mark.usefixtures("bare")
def test_a_damaged_husk_brings_nothing_back(furnished: Path, copied: Path, part: str) -> None:
    """The older revision is whole; the tombstone says what of it may not be seen."""
    path, record = find(copied, "hall", Kind.UNIT, 5)
    spoil(path, record, part)
    good = digests(furnished)
    report = mended(copied)
    if record.body_bytes:
        assert [span[:2] for span in spans(report)] == [("hall", 5)]
        assert spans(report)[0][3] in (HIDDEN, MENDED)
    assert digests(copied) == good, "it is what the forgetting had left of it"
    with Store.open(copied) as opened:
        row = opened.unit(opened.recording("hall").id, 5)
        assert not row.has_caption
        assert Part.KEYFRAME not in row.parts
        assert row.blocks["tokens"].tolist() == [4, 0]


@pytest.mark.usefixtures("bare")
def test_one_of_two_tombstones_is_enough(furnished: Path, copied: Path) -> None:
    for last in (False, True):
        spoil_in(copied, find(furnished, "hall", Kind.TOMBSTONE, 1, last=last), "footer")
        spoil_in(copied, find(furnished, "hall", Kind.UNIT, 5), "prologue")
        mended(copied)
        assert digests(copied) == digests(furnished)
        with Store.open(copied) as opened, Store.open(furnished) as whole:
            assert opened.recording("hall").tombstones == whole.recording("hall").tombstones
        shutil.rmtree(copied)
        shutil.copytree(furnished, copied)


@pytest.mark.usefixtures("bare")
def test_a_forgetting_without_a_readable_tombstone_is_told_and_hides_what_it_can(
    furnished: Path, copied: Path
) -> None:
    for last in (False, True):
        spoil_in(copied, find(furnished, "hall", Kind.TOMBSTONE, 1, last=last), "footer")
    spoil_in(copied, find(furnished, "hall", Kind.UNIT, 5), "footer")
    report = mended(copied)
    assert [note for note in report.notes if "no tombstone in it can be read" in note]
    with Store.open(copied) as opened:
        row = opened.unit(opened.recording("hall").id, 5)
        assert not row.parts, "that a forgetting touched this unit is known from its number alone"
        assert not row.has_caption


@pytest.mark.usefixtures("bare")
def test_a_forgotten_recording_stays_forgotten(furnished: Path, copied: Path) -> None:
    with Store.open(furnished) as opened:
        [forgotten] = opened.catalog.forgotten()
    stones = [name for name in sorted(os.listdir(copied / "segments")) if name.startswith(forgotten)]
    [(_, first), (_, second)] = [
        item for item in records_of(copied, stones) if item[1].kind is Kind.TOMBSTONE
    ]
    path = copied / "segments" / stones[-1]
    whole = path.read_bytes()
    for record in (first, second):
        path.write_bytes(whole)
        spoil(path, record, "footer")
        assert digests_after(copied) == digests(furnished)
        with Store.open(copied) as opened:
            assert opened.catalog.forgotten() == [forgotten]
    spoil(path, first, "footer")
    lose_catalog(copied)
    report = repair(copied)
    assert [note for note in report.notes if stones[-1] in note and "no tombstone" in note]


@pytest.mark.parametrize("role", ["forget", "rewrite"])
@pytest.mark.usefixtures("bare")
def test_a_damaged_seal_costs_nothing(furnished: Path, copied: Path, role: str) -> None:
    """Of a forgetting, what it forgot stays forgotten; of a rewriting, what it replaced is gone from the disk."""
    for name, path in ((name, copied / "segments" / name) for name in files_of(copied, "hall")):
        header, *_, seal = (record for _, record in records_of(copied, [name]))
        if header.meta["role"] == role:
            spoil(path, seal, "footer")
    if role == "rewrite":
        with Store.open(copied) as opened:
            for name in opened.catalog.replaced(opened.recording("hall").id):
                (copied / "segments" / name).unlink()
    report = mended(copied)
    assert digests(copied) == digests(furnished)
    assert report.spans
    assert LOST not in {span.what for span in report.spans}
    with Store.open(copied) as opened:
        assert len(opened.recording("hall").tombstones) == 2
    go_on(copied, "hall")


@pytest.mark.usefixtures("bare")
def test_what_was_never_sealed_does_not_count(copied: Path) -> None:
    """A rewriting and a forgetting that died on the way: the files that they would have replaced count."""
    with Store.open(copied, write=True) as opened:
        left = rewrite(opened, "lobby", seal=False)
        segment = SealedSegment(opened.catalog, opened.segments_path, opened.recording("attic"), FORGET)
        stone: dict[str, object] = {"start_ns": 0, "end_ns": UNIT_NS, "below_unit": 5, "at_ns": 1}
        segment.event(Kind.TOMBSTONE, 0, stone)
        segment.close()
    before = facts(copied)
    report = mended(copied)
    assert facts(copied) == before
    assert [what for what in report.dropped if left in what and "never finished" in what]
    assert report.spans == []


@pytest.mark.usefixtures("bare")
def test_a_rewriting_that_was_never_sealed_is_good_to_mend_from(furnished: Path, copied: Path) -> None:
    with Store.open(copied, write=True) as opened:
        rewrite(opened, "lobby", seal=False)
    spoil_in(copied, find(furnished, "lobby", Kind.UNIT, 2), "body")
    spoil_in(copied, find(furnished, "lobby", Kind.UNIT, 5), "prologue")
    report = mended(copied)
    assert spans(report) == [("lobby", 2, 2, MENDED), ("lobby", 5, 5, MENDED)]
    assert digests(copied) == digests(furnished)


@pytest.mark.usefixtures("bare")
def test_a_replaced_file_mends_what_replaced_it_and_stays_forgotten(furnished: Path, copied: Path) -> None:
    spoil_in(copied, find(furnished, "hall", Kind.UNIT, 0), "footer")
    spoil_in(copied, find(furnished, "hall", Kind.UNIT, 2), "footer")  # forgotten before it was rewritten
    report = mended(copied)
    assert {span[1] for span in spans(report)} == {0, 2}
    assert LOST not in {span.what for span in report.spans}
    assert digests(copied) == digests(furnished)


@pytest.mark.usefixtures("bare")
def test_states_that_do_not_fit_any_more_are_removed(copied: Path) -> None:
    with Store.open(copied) as opened:
        ids = {name: opened.recording(name).id for name in UNITS}
        opened.state(ids["attic"]).save(5, b"behind unit 4", reach_ns=0)
        opened.state(ids["attic"]).save(4, b"behind unit 3", reach_ns=0)
        opened.state(ids["hall"]).save(8, b"of a forgetting that nobody knows", reach_ns=0, tombstones=3)
    spoil(*find(copied, "attic", Kind.UNIT, 4), "body")  # left out: the state behind it is ahead
    lose_catalog(copied)
    with watched(steps := Steps()):
        repair(copied)
    with Store.open(copied) as opened:
        kept = {name: [path.name[-16:-6] for path in opened.state(ids[name]).files()] for name in UNITS}
    assert kept == {"lobby": ["0000000009"], "attic": ["0000000004"], "hall": ["0000000004"], "shed": []}
    names = [step.name for step in steps.seen]
    gone = "the removal of states that fit a repaired catalog no more"
    assert names.index(gone) < names.index("the name of a catalog made anew"), "none comes back beside it"


# Anything


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_is_an_exception_and_nothing_else_suffers(
    furnished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Stretches of random bytes anywhere in segments, with the catalog or without: typed errors and notes only.

    What no damage touched has its content; nothing that was forgotten comes back where a tombstone is left.
    """
    store = tmp_path_factory.mktemp("any") / "s.memdb"
    shutil.copytree(furnished, store)
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
    good = digests(furnished)
    with Store.open(furnished) as whole_store, Store.open(store) as opened:
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
