"""Export and import: one recording as one file, bit for bit; nothing of a file that is not whole ever counts."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memdb.applying import IMPORT, role_of
from memdb.captions import CaptionIndex
from memdb.client import connect
from memdb.compact import compact
from memdb.files import watched
from memdb.forget import forget
from memdb.models.protocol import VideoModel
from memdb.records import Kind, Record, encode, read_body, read_record
from memdb.repair import repair
from memdb.schemas.errors import (
    CorruptionError,
    FormatVersionError,
    LockedError,
    MemdbError,
    ModelMismatch,
    StoreError,
    StoreFull,
    UnknownRecording,
    UsageError,
)
from memdb.schemas.fingerprint import ModelIdentity
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.rows import Part
from memdb.store import Store
from memdb.transfer import ImportReport, export_recording, import_recording
from memdb.transfer_file import TransferFile
from memdb.verify import verify_path
from tests.question_cases import House
from tests.repair_cases import (
    Axe,
    Killed,
    digests,
    furnish,
    records_of,
    true_unit,
)
from tests.run_cases import NAME, ingested, small_film, small_model, small_spec
from tests.store_cases import MODEL, UNIT_NS, Steps, directory_digest, flip, new_store, spec

NAMES = ("lobby", "attic", "hall", "shed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def files(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each recording as a file."""
    folder = tmp_path_factory.mktemp("files")
    for name in NAMES:
        export_recording(home, name, folder / f"{name}.memdb")
    return {name: folder / f"{name}.memdb" for name in NAMES}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without indexing, which takes most of the time."""
    monkeypatch.setattr("memdb.transfer.index", lambda *_: None)


def take_in(store: Path, file: Path, name: str | None = None) -> ImportReport:
    with Store.open(store, create=True, write=True) as opened:
        return import_recording(opened, file, recording=name)


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
def test_all_of_a_recording_arrives(home: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Into an empty store, which takes its model; into one that has others; into the same under another name."""
    store = tmp_path / "new.memdb"
    for name in NAMES:
        report = take_in(store, files[name])
        with Store.open(home) as opened:
            row = opened.recording(name)
            assert (report.recording, report.units) == (name, row.units)
            assert report.watermark_s == row.seen_until_ns / 1e9
    assert digests(store) == digests(home)
    for name in NAMES:
        assert about(store, name) == about(home, name)
    with Store.open(store) as opened:
        assert opened.model == MODEL
        commits = [row.commit_id for row in opened.units_after(0)]
        assert commits == list(range(1, len(commits) + 1))
    take_in(store, files["hall"], "hall again")
    assert about(store, "hall again") == about(home, "hall")
    checked = verify_path(store)
    assert (checked.problems, checked.notes) == ([], [])
    before = digests(store)
    repair(store)
    assert digests(store) == before, "the segments say all there is to say"


@pytest.mark.usefixtures("bare")
def test_a_file_moves_on_as_it_is(files: dict[str, Path], tmp_path: Path) -> None:
    """What was imported exports to the same bytes, but for the names and ids in its header."""
    take_in(tmp_path / "new.memdb", files["hall"])
    export_recording(tmp_path / "new.memdb", "hall", tmp_path / "again")
    first, second = (plain_records(path) for path in (files["hall"], tmp_path / "again"))
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


