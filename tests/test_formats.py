"""Formats: what an older memdb wrote opens, is brought up to date and goes on; what a newer one wrote is refused.

tests/data/format-1.tar.xz holds a store that memdb itself wrote when its format was 1 (commit 360bb70), and the
digests that it gave: lobby with two segments, gaps, epochs, captions and int4; attic with raw.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from functools import partial
from pathlib import Path

import pytest

from memdb.backup import backup
from memdb.captions import CaptionIndex
from memdb.compact import compact
from memdb.database import CATALOG, Database
from memdb.derived import rebuild_derived
from memdb.files import watched
from memdb.forget import forget
from memdb.migrate import migrate
from memdb.migrations import MIGRATIONS
from memdb.page_check import check_pages
from memdb.reader import SliceReader
from memdb.repair import repair
from memdb.schemas.errors import CorruptionError, FormatVersionError, MemdbError
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.recording import Epoch, Gap
from memdb.store import Store, recording_digest
from memdb.transfer import export_recording, import_recording
from memdb.verify import verify_path
from tests.repair_cases import Axe, Killed, digests, true_unit
from tests.store_cases import MODEL, UNIT_NS, directory_digest, fill, new_store

ARCHIVE = Path(__file__).parent / "data" / "format-1.tar.xz"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The store of format 1."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "format-1", filter="data")
    return tmp_path / "format-1" / "store.memdb"


def written(old: Path) -> dict[str, dict[str, str]]:
    """Recording and tier to the digest that the memdb of that time gave."""
    found = json.loads((old.parent / "digests.json").read_text())
    assert isinstance(found, dict)
    return found


def given(store: Path) -> dict[str, dict[str, str]]:
    with Store.open(store) as opened:
        return {
            row.name: {tier: recording_digest(opened, row.name, tier) for tier in ("all", "kv", "captions")}
            for row in opened.recordings()
        }


def format_on_disk(store: Path) -> object:
    database = Database(store / CATALOG, write=False)
    try:
        return database.select("meta", "WHERE key = 'format'")[0][1]
    finally:
        database.close()


def test_the_archive_is_small_and_of_format_1(old: Path) -> None:
    assert ARCHIVE.stat().st_size < 60_000
    assert format_on_disk(old) == 1
    assert written(old).keys() == {"attic", "lobby"}


# Readers


def test_a_reader_finds_all_of_it_and_changes_nothing(old: Path) -> None:
    before = directory_digest(old)
    assert given(old) == written(old)
    with Store.open(old) as store:
        assert store.catalog.database.in_memory
        assert store.model == MODEL
        lobby, attic = store.recording("lobby"), store.recording("attic")
        assert lobby.gaps == (
            Gap(4 * UNIT_NS, 5 * UNIT_NS, "the camera slept"),
            Gap(10 * UNIT_NS, 11 * UNIT_NS, "and again"),
        )
        assert lobby.epochs == (Epoch(0, 0, "the beginning"), Epoch(1, 2, "a fresh window"))
        assert (lobby.units, lobby.end_ns, attic.units, attic.end_ns) == (5, 11 * UNIT_NS, 4, None)
        assert (lobby.tombstones, lobby.kv_from_unit, lobby.generation) == ((), 0, 0)
        for row in store.units(lobby.id):
            assert (row.revision, row.codec, row.first_digest) == (0, "", row.digest)
            assert store.read_caption(row) == true_unit(row.number).caption
        found = CaptionIndex(old).search(store, "fake", text="unit 4").hits
        assert (found[0].recording_id, found[0].unit) == (lobby.id, 4)
        with SliceReader(store) as reader:
            rows = store.units(attic.id)
            batch = reader.read([(row, range(len(row.slices))) for row in rows])  # type: ignore[misc]
            assert not batch.bad
    checked = verify_path(old, checkers=[check_pages])
    assert checked.problems == []
    assert [note for note in checked.notes if "state" in note and "older format" in note]
    assert directory_digest(old) == before


# Writers


def test_a_writer_brings_it_up_to_date_and_goes_on(old: Path) -> None:
    with Store.open(old, write=True) as store:
        assert format_on_disk(old) == FORMAT_VERSION
        assert given(old) == written(old)
        with store.writer(store.recording("lobby").spec) as writer:
            assert writer.next_unit == 5
            writer.append([true_unit(number) for number in (5, 6)])
        attic = digests(old)["attic"]
        forget(store, "lobby", start_ns=0, end_ns=UNIT_NS)
        forget(store, "attic", start_ns=3 * UNIT_NS)
        assert len(store.recording("lobby").tombstones) == 1
    rebuild_derived(old)
    assert verify_path(old, checkers=[check_pages]).problems == []
    before = digests(old)
    assert before["attic"] != attic
    with Store.open(old, write=True) as store:
        report = compact(store)
        assert report.freed_bytes > 0
        assert [row.left for row in report.recordings] == [[], []]
    checked = verify_path(old, checkers=[check_pages])
    assert (checked.problems, checked.notes) == ([], [])
    assert digests(old) == before
    repair(old)
    assert digests(old) == before


def test_a_state_of_format_1_costs_a_longer_replay_and_nothing_else(old: Path) -> None:
    with Store.open(old) as store:
        row = store.recording("lobby")
        assert store.state(row.id).files()
        assert store.state(row.id).load_latest(row.spec.encoding_fingerprint, 5) is None


def test_copies_of_it_are_of_the_present_format(old: Path, tmp_path: Path) -> None:
    before = directory_digest(old)
    assert backup(old, tmp_path / "copy").problems == []
    assert (format_on_disk(tmp_path / "copy"), given(tmp_path / "copy")) == (FORMAT_VERSION, written(old))
    export_recording(old, "lobby", tmp_path / "lobby")
    assert directory_digest(old) == before
    with Store.open(tmp_path / "new.memdb", create=True, write=True) as store:
        import_recording(store, tmp_path / "lobby")
    assert given(tmp_path / "new.memdb") == {"lobby": written(old)["lobby"]}


@pytest.mark.parametrize("harm", ["lost", "a damaged row"])
def test_it_is_repaired_from_its_segments(old: Path, harm: str) -> None:
    """A row that is damaged cannot be brought up to date: nothing is changed, and repair does it."""
    good = written(old)
    if harm == "lost":
        (old / CATALOG).unlink()
    else:
        database = Database(old / CATALOG, write=True)
        database.execute("UPDATE units SET length = length + 64 WHERE number = 1")
        database.checkpoint()
        database.close()
        before = (old / CATALOG).read_bytes()
        for write in (False, True):
            with pytest.raises(CorruptionError, match="run memdb repair"):
                Store.open(old, write=write)
        assert (old / CATALOG).read_bytes() == before
    report = repair(old)
    assert report.spans == []
    assert (format_on_disk(old), given(old)) == (FORMAT_VERSION, good)
    assert verify_path(old, checkers=[check_pages]).problems == []


# Killed in the middle


def test_a_migration_that_dies_at_any_step_leaves_format_1_whole(old: Path) -> None:
    """Every statement of it in turn, and the moments around its commit."""
    good = written(old)
    whole = old.parent / "whole.memdb"
    shutil.copytree(old, whole)
    statements = 0
    execute = Database.execute

    def counted(database: Database, *arguments: object) -> object:
        nonlocal statements
        statements += 1
        return execute(database, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Database, "execute", counted)
        Store.open(whole, write=True).close()
    assert statements > 40
    for at in range(1, statements + 1, 5):
        left = at

        def dying(database: Database, *arguments: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return execute(database, *arguments)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Database, "execute", dying)
            with pytest.raises(Killed):
                Store.open(old, write=True)
        assert format_on_disk(old) == 1
    assert given(old) == good
    with watched(Axe(1, True)), pytest.raises(Killed):
        Store.open(old, write=True)
    assert (format_on_disk(old), given(old)) == (1, good)
    with watched(Axe(2, True)), pytest.raises(Killed):  # committed, and not told to anybody
        Store.open(old, write=True)
    assert (format_on_disk(old), given(old)) == (FORMAT_VERSION, good)


def test_a_killed_process_leaves_format_1_whole(old: Path) -> None:
    code = f"""
        import os
        from memdb import files
        from memdb.store import Store
        class Kill:
            def before(self, step): os.kill(os.getpid(), 9)
            def after(self, step): pass
        with files.watched(Kill()):
            Store.open({str(old)!r}, write=True)
        """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[1], check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert given(old) == written(old)
    with Store.open(old, write=True) as store:
        assert store.recording("lobby").units == 5
    assert given(old) == written(old)


def test_steps_are_run_once(old: Path) -> None:
    """Two writers open at once: the second finds the format of the first."""
    Store.open(old, write=True).close()
    before = given(old)
    Store.open(old, write=True).close()
    assert given(old) == before == written(old)
    database = Database(old / CATALOG, write=True)
    with database.writing():
        migrate(database, since=len(MIGRATIONS))
    database.close()
    assert given(old) == before


# Newer ones


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A store whose catalog says that a newer memdb wrote it."""
    with new_store(tmp_path) as store:
        fill(store, 3)
    database = Database(store.path / CATALOG, write=True)
    with database.writing():
        database.upsert("meta", ("format", FORMAT_VERSION + 1))
    database.checkpoint()
    database.close()
    return store.path


