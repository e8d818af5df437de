"""The store: what was acknowledged is there, after reopening, kills and damage; who may write, and what."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.database import CATALOG, Database
from memdb.digest import unit_digest
from memdb.files import watched
from memdb.repair import repair
from memdb.schemas.errors import (
    CorruptionError,
    EncodingMismatch,
    LockedError,
    ModelMismatch,
    NotAStore,
    SourceMismatch,
    StoreError,
    UnknownRecording,
    UsageError,
)
from memdb.schemas.fingerprint import ModelIdentity
from memdb.schemas.frames import SourceIdentity
from memdb.schemas.recording import Epoch, Gap
from memdb.schemas.rows import RecordingSpec, UnitRow
from memdb.schemas.units import Unit
from memdb.segments import segment_files
from memdb.store import Store, recording_digest
from memdb.verify import verify
from tests.store_cases import (
    MODEL,
    UNIT_NS,
    Steps,
    directory_digest,
    fill,
    flip,
    new_store,
    recipe,
    spec,
    unit,
)


def check_unit(store: Store, row: UnitRow, expected: Unit) -> None:
    """Everything of a unit but its slices, which test_reader reads."""
    assert (row.number, row.start_ns, row.end_ns, row.epoch) == (
        expected.number,
        expected.start_ns,
        expected.end_ns,
        expected.epoch,
    )
    assert row.digest == unit_digest(expected)
    assert np.array_equal(row.blocks, expected.blocks)
    assert store.read_keyframe(row) == expected.keyframe
    if expected.kv is None:
        assert len(row.slices) == 0
    else:
        assert np.array_equal(row.slices, expected.kv.slices)
    keys = store.read_keys(row)
    if expected.keys is None:
        assert keys is None
    else:
        assert keys is not None
        assert keys.dtype == np.float16
        assert np.array_equal(keys, expected.keys)
    assert row.has_caption == (expected.caption is not None)
    if expected.caption is not None:
        said = store.read_caption(row)
        assert said == expected.caption
        assert np.array_equal(said.vector, expected.caption.vector)
        assert row.caption_tokens == len(said.token_ids)


@pytest.mark.parametrize("codec", ["int4", "raw", "none"])
def test_what_was_written_is_there_after_reopening(tmp_path: Path, codec: str) -> None:
    with new_store(tmp_path) as store:
        fill(store, 5, codec=codec, batch=2)
    with Store.open(tmp_path / "lobby.memdb") as store:
        recording = store.recording("lobby")
        assert recording.spec == spec(codec=codec)
        assert (recording.units, recording.watermark_ns, recording.start_ns) == (5, 5 * UNIT_NS, 0)
        assert store.model == MODEL
        rows = store.units(recording.id)
        for number, row in enumerate(rows):
            check_unit(store, row, unit(number, codec=codec))
            assert row.commit_id == number + 1
        assert store.last_commit() == 5


@settings(max_examples=15, deadline=None)
@given(
    captions=st.lists(st.booleans(), min_size=1, max_size=7),
    cuts=st.lists(st.integers(1, 3), min_size=7, max_size=7),
    segment_bytes_max=st.sampled_from([1, 6000, 1 << 30]),
)
def test_grouping_rotation_and_reopening_are_no_content(
    tmp_path_factory: pytest.TempPathFactory, captions: list[bool], cuts: list[int], segment_bytes_max: int
) -> None:
    """The digest and every unit are those of one plain append."""
    units = [unit(number, caption=caption) for number, caption in enumerate(captions)]
    with new_store(tmp_path_factory.mktemp("plain")) as store:
        with store.writer(spec()) as writer:
            writer.append(units)
        expected = {tier: recording_digest(store, "lobby", tier) for tier in ("all", "kv", "captions")}
    with new_store(tmp_path_factory.mktemp("cut")) as store:
        done = 0
        for cut in cuts:
            if done < len(units):
                with store.writer(spec(), segment_bytes_max=segment_bytes_max) as writer:
                    assert writer.next_unit == done
                    for single in units[done : done + cut]:
                        writer.append([single])
                done += cut
        recording = store.recording("lobby")
        for row, wanted in zip(store.units(recording.id), units, strict=True):
            check_unit(store, row, wanted)
        found = {tier: recording_digest(store, "lobby", tier) for tier in ("all", "kv", "captions")}
        assert found == expected
        assert verify(store).ok


def test_the_digest_is_of_content_and_not_of_compression(tmp_path: Path) -> None:
    digests, sizes = set(), set()
    for level in (1, 19):
        with new_store(tmp_path / str(level)) as store:
            with store.writer(spec(codec="raw"), now_ns=level) as writer:
                writer.append([unit(number, codec="raw", level=level) for number in range(3)])
            digests.add(recording_digest(store, "lobby"))
            sizes.add(store.recording("lobby").tier_bytes.kv)
            sizes.add(sum(int(row.slices["stored_bytes"].sum()) for row in store.units(writer.recording.id)))
    assert len(digests) == 1
    assert len(sizes) > 1


def changed(unit: Unit, **changes: object) -> Unit:
    return dataclasses.replace(unit, **changes)  # type: ignore[arg-type]


def test_the_digest_tells_every_part_of_the_content_apart() -> None:
    base = unit(2)
    assert base.kv is not None
    assert base.caption is not None
    assert base.keys is not None
    blocks, slices = base.blocks.copy(), base.kv.slices.copy()
    blocks["position"][1] += 1
    slices["scale_bytes"][0] = 4
    moved = base.kv.slices.copy()
    moved["offset"] += 64
    variants = [
        base,
        changed(base, number=3),
        changed(base, end_ns=base.end_ns + 1),
        changed(base, epoch=1),
        changed(base, blocks=blocks),
        changed(base, kv=dataclasses.replace(base.kv, slices=slices)),
        changed(base, kv=dataclasses.replace(base.kv, raw_digest=b"\0" * 16)),
        changed(base, kv=None),
        changed(base, keys=-base.keys),
        changed(base, keys=base.keys.reshape(1, 2, -1)),
        changed(base, caption=None),
        changed(base, caption=dataclasses.replace(base.caption, text="other")),
        changed(base, caption=dataclasses.replace(base.caption, token_ids=(1,))),
        changed(base, caption=dataclasses.replace(base.caption, vector=np.zeros(8, np.float32))),
        changed(base, keyframe=None),
        changed(base, keyframe=b""),
    ]
    assert len({unit_digest(variant) for variant in variants}) == len(variants)
    assert unit_digest(changed(base, kv=dataclasses.replace(base.kv, slices=moved))) == unit_digest(base)


def test_a_tier_ignores_the_other(tmp_path: Path) -> None:
    digests = []
    for caption, codec in ((True, "int4"), (False, "int4"), (True, "none")):
        with new_store(tmp_path / f"{caption}{codec}") as store:
            with store.writer(spec(codec=codec)) as writer:
                writer.append([unit(0, caption=caption, codec=codec)])
            digests.append(
                {tier: recording_digest(store, "lobby", tier) for tier in ("all", "kv", "captions")}
            )
    both, mute, blind = digests
    assert both["kv"] == mute["kv"] != blind["kv"]
    assert both["captions"] == blind["captions"] != mute["captions"]
    assert len({found["all"] for found in digests}) == 3
    with pytest.raises(UsageError, match="tier"), new_store(tmp_path) as store:
        recording_digest(store, "lobby", "video")


def test_a_digest_is_recomputed_from_the_bytes(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
        row = store.unit(store.recording("lobby").id, 1)
        flip(store.segments_path / row.segment, row.payload_offset)
        with pytest.raises(CorruptionError) as caught:
            recording_digest(store, "lobby", "captions")
        assert caught.value.file == f"segments/{row.segment}"


# Finding units


@settings(max_examples=60, deadline=None)
@given(start=st.integers(-1, 9), length=st.integers(0, 9), half=st.booleans())
def test_units_of_a_span_are_those_that_overlap_it(full: Store, start: int, length: int, half: bool) -> None:
    start_ns = start * UNIT_NS + half * UNIT_NS // 2
    end_ns = start_ns + length * UNIT_NS
    recording = full.recording("lobby")
    every = full.units(recording.id)
    found = [row.number for row in full.units(recording.id, start_ns=start_ns, end_ns=end_ns)]
    assert found == [row.number for row in every if row.end_ns > start_ns and row.start_ns < end_ns]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two recordings, 7 and 3 units, written in turns; every other unit of the second has no caption."""
    store = new_store(tmp_path_factory.mktemp("full"))
    with store.writer(spec("lobby")) as lobby, store.writer(spec("door")) as door:
        for number in range(7):
            lobby.append([unit(number)])
            if number < 3:
                door.append([unit(number, caption=number % 2 == 0)])
    return store


