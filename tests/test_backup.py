"""Backup: a copy of an open store as of one moment, whole or not there at all."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from memdb import backup as module
from memdb.backup import backup
from memdb.captions import CaptionIndex
from memdb.compact import compact
from memdb.database import CATALOG
from memdb.files import Step, watched
from memdb.forget import forget
from memdb.policy import parse, read_policy, write_policy
from memdb.records import Kind
from memdb.repair import repair
from memdb.schemas.errors import StoreError, StoreFull, UsageError
from memdb.segments import OpenSegment
from memdb.store import Store, recording_digest
from memdb.verify import verify_path
from tests.repair_cases import (
    FORGOTTEN,
    Axe,
    Killed,
    digests,
    facts,
    files_of,
    find,
    spoil,
    true_unit,
)
from tests.store_cases import UNIT_NS, Steps, directory_digest, fill, new_store, spec, unit


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups" / "monday"


def content(store: Path) -> dict[str, object]:
    """What a store says, but for files that wait for their removal, which a copy does not take along."""
    return {
        key: value[0] if key.startswith("files of") else value  # type: ignore[index]
        for key, value in facts(store).items()
    }


def test_a_copy_is_a_store_that_holds_the_same(furnished: Path, target: Path) -> None:
    before = directory_digest(furnished)
    told: list[tuple[int, int]] = []
    report = backup(furnished, target, progress=lambda done, all_bytes: told.append((done, all_bytes)))
    assert directory_digest(furnished) == before
    assert os.listdir(target.parent) == [target.name]
    assert set(os.listdir(target)) == {CATALOG, "segments", "state", "locks", "keys", "captions.lance"}
    assert not [name for name in os.listdir(target / "locks") if name == module._LOCK]
    assert content(target) == content(furnished)
    assert {row.name: row.units for row in report.recordings} == {
        "attic": 5,
        "hall": 8,
        "lobby": 9,
        "shed": 0,
    }
    assert (report.problems, report.notes, report.path) == ([], [], str(target))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    assert verify_path(target).ok
    assert not verify_path(target).notes, "nothing lies there that does not count"


def test_a_copy_is_searched_and_gone_on_with(furnished: Path, target: Path) -> None:
    (target).mkdir()  # an empty folder is as good as none
    backup(furnished, target)
    with Store.open(target, write=True) as store:
        found = CaptionIndex(target).search(store, "fake", text="unit 8")
        assert found.indexed_commit > 0, "its table was made"
        assert (found.hits[0].unit, found.warnings) == (8, ())
        row = store.recording("attic")
        state = store.state(store.recording("lobby").id).load_latest(spec().encoding_fingerprint, 9)
        assert state is not None
        assert state.payload == b"state " * 9
        with store.writer(row.spec) as writer:
            writer.append([true_unit(5, "raw")])
        forget(store, "lobby", start_ns=0, end_ns=1)
        compact(store)
    assert verify_path(target).ok
    assert digests(target)["hall"] == digests(furnished)["hall"]
    repair(target)
    with Store.open(target) as store:
        assert store.recording("attic").units == 6
        assert FORGOTTEN not in [row.name for row in store.recordings()]


def test_others_go_on_while_a_copy_is_made(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer appends all the while; between two chunks something is forgotten, and compacted.

    The copy is of one moment: the recordings up to their watermarks at that moment, nothing of what came later.
    """
    with new_store(tmp_path) as store:
        fill(store, 6, "hall")
        row = store.recording("hall")
        forget(store, "hall", start_ns=0, end_ns=UNIT_NS)  # leaves dead bytes
        before = recording_digest(store, "hall")
        source, stop, appended = store.path, threading.Event(), threading.Event()

        def write() -> None:
            with store.writer(spec("lobby")) as writer:
                for number in range(200):
                    writer.append([unit(number, blocks=1)])
                    appended.set()
                    if stop.is_set():
                        break

        interfered: list[str] = []
        copied = module._Backup._segment

        def interfere(run: module._Backup, *found: object) -> None:
            if not interfered:
                forget(store, "hall", start_ns=3 * UNIT_NS, end_ns=4 * UNIT_NS)
                left = compact(store)
                interfered.extend(note for row in left.recordings for note in row.left)
            copied(run, *found)  # type: ignore[arg-type]

        monkeypatch.setattr(module._Backup, "_segment", interfere)
        thread = threading.Thread(target=write)
        thread.start()
        appended.wait()
        report = backup(source, target)
        stop.set()
        thread.join()
        assert [note for note in interfered if "being read" in note], "what is copied was not removed"
        after = recording_digest(store, "hall")
        units = {row.name: row.units for row in report.recordings}
        assert 0 < units["lobby"] <= store.recording("lobby").units
        compact(store)
    assert report.problems == []
    assert before != after
    assert digests(target)["hall"] == before
    with Store.open(target) as copy, Store.open(source) as whole:
        old, new = (at.units(at.recording("lobby").id, last=units["lobby"] - 1) for at in (copy, whole))
        assert [row.digest for row in old] == [row.digest for row in new]
        assert copy.recording("lobby").units == units["lobby"]
        assert not copy.recording("hall").tombstones[1:]
        for name in [row.name for row in copy.catalog.segments(row.id)]:
            assert (target / "segments" / name).exists()
    checked = verify_path(target)
    assert (checked.ok, checked.notes) == (True, [])


