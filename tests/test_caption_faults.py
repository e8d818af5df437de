"""Indexers that die, disks that fill, folders that vanish: a search finds every caption, once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import store_cases
from caption_cases import (
    VECTOR,
    E,
    all_places,
    by_cosine,
    captioned,
    digest,
    filled,
    indexed_to,
    live,
    places,
    rows_in_table,
    table_files,
)
from fake_store import ENCODER, OTHER, RECORDING, FakeStore

from memdb import caption_indexer
from memdb.caption_check import check_captions
from memdb.caption_table import CaptionTable, manifest_file
from memdb.captions import CaptionIndex
from memdb.files import Step, watched
from memdb.room import RESERVE_BYTES
from memdb.verify import Problem

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return filled(tmp_path)


class Killed(BaseException):
    """The process dies here: nothing is tidied up."""


class Death:
    """Before the step of this number, or at a named point."""

    def __init__(self, number: int = -1, name: str = "") -> None:
        self.number, self.name, self.count = number, name, 0

    def before(self, step: Step) -> None:
        if self.count == self.number or (self.name and step.name == self.name):
            raise Killed(step)
        self.count += 1

    def after(self, step: Step) -> None:
        pass


def is_whole(store: FakeStore, *, also: CaptionIndex | None = None, word: str = "passes") -> None:
    """Searches find everything once, before and after the next indexer, which leaves nothing behind."""
    for index in (CaptionIndex(store.path), *([also] if also else [])):
        found = index.search(store, ENCODER, vector=VECTOR, limit=200)
        assert places(found) == by_cosine(store, VECTOR, captioned(store))
        found = index.search(store, ENCODER, text=word, limit=200)
        assert sorted(places(found)) == all_places(captioned(store))
    index = CaptionIndex(store.path)
    index.index_captions(store, ENCODER, flush=True)
    index.purge(store)
    assert rows_in_table(store.path) == all_places(captioned(store))
    assert check_captions(store.path) == []
    assert len(list((store.path / "captions.lance").iterdir())) == 2


def add(store: FakeStore) -> None:
    CaptionIndex(store.path).index_captions(store, ENCODER, flush=True)


def add_and_merge(store: FakeStore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_indexer, "_FRAGMENTS_MAX", 2)
        add(store)


def make_anew(store: FakeStore) -> None:
    data = sorted((store.path / "captions.lance").glob("*.lance/data/*"))[0]
    data.write_bytes(data.read_bytes()[:-1])
    add(store)


def purge(store: FakeStore) -> None:
    store.forget(RECORDING, 5, 9)
    CaptionIndex(store.path).purge(store)


WORK: dict[str, Callable[[FakeStore], None]] = {
    "add": add,
    "merge": add_and_merge,
    "make anew": make_anew,
    "purge": purge,
}


@pytest.mark.parametrize("work", WORK)
def test_a_death_at_any_step_loses_nothing_and_shows_nothing_twice(tmp_path, work):
    """Each step of each protocol that changes the disk, and the moments between LanceDB's steps and ours."""
    folder, pristine = tmp_path / "store", tmp_path / "pristine"
    folder.mkdir()
    source = filled(folder)
    indexed_to(source, 20)
    indexed_to(source, 33)
    shutil.copytree(folder, pristine, symlinks=True)
    rows, captions = list(source.rows), dict(source.captions)
    at, died = 0, True
    while died:
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder, symlinks=True)
        source.rows, source.captions = list(rows), dict(captions)
        source.tombstones.clear()
        reader = CaptionIndex(folder)
        reader.search(source, ENCODER, vector=VECTOR, limit=3)
        try:
            with watched(Death(at)):
                WORK[work](source)
            died = False
        except Killed:
            problems = [found for found in check_captions(folder) if isinstance(found, Problem)]
            assert problems == [] or work == "make anew"
            is_whole(source, also=reader)
        at += 1 if at < 8 else 5  # removals of the files of a folder are many, and alike
    assert at > 5
    is_whole(source, also=reader)


POINTS = {"captions added": add, "captions made": add_and_merge, "captions switched": add_and_merge}


@pytest.mark.parametrize("point", POINTS)
def test_a_death_between_lance_and_the_manifest(store, point):
    reader = indexed_to(store, 20)
    before = live(store.path).manifest
    with pytest.raises(Killed), watched(Death(name=point)):
        POINTS[point](store)
    manifest = live(store.path).manifest
    if point == "captions switched":
        assert manifest.folder != before.folder
        assert (store.path / "captions.lance" / before.folder).is_dir()
    elif point == "captions added":
        assert manifest == before
        assert CaptionTable.open(store.path, before.folder).version > before.version
    else:
        assert manifest.folder == before.folder
        assert len(list((store.path / "captions.lance").glob("*.lance"))) == 2
    is_whole(store, also=reader)


