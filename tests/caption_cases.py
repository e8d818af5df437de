"""Captions of a little store, and what a search must find in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fake_store import ENCODER, OTHER, RECORDING, FakeRow, FakeStore

from memdb.captions import CaptionIndex
from memdb.live_table import LiveTable, LiveTables

E = 8
COLOURS = ["red", "blue", "green"]
SHAPES = ["star", "circle", "square", "triangle"]
VECTOR = np.random.default_rng(1).standard_normal(E).astype(np.float32)


def filled(path: Path, captions: int = 60) -> FakeStore:
    """Captions of two recordings in turn; some said twice, some units without."""
    (path / "locks").mkdir()
    store, rng = FakeStore(path), np.random.default_rng(0)
    for at in range(captions):
        name = RECORDING if at % 3 else OTHER
        if at % 7 == 5:
            store.add(recording_id=name)  # nothing was said
        elif at % 10 == 9:
            said = store.captions[RECORDING, 0]
            store.add(recording_id=name, text=said.text, vector=said.vector)
        else:
            text = f"a {COLOURS[at % 3]} {SHAPES[at % 4]} passes" + " slowly" * (at % 5)
            store.add(recording_id=name, text=text, vector=rng.standard_normal(E))
    return store


def indexed_to(store: FakeStore, commit_id: int) -> CaptionIndex:
    """An index whose table holds the captions up to a commit."""
    later = store.rows
    store.rows = [row for row in later if row.commit_id <= commit_id]
    index = CaptionIndex(store.path)
    index.index_captions(store, ENCODER, flush=True)
    store.rows = later
    return index


def captioned(store: FakeStore, take: Callable[[FakeRow], bool] = lambda row: True) -> list[FakeRow]:
    return [row for row in store.rows if row.has_caption and take(row)]


def by_cosine(store: FakeStore, vector: Any, rows: Iterable[FakeRow]) -> list[tuple[str, int]]:
    """The definition: every cosine in fp64, best first, of equals the one committed first."""

    def score(row: FakeRow) -> float:
        v = np.asarray(store.captions[row.recording_id, row.number].vector, np.float64)
        q = vector.astype(np.float64)
        return float((v * q).sum()) / float(np.sqrt((v * v).sum() * (q * q).sum()))

    ranked = sorted(rows, key=lambda row: (-score(row), row.commit_id))
    return [(row.recording_id, row.number) for row in ranked]


def places(hits: Iterable[Any]) -> list[tuple[str, int]]:
    return [(hit.recording_id, hit.unit) for hit in hits]


def digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        total.update(str(file).encode())
        if file.is_file():
            total.update(file.read_bytes())
    return total.hexdigest()


def live(path: Path, encoder: str = ENCODER) -> LiveTable:
    """The table as a reader opens it that has seen nothing yet."""
    table = LiveTables(path).get(encoder)
    assert table is not None
    return table


def rows_in_table(path: Path, encoder: str = ENCODER) -> list[tuple[str, int]]:
    """The places that the live table has rows of, each as often as it has."""
    columns = live(path, encoder).table._table.to_arrow()
    return sorted(zip(*(columns.column(name).to_pylist() for name in ("recording_id", "unit")), strict=True))


def all_places(rows: Sequence[FakeRow]) -> list[tuple[str, int]]:
    return sorted((row.recording_id, row.number) for row in rows)


def table_files(path: Path) -> list[Path]:
    return sorted(file for file in (path / "captions.lance").rglob("*") if file.is_file())
