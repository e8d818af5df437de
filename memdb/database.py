"""SQLite under the catalog: how it is opened, and rows that carry a checksum.

SQLite sees few of the bits that flip under it, so each row ends with xxh3_64 over its own columns, made when
it is written and compared whenever it is read. (Rows that vanish are the catalog's business: it counts them.)

Writers open the file plainly, in WAL mode with synchronous=FULL. Readers open it with mode=ro. Measured with
SQLite 3.40: such a reader leaves the database and a killed writer's WAL as they are, whoever else is alive.
It makes `-shm` and an empty `-wal` where there are none and leaves them lying, or rewrites `-shm`; the next
writer to close removes both. Where it cannot make them (a read-only directory) the open fails, and the reader
works on a copy in memory, renewed when the files change.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash

from memdb import files
from memdb.schemas.errors import CorruptionError, LockedError, StoreError, StoreFull
from memdb.tables import COLUMNS, KEYS, ROW_TYPES

CATALOG = "catalog.sqlite"
Value = int | str | bytes | None
_BUSY_S = 30.0
_SIGNED = 1 << 63
# What a reader meets where -shm is not there and cannot be made.
_CANNOT_BE_WRITTEN = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
# Table and column names are constants of memdb/tables.py; values are always parameters.
_SELECT = {
    table: f"SELECT {', '.join(names)}, checksum FROM {table} "  # noqa: S608
    for table, names in COLUMNS.items()
}
_INSERT = {
    table: f"INTO {table} ({', '.join(names)}, checksum) VALUES ({', '.join('?' * (len(names) + 1))})"
    for table, names in COLUMNS.items()
}


def row_checksum(table: str, values: Sequence[Value]) -> int:
    """xxh3_64 over the values with their types and lengths, as SQLite's signed integer.

    Raises CorruptionError for a number that no catalog holds: it was read from a file that is not what it was.
    """
    whole = xxhash.xxh3_64(table.encode())
    for value in values:
        if isinstance(value, int):
            if not -_SIGNED <= value < _SIGNED:
                raise CorruptionError(
                    f"a number for {table} has more than 63 bits: run memdb repair", file=CATALOG
                )
            kind, data = b"i", value.to_bytes(8, "little", signed=True)
        elif isinstance(value, str):
            kind, data = b"s", value.encode("utf-8", "surrogatepass")
        elif isinstance(value, bytes):
            kind, data = b"b", value
        else:  # NULL, or a float where damage made one: that equals nothing that was written
            kind, data = b"n", repr(value).encode()
        whole.update(kind + len(data).to_bytes(8, "little"))
        whole.update(data)
    checksum: int = whole.intdigest()
    return checksum - 2 * _SIGNED if checksum >= _SIGNED else checksum


class Database:
    """One connection, usable by several threads."""

    def __init__(self, path: Path, *, write: bool) -> None:
        """Raises StoreError or CorruptionError where the file cannot be read as a database."""
        self._path = path
        self._write = write
        self._lock = threading.RLock()
        self._copied_from: tuple[object, ...] | None = None
        self.on_copy: Callable[[], None] | None = None  # called when a reader sees another file
        self._inode = 0 if write else _inode(path)
        with _typed():
            self._connection = self._open_plain() if write else self._open_read_only()
        self._inode = self._inode or _inode(path)

    @property
    def in_memory(self) -> bool:
        """Whether this is a reader's own copy, which may be changed: nobody else sees it."""
        return self._copied_from is not None

    def into_memory(self) -> None:
        """Go on with a copy in memory, renewed when the files change. For readers."""
        with self._lock, _typed():
            if self._copied_from is None:
                self._copied_from = self._files_state()
                memory = _connect("file::memory:")
                self._connection.backup(memory)
                self._connection.close()
                self._connection = memory

    def reopen_if_replaced(self) -> None:
        """For readers: go on with the catalog that has the name now, where a repair put another there."""
        with self._lock:
            found = _inode(self._path)
            if self._write or self.in_memory or self.in_transaction or found in (0, self._inode):
                return
            with _typed():
                old, self._connection = self._connection, self._open_read_only()
            old.close()
            self._inode = found
            if self.on_copy is not None:
                self.on_copy()

    @property
    def in_transaction(self) -> bool:
        with _typed():
            return self._connection.in_transaction

    def select(self, table: str, tail: str, parameters: Sequence[Value] = ()) -> list[tuple[Value, ...]]:
        """Rows of `table`, each verified, without their checksums. `tail` is constant SQL.

        A value of another type than its column's is damage, whatever the checksum says: SQLite stores any.
        """
        with self._lock, _typed():
            self._renew_copy()
            rows = self._connection.execute(_SELECT[table] + tail, parameters).fetchall()
        types = ROW_TYPES[table]
        for row in rows:
            if row[-1] != row_checksum(table, row[:-1]) or tuple(map(type, row[:-1])) not in types:
                raise CorruptionError(
                    f"{CATALOG}: a row of {table} is damaged ({row[:2]!r:.100})", file=CATALOG
                )
        return [row[:-1] for row in rows]

    def insert(self, table: str, values: Sequence[Value]) -> None:
        """A new row; one that is there already is an error."""
        self._put("INSERT ", table, values)

    def upsert(self, table: str, values: Sequence[Value]) -> None:
        """A new row, or the new content of the row with this primary key (the first columns)."""
        with self._lock, _typed():
            keys = KEYS[table]
            rest = [name for name in (*COLUMNS[table], "checksum") if name not in keys]
            updates = ", ".join(f"{name} = excluded.{name}" for name in rest)
            self._connection.execute(
                f"INSERT {_INSERT[table]} ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {updates}",
                [*values, row_checksum(table, values)],
            )

    def delete(self, table: str, tail: str, parameters: Sequence[Value]) -> None:
        """Delete rows of a known table; `tail` is SQL of our own, values come as parameters."""
        with self._lock, _typed():
            self._connection.execute(f"DELETE FROM {table} {tail}", parameters)  # noqa: S608

    def execute(self, statement: str, parameters: Sequence[Value] = ()) -> list[tuple[Value, ...]]:
        """A statement of memdb's own: a PRAGMA or a migration. Rows come without a look at their checksums."""
        with self._lock, _typed():
            return self._connection.execute(statement, parameters).fetchall()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One short read transaction: everything read inside is of one moment."""
        with self._lock, _typed():
            if self._connection.in_transaction:
                yield
                return
            self._renew_copy()
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One write transaction: all of it or, after an exception, nothing."""
        with self._lock:
            self._check_in_place()
            with _typed():
                self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                files.point("catalog before commit", self._path)
                self._commit()
                files.point("catalog committed", self._path)
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _check_in_place(self) -> None:
        """Whoever has a catalog open that a repair replaced must not commit to what nobody reads any more."""
        if self._write and _inode(self._path) != self._inode:
            raise StoreError(f"{CATALOG} was made anew by memdb repair: open the store again")

    def checkpoint(self) -> bool:
        """Move the WAL into the database and empty it. False where a reader stood in the way all the time."""
        rows = self.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        files.point("catalog checkpointed", self._path)
        return not rows or rows[0][0] == 0

    def scrub(self) -> bool:
        """Write the file anew without free pages, and empty the WAL: what was deleted is in neither.

        False where a reader kept the WAL from being emptied.
        """
        self.execute("VACUUM")
        return self.checkpoint()

    def copy_to(self, path: Path) -> None:
        """Write all of it, as of one moment, into a new file, which is not safe before it is synced."""
        with self._lock, _typed():
            copy = _connect(path.as_uri() + "?mode=rwc")
            try:
                self._connection.backup(copy)
            finally:
                copy.close()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _commit(self) -> None:
        with _typed():
            self._connection.execute("COMMIT")

    def _put(self, verb: str, table: str, values: Sequence[Value]) -> None:
        with self._lock, _typed():
            self._connection.execute(verb + _INSERT[table], [*values, row_checksum(table, values)])

    def _open_plain(self) -> sqlite3.Connection:
        connection = _connect(self._path.as_uri() + "?mode=rwc")
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_read_only(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = None
        try:
            connection = _connect(self._path.as_uri() + "?mode=ro")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            if _primary_code(error) in _CANNOT_BE_WRITTEN:
                return self._copy_into_memory()
            raise
        return connection

    def _copy_into_memory(self) -> sqlite3.Connection:
        """A copy of the database and its WAL. Torn by a writer's step between, it fails on its checksums."""
        self._copied_from = self._files_state()
        with tempfile.TemporaryDirectory(prefix="memdb-") as folder:
            copy = Path(folder) / CATALOG
            try:
                shutil.copyfile(self._path, copy)
                wal = self._path.with_name(CATALOG + "-wal")
                if wal.is_file():
                    shutil.copyfile(wal, copy.with_name(CATALOG + "-wal"))
            except OSError as error:
                raise StoreError(f"cannot read {error.filename}: {error.strerror}") from None
            source = _connect(copy.as_uri() + "?mode=rw")
            try:
                memory = _connect("file::memory:")
                source.backup(memory)
            finally:
                source.close()
        return memory

    def _renew_copy(self) -> None:
        if self._copied_from is None or self._connection.in_transaction:
            return
        if self._copied_from != self._files_state():
            with _typed():
                self._copied_from = None
                old, self._connection = self._connection, self._open_read_only()
            old.close()
            if self.on_copy is not None:
                self.on_copy()

    def _files_state(self) -> tuple[object, ...]:
        state: list[object] = []
        for path in (self._path, self._path.with_name(CATALOG + "-wal")):
            try:
                found = path.stat()
            except OSError:
                state.append(None)
            else:
                state.append((found.st_size, found.st_mtime_ns, found.st_ino))
        return tuple(state)


def _connect(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_S, cached_statements=64
    )
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _inode(path: Path) -> int:
    """Which file has the name, 0 where none has."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _primary_code(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


@contextmanager
def _typed() -> Iterator[None]:
    """SQLite's errors as memdb's: busy, unreadable or unwritable, and else damaged."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise StoreError(f"the store is closed: {error}") from None
    except sqlite3.Error as error:
        match _primary_code(error):
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise LockedError(
                    f"{CATALOG} is kept busy by another process: try again, or end that process"
                ) from None
            case sqlite3.SQLITE_FULL:
                raise StoreFull(
                    f"{CATALOG}: no space left: what was kept is safe; make room, then run it again"
                ) from None
            case (
                sqlite3.SQLITE_IOERR
                | sqlite3.SQLITE_READONLY
                | sqlite3.SQLITE_CANTOPEN
                | sqlite3.SQLITE_PERM
                | sqlite3.SQLITE_NOMEM
            ):
                raise StoreError(
                    f"{CATALOG} cannot be read or written: {error}: check free space and permissions"
                ) from None
            case _:
                raise CorruptionError(
                    f"{CATALOG} is damaged: {error}: run memdb repair", file=CATALOG
                ) from None
    except UnicodeError as error:
        raise CorruptionError(f"{CATALOG} is damaged: {error}: run memdb repair", file=CATALOG) from None
