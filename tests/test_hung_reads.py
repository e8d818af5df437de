"""Disks that fail or do not answer: a read ends by its deadline, and nothing that comes later is taken for it."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest

import memdb.timely as timely
from memdb.client import Client
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.query.engine import Engine
from memdb.reader import SliceReader
from memdb.schemas.answer import Answer
from memdb.schemas.errors import CorruptionError
from memdb.schemas.question import Question
from memdb.schemas.rows import UnitRow
from memdb.store import Store
from tests.question_cases import House
from tests.question_cases import house as house
from tests.store_cases import LAYERS, fill, new_store, raw_slices

DEADLINE_S = 0.2
every = np.arange(2 * LAYERS)


class Disk:
    """A disk of the test's own. `hang` decides by the offset which reads wait for `release`."""

    def __init__(
        self,
        hang: Callable[[int], bool] = lambda _: True,
        error: OSError | None = None,
        *,
        short: bool = False,
    ) -> None:
        self.release, self.came_back = threading.Event(), threading.Event()
        self.hang, self.error, self.short, self.calls = hang, error, short, 0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.calls += 1
        if not self.hang(offset):
            return os.preadv(fd, buffers, offset)
        if self.error is not None:
            raise self.error
        self.release.wait()
        for buffer in buffers:  # what a read that comes too late would do to its buffer
            buffer[:] = b"\xee" * len(buffer)
        self.came_back.set()
        return 7 if self.short else sum(map(len, buffers))


def rows_of(store: Store) -> list[UnitRow]:
    return store.units(store.recording("lobby").id)


def truth(wanted: Sequence[UnitRow]) -> np.ndarray:  # type: ignore[type-arg]
    return np.stack([raw for row in wanted for raw in raw_slices(row.number, 2, "int4")])


@pytest.mark.parametrize("short", [False, True])
def test_a_hung_read_costs_its_slices_and_never_writes_to_a_buffer_in_use(
    tmp_path: Path, short: bool
) -> None:
    with new_store(tmp_path) as store:
        fill(store, 6)
        rows = rows_of(store)
        wanted = [(row, every) for row in rows]
        disk = Disk(lambda offset: rows[2].offset <= offset < rows[3].offset, short=short)
        with SliceReader(store, preadv=disk.preadv, deadline_s=DEADLINE_S) as reader:
            batch = reader.read(wanted)
            assert [(bad.index, bad.unit) for bad in batch.bad] == [(8 + at, 2) for at in range(4)]
            assert all("within 0.2 s" in bad.reason for bad in batch.bad)
            good = truth(rows)
            good[8:12] = 0
            assert np.array_equal(batch.stacked(), good)
            disk.release.set()
            assert disk.came_back.wait(10)
            assert np.array_equal(batch.stacked(), good)  # it wrote to nobody's buffer
            disk.hang = lambda _: False
            again = reader.read(wanted)  # new threads, a new buffer, and nothing is stuck any more
            assert again.bad == []
            assert np.array_equal(again.stacked(), truth(rows))
            while any(left.held() for left in reader._left):  # until its thread has ended
                time.sleep(0.001)
            disk.hang = lambda _: True
            disk.release.clear()
            late = reader.read(wanted)  # the disk came back in between: it has the whole deadline again
            assert "within 0.2 s" in late.bad[0].reason
            disk.release.set()


