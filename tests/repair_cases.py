"""A store with something of everything, and what can be asked of it, for tests of repair, backup and formats."""

from __future__ import annotations

import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from memdb.applying import REWRITE
from memdb.database import CATALOG
from memdb.files import Step
from memdb.forget import forget
from memdb.mend import DAMAGED
from memdb.records import Kind, Record
from memdb.repair import repair
from memdb.repair_report import RepairReport
from memdb.schemas.errors import MemdbError
from memdb.schemas.rows import RecordingRow
from memdb.schemas.units import Unit
from memdb.sealed import SealedSegment, read_unit
from memdb.segments import reading, scan
from memdb.store import Store, recording_digest
from memdb.transfer import ImportReport, export_recording, import_recording
from tests.store_cases import UNIT_NS, fill, flip, new_store, pack, raw_slices, spec, unit

FORGOTTEN = "cellar"  # a recording that was forgotten as a whole
UNITS = {"lobby": 9, "attic": 5, "hall": 8, "shed": 0}


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The furnished store. Nobody writes it."""
    return furnish(tmp_path_factory.mktemp("furnished"))


@pytest.fixture(scope="session")
def exported(furnished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of its recordings as a file."""
    folder = tmp_path_factory.mktemp("files")
    for name in UNITS:
        export_recording(furnished, name, folder / f"{name}.memdb")
    return {name: folder / f"{name}.memdb" for name in UNITS}