def test_what_arrived_is_searched_and_gone_on_with(files: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "new.memdb"
    take_in(store, files["lobby"])
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
def test_what_was_forgotten_does_not_travel(home: Path, files: dict[str, Path]) -> None:
    gone = [true_unit(number) for number in (2, 3, 5)]
    data = files["hall"].read_bytes()
    for one in gone:
        assert one.caption is not None
        assert one.caption.text.split("—")[0].encode() not in data
        assert one.caption.vector.astype("<f4").tobytes() not in data
    kept = true_unit(4)
    assert kept.caption is not None
    assert kept.caption.vector.astype("<f4").tobytes() in data


def test_an_export_leaves_the_store_as_it_was(home: Path, files: dict[str, Path], tmp_path: Path) -> None:
    before = directory_digest(home)
    (tmp_path / ".again.tmp").write_bytes(b"left by one that was killed")
    (tmp_path / "again").write_bytes(b"an older one")
    told: list[tuple[int, int]] = []
    report = export_recording(home, "lobby", tmp_path / "again", progress=lambda *at: told.append(at))
    assert directory_digest(home) == before
    assert (report.units, report.bytes) == (9, (tmp_path / "again").stat().st_size)
    assert (tmp_path / "again").read_bytes() == files["lobby"].read_bytes()
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
def test_a_unit_that_moves_meanwhile_is_found(home: Path, files: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    shutil.copytree(home, store)
    with Store.open(store, write=True) as opened:
        export_recording(store, "hall", tmp_path / "hall", progress=lambda *_: compact(opened) and None)
    take_in(tmp_path / "new.memdb", tmp_path / "hall")
    assert digests(tmp_path / "new.memdb")["hall"] == digests(home)["hall"]


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
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[VideoModel, Path, Path]:
    folder = tmp_path_factory.mktemp("small")
    film, longer = small_film(folder / "film.mp4", 12), small_film(folder / "longer.mp4", 24)
    return small_model(small_spec(folder)), film, longer


def test_an_ingest_goes_on_with_what_was_imported(
    small: tuple[VideoModel, Path, Path], tmp_path: Path
) -> None:
    """No encoder state travels: the film is encoded again, compared unit by unit, and gone on with as one epoch."""
    model, film, _ = small
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
    repair(store.path)


# What is refused


def test_a_name_that_is_taken_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "new.memdb"
    take_in(store, files["attic"])
    before = directory_digest(store / "segments")
    with pytest.raises(UsageError, match="--recording"):
        take_in(store, files["attic"])
    with pytest.raises(UsageError, match="not allowed"):
        take_in(store, files["attic"], "../attic")
    assert directory_digest(store / "segments") == before


@pytest.mark.usefixtures("bare")
def test_a_name_that_is_taken_meanwhile_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with new_store(tmp_path) as store:

        def overtake(*_: object) -> None:
            with pytest.raises(LockedError, match="another process brings"):
                import_recording(store, files["attic"])
            with pytest.raises(LockedError, match="another process writes"):
                store.writer(spec("attic", codec="raw"))

        assert import_recording(store, files["attic"], progress=overtake).units == 5
        with pytest.MonkeyPatch.context() as blind:  # both looked before either wrote
            blind.setattr("memdb.transfer._check_free", lambda *_: None)
            with pytest.raises(UsageError, match="by now"):
                import_recording(store, files["attic"])
        assert len(os.listdir(store.segments_path)) == 1


def test_another_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        other = ModelIdentity("random:1", "a" * 32, MODEL.shape)
        store.bind_model(other)
        with pytest.raises(ModelMismatch, match="another store"):
            import_recording(store, files["attic"])
        assert store.model == other
        assert os.listdir(store.segments_path) == []


def test_what_is_no_export_is_refused(home: Path, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("lobby")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    segment = next((home / "segments").iterdir())
    store = tmp_path / "new.memdb"
    for path in (
        tmp_path / "text",
        tmp_path / "empty",
        tmp_path / "pipe",
        tmp_path,
        tmp_path / "none",
        segment,
    ):
        with pytest.raises(UsageError, match=r"memdb export|cannot read"):
            take_in(store, path)
    with pytest.raises(UnknownRecording):
        export_recording(home, "nowhere", tmp_path / "out")
    for out in (tmp_path, tmp_path / "missing" / "out"):
        with pytest.raises(UsageError, match="--out"):
            export_recording(home, "lobby", out)
    assert os.listdir(store / "segments") == []


def test_a_damaged_recording_is_not_exported(home: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    shutil.copytree(home, store)
    with Store.open(store) as opened:
        row = opened.unit(opened.recording("lobby").id, 3)
    flip(store / "segments" / row.segment, row.body_offset + 3)
    with pytest.raises(CorruptionError, match=row.segment):
        export_recording(store, "lobby", tmp_path / "out")
    (store / "segments" / row.segment).unlink()
    with pytest.raises(CorruptionError, match="memdb verify"):
        export_recording(store, "lobby", tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


def refused(store: Path, file: Path, expected: type[MemdbError] = CorruptionError) -> str:
    """What an import of a file says that must be refused. Nothing of it is left."""
    before = set(os.listdir(store / "segments"))
    with Store.open(store) as opened:
        names = [row.name for row in opened.recordings()]
    with pytest.raises(expected) as caught:
        take_in(store, file)
    assert set(os.listdir(store / "segments")) == before
    with Store.open(store) as opened:
        assert [row.name for row in opened.recordings()] == names
    return str(caught.value)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with new_store(tmp_path / "into") as made:
        return made.path


def records_in(file: Path) -> list[Record]:
    with file.open("rb") as stream:
        size, offset, found = file.stat().st_size, 0, []
        while offset < size:
            found.append(read_record(stream.fileno(), offset, size, file=file.name))
            offset = found[-1].end
        return found


def test_a_flipped_bit_anywhere_is_refused(files: dict[str, Path], store: Path, tmp_path: Path) -> None:
    """In the prologue, body, padding and footer of every record."""
    data = files["hall"].read_bytes()
    copy = tmp_path / "flipped"
    for trial, record in enumerate(records_in(files["hall"])):
        for at in (
            record.offset + 9,
            record.offset + 60,
            record.body_offset,
            record.end - 1,
            record.end - 60,
        ):
            changed = bytearray(data)
            changed[min(at + trial % 3, record.end - 1)] ^= 1 << trial % 8
            copy.write_bytes(changed)
            assert str(copy) in refused(store, copy, MemdbError)


def test_a_cut_a_longer_and_a_shuffled_file_are_refused(
    files: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    data, found = files["lobby"].read_bytes(), records_in(files["lobby"])
    pieces = [data[record.offset : record.end] for record in found]
    units = [at for at, record in enumerate(found) if record.kind is Kind.UNIT]
    swapped, dropped, doubled = list(pieces), list(pieces), list(pieces)
    swapped[units[0]], swapped[units[1]] = pieces[units[1]], pieces[units[0]]
    del dropped[units[3]]
    doubled.insert(units[2], pieces[units[2]])
    other = files["attic"].read_bytes()
    changed = {
        "without its end": data[: found[-1].offset],
        "cut in a record": data[: found[-2].end - 70],
        "with more behind": data + bytes(64),
        "twice": data + data,
        "with another's units": data[: found[units[0]].offset]
        + other[records_in(files["attic"])[1].offset :],
        **{
            what: b"".join(parts)
            for what, parts in (("swapped", swapped), ("a unit less", dropped), ("one more", doubled))
        },
    }
    for what, content in changed.items():
        (tmp_path / "changed").write_bytes(content)
        assert "export" not in refused(store, tmp_path / "changed") or what == "without its end", what


# What has right checksums, and makes no sense

Change = Callable[[dict[str, object]], object]


def forged(source: Path, target: Path, at: int, **changes: object) -> None:
    """The file with one record changed, every checksum made right again."""
    data, offset, previous = bytearray(), 0, b""
    with source.open("rb") as stream:
        for number, record in enumerate(records_in(source)):
            body = read_body(stream.fileno(), record, source.stat().st_size, file="")
            meta = {
                key: value
                for key, value in record.meta.items()
                if key not in ("previous", "body_xxh3", "counts")
            }
            tables = {"blocks": record.blocks, "slices": record.slices}
            index = record.number
            if number == at:
                index = int(changes.pop("number", index))  # type: ignore[call-overload]
                for name in ("blocks", "slices"):
                    tables[name] = changes.pop(name, tables[name])  # type: ignore[assignment]
                meta |= changes
            parts = np.frombuffer(
                record.parts, [("part", "<u2"), ("offset", "<u8"), ("length", "<u8"), ("xxh3", "<u8")]
            )
            given = [
                (Part(int(row["part"])), body[row["offset"] : row["offset"] + row["length"]]) for row in parts
            ]
            buffers, made = encode(
                record.kind, index, meta, offset=offset, previous=previous, parts=given, **tables
            )
            data += b"".join(bytes(buffer) for buffer in buffers)
            offset, previous = made.end, made.footer_hash
    target.write_bytes(data)


def changed_slices(record: Record, **columns: int) -> bytes:
    from memdb.schemas.units import SLICE_DTYPE

    table = np.frombuffer(record.slices, SLICE_DTYPE).copy()
    for name, value in columns.items():
        table[name][0] = value
    return table.tobytes()


def test_a_forger_gets_a_typed_error_too(files: dict[str, Path], store: Path, tmp_path: Path) -> None:
    """Sizes that would allocate without bound, numbers that climb out, orders that nobody writes."""
    source, target = files["attic"], tmp_path / "forged"
    found = records_in(source)
    first = next(at for at, record in enumerate(found) if record.kind is Kind.UNIT)
    last, one = len(found) - 1, found[first]
    header_spec = found[0].meta["spec"]
    assert isinstance(header_spec, dict)
    huge = 0xFFFFFFFF
    forgeries: list[tuple[int, dict[str, object]]] = [
        (first, {"slices": changed_slices(one, raw_bytes=huge)}),
        (first, {"slices": changed_slices(one, tokens=huge, raw_bytes=huge)}),
        (first, {"slices": changed_slices(one, stored_bytes=huge)}),
        (first, {"slices": changed_slices(one, offset=1 << 40)}),
        (first, {"slices": changed_slices(one, layer=99)}),
        (first, {"slices": changed_slices(one, block=99)}),
        (first, {"slices": changed_slices(one, scale_bytes=8)}),
        (first, {"slices": b""}),
        (first, {"blocks": one.blocks[:32]}),
        (first, {"start_ns": -1}),
        (first, {"end_ns": 0}),
        (first, {"start_ns": 1 << 62, "end_ns": (1 << 62) + 1}),
        (first, {"epoch": -1}),
        (first, {"revision": 1 << 40}),
        (first, {"kept_ppm": 1 << 40}),
        (first, {"codec": "gold"}),
        (first, {"codec": "int4"}),
        (first, {"digest": "00" * 16}),
        (first, {"digest": "no digest"}),
        (first, {"first_digest": 7}),
        (first, {"layers": 1}),
        (first, {"caption_tokens": None}),
        (first, {"encoding": "of another"}),
        (first, {"number": 1}),
        (first + 1, {"start_ns": 0}),
        (last, {"units": 4}),
        (last, {"units": 1 << 60}),
        (last, {"kv_from_unit": 1 << 60}),
        (last, {"replaces": ["0" * 32 + "-000000.seg"]}),
        (0, {"spec": {**header_spec, "dtype": "float3"}}),
        (0, {"spec": {**header_spec, "sample_fps": 0}}),
        (0, {"spec": {**header_spec, "init_ids": [-1]}}),
        (0, {"spec": {**header_spec, "model": {"spec": "x", "fingerprint": "y", "shape": {}}}}),
        (0, {"spec": {**header_spec, "recipe": {}}}),
        (0, {"spec": None}),
        (0, {"created_ns": 1 << 70}),
    ]
    for at, changes in forgeries:
        forged(source, target, at, **changes)
        said = refused(store, target)
        assert "Traceback" not in said, changes
    forged(source, target, 0, format=FORMAT_VERSION + 1)
    assert "newer" in refused(store, target, FormatVersionError)
    forged(source, target, 0, role="stream")
    refused(store, target, UsageError)
    forged(source, target, 0, spec={**header_spec, "name": "../../etc"})
    refused(store, target, UsageError)
    forged(source, target, 0)
    assert take_in(store, target).units == 5, "a forger who changes nothing is none"


def test_events_that_make_no_sense_are_refused(files: dict[str, Path], store: Path, tmp_path: Path) -> None:
    for name, kind, changes in (
        ("lobby", Kind.EPOCH, {"first_unit": 1 << 60}),
        ("lobby", Kind.END, {"units": 1 << 60}),
        ("lobby", Kind.GAP, {"end_ns": 0}),
        ("lobby", Kind.GAP, {"number": 7}),
        ("lobby", Kind.GAP, {"reason": 7}),
        ("hall", Kind.TOMBSTONE, {"below_unit": 1 << 60}),
        ("hall", Kind.TOMBSTONE, {"end_ns": 1}),
    ):
        at = next(at for at, record in enumerate(records_in(files[name])) if record.kind is kind)
        forged(files[name], tmp_path / "forged", at, **changes)  # type: ignore[arg-type]
        refused(store, tmp_path / "forged")


def test_lengths_that_are_larger_than_the_file_are_not_allocated(
    files: dict[str, Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file is as large as it claims: holes take no room on a disk."""
    from memdb.records import encode_prologue

    head = files["attic"].read_bytes()[: records_in(files["attic"])[0].end]
    target = tmp_path / "huge"
    for body, footer in ((1 << 50, 64), (64, 1 << 50), (1 << 35, 64), (64, 1 << 29)):
        target.write_bytes(head + encode_prologue(Kind.UNIT, 0, body, footer))
        if body + footer < 1 << 40:
            os.truncate(target, len(head) + 64 + body + footer)
        refused(store, target)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Read without writing: whatever is done to the bytes, a typed error comes before the end."""
    whole = files[data.draw(st.sampled_from(["hall", "lobby"]))].read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["noise", "cut", "insert", "drop", "copy"])):
        case "noise":
            noise = random.Random(start).randbytes(data.draw(st.sampled_from([1, 8, 500])))
            changed = whole[:start] + noise + whole[start + len(noise) :]
        case "cut":
            changed = whole[:start]
        case "insert":
            changed = whole[:start] + bytes(64) + whole[start:]
        case "drop":
            changed = whole[:start] + whole[start + 64 :]
        case _:
            other = data.draw(st.integers(0, len(whole) - 64)) // 64 * 64
            changed = whole[: start // 64 * 64] + whole[other : other + 512] + whole[start // 64 * 64 + 512 :]
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(changed)
    if changed == whole:
        return
    with pytest.raises(MemdbError), TransferFile(path) as source:
        for _ in source.items():
            pass


# Kills, and disks that fill up


@pytest.mark.usefixtures("bare")
def test_a_kill_at_any_step_leaves_all_or_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    """Half an import never counts; one that was whole on the disk comes back, and says so to a second one."""
    with new_store(tmp_path) as made:
        base = made.path
    counting = Axe(0, True)
    shutil.copytree(base, tmp_path / "count.memdb")
    with watched(counting):
        take_in(tmp_path / "count.memdb", files["attic"])
    good = digests(tmp_path / "count.memdb")
    whole = 0
    for at in range(1, counting.steps + 1):
        store = tmp_path / "trial.memdb"
        shutil.copytree(base, store)
        with pytest.MonkeyPatch.context() as dying:
            dying.setattr("memdb.transfer.unlink", lambda path: None)  # the process is gone: nobody tidies up
            with watched(Axe(at, at % 2 == 0)), pytest.raises(Killed):
                take_in(store, files["attic"])
        found = digests(store)
        assert found in ({}, good), at
        assert verify_path(store).ok
        if found:
            whole += 1
            with pytest.raises(UsageError, match="--recording"):
                take_in(store, files["attic"])
        else:
            take_in(store, files["attic"])
        assert digests(store) == good
        repair(store)
        assert digests(store) == good, at
        shutil.rmtree(store)
    assert 0 < whole < counting.steps


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("bare")
def test_a_recording_that_comes_back_to_a_name_that_is_taken_gets_another(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """A store must open, whatever was left in it."""
    with new_store(tmp_path) as made:
        store = made.path
    with pytest.MonkeyPatch.context() as dying:
        dying.setattr("memdb.transfer._check_free", lambda *_: None)
        dying.setattr("memdb.transfer._Import._commit", interrupted)
        dying.setattr("memdb.transfer.unlink", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            take_in(store, files["attic"])
        dying.undo()
        dying.setattr("memdb.transfer._check_free", lambda *_: None)
        take_in(store, files["attic"])
    found = digests(store)
    assert sorted(found) == ["attic", "attic-2"]
    assert found["attic"] == found["attic-2"]
    repair(store)
    assert digests(store) == found


@pytest.mark.usefixtures("bare")
def test_an_export_that_is_killed_leaves_the_old_file(
    home: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    counting = Axe(0, True)
    with watched(counting):
        export_recording(home, "attic", tmp_path / "out")
    for at in range(1, counting.steps + 1, 2):
        (tmp_path / "out").write_bytes(b"the old one")
        with watched(Axe(at, True)), pytest.raises(Killed):
            export_recording(home, "attic", tmp_path / "out")
        data = (tmp_path / "out").read_bytes()
        assert data in (b"the old one", files["attic"].read_bytes())
    with watched(steps := Steps()):
        export_recording(home, "attic", tmp_path / "out")
    order = [step.what for step in steps.seen if step.what not in ("write", "unlink")]
    assert order[-3:] == ["sync", "replace", "sync_folder"]


@pytest.mark.parametrize("what", ["write", "sync", "create"])
@pytest.mark.usefixtures("bare")
def test_a_disk_that_fills_up_leaves_nothing(
    home: Path, files: dict[str, Path], tmp_path: Path, what: str
) -> None:
    with new_store(tmp_path) as made:
        store = made.path
    with watched(Steps(lambda step: step.what == what)), pytest.raises(StoreError):
        take_in(store, files["attic"])
    assert os.listdir(store / "segments") == []
    with watched(Steps(lambda step: step.what == what)), pytest.raises(StoreFull):
        export_recording(home, "attic", tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


@pytest.mark.usefixtures("bare")
def test_a_disk_without_room_is_refused_before_anything_is_written(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdb.room.free_bytes", lambda folder: 65 << 20)
    monkeypatch.setattr("memdb.transfer.RESERVE_BYTES", 65 << 20)
    with new_store(tmp_path) as store, pytest.raises(StoreFull, match="importing"):
        import_recording(store, files["attic"])
    assert os.listdir(tmp_path / "lobby.memdb" / "segments") == []


@pytest.mark.usefixtures("bare")
def test_an_import_is_safe_before_it_counts(files: dict[str, Path], tmp_path: Path) -> None:
    with new_store(tmp_path) as store, watched(steps := Steps()):
        import_recording(store, files["attic"])
    seen = steps.seen
    written = max(at for at, step in enumerate(seen) if step.what == "write" and step.path.suffix == ".seg")
    synced = next(
        at for at, step in enumerate(seen) if step.name == "an imported recording, before it is committed"
    )
    named = next(at for at, step in enumerate(seen) if step.name == "the name of an import")
    committed = [at for at, step in enumerate(seen) if step.name == "catalog committed"]
    assert written < synced < named < committed[0]


@pytest.mark.usefixtures("bare")
def test_nobody_sees_or_takes_half_an_import(files: dict[str, Path], tmp_path: Path) -> None:
    """Readers and compactions at work meanwhile leave it alone."""
    with new_store(tmp_path) as store:
        seen = []

        def look(done: int, all_bytes: int) -> None:
            with Store.open(store.path) as reader:
                seen.append([row.name for row in reader.recordings()])
            compact(store)

        assert import_recording(store, files["attic"], progress=look).units == 5
        assert seen
        assert not any(seen)
    assert verify_path(store.path).ok


@pytest.mark.usefixtures("bare")
def test_the_segment_of_an_import_has_a_role_and_two_seals(files: dict[str, Path], tmp_path: Path) -> None:
    """So that no single flip takes a recording away that lies in one file."""
    store = tmp_path / "new.memdb"
    take_in(store, files["attic"])
    [name] = os.listdir(store / "segments")
    found = [record for _, record in records_of(store, [name])]
    assert role_of(found[0]) == IMPORT
    good = digests(store)
    data = (store / "segments" / name).read_bytes()
    for seal in found[-2:]:
        assert seal.kind is Kind.SEAL
        (store / "segments" / name).write_bytes(data)
        flip(store / "segments" / name, seal.end - 9)
        for path in store.glob("catalog.sqlite*"):
            path.unlink()
        repair(store)
        assert digests(store) == good
