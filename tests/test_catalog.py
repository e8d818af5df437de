"""The catalog: damaged and lost rows are noticed, formats are checked, readers change nothing."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from memdb import migrations
from memdb.applying import REWRITE
from memdb.catalog import Catalog
from memdb.database import CATALOG, COLUMNS, Database, row_checksum
from memdb.forget import forget
from memdb.migrations import MIGRATIONS, Migration
from memdb.schemas.errors import CorruptionError, FormatVersionError, MemdbError, StoreError
from memdb.schemas.format import FORMAT_VERSION
from memdb.sealed import SealedSegment, read_unit
from memdb.store import Store
from tests.store_cases import directory_digest, fill, flip, new_store, spec, unit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed store of 5 units and a gap."""
    with new_store(tmp_path) as store:
        fill(store, 5)
        with store.writer(spec()) as writer:
            writer.gap(10_000_000_000, 11_000_000_000, "the camera slept")
            writer.end(12_000_000_000)
    return tmp_path / "lobby.memdb"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A closed store that has a row in every table."""
    with new_store(tmp_path) as store:
        fill(store, 5)
        fill(store, 2, "attic")
        with store.writer(spec()) as writer:
            writer.epoch(0, 0, "the beginning")
            writer.gap(10_000_000_000, 11_000_000_000, "the camera slept")
            writer.end(12_000_000_000)
        replace_first_segment(store)
        forget(store, "lobby", start_ns=1_000_000_000, end_ns=3_000_000_000, now_ns=7)
        forget(store, "attic", now_ns=8)
    return tmp_path / "lobby.memdb"


def replace_first_segment(store: Store) -> None:
    """As a compaction does that died before it removed the old file."""
    row = store.recording("lobby")
    old = store.catalog.segments(row.id)[0].name
    segment = SealedSegment(store.catalog, store.segments_path, row, REWRITE)
    for found in store.units(row.id):
        segment.unit(read_unit(store.segments_path, row, found), found)
    segment.seal(replaces=[old])
    segment.close()


def execute(folder: Path, statement: str, *parameters: object) -> None:
    connection = sqlite3.connect(folder / CATALOG)
    with connection:
        connection.execute(statement, parameters)
    connection.close()


def answers(folder: Path) -> list[object]:
    """Everything that the catalog can be asked."""
    with Store.open(folder) as store:
        rows: list[object] = [store.store_id, store.model, store.last_commit()]
        for recording in store.recordings():
            rows.append(recording)
            for row in (
                *store.units(recording.id),
                *store.units_after(2),
                *store.units(recording.id, start_ns=3),
            ):
                rows.append([getattr(row, name) for name in row.__dataclass_fields__])
        return rows


def read_all(folder: Path) -> None:
    with Store.open(folder) as store:
        for recording in store.recordings():
            store.units(recording.id)
            store.catalog.segments(recording.id)
            store.catalog.replaced(recording.id)
        store.catalog.forgotten()


def test_the_full_store_has_a_row_in_every_table(full: Path) -> None:
    read_all(full)
    connection = sqlite3.connect(full / CATALOG)
    counts = {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in COLUMNS}
    connection.close()
    assert min(counts.values()) > 0, counts


@pytest.mark.parametrize("table", [table for table in COLUMNS if table != "meta"])
def test_every_column_of_every_row_is_under_its_checksum(full: Path, tmp_path: Path, table: str) -> None:
    for column in COLUMNS[table]:
        copy = tmp_path / f"{column}.memdb"
        shutil.copytree(full, copy)
        execute(
            copy, f"UPDATE {table} SET {column} = 77 WHERE checksum = (SELECT max(checksum) FROM {table})"
        )
        with pytest.raises(MemdbError):
            read_all(copy)


@pytest.mark.parametrize("key", ["format", "store_id", "last_commit", "recordings", "model"])
def test_meta_is_under_its_checksum(folder: Path, key: str) -> None:
    execute(folder, "UPDATE meta SET value = 0 WHERE key = ?", key)
    with pytest.raises(CorruptionError), Store.open(folder) as store:
        _ = store.model, store.last_commit(), store.recordings()


@pytest.mark.parametrize("table", [table for table in COLUMNS if table != "meta"])
def test_a_lost_row_is_noticed(full: Path, table: str) -> None:
    execute(full, f"DELETE FROM {table} WHERE checksum = (SELECT max(checksum) FROM {table})")
    with pytest.raises(CorruptionError) as caught:
        read_all(full)
    assert caught.value.file == CATALOG


@pytest.mark.parametrize("key", ["format", "store_id", "last_commit", "recordings", "forgotten", "model"])
def test_a_lost_row_of_meta_is_noticed(full: Path, key: str) -> None:
    execute(full, "DELETE FROM meta WHERE key = ?", key)
    with pytest.raises(CorruptionError), Store.open(full) as store:
        _ = store.model, store.last_commit(), store.recordings(), store.catalog.forgotten()


def test_a_checksum_tells_types_lengths_and_tables_apart() -> None:
    rows = [("a", ["1"]), ("a", [1]), ("a", [b"1"]), ("a", [None]), ("a", [1.0]), ("b", [1])]
    rows += [("a", ["1", "2"]), ("a", ["12", ""]), ("a", ["", "12"])]
    assert len({row_checksum(table, values) for table, values in rows}) == len(rows)  # type: ignore[arg-type]
    assert -(2**63) <= min(row_checksum("a", [number]) for number in range(50)) < 0


def test_flipped_bits_never_change_an_answer(folder: Path, tmp_path: Path) -> None:
    good = answers(folder)
    size = (folder / CATALOG).stat().st_size
    noticed = 0
    copy = tmp_path / "copy.memdb"
    shutil.copytree(folder, copy)
    whole = (folder / CATALOG).read_bytes()
    for trial, byte in enumerate(range(0, size, size // 400)):
        flip(copy / CATALOG, byte, trial % 8)
        try:
            assert answers(copy) == good
        except MemdbError:
            noticed += 1
        (copy / CATALOG).write_bytes(whole)
    assert noticed > 0


def test_the_format_is_the_number_of_migrations() -> None:
    assert len(MIGRATIONS) == FORMAT_VERSION
    assert len({migration.name for migration in MIGRATIONS}) == len(MIGRATIONS)


def set_format(folder: Path, value: int) -> None:
    database = Database(folder / CATALOG, write=True)
    with database.writing():
        database.upsert("meta", ("format", value))
    database.close()


@pytest.mark.parametrize("write", [False, True])
def test_a_newer_format_is_refused(folder: Path, write: bool) -> None:
    set_format(folder, FORMAT_VERSION + 1)
    with pytest.raises(FormatVersionError, match="newer"):
        Store.open(folder, write=write)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this memdb one of the next format, with these statements as its step."""

    def become(*statements: str) -> None:
        step = Migration("one more step", statements)
        monkeypatch.setattr("memdb.migrate.MIGRATIONS", [*migrations.MIGRATIONS, step])
        monkeypatch.setattr("memdb.catalog.FORMAT_VERSION", FORMAT_VERSION + 1)

    return become