def test_all_the_reads_of_a_dead_disk_wait_at_most_twice_the_deadline(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
        wanted = [(row, every) for row in rows_of(store)]
        disk = Disk()
        with SliceReader(store, preadv=disk.preadv, deadline_s=DEADLINE_S) as reader:
            reasons = [reader.read(wanted).bad[0].reason for _ in range(40)]
            deadlines_s = [float(reason.split(" within ")[1].split()[0]) for reason in reasons]
            assert deadlines_s[0] == DEADLINE_S
            waited_s = deadlines_s[: deadlines_s.index(deadlines_s[-1])]  # the last ones wait for nothing
            assert len(waited_s) > 2
            assert sum(waited_s) <= 2 * DEADLINE_S
            calls = disk.calls
            reader.read(wanted)
            assert disk.calls == calls  # so many threads are left behind that no more are
            assert all(len(reader.read(wanted).bad) == 8 for _ in range(2))
            disk.release.set()


def test_an_error_of_the_disk_is_said_at_once(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
        disk = Disk(error=OSError(errno.EIO, "Input/output error"))
        with SliceReader(store, preadv=disk.preadv) as reader:
            batch = reader.read([(row, every) for row in rows_of(store)])
            assert len(batch.bad) == 8
            assert all("Input/output error" in bad.reason for bad in batch.bad)
            assert not batch.stacked().any()


def test_what_fails_in_a_thread_comes_out_of_the_read(tmp_path: Path) -> None:
    def broken(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise RuntimeError("a slip of ours")

    with new_store(tmp_path) as store:
        fill(store, 2)
        wanted = [(row, every) for row in rows_of(store)]
        with SliceReader(store, preadv=broken) as reader, pytest.raises(RuntimeError, match="slip"):
            reader.read(wanted)


def test_a_caption_that_the_disk_does_not_give_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def hung(*_: object, **__: object) -> bytes:
        release.wait()
        return b""

    with new_store(tmp_path) as store:
        fill(store, 2)
        row = rows_of(store)[1]
        store._patience = timely.Patience(DEADLINE_S)
        monkeypatch.setattr(timely, "RWF_NOWAIT", 0)  # nothing is in the page cache
        assert store.read_caption(row).text.startswith("unit 1")
        monkeypatch.setattr(timely, "read_exactly", hung)
        for _ in range(20):
            with pytest.raises(CorruptionError, match="did not give"):
                store.read_caption(row)
        release.set()


# A question over such a disk


def asked(client: Client, disk: Disk, mode: str, recording: str) -> Answer:
    """A question over a disk that is well until the question comes."""
    reader = SliceReader(client.store, preadv=disk.preadv, deadline_s=DEADLINE_S)
    engine = Engine(client.store, client.loaded.model(), client.loaded.question_vectors, reader=reader)
    question = Question("what colour was the star?", mode, recording)
    hang, disk.hang = disk.hang, lambda _: False
    engine.prepare(question)
    disk.hang = hang
    answer = engine.ask(question)
    engine.close()
    return answer


@pytest.mark.parametrize("mode", ["kv", "recent"])
@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "Input/output error")])
def test_a_question_goes_on_with_captions_where_no_kv_comes(
    house: House, mode: str, error: OSError | None
) -> None:
    disk = Disk(error=error)
    with house.open() as client:
        answer = asked(client, disk, mode, "hall")
        disk.release.set()
        captions = client.ask("what colour was the star?", mode="captions", recording="hall")
    assert answer.plan.mode == "captions"
    assert {item.tier for item in answer.evidence} == {"captions"}
    assert answer.token_ids == captions.token_ids
    said = " | ".join(answer.warnings)
    assert f"nothing that mode {mode} needs could be read: the answer comes from mode captions" in said
    assert ("Input/output error" if error else "did not give it within") in said


def test_a_question_goes_on_with_the_blocks_that_come(house: House) -> None:
    with house.open() as client:
        units = client.store.units(client.store.recording("hall").id)
        disk = Disk(lambda offset: units[0].offset <= offset < units[1].offset)
        answer = asked(client, disk, "kv", "hall")
        disk.release.set()
    assert answer.plan.mode == "kv"
    assert {item.tier for item in answer.evidence} == {"kv"}
    assert any("left out" in warning for warning in answer.warnings)
    assert not any("nothing" in warning for warning in answer.warnings)


def test_a_question_goes_on_with_captions_where_no_keys_come(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, disk = threading.Event(), Disk(lambda _: False)

    def hung(*_: object) -> None:
        release.wait()

    with house.open() as client:
        captions = client.ask("what colour was the star?", mode="captions", recording="hall")
        monkeypatch.setattr(KeyTable, "read_rows", hung)
        monkeypatch.setattr(KeySearch, "__init__", partialmethod(KeySearch.__init__, deadline_s=DEADLINE_S))
        answer = asked(client, disk, "kv", "hall")
    release.set()
    assert answer.plan.mode == "captions"
    assert answer.token_ids == captions.token_ids
    assert any("did not give it within" in warning for warning in answer.warnings)


def test_costs_that_could_not_be_measured_are_not_kept(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMDB_CACHE_DIR", str(tmp_path / "cache"))
    disk = Disk(error=OSError(errno.EIO, "Input/output error"))
    question = Question("what colour was the star?", "kv", "hall")
    with house.open() as client:
        for failing in (True, False):
            reader = SliceReader(client.store, preadv=disk.preadv)
            engine = Engine(
                client.store, client.loaded.model(), client.loaded.question_vectors, reader=reader
            )
            engine.prepare(question)
            engine.close()
            assert engine._costs is not None
            file, costs = engine._costs
            assert (file.load() is None) == failing
            assert (costs.read_block == costs.search_layer == 0) == failing
            disk.hang = lambda _: False


def test_without_the_other_tier_the_answer_says_on_what_it_rests(house: House) -> None:
    disk = Disk(error=OSError(errno.EIO, "Input/output error"))
    with house.open() as client:
        answer = asked(client, disk, "kv", "yard")
    assert answer.evidence == ()
    assert any("rests on the question alone" in warning for warning in answer.warnings)


def test_captions_that_cannot_be_read_leave_the_kv(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Store, row: UnitRow) -> None:
        raise CorruptionError("its caption is damaged", file="segments/x")

    with house.open() as client:
        kv = client.ask("what colour was the star?", mode="kv", recording="hall")
        monkeypatch.setattr(Store, "read_caption", damaged)
        answer = client.ask("what colour was the star?", mode="captions", recording="hall")
    assert answer.plan.mode == "kv"
    assert answer.token_ids == kv.token_ids
    assert any("the answer comes from mode kv" in warning for warning in answer.warnings)