def test_a_store_of_a_newer_format_is_refused_by_all(newer: Path, tmp_path: Path) -> None:
    before = directory_digest(newer)
    for attempt in (
        lambda: Store.open(newer),
        lambda: Store.open(newer, write=True),
        lambda: verify_path(newer),
        lambda: repair(newer),
        lambda: backup(newer, tmp_path / "copy"),
        lambda: export_recording(newer, "lobby", tmp_path / "out"),
    ):
        with pytest.raises(FormatVersionError, match="install a newer memdb-video"):
            attempt()
    assert directory_digest(newer) == before
    assert os.listdir(tmp_path) == [newer.name]


def test_segments_of_a_newer_format_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known to the catalog: by whoever reads every byte. Not known to it: by whoever opens the store."""
    with new_store(tmp_path) as store:
        fill(store, 2, "hall")
        with monkeypatch.context() as patched:
            patched.setattr("memdb.writer.FORMAT_VERSION", FORMAT_VERSION + 1)
            fill(store, 2)
    path = store.path
    before = directory_digest(path / "segments")
    for attempt in (lambda: verify_path(path), lambda: repair(path)):
        with pytest.raises(FormatVersionError, match="a segment has format"):
            attempt()
    drop_rows(path, "lobby")
    to_write = partial(Store.open, path, write=True)
    for attempt in (lambda: Store.open(path), to_write, lambda: verify_path(path), lambda: repair(path)):
        with pytest.raises(FormatVersionError, match="a segment has format"):
            attempt()
    (path / CATALOG).unlink()
    with pytest.raises(FormatVersionError):
        repair(path)
    assert directory_digest(path / "segments") == before


def drop_rows(path: Path, name: str) -> None:
    """As if the catalog had never heard of a recording."""
    with Store.open(path, write=True) as store:
        database, row = store.catalog.database, store.recording(name)
        with database.writing():
            for table in ("units", "segments"):
                database.delete(table, "WHERE recording = ?", (row.id,))
            database.delete("recordings", "WHERE id = ?", (row.id,))
            database.upsert("meta", ("recordings", store.catalog.count_of("recordings") - 1))
        database.checkpoint()


def test_what_is_not_a_number_is_no_format(newer: Path) -> None:
    database = Database(newer / CATALOG, write=True)
    with database.writing():
        database.upsert("meta", ("format", "two"))
    database.checkpoint()
    database.close()
    for write in (False, True):
        with pytest.raises(MemdbError, match="no number"):
            Store.open(newer, write=write)