def test_units_by_number(full: Store) -> None:
    recording = full.recording("lobby")
    assert [row.number for row in full.units(recording.id, first=2, last=4)] == [2, 3, 4]
    assert [row.number for row in full.units(recording.id, first=5)] == [5, 6]
    assert full.units(recording.id, first=7) == []
    assert [row.number for row in full.units(recording.id, first=3, end_ns=5 * UNIT_NS)] == [3, 4]
    with pytest.raises(UsageError):
        full.unit(recording.id, 7)


def test_units_after_a_commit_come_in_order_over_all_recordings(full: Store) -> None:
    lobby, door = full.recording("lobby"), full.recording("door")
    every = full.units_after(0)
    assert [row.commit_id for row in every] == list(range(1, 11))
    assert full.last_commit() == 10
    for commit in range(11):
        assert [row.commit_id for row in full.units_after(commit)] == list(range(commit + 1, 11))
    assert [row.number for row in full.units_after(3, recording_id=door.id)] == [1, 2]
    assert [row.number for row in full.units_after(0, recording_id=door.id, captions_only=True)] == [0, 2]
    assert [row.commit_id for row in full.units_after(2, limit=3)] == [3, 4, 5]
    assert full.units_after(0, recording_id=lobby.id)[-1].commit_id == lobby.last_commit


