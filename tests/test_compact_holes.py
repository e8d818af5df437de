"""Compaction of segments with damage in what does not count: what is whole moves, and the file goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdb.compact import CompactReport, compact
from memdb.forget import forget
from memdb.records import Kind, Record
from memdb.repair import repair
from memdb.schemas.rows import RecordingRow
from memdb.store import Store, recording_digest
from memdb.verify import verify
from tests.kill_cases import quick_disk
from tests.needle_cases import holders, needles
from tests.repair_cases import bare, find, lose_catalog, spoil
from tests.store_cases import UNIT_NS, new_store, spec, unit

__all__ = ["bare", "quick_disk"]

UNITS = 6
SPAN = (2, 4)  # units that were forgotten: their first records are dead


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A closed store: one file with all units, a gap, an epoch and an end, and one that forgot two of them."""
    with new_store(tmp_path) as opened:
        with opened.writer(spec()) as writer:
            writer.epoch(0, 0, "the beginning")
            writer.append([unit(number) for number in range(3)])
            writer.gap(3 * UNIT_NS, 3 * UNIT_NS + 5, "dark")
            writer.append([unit(number) for number in range(3, UNITS)])
            writer.end(UNITS * UNIT_NS)
        forget(opened, "lobby", start_ns=SPAN[0] * UNIT_NS, end_ns=SPAN[1] * UNIT_NS)
    return tmp_path / "lobby.memdb"


def compacted(path: Path) -> CompactReport:
    with Store.open(path, write=True) as opened:
        return compact(opened)


def left(report: CompactReport) -> list[str]:
    return [what for done in report.recordings for what in done.left]


def told(path: Path) -> tuple[str, list[object]]:
    """The digest of the recording, and its events."""
    with Store.open(path) as opened:
        row: RecordingRow = opened.recording("lobby")
        return recording_digest(opened, "lobby"), [row.gaps, row.epochs, row.end_ns, row.tombstones]


def wipe(path: Path, record: Record, bytes_wiped: int) -> None:
    data = bytearray(path.read_bytes())
    data[record.offset : record.offset + bytes_wiped] = bytes(bytes_wiped)
    path.write_bytes(data)


@pytest.mark.usefixtures("quick_disk", "bare")
@pytest.mark.parametrize("kinds", [[Kind.UNIT], [Kind.GAP], [Kind.EPOCH, Kind.END, Kind.UNIT], [Kind.HEADER]])
@pytest.mark.parametrize("part", ["prologue", "footer", "all of it"])
def test_a_hole_where_nothing_counts_is_left_behind(store: Path, kinds: list[Kind], part: str) -> None:
    whole = told(store)
    sources = set((store / "segments").iterdir())
    found = [find(store, "lobby", kind, SPAN[0] if kind is Kind.UNIT else 0, last=False) for kind in kinds]
    for path, record in found:
        if part == "all of it":
            wipe(path, record, record.length)
        else:
            spoil(path, record, part)
    assert left(compacted(store)) == []
    assert not sources & set((store / "segments").iterdir())
    assert told(store) == whole
    with Store.open(store) as opened:
        assert verify(opened).problems == []
    for number in range(*SPAN):
        assert holders(store, needles(unit(number))) == {}
    lose_catalog(store)
    report = repair(store)
    assert report.spans == []
    assert told(store) == whole


@pytest.mark.usefixtures("quick_disk", "bare")
@pytest.mark.parametrize("part", ["prologue", "body", "footer"])
def test_a_hole_where_a_unit_counts_is_kept_and_told(store: Path, part: str) -> None:
    path, record = find(store, "lobby", Kind.UNIT, UNITS - 1)
    spoil(path, record, part)
    data = path.read_bytes()
    assert any(path.name in what for what in left(compacted(store)))
    assert path.read_bytes() == data
    lost = repair(store).spans
    assert [(span.first_unit, span.last_unit) for span in lost] == [(UNITS - 1, UNITS - 1)]
    if part == "body":
        return  # what of it is whole is served from where it is
    assert left(compacted(store)) == []
    assert not path.exists()
    with Store.open(store) as opened:
        assert verify(opened).problems == []
        assert opened.recording("lobby").units == UNITS


@pytest.mark.usefixtures("quick_disk")
def test_what_reads_like_a_record_within_a_hole_is_none(store: Path, tmp_path: Path) -> None:
    """A picture may hold anything: of a record that lies in a damaged one nothing is taken over."""
    with new_store(tmp_path / "other") as opened, opened.writer(spec()) as writer:
        writer.append([unit(0)])
        writer.gap(UNIT_NS, UNIT_NS + 9, "made up")
    file, gap = find(tmp_path / "other" / "lobby.memdb", "lobby", Kind.GAP)
    forged = file.read_bytes()[gap.offset : gap.end]
    whole = told(store)
    path, record = find(store, "lobby", Kind.UNIT, SPAN[0], last=False)
    assert record.body_bytes > len(forged)
    data = bytearray(path.read_bytes())
    data[record.body_offset : record.body_offset + len(forged)] = forged
    path.write_bytes(data)
    spoil(path, record, "prologue")
    assert left(compacted(store)) == []
    assert told(store) == whole
