"""What the campaigns of tools/trust found in the store, one by one, so that it does not come back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memdb import segments, verify
from memdb import store as store_module
from memdb.captions import CaptionIndex
from memdb.client import Client
from memdb.compact import compact
from memdb.database import CATALOG
from memdb.derived import drop_derived
from memdb.export import export
from memdb.files import Step, watched
from memdb.forget import forget
from memdb.schemas.errors import CorruptionError, NotAStore
from memdb.schemas.frames import SourceIdentity
from memdb.segments import OpenSegment
from memdb.store import Store, recording_digest
from tests.store_cases import MODEL, UNIT_NS, fill, new_store, spec, unit

WAL = f"{CATALOG}-wal"


class Died(Exception):
    pass


class Steps:
    """Lists every step; raises at the one that is told."""

    def __init__(self, dies_at: str = "") -> None:
        self.steps: list[Step] = []
        self._dies_at = dies_at

    def before(self, step: Step) -> None:
        if self._dies_at and step.name == self._dies_at:
            raise Died(step.name)

    def after(self, step: Step) -> None:
        self.steps.append(step)


def without_wal(folder: Path, target: Path) -> Path:
    """A copy of an open store as it is when the WAL, and with it all since the last checkpoint, is lost."""
    shutil.copytree(folder, target)
    for name in (WAL, f"{CATALOG}-shm"):
        (target / name).unlink(missing_ok=True)
    return target


def test_all_names_above_a_new_store_are_safe_before_it_holds_anything(tmp_path: Path) -> None:
    steps = Steps()
    path = tmp_path / "a" / "b" / "lobby.memdb"
    with watched(steps):
        Store.open(path, create=True, write=True).close()
    synced = [step.path for step in steps.steps if step.what == "sync_folder"]
    assert synced == [tmp_path, tmp_path / "a", path, path.parent]
    commits = [at for at, step in enumerate(steps.steps) if step.name == "catalog before commit"]
    assert max(at for at, step in enumerate(steps.steps) if step.what == "sync_folder") < min(commits)


@pytest.mark.parametrize("moment", ["catalog before commit", "catalog committed", "catalog checkpointed"])
def test_a_store_whose_maker_died_is_made_by_the_next(tmp_path: Path, moment: str) -> None:
    with watched(Steps(moment)), pytest.raises(Died):
        new_store(tmp_path)
    with new_store(tmp_path) as store:
        fill(store, 1)
        assert Client(store).verify().ok


def test_a_catalog_that_is_cut_to_nothing_is_damage_where_there_are_segments(tmp_path: Path) -> None:
    """And never taken for a store that is still to be made: its segments would be foreign to it."""
    with new_store(tmp_path) as store:
        fill(store, 1)
    (store.path / CATALOG).write_bytes(b"")
    for create in (False, True):
        with pytest.raises(CorruptionError, match="missing"):
            Store.open(store.path, create=create, write=create)
    shutil.rmtree(store.path / "segments")
    with pytest.raises(NotAStore):
        Store.open(store.path)


def test_the_model_comes_back_from_the_segments(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0)])
        lost = without_wal(store.path, tmp_path / "lost.memdb")
        with Store.open(lost) as found:
            assert found.model == MODEL
            assert Client(found).verify().ok


def test_a_recording_begun_anew_stays_when_the_wal_is_lost(tmp_path: Path) -> None:
    other = dataclasses.replace(spec("r"), source=SourceIdentity("file", 7, "77"))
    with new_store(tmp_path) as store:
        with store.writer(spec("r")) as writer:
            writer.epoch(0, 0, "the beginning")
        with store.writer(other) as writer:
            writer.append([unit(0)])
            lost = without_wal(store.path, tmp_path / "lost.memdb")
    for write in (False, True):
        with Store.open(lost, write=write) as found:
            if write:
                with found.writer(other) as writer:
                    assert writer.next_unit == 1
            row = found.recording("r")
            assert (row.units, row.epochs, row.spec) == (1, (), other)
            assert Client(found).verify().ok


def test_a_name_given_anew_after_forgetting_stays_when_the_wal_is_lost(tmp_path: Path) -> None:
    """Also where the forgetting itself is known from its segment alone."""
    with new_store(tmp_path) as store:
        fill(store, 2)
        with watched(Steps("catalog committed")), pytest.raises(Died):
            forget(store, "lobby")
        with store.writer(spec()) as writer:
            writer.append([unit(0), unit(1), unit(2)])
            lost = without_wal(store.path, tmp_path / "lost.memdb")
    with Store.open(lost) as found:
        assert found.recording("lobby").units == 3
    with Store.open(lost, write=True) as found, found.writer(spec()) as writer:
        assert writer.next_unit == 3


def test_what_only_segments_know_can_be_forgotten(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        writer.append([unit(0), unit(1)])
        lost = without_wal(store.path, tmp_path / "lost.memdb")
        second = without_wal(store.path, tmp_path / "second.memdb")
    with Store.open(lost, write=True) as found:
        assert forget(found, "lobby", start_ns=0, end_ns=UNIT_NS).units == 1
    with Store.open(second, write=True) as found:
        assert forget(found, "lobby").whole
    with Store.open(second) as found:
        assert found.recordings() == []


def test_a_table_that_is_half_removed_when_a_repair_dies_is_no_damage(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 3)
        CaptionIndex(store.path).index_captions(store, "fake", flush=True)
    steps = Steps()
    with watched(steps):
        drop_derived(tmp_path / "lobby.memdb")
    removed = [step.path for step in steps.steps if step.what == "unlink"]
    assert len(removed) > 3
    assert removed[0].suffix == ".manifest"


class _Meanwhile:
    """A reader's file system, in which another process acts once, just before a segment is opened."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], module: ModuleType = verify
    ) -> None:
        self._act: Callable[[], object] | None = act
        self._reading = segments.reading
        monkeypatch.setattr(module, "reading", self)

    def __call__(self, folder: Path, name: str) -> AbstractContextManager[OpenSegment]:
        act, self._act = self._act, None
        if act is not None:
            act()
        return self._reading(folder, name)