def test_recordings_are_listed_and_named(full: Store) -> None:
    assert [row.name for row in full.recordings()] == ["door", "lobby"]
    with pytest.raises(UnknownRecording, match="'door', 'lobby'"):
        full.recording("roof")
    assert full.recording_by_id(full.recording("door").id).name == "door"
    with pytest.raises(UnknownRecording):
        full.recording_by_id("0" * 32)


def test_a_damaged_part_is_a_typed_error(tmp_path: Path) -> None:
    from memdb.schemas.rows import Part

    with new_store(tmp_path) as store:
        fill(store, 1)
        row = store.units(store.recording("lobby").id)[0]
        path = store.segments_path / row.segment
        reads = {
            Part.CAPTION: store.read_caption,
            Part.VECTOR: store.read_caption,
            Part.KEYFRAME: store.read_keyframe,
            Part.KEYS: store.read_keys,
        }
        for part, read in reads.items():
            flip(path, row.parts[part].offset + 3)
            with pytest.raises(CorruptionError) as caught:
                read(row)  # type: ignore[operator]
            assert caught.value.file == f"segments/{row.segment}"
            flip(path, row.parts[part].offset + 3)
        path.unlink()
        with pytest.raises(CorruptionError):
            store.read_keys(row)


# Writing


def test_events_are_kept(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        with store.writer(spec()) as writer:
            writer.append([unit(0)])
            writer.gap(UNIT_NS, 2 * UNIT_NS, "no light")
            writer.gap(UNIT_NS, 2 * UNIT_NS, "no light")
            writer.epoch(1, 1, "after the gap")
            writer.epoch(1, 1, "said twice")
            writer.end(3 * UNIT_NS)
            writer.end(3 * UNIT_NS)
            with pytest.raises(StoreError, match="follow"):
                writer.epoch(1, 2, "the same number")
        row = store.recording("lobby")
        assert row.gaps == (Gap(UNIT_NS, 2 * UNIT_NS, "no light"),)
        assert row.epochs == (Epoch(1, 1, "after the gap"),)
        assert (row.end_ns, row.finished) == (3 * UNIT_NS, True)
        with store.writer(spec()) as writer:  # the file grew
            writer.append([unit(1)])
            assert not store.recording("lobby").finished
            writer.end(4 * UNIT_NS)
        assert store.recording("lobby").end_ns == 4 * UNIT_NS
        assert verify(store).ok


@pytest.mark.parametrize(
    "wrong",
    [
        changed(unit(1), number=2),
        changed(unit(1), number=0),
        changed(unit(1), start_ns=5 * UNIT_NS),
        changed(unit(1), start_ns=-1, end_ns=UNIT_NS),
        changed(unit(1), end_ns=UNIT_NS - 1, start_ns=0),
        changed(unit(1), keys=np.zeros((2, 3, 6), np.float16)),
        changed(unit(1), keys=np.zeros((2, 2, 6), np.float32)),
        changed(unit(1), blocks=unit(1).blocks[:1], keys=None),
        changed(unit(1), kv=dataclasses.replace(unit(1).kv, payload=unit(1).kv.payload[:-64])),  # type: ignore[type-var, union-attr]
        changed(unit(1), kv=dataclasses.replace(unit(1).kv, payload=unit(1).kv.payload ^ np.uint8(1))),  # type: ignore[type-var, union-attr]
    ],
)
def test_a_unit_that_does_not_fit_is_refused_and_the_writer_goes_on(tmp_path: Path, wrong: Unit) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0)])
        before = directory_digest(store.segments_path)
        with pytest.raises(StoreError):
            writer.append([wrong])
        assert directory_digest(store.segments_path) == before
        assert writer.append([unit(1)]) == 2


