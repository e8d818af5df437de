"""Rows of a catalog whose checksums are right and whose values cannot be: typed errors, and verify names the file."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from memdb.database import CATALOG, Database, row_checksum
from memdb.index.key_table import KeyTable
from memdb.index.page_writer import index_recording
from memdb.pieces import MISSING, PieceTable, piece_keys
from memdb.repair import repair
from memdb.schemas.errors import CorruptionError, MemdbError
from memdb.store import Store
from memdb.tables import COLUMNS, KEYS
from memdb.verify import verify_path
from tests.store_cases import fill, new_store

FOREIGN: dict[type, object] = {
    int: b"x",
    str: b"x",
    bytes: "x",
    type(None): b"x",
}  # that no affinity converts
HUGE = (1 << 63) - 1


def reseal(store: Path, table: str, column: str, value: object) -> None:
    """Put a value into the first row of a table, under a right checksum."""
    names = COLUMNS[table]
    with closing(sqlite3.connect(store / CATALOG, isolation_level=None)) as database:
        row = list(database.execute(f"SELECT {', '.join(names)} FROM {table} LIMIT 1").fetchone())
        where = " AND ".join(f"{name} = ?" for name in KEYS[table])
        keys = [row[names.index(name)] for name in KEYS[table]]
        row[names.index(column)] = value
        sets = ", ".join(f"{name} = ?" for name in (*names, "checksum"))
        database.execute(f"UPDATE {table} SET {sets} WHERE {where}", [*row, row_checksum(table, row), *keys])


def value_of(store: Path, table: str, column: str) -> object:
    with closing(sqlite3.connect(store / CATALOG)) as database:
        return database.execute(f"SELECT {column} FROM {table} LIMIT 1").fetchone()[0]


def read_all(store: Path) -> None:
    with Store.open(store) as opened:
        for row in opened.recordings():
            for unit in opened.units(row.id):
                unit.check()
            opened.catalog.segments(row.id)
            opened.catalog.replaced(row.id)
        opened.catalog.forgotten()


@pytest.mark.parametrize("table", COLUMNS)
def test_a_value_of_another_type_is_damage_whatever_its_checksum(
    furnished: Path, copied: Path, table: str
) -> None:
    for column in COLUMNS[table]:
        before = value_of(copied, table, column)
        reseal(copied, table, column, FOREIGN[type(before)])
        database = Database(copied / CATALOG, write=False)
        with pytest.raises(CorruptionError, match=f"a row of {table} is damaged") as caught:
            database.select(table, "")
        database.close()
        assert caught.value.file == CATALOG
        shutil.rmtree(copied)
        shutil.copytree(furnished, copied)


@pytest.mark.parametrize("value", [-1, 1 << 32, HUGE])
def test_a_caption_of_more_tokens_than_key_pages_have_room_for_is_damage(tmp_path: Path, value: int) -> None:
    """It was copied into a column of 32 bits, in pages and in the tail that a question reads."""
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = tmp_path / "lobby.memdb"
    reseal(path, "units", "caption_tokens", value)
    assert CATALOG in {problem.file for problem in verify_path(path).problems}
    with Store.open(path) as store:
        recording = store.recording("lobby").id
        with pytest.raises(CorruptionError, match="tokens"):
            KeyTable.open(store, recording)
    with Store.open(path, write=True) as store, pytest.raises(CorruptionError, match="tokens"):
        index_recording(store, store.recording("lobby").id, flush=True)
    repair(path)
    assert verify_path(path).ok


@pytest.mark.parametrize("column", ["offset", "length"])
@pytest.mark.parametrize("value", [-1, HUGE - 70, HUGE])
def test_a_place_that_no_file_has_is_damage_to_whoever_reads_there(
    tmp_path: Path, column: str, value: int
) -> None:
    """Added to the place of a slice it left 64 bits."""
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = tmp_path / "lobby.memdb"
    reseal(path, "units", column, value)
    assert CATALOG in {problem.file for problem in verify_path(path).problems}
    with Store.open(path) as store:
        pieces = PieceTable(store, store.recording("lobby").id)
        found = pieces.find(0, piece_keys(0, 0, np.arange(1)))
        assert found.table["file"].tolist() == [MISSING]
        found = pieces.find(0, piece_keys(1, 0, np.arange(1)))
        assert found.table["file"].tolist() != [MISSING]


@pytest.mark.parametrize(
    "column", [name for name in COLUMNS["recordings"] if name not in ("id", "name", "spec")]
)
def test_a_count_that_cannot_be_is_told_and_walked_by_nobody(copied: Path, bare: None, column: str) -> None:
    """verify asked for every unit of four milliards of milliards."""
    before = value_of(copied, "recordings", column)
    for value in (HUGE, -5):
        reseal(copied, "recordings", column, value)
        with suppress(MemdbError):
            read_all(copied)
        problems = {problem.file for problem in verify_path(copied).problems}
        if column in ("units", "segments", "gaps", "epochs", "ends", "tombstones", "replaced"):
            assert CATALOG in problems
    repair(copied)
    assert verify_path(copied).ok
    if column in ("units", "watermark_ns", "kv_bytes"):
        assert value_of(copied, "recordings", column) == before