@pytest.mark.usefixtures("bare")
def test_a_segment_that_goes_before_it_is_pinned_means_another_moment(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_store(tmp_path) as store:
        fill(store, 6, "hall")
        forget(store, "hall", start_ns=0, end_ns=UNIT_NS)
        pin, tries = module._Backup._pin, []

        def late(run: module._Backup, *found: object, last: bool) -> OpenSegment | None:
            if not tries:
                compact(store)
            tries.append(last)
            return pin(run, *found, last=last)  # type: ignore[arg-type]

        monkeypatch.setattr(module._Backup, "_pin", late)
        report = backup(store.path, target)
        assert report.notes == []
        assert digests(target) == digests(store.path)
    assert verify_path(target).ok


@pytest.mark.usefixtures("bare")
def test_bytes_behind_the_moment_are_not_copied(tmp_path: Path, target: Path) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0)])
        [name] = files_of(store.path, "lobby")
        with (store.segments_path / name).open("ab") as file:
            file.write(b"torn" * 100)
        backup(store.path, target)
        with Store.open(target) as copy:
            [row] = copy.catalog.segments(copy.recording("lobby").id)
        assert (target / "segments" / name).stat().st_size == row.end_bytes


@pytest.mark.usefixtures("bare")
def test_damage_is_copied_and_told(furnished: Path, target: Path, tmp_path: Path) -> None:
    """A copy of what is left is worth having; nobody takes it for whole."""
    store = tmp_path / "s.memdb"
    shutil.copytree(furnished, store)
    path, record = find(store, "lobby", Kind.UNIT, 3)
    spoil(path, record, "body")
    lost = files_of(store, "attic")[0]
    (store / "segments" / lost).unlink()
    report = backup(store, target)
    assert {problem.file for problem in report.problems} == {f"segments/{path.name}", f"segments/{lost}"}
    assert [note for note in report.notes if lost in note]
    assert digests(target)["hall"] == digests(furnished)["hall"]