def test_scale_widths_are_those_of_the_last_units(tmp_path: Path) -> None:
    wide = unit(1)
    assert wide.kv is not None
    wide.kv.slices["scale_bytes"][2:] = 4  # layer 1
    with new_store(tmp_path) as store:
        with store.writer(spec()) as writer:
            assert writer.scale_widths() == {}
            writer.append([unit(0)])
            assert writer.scale_widths() == {0: 2, 1: 2}
            writer.append([wide])
            assert writer.scale_widths() == {0: 2, 1: 4}
            writer.append([changed(unit(2), kv=None, keys=None, blocks=unit(2).blocks[:0])])
        with store.writer(spec()) as writer:
            assert writer.scale_widths() == {0: 2, 1: 4}


def test_one_writer_a_recording_many_recordings(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, Store.open(store.path, write=True) as other:
        with store.writer(spec()) as writer:
            assert store.is_written(writer.recording.id)
            with pytest.raises(LockedError, match="lobby"):
                other.writer(spec())
            with other.writer(spec("door")) as second:
                second.append([unit(0)])
                writer.append([unit(0)])
        assert not store.is_written(writer.recording.id)
        with other.writer(spec()) as writer:
            assert writer.next_unit == 1


def test_a_store_open_for_reading_refuses_writers(tmp_path: Path) -> None:
    new_store(tmp_path).close()
    with Store.open(tmp_path / "lobby.memdb") as store, pytest.raises(StoreError, match="write=True"):
        store.writer(spec())


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (spec(fingerprint="d" * 32), EncodingMismatch),
        (spec(codec="raw"), EncodingMismatch),
        (spec(source=SourceIdentity("file", 1234, "other")), SourceMismatch),
        (spec(model=dataclasses.replace(MODEL, fingerprint="0" * 32)), ModelMismatch),
    ],
)
def test_another_way_or_film_is_refused_with_the_way_out(
    tmp_path: Path, other: RecordingSpec, error: type[Exception]
) -> None:
    with new_store(tmp_path) as store:
        fill(store, 1)
        before = directory_digest(store.path)
        with pytest.raises(error, match="another"):
            store.writer(other)
        assert directory_digest(store.path) == before
        with store.writer(spec(source_name="renamed.mp4", recipe=recipe())) as writer:
            assert writer.next_unit == 1


