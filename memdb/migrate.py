"""Bring a catalog to the format of this memdb, inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence

from memdb.database import CATALOG, Database, Value, row_checksum
from memdb.migrations import MIGRATIONS, Added
from memdb.schemas.errors import CorruptionError
from memdb.tables import COLUMNS, KEYS


def migrate(database: Database, *, since: int) -> None:
    """Run the steps after format `since`. Raises CorruptionError for a row that is damaged already."""
    for step in range(since, len(MIGRATIONS)):
        migration = MIGRATIONS[step]
        for statement in migration.statements:
            database.execute(statement)
        for table in dict.fromkeys(added.table for added in migration.columns):
            old, new = _columns_after(table, step), _columns_after(table, step + 1)
            _verify(database, table, old)
            _add(database, [added for added in migration.columns if added.table == table])
            _close(database, table, new)
    if since == 1:
        database.insert("meta", ("forgotten", 0))
    database.upsert("meta", ("format", len(MIGRATIONS)))


def _columns_after(table: str, steps: int) -> tuple[str, ...]:
    later = {added.column for step in MIGRATIONS[steps:] for added in step.columns if added.table == table}
    return tuple(name for name in COLUMNS[table] if name not in later)


def _rows(database: Database, table: str, columns: Sequence[str]) -> list[tuple[Value, ...]]:
    return database.execute(f"SELECT {', '.join(columns)} FROM {table}")  # noqa: S608


def _verify(database: Database, table: str, columns: tuple[str, ...]) -> None:
    for row in _rows(database, table, (*columns, "checksum")):
        if row[-1] != row_checksum(table, row[:-1]):
            raise CorruptionError(
                f"{CATALOG}: a row of {table} is damaged, so that it cannot be brought to the present format: "
                "run memdb repair",
                file=CATALOG,
            )


def _add(database: Database, columns: Sequence[Added]) -> None:
    for added in columns:
        database.execute(f"ALTER TABLE {added.table} ADD COLUMN {added.column} {added.type}")
        database.execute(f"UPDATE {added.table} SET {added.column} = {added.value}")  # noqa: S608


def _close(database: Database, table: str, columns: tuple[str, ...]) -> None:
    """Give every row its checksum over the columns as they are now."""
    keys = KEYS[table]
    found = " AND ".join(f"{key} = ?" for key in keys)
    for row in _rows(database, table, columns):
        values = dict(zip(columns, row, strict=True))
        database.execute(
            f"UPDATE {table} SET checksum = ? WHERE {found}",  # noqa: S608
            [row_checksum(table, row), *(values[key] for key in keys)],
        )