@pytest.mark.parametrize("whole", [False, True])
def test_verify_beside_forgetting_and_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """What is moved or forgotten while it is verified is no damage."""
    with new_store(tmp_path) as store:
        fill(store, 3)
        fill(store, 2, name="door")

    def act() -> None:
        with Store.open(store.path, write=True) as other:
            forget(other, "door", start_ns=None if whole else 0, end_ns=None if whole else UNIT_NS)
            compact(other)

    _Meanwhile(monkeypatch, act)
    with Store.open(store.path) as reader:
        assert Client(reader).verify().problems == []


def test_verify_of_a_recording_that_is_forgotten_just_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_store(tmp_path) as store:
        fill(store, 3)
        fill(store, 2, name="yard")

    def act() -> None:
        with Store.open(store.path, write=True) as other:
            forget(other, "yard")
            compact(other)

    _Meanwhile(monkeypatch, act)
    with Store.open(store.path) as reader:
        assert Client(reader).verify().problems == []


def test_a_digest_beside_compaction_and_forgetting_is_of_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files go while the first unit is read; in the middle of it all, the last unit is forgotten."""
    with new_store(tmp_path) as store:
        fill(store, 4)
        forget(store, "lobby", start_ns=0, end_ns=1)

        def act() -> None:
            with Store.open(store.path, write=True) as other:
                compact(other)
                forget(other, "lobby", start_ns=3 * UNIT_NS, end_ns=4 * UNIT_NS)

        with Store.open(store.path) as reader:
            before = recording_digest(reader, "lobby")
            _Meanwhile(monkeypatch, act, store_module)
            found = recording_digest(reader, "lobby")
            assert found == recording_digest(reader, "lobby") != before


def test_a_search_passes_over_a_recording_that_is_forgotten_just_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
        fill(store, 2, name="door")
        first = store.units

        def units(*args: Any, **given: Any) -> Any:
            monkeypatch.undo()
            forget(store, "door")
            return first(*args, **given)

        monkeypatch.setattr(store, "units", units)
        hits = CaptionIndex(store.path).search(store, spec().caption_encoder, text="unit", limit=9)
        lobby = store.recording("lobby").id
        assert {hit.recording_id for hit in hits} <= {lobby}


@pytest.mark.parametrize("format", ["jsonl", "srt"])
def test_captions_with_half_a_surrogate_pair_are_exported(tmp_path: Path, format: str) -> None:
    text = "a \ud800 star"
    said = unit(0)
    assert said.caption is not None
    with new_store(tmp_path) as store:
        with store.writer(spec()) as writer:
            writer.append([dataclasses.replace(said, caption=dataclasses.replace(said.caption, text=text))])
        assert export(store, "lobby", tmp_path / "out", format) == 1
    written = (tmp_path / "out").read_text(encoding="utf-8")
    assert json.loads(written)["caption"] == text if format == "jsonl" else "a ? star" in written