def test_a_live_source_may_change(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        store.writer(spec(live=True)).close()
        store.writer(spec(live=True, source=SourceIdentity("stream", 0, ""))).close()


def test_the_model_that_was_bound_first_stays(tmp_path: Path) -> None:
    other = ModelIdentity("random:1", "1" * 32, MODEL.shape)
    with new_store(tmp_path) as store:
        assert store.model is None
        store.bind_model(MODEL)
        store.bind_model(dataclasses.replace(MODEL, spec="another/path"))
        with pytest.raises(ModelMismatch, match="random:0"):
            store.bind_model(other)
        assert store.model == MODEL


@pytest.mark.parametrize("name", ["../lobby", "a/b", "", ".hidden", "a..b", "x" * 200, "a\0b"])
def test_names_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    with new_store(tmp_path) as store:
        before = directory_digest(tmp_path)
        with pytest.raises(UsageError):
            store.writer(spec(name))
        assert directory_digest(tmp_path) == before


# Kills and failures


class KilledError(BaseException):
    """Stands for the death of the process: nothing after it runs but what tests call."""


def test_units_behind_the_catalog_come_back_when_a_writer_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between fdatasync and the commit of SQLite."""
    store = new_store(tmp_path)
    writer = store.writer(spec())
    writer.append([unit(0)])

    def killed(database: Database) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Database, "_commit", killed)
        with pytest.raises(KilledError):
            writer.append([unit(1), unit(2)])
    with pytest.raises(StoreError, match="ended"):
        writer.append([unit(1)])
    assert store.recording("lobby").units == 1
    writer.close()
    assert any("never acknowledged" in note for note in verify(store).notes)
    with store.writer(spec()) as writer:
        assert (writer.next_unit, writer.recording.units) == (3, 3)
        writer.append([unit(3)])
    for number, row in enumerate(store.units(writer.recording.id)):
        check_unit(store, row, unit(number))
    assert [row.commit_id for row in store.units_after(0)] == [1, 2, 3, 4]
    assert verify(store).ok


def test_a_recording_that_the_catalog_never_heard_of_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a damaged WAL, which loses the first commit too."""
    store = new_store(tmp_path)
    store.bind_model(MODEL)
    store.close()
    empty = (tmp_path / "lobby.memdb" / CATALOG).read_bytes()
    with Store.open(store.path, write=True) as store:
        fill(store, 3)
        with store.writer(spec()) as writer:
            writer.gap(5 * UNIT_NS, 6 * UNIT_NS, "lost too")
            writer.append([unit(3)])
        expected = recording_digest(store, "lobby")
        recording_id = store.recording("lobby").id
    (store.path / CATALOG).write_bytes(empty)
    with Store.open(store.path, write=True) as store:
        assert store.recordings() == []
        store.writer(spec()).close()
        row = store.recording("lobby")
        assert (row.id, row.units, len(row.gaps)) == (recording_id, 4, 1)
        assert recording_digest(store, "lobby") == expected
        assert verify(store).ok


def test_a_tail_torn_at_any_length_loses_only_what_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path)
    writer = store.writer(spec())
    writer.append([unit(0)])
    committed = (store.segments_path / store.unit(writer.recording.id, 0).segment).stat().st_size

    def killed(database: Database) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Database, "_commit", killed)
        with pytest.raises(KilledError):
            writer.append([unit(1), unit(2)])
    writer.close()
    store.close()
    template = tmp_path / "template.memdb"
    shutil.copytree(tmp_path / "lobby.memdb", template)
    name = next(path.name for path in (template / "segments").iterdir())
    full = (template / "segments" / name).stat().st_size
    for length in [*range(committed, full, 211), full - 1, full]:
        copy = tmp_path / "copy.memdb"
        shutil.copytree(template, copy)
        os.truncate(copy / "segments" / name, length)
        with Store.open(copy, write=True) as store:
            with store.writer(spec()) as writer:
                kept = writer.next_unit
                assert kept == (3 if length == full else 2 if length >= _end_of(template, name, 1) else 1)
                writer.append([unit(number) for number in range(kept, 4)])
            for number, row in enumerate(store.units(writer.recording.id)):
                check_unit(store, row, unit(number))
            assert verify(store).ok
            assert len(segment_files(store.segments_path)[writer.recording.id]) == 2
        shutil.rmtree(copy)