@pytest.mark.usefixtures("bare")
def test_sectors_that_cannot_be_read_cost_no_more_than_themselves(
    furnished: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = files_of(furnished, "attic")[0]
    bad = os.stat(furnished / "segments" / name).st_ino
    pread = os.pread

    def failing(fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == bad and offset <= 5000 < offset + length:
            raise OSError(5, "Input/output error")
        return pread(fd, length, offset)

    with monkeypatch.context() as patched:
        patched.setattr("memdb.backup.os.pread", failing)
        report = backup(furnished, target)
    data, copy = ((at / "segments" / name).read_bytes() for at in (furnished, target))
    assert copy[:4096] == data[:4096]
    assert copy[4096:8192] == bytes(4096)
    assert copy[8192:] == data[8192 : len(copy)]
    assert [note for note in report.notes if name in note and "Input/output" in note]
    assert report.problems


@pytest.mark.usefixtures("bare")
def test_states_of_another_moment_are_left_out(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is forgotten between the copy of the states and that of the catalog is in no state of the copy."""
    with new_store(tmp_path) as store:
        fill(store, 4)
        fill(store, 4, "hall")
        for name in ("lobby", "hall"):
            store.state(store.recording(name).id).save(4, b"holds everything")
        states = module._Backup._states

        def then_forget(run: module._Backup) -> None:
            states(run)
            forget(store, "lobby", start_ns=0, end_ns=UNIT_NS)

        monkeypatch.setattr(module._Backup, "_states", then_forget)
        (store.path / "state" / f"{store.recording('hall').id}-0000000003.state").write_bytes(b"torn")
        backup(store.path, target)
        assert [name[:32] for name in os.listdir(target / "state")] == [store.recording("hall").id]
        assert (target / "state" / os.listdir(target / "state")[0]).stat().st_size > 100


# What is refused


@pytest.mark.usefixtures("bare")
def test_a_target_that_is_not_free_is_refused(furnished: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in ("full", "file", "link", "missing/folder"):
        with pytest.raises(UsageError):
            backup(furnished, tmp_path / path)
    for inside in (furnished, furnished / "copy"):
        with pytest.raises(UsageError, match="lie in each other"):
            backup(furnished, inside)
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "link"]


@pytest.mark.usefixtures("bare")
def test_a_disk_without_room_is_refused_before_a_segment_is_copied(
    furnished: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdb.room.free_bytes", lambda folder: 9 << 20)
    monkeypatch.setattr(module, "UPKEEP_RESERVE_BYTES", 9 << 20)
    with watched(steps := Steps()), pytest.raises(StoreFull, match="no room for a backup"):
        backup(furnished, target)
    assert not [step for step in steps.seen if step.path.suffix == ".seg"]
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("what", ["write", "sync", "create", "sync_folder"])
@pytest.mark.usefixtures("bare")
def test_a_disk_that_fills_up_leaves_nothing(furnished: Path, target: Path, what: str) -> None:
    before = directory_digest(furnished)
    with watched(Steps(lambda step: step.what == what)), pytest.raises(StoreError, match="make room"):
        backup(furnished, target)
    assert os.listdir(target.parent) == []
    assert directory_digest(furnished) == before


# Kills


def steps_of(run: Callable[[], object]) -> list[Step]:
    with watched(steps := Steps()):
        run()
    return steps.seen


@pytest.mark.usefixtures("bare")
def test_a_kill_at_any_step_leaves_all_or_nothing(
    furnished: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies, so nothing is tidied up; the next backup removes what lies there."""
    count = len(steps_of(lambda: backup(furnished, target)))
    good = content(target)
    shutil.rmtree(target)
    named = 0
    for at in range(1, count + 1, 2):
        with monkeypatch.context() as dying:
            dying.setattr("memdb.backup.shutil.rmtree", lambda *_, **__: None)
            with watched(Axe(at, at % 4 == 1)), pytest.raises(Killed):
                backup(furnished, target)
        if target.exists():
            named += 1
            assert content(target) == good
            shutil.rmtree(target)
    assert named
    assert [name for name in os.listdir(target.parent) if ".tmp-" in name]
    (target.parent / "monday.txt").touch()
    backup(furnished, target)
    assert sorted(os.listdir(target.parent)) == ["monday", "monday.txt"]
    assert content(target) == good


@pytest.mark.usefixtures("bare")
def test_all_is_on_the_disk_before_it_has_its_name(copied: Path, target: Path) -> None:
    write_policy(copied, parse({"when_full": "forget-oldest"}))
    seen = steps_of(lambda: backup(copied, target))
    assert read_policy(target) == read_policy(copied) == parse({"when_full": "forget-oldest"})
    [renamed] = [at for at, step in enumerate(seen) if step.what == "replace"]
    written = {step.path for step in seen if step.what == "write"} | {
        next(step.path for step in seen if step.name == "the catalog of a backup")
    }
    for path in written:
        if path.parent.name != "state" or path.exists():
            last = max(
                (at for at, step in enumerate(seen) if step.what == "write" and step.path == path), default=0
            )
            syncs = [at for at, step in enumerate(seen) if step.what == "sync" and step.path == path]
            assert last < syncs[-1] < renamed, path
            folders = [
                at for at, step in enumerate(seen) if step.what == "sync_folder" and step.path == path.parent
            ]
            assert syncs[-1] < max(folders) < renamed, path
    assert [step.what for step in seen[renamed + 1 :] if step.path == target.parent] == ["sync_folder"]
    whys = [step.name for step in seen if step.what.startswith("sync")]
    assert len(set(whys)) == 8