@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_is_a_warning_and_the_next_call_tries_again(store, point, caplog):
    indexed_to(store, 20)

    class Full(Death):
        def before(self, step: Step) -> None:
            if step.name == point:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    index = CaptionIndex(store.path)
    with watched(Full()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_indexer, "_FRAGMENTS_MAX", 50 if point == "captions added" else 2)
        assert index.index_captions(store, ENCODER, flush=True) == 0
    assert "not indexed: [Errno 28] No space left on device" in caplog.text
    # What half came through takes no room on the full disk.
    assert not [found for found in check_captions(store.path) if point != "captions switched"]
    assert places(index.search(store, ENCODER, vector=VECTOR, limit=100)) == (
        by_cosine(store, VECTOR, captioned(store))
    )
    index.index_captions(store, ENCODER, flush=True)
    is_whole(store, also=index)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(store):
    indexed_to(store, 20)
    before = (store.path / manifest_file(ENCODER)).read_bytes()

    class Full(Death):
        def before(self, step: Step) -> None:
            if step.what == "write":
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    index = CaptionIndex(store.path)
    with watched(Full()):
        assert index.index_captions(store, ENCODER, flush=True) == 0
    assert (store.path / manifest_file(ENCODER)).read_bytes() == before
    is_whole(store, also=index)


def test_the_last_of_a_disk_is_not_taken_for_a_table(store, monkeypatch, caplog):
    index, table = indexed_to(store, 20), digest(store.path / "captions.lance")
    with monkeypatch.context() as patch:
        patch.setattr("memdb.room.free_bytes", lambda folder: RESERVE_BYTES - 1)
        assert index.index_captions(store, ENCODER, flush=True) == 0
    assert "not indexed: no room for the table of captions" in caplog.text
    assert digest(store.path / "captions.lance") == table
    is_whole(store, also=index)


SMALL_FILES = """
import json, resource, sys
sys.path[:0] = sys.argv[2:4]
from pathlib import Path
from caption_cases import *
from memdb.caption_check import check_captions
store = filled(Path(sys.argv[1]))
index = indexed_to(store, 20)
last = store.rows
store.rows = last[:20]
for number in range(60):
    store.add(text="word " * 3000, vector=VECTOR)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
none = [index.index_captions(store, ENCODER, flush=True) for _ in range(3)]
fresh = CaptionIndex(store.path)
found = len(fresh.search(store, ENCODER, text="word", limit=100))
left = [str(note) for note in check_captions(store.path)]
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
added = index.index_captions(store, ENCODER, flush=True)
print(json.dumps([none, found, left, added, rows_in_table(store.path) == all_places(captioned(store))]))
"""