def _end_of(folder: Path, name: str, number: int) -> int:
    from memdb.records import Kind
    from memdb.segments import reading, scan

    with reading(folder / "segments", name) as segment:
        found = scan(segment, 0).records
    return next(record.end for record in found if record.kind is Kind.UNIT and record.number == number)


def test_a_killed_process_loses_nothing_acknowledged(tmp_path: Path) -> None:
    code = """
        import os, sys
        from memdb.store import Store
        from tests.store_cases import spec, unit
        store = Store.open(sys.argv[1], create=True, write=True)
        writer = store.writer(spec())
        for number in range(4):
            writer.append([unit(number)])
            print(number, flush=True)
        os.kill(os.getpid(), 9)
        """
    folder = tmp_path / "lobby.memdb"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (-9, "0\n1\n2\n3\n")
    with Store.open(folder, write=True) as store, store.writer(spec()) as writer:
        assert writer.next_unit == 4
        for number, row in enumerate(store.units(writer.recording.id)):
            check_unit(store, row, unit(number))


def test_a_failed_fdatasync_ends_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_store(tmp_path) as store:
        with store.writer(spec()) as writer:
            writer.append([unit(0)])
            with monkeypatch.context() as patched:
                patched.setattr(os, "fdatasync", _no_space)
                with pytest.raises(StoreError, match="No space left"):
                    writer.append([unit(1)])
            for call in (lambda: writer.append([unit(1)]), lambda: writer.end(UNIT_NS)):
                with pytest.raises(StoreError, match="ended"):
                    call()
            assert store.recording("lobby").units == 1
        with store.writer(spec()) as writer:
            writer.append([unit(number) for number in range(writer.next_unit, 3)])
        assert store.recording("lobby").units == 3
        assert verify(store).ok


def _no_space(fd: int) -> None:
    raise OSError(28, "No space left on device")


def test_bytes_are_safe_before_they_are_committed(tmp_path: Path) -> None:
    """New names and their folder before the first commit that names them, then one sync a commit."""
    order = ("sync", "sync_folder", "point")
    with new_store(tmp_path) as store, watched(steps := Steps()):
        store.bind_model(spec().model)
        steps.seen.clear()
        with store.writer(spec()) as writer:
            assert [step.name for step in steps.seen if step.what in order] == [
                "catalog before commit",  # the model, which is bound already
                "catalog committed",
                "a new segment's header, before it is committed",
                "the name of a new segment",
                "catalog before commit",
                "catalog committed",
            ]
            steps.seen.clear()
            writer.append([unit(0), unit(1), unit(2)])
            assert [step.name for step in steps.seen if step.what in order] == [
                "a unit's bytes, before it is committed",
                "catalog before commit",
                "catalog committed",
            ]


def test_a_closed_writer_leaves_no_wal(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
        wal = store.path / f"{CATALOG}-wal"
        assert not wal.exists() or wal.stat().st_size == 0
    assert not wal.exists()


# Opening


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"x")
    before = directory_digest(tmp_path)
    for path in (tmp_path / "missing", tmp_path / "file", photos):
        with pytest.raises(NotAStore):
            Store.open(path)
    for path in (tmp_path / "file", photos):
        with pytest.raises((NotAStore, StoreError)):
            Store.open(path, create=True, write=True)
    assert directory_digest(tmp_path) == before


def test_an_empty_folder_and_a_half_made_store_become_stores(tmp_path: Path) -> None:
    half = tmp_path / "half"
    (half / "segments").mkdir(parents=True)
    (half / CATALOG).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for path in (half, tmp_path / "empty", tmp_path / "deep" / "er"):
        with Store.open(path, create=True, write=True) as store:
            fill(store, 1)
        with Store.open(path, create=True) as store:
            assert store.recording("lobby").units == 1


