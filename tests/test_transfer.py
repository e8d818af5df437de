"""Export and import: one recording as one file, bit for bit; nothing of a file that is not whole ever counts."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from memdb.applying import IMPORT, role_of
from memdb.captions import CaptionIndex
from memdb.client import connect
from memdb.compact import compact
from memdb.files import watched
from memdb.forget import forget
from memdb.models.protocol import VideoModel
from memdb.records import Kind, read_body, read_record
from memdb.repair import repair
from memdb.schemas.errors import (
    StoreError,
    StoreFull,
    UsageError,
)
from memdb.store import Store
from memdb.transfer import export_recording, import_recording
from memdb.verify import verify_path
from tests.question_cases import House
from tests.repair_cases import (
    UNITS,
    Axe,
    Killed,
    digests,
    lose_catalog,
    records_of,
    take_in,
    true_unit,
)
from tests.run_cases import NAME, ingested, small_film, small_model, small_spec
from tests.store_cases import MODEL, UNIT_NS, Steps, directory_digest, flip, new_store, spec


def about(store: Path, name: str) -> list[object]:
    """What moves with a recording, beside its content."""
    with Store.open(store) as opened:
        row = opened.recording(name)
        units = [
            (
                one.number,
                one.start_ns,
                one.end_ns,
                one.epoch,
                one.digest,
                one.revision,
                one.codec,
                one.first_digest,
            )
            for one in opened.units(row.id)
        ]
        return [
            replace(row.spec, name=""), row.created_ns, row.gaps, row.epochs, row.end_ns, row.tombstones,
            row.kv_from_unit, row.tier_bytes, units,
        ]  # fmt: skip


# Bit for bit


@pytest.mark.usefixtures("bare")
def test_all_of_a_recording_arrives(furnished: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    """Into an empty store, which takes its model; into one that has others; into the same under another name."""
    store = tmp_path / "new.memdb"
    for name in UNITS:
        report = take_in(store, exported[name])
        with Store.open(furnished) as opened:
            row = opened.recording(name)
            assert (report.recording, report.units) == (name, row.units)
            assert report.watermark_s == row.seen_until_ns / 1e9
    assert digests(store) == digests(furnished)
    for name in UNITS:
        assert about(store, name) == about(furnished, name)
    with Store.open(store) as opened:
        assert opened.model == MODEL
        commits = [row.commit_id for row in opened.units_after(0)]
        assert commits == list(range(1, len(commits) + 1))
    take_in(store, exported["hall"], "hall again")
    assert about(store, "hall again") == about(furnished, "hall")
    checked = verify_path(store)
    assert (checked.problems, checked.notes) == ([], [])
    before = digests(store)
    repair(store)
    assert digests(store) == before, "the segments say all there is to say"


@pytest.mark.usefixtures("bare")
def test_a_file_moves_on_as_it_is(exported: dict[str, Path], tmp_path: Path) -> None:
    """What was imported exports to the same bytes, but for the names and ids in its header."""
    take_in(tmp_path / "new.memdb", exported["hall"])
    export_recording(tmp_path / "new.memdb", "hall", tmp_path / "again")
    first, second = (plain_records(path) for path in (exported["hall"], tmp_path / "again"))
    assert [record[:-1] for record in first[1:]] == [record[:-1] for record in second[1:]]
    assert [record[-1] for record in first] == [record[-1] for record in second], "every body, byte for byte"


def plain_records(path: Path) -> list[tuple[object, ...]]:
    found = []
    with path.open("rb") as file:
        size, offset = path.stat().st_size, 0
        while offset < size:
            record = read_record(file.fileno(), offset, size, file=path.name)
            meta = {key: value for key, value in record.meta.items() if key != "previous"}
            body = read_body(file.fileno(), record, size, file=path.name)
            found.append((record.kind, record.number, meta, record.blocks, record.slices, record.parts, body))
            offset = record.end
    return found


def test_what_arrived_is_searched_and_gone_on_with(exported: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "new.memdb"
    take_in(store, exported["lobby"])
    with Store.open(store, write=True) as opened:
        found = CaptionIndex(store).search(opened, "fake", text="unit 8")
        assert (found.hits[0].unit, found.warnings) == (8, ())
        assert found.indexed_commit > 0
        row = opened.recording("lobby")
        assert (store / "keys" / f"{row.id}.pages").stat().st_size > 0
        with opened.writer(row.spec) as writer:
            writer.append([true_unit(9)])
        forget(opened, "lobby", start_ns=0, end_ns=UNIT_NS)
        assert opened.recording("lobby").units == 10
    assert verify_path(store).ok


@pytest.mark.usefixtures("bare")
def test_what_was_forgotten_does_not_travel(furnished: Path, exported: dict[str, Path]) -> None:
    gone = [true_unit(number) for number in (2, 3, 5)]
    data = exported["hall"].read_bytes()
    for one in gone:
        assert one.caption is not None
        assert one.caption.text.split("—")[0].encode() not in data
        assert one.caption.vector.astype("<f4").tobytes() not in data
    kept = true_unit(4)
    assert kept.caption is not None
    assert kept.caption.vector.astype("<f4").tobytes() in data


def test_an_export_leaves_the_store_as_it_was(
    furnished: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    before = directory_digest(furnished)
    (tmp_path / ".again.tmp").write_bytes(b"left by one that was killed")
    (tmp_path / "again").write_bytes(b"an older one")
    told: list[tuple[int, int]] = []
    report = export_recording(furnished, "lobby", tmp_path / "again", progress=lambda *at: told.append(at))
    assert directory_digest(furnished) == before
    assert (report.units, report.bytes) == (9, (tmp_path / "again").stat().st_size)
    assert (tmp_path / "again").read_bytes() == exported["lobby"].read_bytes()
    assert told[-1] == (9, 9)
    assert os.listdir(tmp_path) == ["again"]


@pytest.mark.usefixtures("bare")
def test_an_export_is_of_one_moment(tmp_path: Path) -> None:
    """What a writer appends meanwhile is left out; where a span is forgotten, it begins anew without it."""
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([true_unit(number) for number in range(4)])
        before = digests(store.path)

        def append(done: int, _: int) -> None:
            if done == 2:
                writer.append([true_unit(writer.next_unit)])
                writer.gap(90 * UNIT_NS, 91 * UNIT_NS, "asleep")

        export_recording(store.path, "lobby", tmp_path / "lobby", progress=append)
        take_in(tmp_path / "new.memdb", tmp_path / "lobby")
        assert digests(tmp_path / "new.memdb") == before
        told = []

        def forgetting(done: int, units: int) -> None:
            told.append(units)
            if len(told) == 4:
                forget(store, "lobby", start_ns=0, end_ns=UNIT_NS)
                compact(store)

        export_recording(store.path, "lobby", tmp_path / "lobby", progress=forgetting)
        assert told == [5] * 10
        take_in(tmp_path / "new.memdb", tmp_path / "lobby", "again")
        assert digests(tmp_path / "new.memdb")["again"] == digests(store.path)["lobby"]


@pytest.mark.usefixtures("bare")
def test_a_unit_that_moves_meanwhile_is_found(
    furnished: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "s.memdb"
    shutil.copytree(furnished, store)
    with Store.open(store, write=True) as opened:
        export_recording(store, "hall", tmp_path / "hall", progress=lambda *_: compact(opened) and None)
    take_in(tmp_path / "new.memdb", tmp_path / "hall")
    assert digests(tmp_path / "new.memdb")["hall"] == digests(furnished)["hall"]


# Real recordings


def test_a_real_recording_answers_the_same_elsewhere(house: House, tmp_path: Path) -> None:
    question = "What colour was the star?"
    with house.open() as client, connect(tmp_path / "new.memdb") as other:
        for name in ("hall", "yard", "roof"):
            client.export(name, tmp_path / name, format="memdb")
            other.import_(tmp_path / name)
        assert other.digest() == client.digest()
        assert other.verify().ok
        for name, mode in (("hall", "both"), ("yard", "kv"), ("roof", "captions")):
            here, there = (at.ask(question, recording=name, mode=mode) for at in (client, other))
            assert (there.text, there.warnings) == (here.text, here.warnings)
            assert [item.as_json() for item in there.evidence] == [item.as_json() for item in here.evidence]
        # Equal scores stand in the order of ids, which are others.
        found = [sorted((hit.score, hit.caption) for hit in at.search("star")) for at in (client, other)]
        assert found[0] == found[1] != []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[VideoModel, Path]:
    folder = tmp_path_factory.mktemp("small")
    return small_model(small_spec(folder)), small_film(folder / "film.mp4", 12)


def test_an_ingest_goes_on_with_what_was_imported(small: tuple[VideoModel, Path], tmp_path: Path) -> None:
    """No encoder state travels: the film is encoded again, compared unit by unit, and gone on with as one epoch."""
    model, film = small
    whole, part, new = (tmp_path / f"{name}.memdb" for name in ("whole", "part", "new"))
    ingested(whole, model, film, "hybrid")
    shutil.copytree(whole, part)
    with Store.open(whole) as store:
        rows = store.units(store.recording(NAME).id)
    with Store.open(part, write=True) as store:
        cut_short(store, 2)
    export_recording(part, NAME, tmp_path / "file")
    take_in(new, tmp_path / "file")
    with Store.open(new) as store:
        assert store.recording(NAME).units == 2
    report = ingested(new, model, film, "hybrid")
    assert (report.resumed_from_unit, report.replayed_units) == (0, 2)
    assert report.units == len(rows) - 2
    assert digests(new) == digests(whole)
    with Store.open(new) as store:
        assert [epoch.number for epoch in store.recording(NAME).epochs] == [0]


def cut_short(store: Store, units: int) -> None:
    """As if the ingest had been killed behind so many units."""
    row = store.recording(NAME)
    [segment] = store.catalog.segments(row.id)
    keep = store.unit(row.id, units - 1)
    path = store.segments_path / segment.name
    data = path.read_bytes()[: keep.offset + keep.length]
    store.close()
    path.write_bytes(data)
    lose_catalog(store.path)
    repair(store.path)


# Kills, and disks that fill up


@pytest.mark.usefixtures("bare")
def test_a_kill_at_any_step_leaves_all_or_nothing(exported: dict[str, Path], tmp_path: Path) -> None:
    """Half an import never counts; one that was whole on the disk comes back, and says so to a second one."""
    with new_store(tmp_path) as made:
        base = made.path
    counting = Axe(0, True)
    shutil.copytree(base, tmp_path / "count.memdb")
    with watched(counting):
        take_in(tmp_path / "count.memdb", exported["attic"])
    good = digests(tmp_path / "count.memdb")
    whole = 0
    for at in range(1, counting.steps + 1):
        store = tmp_path / "trial.memdb"
        shutil.copytree(base, store)
        with pytest.MonkeyPatch.context() as dying:
            dying.setattr("memdb.transfer.unlink", lambda path: None)  # the process is gone: nobody tidies up
            with watched(Axe(at, at % 2 == 0)), pytest.raises(Killed):
                take_in(store, exported["attic"])
        found = digests(store)
        assert found in ({}, good), at
        assert verify_path(store).ok
        if found:
            whole += 1
            with pytest.raises(UsageError, match="--recording"):
                take_in(store, exported["attic"])
        else:
            take_in(store, exported["attic"])
        assert digests(store) == good
        repair(store)
        assert digests(store) == good, at
        shutil.rmtree(store)
    assert 0 < whole < counting.steps


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("bare")
def test_a_recording_that_comes_back_to_a_name_that_is_taken_gets_another(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    """A store must open, whatever was left in it."""
    with new_store(tmp_path) as made:
        store = made.path
    with pytest.MonkeyPatch.context() as dying:
        dying.setattr("memdb.transfer._check_free", lambda *_: None)
        dying.setattr("memdb.transfer._Import._commit", interrupted)
        dying.setattr("memdb.transfer.unlink", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            take_in(store, exported["attic"])
        dying.undo()
        dying.setattr("memdb.transfer._check_free", lambda *_: None)
        take_in(store, exported["attic"])
    found = digests(store)
    assert sorted(found) == ["attic", "attic-2"]
    assert found["attic"] == found["attic-2"]
    repair(store)
    assert digests(store) == found


@pytest.mark.usefixtures("bare")
def test_an_export_that_is_killed_leaves_the_old_file(
    furnished: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    counting = Axe(0, True)
    with watched(counting):
        export_recording(furnished, "attic", tmp_path / "out")
    for at in range(1, counting.steps + 1, 2):
        (tmp_path / "out").write_bytes(b"the old one")
        with watched(Axe(at, True)), pytest.raises(Killed):
            export_recording(furnished, "attic", tmp_path / "out")
        data = (tmp_path / "out").read_bytes()
        assert data in (b"the old one", exported["attic"].read_bytes())
    with watched(steps := Steps()):
        export_recording(furnished, "attic", tmp_path / "out")
    order = [step.what for step in steps.seen if step.what not in ("write", "unlink")]
    assert order[-3:] == ["sync", "replace", "sync_folder"]


@pytest.mark.parametrize("what", ["write", "sync", "create"])
@pytest.mark.usefixtures("bare")
def test_a_disk_that_fills_up_leaves_nothing(
    furnished: Path, exported: dict[str, Path], tmp_path: Path, what: str
) -> None:
    with new_store(tmp_path) as made:
        store = made.path
    with watched(Steps(lambda step: step.what == what)), pytest.raises(StoreError):
        take_in(store, exported["attic"])
    assert os.listdir(store / "segments") == []
    with watched(Steps(lambda step: step.what == what)), pytest.raises(StoreFull):
        export_recording(furnished, "attic", tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


@pytest.mark.usefixtures("bare")
def test_a_disk_without_room_is_refused_before_anything_is_written(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdb.room.free_bytes", lambda folder: 65 << 20)
    monkeypatch.setattr("memdb.transfer.RESERVE_BYTES", 65 << 20)
    with new_store(tmp_path) as store, pytest.raises(StoreFull, match="importing"):
        import_recording(store, exported["attic"])
    assert os.listdir(tmp_path / "lobby.memdb" / "segments") == []


@pytest.mark.usefixtures("bare")
def test_an_import_is_safe_before_it_counts(exported: dict[str, Path], tmp_path: Path) -> None:
    with new_store(tmp_path) as store, watched(steps := Steps()):
        import_recording(store, exported["attic"])
    seen = steps.seen
    written = max(at for at, step in enumerate(seen) if step.what == "write" and step.path.suffix == ".seg")
    synced = next(
        at for at, step in enumerate(seen) if step.name == "an imported recording, before it is committed"
    )
    named = next(at for at, step in enumerate(seen) if step.name == "the name of an import")
    committed = [at for at, step in enumerate(seen) if step.name == "catalog committed"]
    assert written < synced < named < committed[0]


@pytest.mark.usefixtures("bare")
def test_nobody_sees_or_takes_half_an_import(exported: dict[str, Path], tmp_path: Path) -> None:
    """Readers and compactions at work meanwhile leave it alone."""
    with new_store(tmp_path) as store:
        seen = []

        def look(done: int, all_bytes: int) -> None:
            with Store.open(store.path) as reader:
                seen.append([row.name for row in reader.recordings()])
            compact(store)

        assert import_recording(store, exported["attic"], progress=look).units == 5
        assert seen
        assert not any(seen)
    assert verify_path(store.path).ok


@pytest.mark.usefixtures("bare")
def test_the_segment_of_an_import_has_a_role_and_two_seals(exported: dict[str, Path], tmp_path: Path) -> None:
    """So that no single flip takes a recording away that lies in one file."""
    store = tmp_path / "new.memdb"
    take_in(store, exported["attic"])
    [name] = os.listdir(store / "segments")
    found = [record for _, record in records_of(store, [name])]
    assert role_of(found[0]) == IMPORT
    good = digests(store)
    data = (store / "segments" / name).read_bytes()
    for seal in found[-2:]:
        assert seal.kind is Kind.SEAL
        (store / "segments" / name).write_bytes(data)
        flip(store / "segments" / name, seal.end - 9)
        lose_catalog(store)
        repair(store)
        assert digests(store) == good
