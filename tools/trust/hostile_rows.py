"""What a hostile writer makes of a catalog: odd values under right checksums, rows that are gone, and rows twice."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from memdb.database import row_checksum
from memdb.records import canonical_ascii
from memdb.tables import COLUMNS, KEYS
from tools.trust.hostile_values import NUMBERS, Chance, deep, mangled, odd_json


def hostile_rows(path: Path, chance: Chance) -> None:
    """Rows of a catalog with odd values under right checksums, rows that are gone, and rows twice."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for _ in range(chance.choice((1, 1, 2, 4))):
            with suppress(sqlite3.Error, OverflowError):
                _hostile_row(database, chance)


def _hostile_row(database: sqlite3.Connection, chance: Chance) -> None:
    table = chance.choice(list(COLUMNS))
    names = COLUMNS[table]
    rows = database.execute(f"SELECT rowid, {', '.join(names)} FROM {table}").fetchall()
    if not rows:
        return
    rowid, *values = chance.choice(rows)
    if chance.random() < 0.15:
        database.execute(f"DELETE FROM {table} WHERE rowid = ?", (rowid,))
        return
    at = chance.randrange(len(values))
    values[at] = _odd_cell(values[at], chance)
    keys = len(KEYS[table])
    twice = chance.random() < 0.2 and at < keys
    checksum = row_checksum(table, values) if not isinstance(values[at], float) else 0
    if twice:
        marks = ", ".join("?" * (len(names) + 1))
        database.execute(
            f"INSERT INTO {table} ({', '.join(names)}, checksum) VALUES ({marks})",
            [*values, checksum],
        )
    else:
        sets = ", ".join(f"{name} = ?" for name in (*names, "checksum"))
        database.execute(f"UPDATE {table} SET {sets} WHERE rowid = ?", [*values, checksum, rowid])


def _odd_cell(value: object, chance: Chance) -> Any:
    if isinstance(value, bytes):
        return mangled(value, chance) if chance.random() < 0.8 else bytes(chance.choice((0, 1, 1 << 20)))
    if isinstance(value, int) and chance.random() < 0.8:
        number = chance.choice(NUMBERS)
        return number if -(1 << 63) <= number < 1 << 63 else -number % (1 << 63)
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError, TypeError):
            return deep(canonical_ascii(odd_json(json.loads(value), chance))).decode()
    if isinstance(value, str) and chance.random() < 0.5:
        return mangled(value.encode(), chance).decode("latin-1")
    return chance.choice((None, "", "x" * 1000, "../../etc/passwd", 0, -1, b"", b"x" * 40, 1.5))