def test_an_older_format_is_brought_up_to_date_on_the_disk_by_writers_only(
    folder: Path, newer: Callable[..., None]
) -> None:
    newer("CREATE TABLE notes (text TEXT)")
    before, count = directory_digest(folder), "SELECT count(*) FROM notes"
    with Store.open(folder) as store:
        assert store.catalog.database.in_memory
        assert store.catalog.database.execute(count) == [(0,)]
        assert store.recording("lobby").units == 5
    assert directory_digest(folder) == before
    with Store.open(folder, write=True) as store:
        assert store.catalog.database.execute(count) == [(0,)]
    with Store.open(folder) as store:
        assert not store.catalog.database.in_memory
        assert store.recording("lobby").units == 5


def test_a_migration_that_fails_leaves_the_old_format(
    folder: Path, newer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(folder)
    newer("CREATE TABLE notes (text TEXT)", "CREATE TABLE units (again TEXT)")
    for write in (True, False):
        with pytest.raises(MemdbError):
            Store.open(folder, write=write)
    monkeypatch.undo()
    assert answers(folder) == before
    with Store.open(folder) as store:
        assert not store.catalog.database.in_memory, "it has the format that it had"


def test_a_reader_leaves_the_directory_as_it_was(folder: Path) -> None:
    before = directory_digest(folder)
    answers(folder)
    assert directory_digest(folder) == before


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def kill_a_writer(folder: Path) -> None:
    """Two units are committed and then the process dies, with its WAL lying."""
    run(
        f"""
        import os
        from memdb.store import Store
        from tests.store_cases import spec, unit
        store = Store.open({str(folder)!r}, write=True)
        store.writer(spec()).append([unit(5), unit(6)])
        os.kill(os.getpid(), 9)
        """
    )
    assert (folder / f"{CATALOG}-wal").stat().st_size > 0


def test_a_reader_leaves_the_wal_of_a_killed_writer_and_reads_it(folder: Path) -> None:
    kill_a_writer(folder)
    before = directory_digest(folder)
    with Store.open(folder) as store:
        assert store.recording("lobby").units == 7
    assert directory_digest(folder) == before
    (folder / f"{CATALOG}-shm").unlink()
    with Store.open(folder) as store:
        assert store.recording("lobby").units == 7
    assert directory_digest(folder) == before


def test_a_directory_that_cannot_be_written_is_read_from_a_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite is made to refuse as it does there; the copy follows a writer."""
    good = answers(folder)
    from memdb import database

    connect = database._connect

    def refusing(uri: str) -> sqlite3.Connection:
        if uri.endswith("mode=ro"):
            uri = Path("/nowhere/catalog.sqlite").as_uri() + "?mode=ro"
        return connect(uri)

    monkeypatch.setattr(database, "_connect", refusing)
    before, names = directory_digest(folder), os.listdir(folder)
    assert answers(folder) == good
    assert os.listdir(folder) == names
    assert directory_digest(folder) == before
    with Store.open(folder) as reader, Store.open(folder, write=True) as store:
        assert reader.recording("lobby").units == 5
        with store.writer(spec()) as writer:
            writer.append([unit(5)])
            assert reader.recording("lobby").units == 6
        assert [row.number for row in reader.units_after(5)] == [5]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("killed", [False, True])
def test_another_user_reads_a_store_that_it_cannot_write(folder: Path, killed: bool) -> None:
    if killed:
        kill_a_writer(folder)
        (folder / f"{CATALOG}-shm").unlink()
    for path in folder.parents:
        if "pytest" in str(path):
            path.chmod(0o755)
    code = f"""
        import os, tempfile
        from memdb.store import Store
        os.seteuid(65534)
        with Store.open({str(folder)!r}) as store:
            print(store.recording("lobby").units)
        """
    before = directory_digest(folder)
    done = run(code)
    assert (done.stdout, done.stderr) == ("7\n" if killed else "5\n", "")
    assert directory_digest(folder) == before


def test_a_file_that_is_no_database_is_told(folder: Path) -> None:
    (folder / CATALOG).write_bytes(b"not a database" * 1000)
    with pytest.raises(CorruptionError):
        Catalog(folder / CATALOG, write=False)


def test_a_closed_store_says_so(folder: Path) -> None:
    store = Store.open(folder)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.recordings()