@pytest.fixture
def copied(furnished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(furnished, tmp_path / "lobby.memdb")
    return tmp_path / "lobby.memdb"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs, backups and imports without making derived data anew, which takes most of their time."""
    monkeypatch.setattr("memdb.repair.rebuild_derived", lambda folder: [])
    monkeypatch.setattr("memdb.backup.rebuild_derived", lambda folder: [])
    monkeypatch.setattr("memdb.transfer.index", lambda *_: None)


def true_unit(number: int, codec: str = "int4") -> Unit:
    """A unit whose slices have the sizes that its codec gives them."""
    sizes = {"int4": 384, "raw": 256}
    found = unit(number, codec=codec)
    kv = pack(raw_slices(number, 2, codec, raw_bytes=sizes[codec]), 2, codec)
    kv.slices["scale_bytes"] = 2 if codec == "int4" else 0
    return replace(found, kv=kv)


def put(store: Store, name: str, units: int, codec: str = "int4") -> None:
    with store.writer(spec(name, codec=codec)) as writer:
        for first in range(0, units, 2):
            writer.append([true_unit(number, codec) for number in range(first, min(first + 2, units))])


def furnish(folder: Path) -> Path:
    """lobby: gaps, epochs, an end, many files. attic: raw. hall: forgotten spans, rewritten. shed: empty."""
    with new_store(folder) as store:
        with store.writer(spec("lobby"), segment_bytes_max=8500, now_ns=1) as writer:
            writer.epoch(0, 0, "the beginning")
            for first in range(0, 8, 2):
                writer.append([true_unit(first), true_unit(first + 1)])
            writer.epoch(1, 8, "a fresh window")
            writer.gap(8 * UNIT_NS, 8 * UNIT_NS + 1, "asleep")
            writer.append([true_unit(8)])
            writer.gap(9 * UNIT_NS, 10 * UNIT_NS, "asleep again")
            writer.end(10 * UNIT_NS)
        put(store, "attic", 5, "raw")
        put(store, "hall", 8)
        fill(store, 3, FORGOTTEN)
        store.writer(spec("shed")).close()
        forget(store, "hall", start_ns=2 * UNIT_NS, end_ns=3 * UNIT_NS + 1, now_ns=7)
        rewrite(store, "hall")
        forget(store, "hall", start_ns=int(5.5 * UNIT_NS), end_ns=6 * UNIT_NS, now_ns=8)
        forget(store, FORGOTTEN, now_ns=9)
        for name, count in (("lobby", 9), ("hall", 4)):
            row = store.recording(name)
            store.state(row.id).save(
                count, b"state " * 9, reach_ns=8 * UNIT_NS, tombstones=len(row.tombstones)
            )
    return folder / "lobby.memdb"


def rewrite(store: Store, name: str, *, seal: bool = True) -> str:
    """Write all files of a recording anew, as compaction does; the new file. The old ones wait."""
    row = store.recording(name)
    old = [segment.name for segment in store.catalog.segments(row.id)]
    new = SealedSegment(store.catalog, store.segments_path, row, REWRITE)
    for _, record in records_of(store.path, old):
        if record.kind in (Kind.GAP, Kind.EPOCH, Kind.END):
            new.carry(record)
    stones = {r.number: r for _, r in records_of(store.path, old) if r.kind is Kind.TOMBSTONE}
    for _ in range(2):
        for _, record in sorted(stones.items()):
            new.carry(record)
    for found in store.units(row.id):
        new.unit(read_unit(store.segments_path, row, found), found)
    if seal:
        new.seal(replaces=old, kv_from_unit=row.kv_from_unit)
    new.close()
    return new.name


def records_of(store: Path, names: list[str]) -> list[tuple[str, Record]]:
    """Every whole record of these segment files, in order."""
    found = []
    for name in names:
        with reading(store / "segments", name) as segment:
            found += [(name, record) for record in scan(segment, 0).records]
    return found


def files_of(store: Path, name: str) -> list[str]:
    """The segment files of a recording that count."""
    with Store.open(store) as opened:
        return [row.name for row in opened.catalog.segments(opened.recording(name).id)]


def find(store: Path, name: str, kind: Kind, number: int = 0, *, last: bool = True) -> tuple[Path, Record]:
    """A record of a recording: of several the last one, or the first."""
    found = [
        (file, record)
        for file, record in records_of(store, files_of(store, name))
        if record.kind is kind and record.number == number
    ]
    file, record = found[-1 if last else 0]
    return store / "segments" / file, record


def spoil_in(store: Path, found: tuple[Path, Record], part: str) -> str:
    """Damage a record that was found in a whole copy of this store; the name of its file."""
    path = store / "segments" / found[0].name
    spoil(path, found[1], part)
    return path.name


def spoil(path: Path, record: Record, part: str) -> None:
    """Damage a record in its prologue, body or footer."""
    at = {
        "prologue": record.offset + 20,
        "body": record.body_offset + 3,
        "footer": record.end - record.footer_bytes + 9,
    }[part]
    flip(path, at, 4)


def facts(store: Path) -> dict[str, object]:
    """All that a store says of its recordings, but for commit ids."""
    with Store.open(store) as opened:
        found: dict[str, object] = {"id": opened.store_id, "model": opened.model}
        for row in opened.recordings():
            found[row.name] = (recording(row), digest(opened, row.name))
            for one in opened.units(row.id):
                values = [
                    getattr(one, item.name)
                    for item in fields(one)
                    if item.name not in ("commit_id", "segment")
                ]
                found[f"{row.name} {one.number}"] = (values, one.segment)
            found[f"files of {row.name}"] = (
                opened.catalog.segments(row.id),
                opened.catalog.replaced(row.id),
            )
        found["forgotten"] = opened.catalog.forgotten()
    return found


def recording(row: RecordingRow) -> list[object]:
    return [getattr(row, item.name) for item in fields(row) if item.name not in ("last_commit", "generation")]


def digest(store: Store, name: str) -> str:
    """The digest of a recording, or why there is none."""
    try:
        return recording_digest(store, name)
    except MemdbError as error:
        return str(error)


def digests(store: Path) -> dict[str, str]:
    with Store.open(store) as opened:
        return {row.name: digest(opened, row.name) for row in opened.recordings()}


class Killed(BaseException):
    pass


class Axe:
    """Dies before or after the n-th step."""

    def __init__(self, at: int, before: bool) -> None:
        self._left, self._before = at, before
        self.steps = 0

    def before(self, step: Step) -> None:
        self.steps += 1
        if self._before and self.steps == self._left:
            raise Killed

    def after(self, step: Step) -> None:
        if not self._before and self.steps == self._left:
            raise Killed


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
            writer.append([true_unit(writer.next_unit, row.spec.recipe.codec)])
        forget(opened, name, start_ns=UNIT_NS // 2, end_ns=UNIT_NS)
        assert opened.recording(name).units == row.units + 1


def digests_after(store: Path) -> dict[str, str]:
    lose_catalog(store)
    repair(store)
    return digests(store)


def wipe(path: Path, at: int) -> None:
    """Damage more than one bit."""
    flip(path, at, 1)
    flip(path, at, 6)


def take_in(store: Path, file: Path, name: str | None = None) -> ImportReport:
    """Import a file into a store, which is made if it is not there."""
    with Store.open(store, create=True, write=True) as opened:
        return import_recording(opened, file, recording=name)