def test_lances_own_words_for_a_full_disk_are_understood(tmp_path):
    """A limit on the size of files: LanceDB meets what it meets on a full disk, and the table stays."""
    arguments = [sys.executable, "-c", SMALL_FILES, str(tmp_path), str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
    none, found, left, added, whole = json.loads(done.stdout)
    assert (none, found, left, added, whole) == ([0, 0, 0], 60, [], 60, True)
    assert "not indexed: [Errno 27]" in done.stderr
    assert "made anew" not in done.stderr


def test_attempts_that_fail_take_little_of_an_ingests_time(store, monkeypatch):
    index = indexed_to(store, 20)
    tries = []

    def failing(*_: object, **__: object) -> int:
        tries.append(clock[0])
        clock[0] += 2.0
        raise OSError(errno.ENOSPC, "full")

    clock = [100.0]
    monkeypatch.setattr("memdb.captions.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(index._indexer, "index", failing)
    while clock[0] < 200:
        assert index.index_captions(store, ENCODER) == 0
        clock[0] += 0.5
    assert tries[0] == 100.0
    assert len(tries) == 3
    assert index.index_captions(store, ENCODER, flush=True) == 0  # the last call of an ingest tries at once
    assert len(tries) == 4


def test_two_indexers_in_turn_add_everything_once(store):
    first, second = CaptionIndex(store.path), CaptionIndex(store.path)
    rows, store.rows = store.rows, []
    for number, row in enumerate(rows):
        store.rows.append(row)
        (first if number % 3 else second).index_captions(store, ENCODER, flush=True)
    is_whole(store)


def test_a_version_of_another_process_is_not_mixed_with_ours(store):
    """It died after its rows came through: our open handle must not go on from them."""
    index = indexed_to(store, 20)
    row = captioned(store)[-1]
    CaptionTable.open(store.path, live(store.path).manifest.folder).add(
        [caption_indexer.CaptionEntry(row.recording_id, row.number, 0, 1, "passes", VECTOR)]
    )
    assert index.index_captions(store, ENCODER, flush=True) > 0
    is_whole(store, also=index)


def test_a_reader_goes_on_where_its_folder_vanishes(store):
    """It was merged, made anew, purged: one look at the manifest, and no warning."""
    reader = indexed_to(store, 33)
    for work in (add_and_merge, make_anew, purge):
        reader.search(store, ENCODER, vector=VECTOR, text="red", limit=5)
        store.add(text="a red star passes", vector=VECTOR)
        before = live(store.path).manifest.folder
        work(store)
        assert live(store.path).manifest.folder != before
        found = reader.search(store, ENCODER, vector=VECTOR, limit=100)
        assert places(found) == by_cosine(store, VECTOR, captioned(store))
        assert found.warnings == ()


def test_a_table_that_vanishes_under_a_search_is_looked_for_once_more(store, monkeypatch):
    """Between the look at its files and the reading of them."""
    reader = indexed_to(store, 33)
    nearest, work = CaptionTable.nearest, [add_and_merge]

    def late(self: CaptionTable, *arguments: object) -> object:
        if work:
            work.pop()(store)
        return nearest(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CaptionTable, "nearest", late)
    found = reader.search(store, ENCODER, vector=VECTOR, limit=100)
    assert places(found) == by_cosine(store, VECTOR, captioned(store))
    assert found.warnings == ()


def test_a_folder_that_is_gone_for_good_costs_a_warning(store):
    reader = indexed_to(store, 60)
    reader.search(store, ENCODER, vector=VECTOR)
    shutil.rmtree(store.path / "captions.lance" / live(store.path).manifest.folder)
    found = reader.search(store, ENCODER, vector=VECTOR, limit=100)
    assert places(found) == by_cosine(store, VECTOR, captioned(store))
    assert "one by one" in found.warnings[0]
    is_missing = [problem for problem in check_captions(store.path) if isinstance(problem, Problem)]
    assert is_missing
    assert CaptionIndex(store.path).index_captions(store, ENCODER) == len(captioned(store))
    assert reader.search(store, ENCODER, vector=VECTOR, limit=100).warnings == ()


def test_searches_beside_an_indexer_find_every_caption_each_time(tmp_path, monkeypatch):
    """Adds and merges go on under readers that have the table open."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr(caption_indexer, "_FRAGMENTS_MAX", 4)
    store, random, stop = FakeStore(tmp_path), np.random.default_rng(6), threading.Event()
    vectors = random.standard_normal((400, E))
    store.add(text="star 0", vector=vectors[0])
    failures: list[object] = []
    searches = [0, 0]

    def read(which: int) -> None:
        index = CaptionIndex(tmp_path)
        while not stop.is_set() and not failures:
            there = len(store.rows)
            vector = index.search(store, ENCODER, vector=VECTOR, limit=1000)
            text = index.search(store, ENCODER, text="star", limit=1000)
            for found in (vector, text):
                units = [hit.unit for hit in found]
                if len(set(units)) != len(units) or not set(range(there)) <= set(units):
                    failures.append((there, sorted(units), found.warnings))
            searches[which] += 1

    threads = [threading.Thread(target=read, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    writer = CaptionIndex(tmp_path)
    for number in range(1, 120):
        store.add(text=f"star {number}", vector=vectors[number])
        writer.index_captions(store, ENCODER, flush=number % 3 == 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert min(searches) > 3
    is_whole(store, word="star")


OTHER_PROCESS = """
import json, sys
import numpy as np
from memdb.captions import CaptionIndex
from memdb.store import Store
with Store.open(sys.argv[1]) as store:
    index = CaptionIndex(store.path)
    vector = np.array(json.loads(sys.argv[2]), np.float32)
    queries = ({"vector": vector}, {"text": sys.argv[3]}, {"text": sys.argv[3], "vector": vector})
    found = [index.search(store, "fake", **query, limit=3) for query in queries]
    print(json.dumps([[[hits[0].unit, hits[0].how, hits.tail_units, hits.warnings] for hits in found]]))
"""


@pytest.mark.parametrize("indexed", [0, 40])
def test_with_the_indexer_stopped_another_process_finds_the_last_unit(tmp_path, indexed):
    """By vector, by words and by both, while the writer has the store open."""
    real = store_cases.new_store(tmp_path)
    with real.writer(store_cases.spec()) as writer:
        for number in range(45):
            writer.append([store_cases.unit(number, codec="none")])
            if number + 1 == indexed:
                CaptionIndex(real.path).index_captions(real, "fake", flush=True)
        said = store_cases.unit(44, codec="none").caption
        assert said is not None
        vector = json.dumps(said.vector.tolist())
        before = digest(real.path / "captions.lance")
        arguments = [sys.executable, "-c", OTHER_PROCESS, str(real.path), vector, "44"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
        assert digest(real.path / "captions.lance") == before
    real.close()
    (found,) = json.loads(done.stdout)
    assert found == [[44, how, 45 - indexed, []] for how in ("vector", "text", "both")]


def test_links_in_the_place_of_a_table_lead_nowhere(store, tmp_path):
    """Nothing outside captions.lance is read for a table, and nothing outside is removed with one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    indexed_to(store, 60)
    captions = store.path / "captions.lance"
    (captions / f"{live(store.path).manifest.folder.split('-')[0]}-old.lance").symlink_to(outside)
    is_whole(store)
    folder = captions / live(store.path).manifest.folder
    shutil.rmtree(folder / "data")
    (folder / "data").symlink_to(outside)
    found = CaptionIndex(store.path).search(store, ENCODER, vector=VECTOR, limit=100)
    assert places(found) == by_cosine(store, VECTOR, captioned(store))
    assert CaptionIndex(store.path).index_captions(store, ENCODER) == len(captioned(store))
    is_whole(store)
    assert (outside / "precious").read_text() == "mine"
    assert len(table_files(store.path)) > 5
    assert OTHER in {name for name, _ in rows_in_table(store.path)}
