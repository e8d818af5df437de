"""What a power cut leaves of files that never counted: repair takes none of it for more than it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdb.records import PROLOGUE_BYTES, Kind
from memdb.repair import repair
from memdb.store import Store
from memdb.verify import verify
from tests.repair_cases import bare, copied, digests, furnished, lose_catalog, records_of, rewrite

__all__ = ["bare", "copied", "furnished"]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("with_catalog", [True, False])
@pytest.mark.parametrize("unit_is", ["nothing", "a prologue", "a prologue, and events are whole"])
def test_a_rewriting_that_was_cut_off_and_lost_its_header_hides_no_unit(
    furnished: Path, copied: Path, unit_is: str, with_catalog: bool
) -> None:
    """It passed for the newest file of a writer, behind which no older one counts: the last units went."""
    with Store.open(copied, write=True) as store:
        name = rewrite(store, "lobby", seal=False)
    path = copied / "segments" / name
    data = bytearray(path.read_bytes())
    records = [record for _, record in records_of(copied, [name])]
    for record in records:
        if record.kind is Kind.HEADER or (
            record.kind in (Kind.GAP, Kind.EPOCH, Kind.END) and "events" not in unit_is
        ):
            data[record.offset : record.end] = bytes(record.length)
        elif record.kind is Kind.UNIT:
            kept = PROLOGUE_BYTES if unit_is != "nothing" and record.number == 3 else 0
            data[record.offset + kept : record.end] = bytes(record.length - kept)
    path.write_bytes(data)
    states = sorted((copied / "state").iterdir())
    if not with_catalog:
        lose_catalog(copied)
    report = repair(copied)
    assert report.spans == []
    assert {one.name: one.units for one in report.recordings}["lobby"] == 9
    assert sorted((copied / "state").iterdir()) == states
    assert digests(copied) == digests(furnished)
    with Store.open(copied) as store:
        assert verify(store).problems == []
        assert name not in [row.name for row in store.catalog.segments(store.recording("lobby").id)]
