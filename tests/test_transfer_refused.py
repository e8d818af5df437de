"""What an import refuses: names, models, files that are damaged, cut, shuffled or forged; always with typed errors."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memdb.records import Kind, Record, encode, read_body, read_record
from memdb.schemas.errors import (
    CorruptionError,
    FormatVersionError,
    LockedError,
    MemdbError,
    ModelMismatch,
    UnknownRecording,
    UsageError,
)
from memdb.schemas.fingerprint import ModelIdentity
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.rows import Part
from memdb.store import Store
from memdb.transfer import export_recording, import_recording
from memdb.transfer_file import TransferFile
from tests.repair_cases import (
    take_in,
)
from tests.store_cases import MODEL, directory_digest, flip, new_store, spec

# What is refused


def test_a_name_that_is_taken_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "new.memdb"
    take_in(store, exported["attic"])
    before = directory_digest(store / "segments")
    with pytest.raises(UsageError, match="--recording"):
        take_in(store, exported["attic"])
    with pytest.raises(UsageError, match="not allowed"):
        take_in(store, exported["attic"], "../attic")
    assert directory_digest(store / "segments") == before


@pytest.mark.usefixtures("bare")
def test_a_name_that_is_taken_meanwhile_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    with new_store(tmp_path) as store:

        def overtake(*_: object) -> None:
            with pytest.raises(LockedError, match="another process brings"):
                import_recording(store, exported["attic"])
            with pytest.raises(LockedError, match="another process writes"):
                store.writer(spec("attic", codec="raw"))

        assert import_recording(store, exported["attic"], progress=overtake).units == 5
        with pytest.MonkeyPatch.context() as blind:  # both looked before either wrote
            blind.setattr("memdb.transfer._check_free", lambda *_: None)
            with pytest.raises(UsageError, match="by now"):
                import_recording(store, exported["attic"])
        assert len(os.listdir(store.segments_path)) == 1


def test_another_model_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        other = ModelIdentity("random:1", "a" * 32, MODEL.shape)
        store.bind_model(other)
        with pytest.raises(ModelMismatch, match="another store"):
            import_recording(store, exported["attic"])
        assert store.model == other
        assert os.listdir(store.segments_path) == []


def test_what_is_no_export_is_refused(furnished: Path, exported: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("lobby")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    segment = next((furnished / "segments").iterdir())
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
        export_recording(furnished, "nowhere", tmp_path / "out")
    for out in (tmp_path, tmp_path / "missing" / "out"):
        with pytest.raises(UsageError, match="--out"):
            export_recording(furnished, "lobby", out)
    assert os.listdir(store / "segments") == []


def test_a_damaged_recording_is_not_exported(furnished: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    shutil.copytree(furnished, store)
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


def test_a_flipped_bit_anywhere_is_refused(exported: dict[str, Path], store: Path, tmp_path: Path) -> None:
    """In the prologue, body, padding and footer of every record."""
    data = exported["hall"].read_bytes()
    copy = tmp_path / "flipped"
    for trial, record in enumerate(records_in(exported["hall"])):
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
    exported: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    data, found = exported["lobby"].read_bytes(), records_in(exported["lobby"])
    pieces = [data[record.offset : record.end] for record in found]
    units = [at for at, record in enumerate(found) if record.kind is Kind.UNIT]
    swapped, dropped, doubled = list(pieces), list(pieces), list(pieces)
    swapped[units[0]], swapped[units[1]] = pieces[units[1]], pieces[units[0]]
    del dropped[units[3]]
    doubled.insert(units[2], pieces[units[2]])
    other = exported["attic"].read_bytes()
    changed = {
        "without its end": data[: found[-1].offset],
        "cut in a record": data[: found[-2].end - 70],
        "with more behind": data + bytes(64),
        "twice": data + data,
        "with another's units": data[: found[units[0]].offset]
        + other[records_in(exported["attic"])[1].offset :],
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


def test_a_forger_gets_a_typed_error_too(exported: dict[str, Path], store: Path, tmp_path: Path) -> None:
    """Sizes that would allocate without bound, numbers that climb out, orders that nobody writes."""
    source, target = exported["attic"], tmp_path / "forged"
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
    assert "'../../etc' is not allowed" in refused(store, target)
    forged(source, target, 0)
    assert take_in(store, target).units == 5, "a forger who changes nothing is none"


def test_events_that_make_no_sense_are_refused(
    exported: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    for name, kind, changes in (
        ("lobby", Kind.EPOCH, {"first_unit": 1 << 60}),
        ("lobby", Kind.END, {"units": 1 << 60}),
        ("lobby", Kind.GAP, {"end_ns": 0}),
        ("lobby", Kind.GAP, {"number": 7}),
        ("lobby", Kind.GAP, {"reason": 7}),
        ("hall", Kind.TOMBSTONE, {"below_unit": 1 << 60}),
        ("hall", Kind.TOMBSTONE, {"end_ns": 1}),
    ):
        at = next(at for at, record in enumerate(records_in(exported[name])) if record.kind is kind)
        forged(exported[name], tmp_path / "forged", at, **changes)  # type: ignore[arg-type]
        refused(store, tmp_path / "forged")


def test_lengths_that_are_larger_than_the_file_are_not_allocated(
    exported: dict[str, Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file is as large as it claims: holes take no room on a disk."""
    from memdb.records import encode_prologue

    head = exported["attic"].read_bytes()[: records_in(exported["attic"])[0].end]
    target = tmp_path / "huge"
    for body, footer in ((1 << 50, 64), (64, 1 << 50), (1 << 35, 64), (64, 1 << 29)):
        target.write_bytes(head + encode_prologue(Kind.UNIT, 0, body, footer))
        if body + footer < 1 << 40:
            os.truncate(target, len(head) + 64 + body + footer)
        refused(store, target)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused(
    exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Read without writing: whatever is done to the bytes, a typed error comes before the end."""
    whole = exported[data.draw(st.sampled_from(["hall", "lobby"]))].read_bytes()
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