def test_a_store_without_its_catalog_is_damaged_and_not_empty(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 1)
    (store.path / CATALOG).unlink()
    for create in (False, True):
        with pytest.raises(CorruptionError, match="missing"):
            Store.open(store.path, create=create, write=create)


@pytest.mark.parametrize("name", ["segments", "state", "locks", CATALOG])
def test_links_in_a_store_are_refused(tmp_path: Path, name: str) -> None:
    new_store(tmp_path).close()
    inside = tmp_path / "lobby.memdb" / name
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        Store.open(tmp_path / "lobby.memdb", write=True)


def test_readers_see_commits_while_a_writer_works(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, Store.open(store.path) as reader, store.writer(spec()) as writer:
        for number in range(5):
            writer.append([unit(number)])
            assert reader.recording("lobby").units == number + 1
            check_unit(reader, reader.units_after(number)[0], unit(number))


def test_a_store_is_used_by_several_threads(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    finished = threading.Event()
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0)])

        def read() -> None:
            try:
                while not finished.is_set():
                    rows = store.units(writer.recording.id)
                    check_unit(store, rows[-1], unit(len(rows) - 1))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1, 15):
            writer.append([unit(number)])
        finished.set()
        for thread in threads:
            thread.join()
    assert errors == []


def test_the_store_imports_nothing_heavy() -> None:
    code = (
        "import sys, memdb.store, memdb.reader, memdb.verify, memdb.stats; "
        "heavy = {'torch', 'transformers', 'lancedb', 'faiss', 'av', 'pyarrow', 'zstandard'}; "
        "print(heavy & set(sys.modules))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_recording_that_holds_nothing_may_be_begun_anew_in_another_way(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        with store.writer(spec("r")) as writer:
            writer.epoch(0, 0, "the beginning")
        other = dataclasses.replace(
            spec("r"), encoding_fingerprint="f" * 32, source=SourceIdentity("file", 7, "77")
        )
        with store.writer(other) as writer:
            assert (writer.next_unit, writer.recording.epochs) == (0, ())
            writer.append([unit(0)])
        assert store.recording("r").spec == other
        report = verify(store)
        assert report.ok, report.problems
        with pytest.raises(EncodingMismatch):  # now that it holds something, it stays as it is
            store.writer(spec("r"))


@pytest.mark.parametrize("size_bytes", [1, 100, 4096])
def test_a_store_whose_making_a_power_cut_left_as_noise_is_made_anew(tmp_path: Path, size_bytes: int) -> None:
    """Nothing was acknowledged, and no repair could find anything: the next ingest must not stand before it."""
    path = tmp_path / "lobby.memdb"
    with Store.open(path, create=True, write=True):
        pass
    for beside in path.glob("catalog.sqlite?*"):
        beside.unlink()
    (path / "catalog.sqlite").write_bytes(random.Random(size_bytes).randbytes(size_bytes))
    with pytest.raises(NotAStore):
        Store.open(path)
    with Store.open(path, create=True, write=True) as store:
        assert store.recordings() == []


def test_noise_in_the_place_of_a_catalog_is_for_a_repair_where_there_are_segments(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = tmp_path / "lobby.memdb"
    for beside in path.glob("catalog.sqlite?*"):
        beside.unlink()
    (path / "catalog.sqlite").write_bytes(random.Random(1).randbytes(4096))
    with pytest.raises(CorruptionError, match="memdb repair"):
        Store.open(path, create=True, write=True)
    repair(path)
    with Store.open(path) as store:
        assert store.recording("lobby").units == 2


def test_a_writer_whose_closing_fails_frees_its_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody could write it before this process ends."""
    with new_store(tmp_path) as store:
        fill(store, 2)
        writer = store.writer(spec("lobby"))

        def fails() -> bool:
            raise StoreError("the catalog cannot be written")

        monkeypatch.setattr(writer._catalog.database, "checkpoint", fails)
        with pytest.raises(StoreError):
            writer.close()
        store.writer(spec("lobby")).close()
