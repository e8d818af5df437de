"""What lies beyond the catalog's end: seen by readers without a change on disk, brought back by writers."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import memdb.store
from memdb.database import CATALOG
from memdb.files import Step, watched
from memdb.forget import forget
from memdb.store import Store, recording_digest
from memdb.verify import verify
from tests.store_cases import UNIT_NS, Steps, directory_digest, fill, flip, new_store, spec, unit


class Died(BaseException):
    """Stands for a process that ends between two steps."""


def dies_at(name: str) -> Steps:
    class Dying(Steps):
        def before(self, step: Step) -> None:
            if step.name == name:
                raise Died

    return Dying()


def with_wal(tmp_path: Path, units: int = 6) -> Path:
    """A store as a killed writer leaves it: the last commits are in the WAL only."""
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        for number in range(units):
            writer.append([unit(number)])
        copy = tmp_path / "killed.memdb"
        shutil.copytree(store.path, copy)
    assert (copy / f"{CATALOG}-wal").stat().st_size > 0
    return copy


def digest(path: Path) -> tuple[int, str]:
    with Store.open(path) as store:
        return store.recording("lobby").units, recording_digest(store, "lobby")


def test_a_reader_sees_what_was_safe_and_not_yet_committed(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 4)
        writer = store.writer(spec())
        writer.append([unit(4)])
        with watched(dies_at("catalog before commit")), pytest.raises(Died):
            writer.append([unit(5)])
        writer.close()
    before = directory_digest(store.path)
    units, found = digest(store.path)
    assert units == 6
    assert directory_digest(store.path) == before, "a reader changes nothing"
    with Store.open(store.path) as reader:
        report = verify(reader)
        assert report.ok
        assert any("behind the segments" in note for note in report.notes)
    with Store.open(store.path, write=True) as again, again.writer(spec()) as writer:
        assert writer.next_unit == 6
    assert digest(store.path) == (6, found)


def test_damage_to_the_wal_hides_nothing(tmp_path: Path) -> None:
    path = with_wal(tmp_path)
    whole = digest(path)
    assert whole[0] == 6
    random_ = random.Random(5)
    size = (path / f"{CATALOG}-wal").stat().st_size
    for trial in range(25):
        copy = tmp_path / f"flipped-{trial}"
        shutil.copytree(path, copy)
        flip(copy / f"{CATALOG}-wal", random_.randrange(size), random_.randrange(8))
        (copy / f"{CATALOG}-shm").unlink(missing_ok=True)
        assert digest(copy) == whole
        shutil.rmtree(copy)
    (path / f"{CATALOG}-wal").unlink()
    (path / f"{CATALOG}-shm").unlink(missing_ok=True)
    assert digest(path) == whole


def test_an_open_reader_sees_what_a_writer_left_when_it_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memdb.store, "_LOOK_S", 0)
    with new_store(tmp_path) as store:
        fill(store, 2)
        with Store.open(store.path) as reader:
            assert reader.recording("lobby").units == 2
            writer = store.writer(spec())
            writer.append([unit(2)])
            with watched(dies_at("catalog before commit")), pytest.raises(Died):
                writer.append([unit(3), unit(4)])
            writer.close()
            assert reader.recording("lobby").units == 5
            with store.writer(spec()) as writer:  # the next writer brings them back and goes on
                assert writer.next_unit == 5
                writer.append([unit(5)])
            assert reader.recording("lobby").units == 6


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("a sealed segment, before it is committed", True),  # the bytes are there, only unsafe
        ("the name of a sealed segment", True),
        ("catalog before commit", True),
        ("unsealed", False),
    ],
)
def test_a_forgetting_that_died_counts_once_it_is_sealed(
    tmp_path: Path, whole: bool, name: str, counts: bool
) -> None:
    if whole:
        name = {
            "a sealed segment, before it is committed": "the tombstone of a recording, before it is committed",
            "the name of a sealed segment": "the name of a recording's tombstone",
        }.get(name, name)
    with new_store(tmp_path) as store:
        fill(store, 6)
        watch: Steps
        if name == "unsealed":
            writes = iter(range(10))
            watch = Steps(lambda step: step.what == "write" and next(writes) == 2)
        else:
            watch = dies_at(name)
        span: dict[str, int] = {} if whole else {"start_ns": UNIT_NS, "end_ns": 3 * UNIT_NS}
        with watched(watch), pytest.raises((Died, memdb.store.StoreError)):
            forget(store, "lobby", **span)  # type: ignore[arg-type]
    check: Callable[[Store], None] = gone if counts else there
    for write in (False, True):
        with Store.open(store.path, write=write) as again:
            if write and not (whole and counts):
                again.writer(spec()).close()
            elif write:
                fill(again, 1)
                assert again.recording("lobby").units == 1
                return
            if whole and counts:
                assert not again.recordings()
            else:
                check(again)
            assert verify(again).ok


def gone(store: Store) -> None:
    row = store.recording("lobby")
    assert [found.has_caption for found in store.units(row.id)] == [True, False, False, True, True, True]
    assert len(row.tombstones) == 1


def there(store: Store) -> None:
    row = store.recording("lobby")
    assert [found.has_caption for found in store.units(row.id)] == [True] * 6
    assert not row.tombstones
