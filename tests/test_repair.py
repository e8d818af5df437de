"""Repair: the catalog made anew from the segments says what the old one said; what is lost is told, and no more is."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from memdb.captions import CaptionIndex
from memdb.catalog import Catalog
from memdb.compact import compact
from memdb.database import CATALOG
from memdb.files import Step, watched
from memdb.locks import FileLock, rewrite_lock
from memdb.records import Kind
from memdb.repair import repair
from memdb.schemas.errors import (
    CorruptionError,
    FormatVersionError,
    LockedError,
    NotAStore,
    StoreError,
    StoreFull,
)
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
    find,
    go_on,
    lose_catalog,
    mended,
    spoil,
    spoil_in,
    true_unit,
)
from tests.store_cases import Steps, directory_digest, flip, spec

Harm = Callable[[Path], None]

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
def test_a_catalog_is_made_anew_as_it_was(furnished: Path, copied: Path, harm: str) -> None:
    harms()[harm](copied)
    report = repair(copied)
    assert facts(copied) == facts(furnished)
    assert (report.spans, report.forgotten) == ([], 1)
    assert {row.name: row.units for row in report.recordings} == UNITS
    assert verify_path(copied).ok
    assert not [path.name for path in copied.iterdir() if path.name.startswith(NEW)]
    go_on(copied)


@pytest.mark.usefixtures("bare")
def test_a_catalog_with_any_byte_damaged_is_made_anew(furnished: Path, copied: Path) -> None:
    """Whatever opens or does not before, all is as it was after."""
    good, whole = facts(furnished), (copied / CATALOG).read_bytes()
    for trial, byte in enumerate(range(7, len(whole), len(whole) // 25)):
        lose_catalog(copied)
        (copied / CATALOG).write_bytes(whole)
        flip(copied / CATALOG, byte, trial % 8)
        repair(copied)
        assert facts(copied) == good, byte


def test_commit_ids_are_the_same_each_time_and_grow_with_time(copied: Path) -> None:
    def commits() -> list[tuple[str, int, int]]:
        with Store.open(copied) as opened:
            rows = opened.units_after(0)
            assert [row.commit_id for row in rows] == list(range(1, len(rows) + 1))
            assert opened.last_commit() == len(rows) == sum(UNITS.values())
            assert (
                opened.recording("lobby").last_commit
                == opened.unit(opened.recording("lobby").id, 8).commit_id
            )
            return [(row.recording_id, row.number, row.commit_id) for row in rows]

    repair(copied)
    first = commits()
    repair(copied)
    assert commits() == first
    with Store.open(copied) as opened:
        began = {row.id: row.created_ns for row in opened.recordings()}
        moments = [began[row.recording_id] + row.end_ns for row in opened.units_after(0)]
    assert moments == sorted(moments)


def test_derived_data_is_made_anew_and_old_pages_never_count(furnished: Path, copied: Path) -> None:
    with Store.open(copied) as opened:
        row = opened.recording("lobby")
    (copied / "keys").mkdir(exist_ok=True)
    for name in (f"{row.id}.pages", f"{row.id}-4.pages"):
        (copied / "keys" / name).write_bytes(b"pages with other commit ids" * 9)
    (copied / "captions.lance" / "captions_77").mkdir(parents=True)
    (copied / "captions.lance" / "captions_77" / "data").write_bytes(b"rows with other commit ids")
    lose_catalog(copied)
    repair(copied)
    with Store.open(copied) as opened:
        assert opened.recording("lobby").generation == 5
        assert f"{row.id}-5.pages" in os.listdir(copied / "keys")
        assert not {f"{row.id}.pages", f"{row.id}-4.pages"} & set(os.listdir(copied / "keys"))
        hits = CaptionIndex(copied).search(opened, "fake", text="unit 8").hits
        assert (hits[0].recording_id, hits[0].unit) in {(one.id, 8) for one in opened.recordings()}
    assert not (copied / "captions.lance" / "captions_77").exists()
    assert verify_path(copied).ok


def test_an_opening_that_fails_says_what_to_type(copied: Path) -> None:
    for harm in ("empty", "of random bytes", "missing"):
        harms()[harm](copied)
        for write in (False, True):
            with pytest.raises(CorruptionError, match="run memdb repair"):
                Store.open(copied, write=write)


# Who may, and when


@pytest.mark.usefixtures("bare")
def test_a_writer_that_is_alive_is_not_disturbed(copied: Path) -> None:
    before = (
        [directory_digest(copied / name) for name in ("segments", "state")],
        (copied / CATALOG).read_bytes(),
    )
    with Store.open(copied) as opened:
        row = opened.recording("attic")
    for lock in (
        copied / "locks" / f"{row.id}.lock",
        rewrite_lock(copied, row.id),
        copied / "locks" / "names.lock",
    ):
        with FileLock(lock), pytest.raises(LockedError, match="run memdb repair again"):
            repair(copied)
    after = (
        [directory_digest(copied / name) for name in ("segments", "state")],
        (copied / CATALOG).read_bytes(),
    )
    assert after == before


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "film.mp4"):
        with pytest.raises(NotAStore):
            repair(folder)
    assert os.listdir(tmp_path) == ["film.mp4"]


@pytest.mark.usefixtures("bare")
def test_a_link_in_a_store_is_refused(copied: Path, tmp_path: Path) -> None:
    shutil.move(copied / "state", tmp_path / "elsewhere")
    (copied / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        repair(copied)


@pytest.mark.usefixtures("bare")
def test_whoever_had_the_old_catalog_open_commits_nothing_to_it(copied: Path) -> None:
    catalog = Catalog(copied / CATALOG, write=True)
    repair(copied)
    with pytest.raises(StoreError, match="open the store again"), catalog.database.writing():
        catalog.database.upsert("meta", ("last_commit", 77))
    catalog.close()
    with Store.open(copied) as opened:
        assert opened.last_commit() == sum(UNITS.values())


@pytest.mark.usefixtures("bare")
def test_whoever_reads_goes_on_with_the_new_catalog(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memdb.store._LOOK_S", 0.0)
    with Store.open(copied) as reader:
        assert reader.recording("attic").units == 5
        repair(copied)
        with Store.open(copied, write=True) as opened, opened.writer(spec("attic", codec="raw")) as writer:
            writer.append([true_unit(5, "raw")])
        assert reader.recording("attic").units == 6
        assert reader.last_commit() == sum(UNITS.values()) + 1


@pytest.mark.usefixtures("bare")
def test_compaction_writes_damaged_files_anew_after_a_repair(furnished: Path, copied: Path) -> None:
    """What is damaged goes from the disk, with what a forgetting would not find in it."""
    spoil_in(copied, find(furnished, "lobby", Kind.UNIT, 1), "footer")
    mended(copied)
    before = digests(copied)
    assert verify_path(copied).problems
    with Store.open(copied, write=True) as opened:
        compact(opened)
    checked = verify_path(copied)
    assert (checked.problems, checked.notes) == ([], [])
    assert digests(copied) == before


@pytest.mark.usefixtures("bare")
def test_a_disk_without_room_leaves_all_as_it_was(furnished: Path, copied: Path) -> None:
    def full(step: Step) -> bool:
        return step.what in ("write", "sync") and (step.path.name == NEW or step.path.suffix == ".seg")

    spoil(*find(copied, "lobby", Kind.UNIT, 3), "footer")
    before = facts(copied)
    with watched(Steps(full)), pytest.raises(StoreFull, match="make room"):
        repair(copied)
    assert facts(copied) == before


# Kills


@pytest.mark.usefixtures("bare")
def test_a_kill_at_any_step_leaves_a_store_that_opens_or_repairs(furnished: Path, tmp_path: Path) -> None:
    """A unit is lost and a WAL lies there, full of commits that the segments have, too."""
    broken = tmp_path / "broken.memdb"
    shutil.copytree(furnished, broken)
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


def test_no_catalog_is_ever_beside_the_wal_of_another(copied: Path) -> None:
    """In whatever order names reach the disk between two syncs of the folder."""
    leave_wal(copied)
    for name in ("keys", "captions.lance"):
        (copied / name).mkdir()
    steps = Steps()
    with watched(steps):
        repair(copied)
    seen = [
        (step.what, (step.target or step.path).name)
        for step in steps.seen
        if step.what in ("unlink", "replace", "sync_folder", "sync")
        and (step.path == copied or step.path.parent == copied)
    ]
    swap = seen[seen.index(("sync", NEW)) :]
    assert swap == [
        ("sync", NEW),
        ("unlink", CATALOG),
        ("sync_folder", copied.name),
        *(("unlink", f"{CATALOG}{suffix}") for suffix in ("-wal", "-shm", "-journal")),
        ("sync_folder", copied.name),
        ("replace", CATALOG),
        ("sync_folder", copied.name),
    ]
    whys = [step.name for step in steps.seen if step.what in ("sync", "sync_folder")]
    assert whys.index("the removal of derived data, before a catalog is made anew") < whys.index(
        "the name of a catalog made anew"
    )


def test_what_is_mended_is_safe_before_the_catalog_names_it(copied: Path) -> None:
    spoil(*find(copied, "lobby", Kind.UNIT, 3), "footer")
    lose_catalog(copied)
    steps = Steps()
    with watched(steps):
        repair(copied)
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
def test_a_newer_format_is_refused(copied: Path) -> None:
    connection = sqlite3.connect(copied / CATALOG)
    connection.close()
    from memdb.database import Database
    from memdb.schemas.format import FORMAT_VERSION

    database = Database(copied / CATALOG, write=True)
    with database.writing():
        database.upsert("meta", ("format", FORMAT_VERSION + 1))
    database.checkpoint()
    database.close()
    before = directory_digest(copied)
    with pytest.raises(FormatVersionError, match="newer"):
        repair(copied)
    assert directory_digest(copied) == before
