"""A recording that was begun, never filled, and begun anew in another way: a power cut may bring its file back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from memdb.database import CATALOG
from memdb.forget import forget
from memdb.repair import repair
from memdb.roll_forward import beyond
from memdb.segments import segment_files
from memdb.store import Store
from tests.store_cases import fill, new_store, spec, unit


def come_back(folder: Path) -> tuple[Path, str]:
    """A store with one filled recording, and the file of the one that was begun before it under its name."""
    aside = folder / "aside.seg"
    with new_store(folder) as store:
        store.writer(spec(fingerprint="a" * 32)).close()
        (files,) = segment_files(store.segments_path).values()
        shutil.copyfile(store.segments_path / files[0][1], aside)
        with store.writer(spec(fingerprint="b" * 32)) as writer:
            writer.append([unit(0)])
        assert files[0][1] not in {file.name for file in store.segments_path.iterdir()}
        shutil.copyfile(aside, store.segments_path / files[0][1])
        return store.path, files[0][1]


def names(path: Path) -> list[tuple[str, int]]:
    with Store.open(path) as store:
        return [(row.name, row.units) for row in store.recordings()]


def test_it_does_not_stand_beside_the_one_that_has_its_name(tmp_path: Path) -> None:
    path, _ = come_back(tmp_path)
    assert names(path) == [("lobby", 1)]


def test_a_writer_drops_its_file_so_that_it_is_gone_when_the_name_is_free(tmp_path: Path) -> None:
    path, file = come_back(tmp_path)
    with Store.open(path, write=True) as store:
        with store.writer(spec(fingerprint="b" * 32)) as writer:
            writer.append([unit(1)])
        assert not (store.segments_path / file).exists()
        forget(store, "lobby")
    assert names(path) == []


def test_repair_gives_the_name_to_the_one_that_holds_something(tmp_path: Path) -> None:
    path, _ = come_back(tmp_path)
    for file in path.glob(f"{CATALOG}*"):
        file.unlink()
    report = repair(path)
    assert names(path) == [("lobby", 1)]
    assert any("holds nothing" in note for note in report.notes)


def test_a_reader_passes_over_what_is_forgotten_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may forget a recording between a reader's look at its segments and that at its row."""
    with new_store(tmp_path) as store:
        fill(store, 2)
        (row,) = store.recordings()
        seen = store.catalog.segments(row.id)
        monkeypatch.setattr(store.catalog, "segments", lambda recording_id: seen)
        monkeypatch.setattr(store.catalog, "state", lambda recording_id: None)
        assert list(beyond(store.catalog, store.segments_path, row.id)) == []
