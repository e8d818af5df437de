"""Nothing is believed of a caption table that its manifest does not vouch for, byte by byte."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
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
from xxhash import xxh3_64_hexdigest

from memdb import caption_indexer
from memdb.caption_check import check_captions
from memdb.caption_table import CaptionTable, manifest_file
from memdb.captions import CaptionIndex
from memdb.schemas.errors import CorruptionError
from memdb.table_files import HINT, CheckedFiles
from memdb.table_manifest import ListedFile, TableManifest
from memdb.verify import Problem

QUERIES = (
    {"vector": VECTOR, "limit": 7},
    {"text": "red star", "limit": 9},
    {"text": "blue", "vector": VECTOR, "limit": 12, "start_ns": 20_000_000_000},
)


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    """A table of a merged fragment with its index, and two that came after."""
    store = filled(tmp_path)
    for commit in (20, 34, 47):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caption_indexer, "_FRAGMENTS_MAX", 2 if commit == 34 else 50)
            indexed_to(store, commit)
    assert live(tmp_path).manifest.fragments == 2
    return store


def answers(store: FakeStore, index: CaptionIndex) -> list[object]:
    return [(found.hits, found.warnings) for found in (index.search(store, ENCODER, **q) for q in QUERIES)]


def scanned(store: FakeStore) -> list[object]:
    """The same without any table."""
    bare = CaptionIndex(store.path / "nothing here")
    return [bare.search(store, ENCODER, **query).hits for query in QUERIES]


MANIFEST = TableManifest(
    ENCODER,
    f"captions_{'0' * 16}-{'1' * 16}.lance",
    7,
    384,
    64,
    99,
    {RECORDING: 70, OTHER: 3},
    ((OTHER, 2),),
    (ListedFile("data/1011.lance", 159_341, "00ff" * 4), ListedFile("_versions/1.manifest", 9, "ab01" * 4)),
)


def test_a_manifest_comes_back_as_it_was_and_no_byte_of_it_may_differ():
    packed = MANIFEST.pack()
    assert TableManifest.parse(packed, file="x") == MANIFEST
    assert json.loads(packed.splitlines()[0])["rows"] == 64
    for byte in range(len(packed)):
        for bit in range(8):
            flipped = bytearray(packed)
            flipped[byte] ^= 1 << bit
            with pytest.raises(CorruptionError, match="x is damaged"):
                TableManifest.parse(bytes(flipped), file="x")
    for cut in (0, 5, 17, len(packed) - 1):
        with pytest.raises(CorruptionError, match="x is damaged"):
            TableManifest.parse(packed[:cut], file="x")


@pytest.mark.parametrize(
    "change",
    [
        {"folder": "../../elsewhere.lance"},
        {"folder": f"captions_{'0' * 16}.lance"},
        {"files": [["../../catalog.sqlite", 1, "0" * 16]]},
        {"files": [["/etc/passwd", 1, "0" * 16]]},
        {"files": [["data//x", 1, "0" * 16]]},
        {"files": [["data/x", -1, "0" * 16]]},
        {"files": [["data/x", 1, "0"]]},
        {"files": [["data/x", 1]]},
        {"units": {"short": 1}},
        {"units": {RECORDING: 1.5}},
        {"unread": [[RECORDING]]},
        {"rows": True},
        {"rows": None},
        {"format": 2},
        {"encoder": 7},
    ],
)
def test_a_manifest_that_says_what_none_can_is_refused(change):
    plain = json.loads(MANIFEST.pack().splitlines()[0]) | change
    text = json.dumps(plain).encode() + b"\n"
    with pytest.raises(CorruptionError, match="not of this version"):
        TableManifest.parse(text + xxh3_64_hexdigest(text).encode() + b"\n", file="x")


def test_every_flip_is_noticed_by_searches_and_by_verify(store):
    """In each file of the table and in its manifest: answers as without a table, a warning, the file's name."""
    random = np.random.default_rng(5)
    whole, expected = answers(store, CaptionIndex(store.path)), scanned(store)
    assert [warnings for _, warnings in whole] == [()] * len(QUERIES)
    assert check_captions(store.path) == []
    opened = CaptionIndex(store.path)
    answers(store, opened)
    files = [file for file in table_files(store.path) if not file.as_posix().endswith(HINT)]
    assert len(files) >= 12
    assert {file.parent.parent.name for file in files if file.suffix == ".lance"} > {"_indices"}
    for file in files:
        before = file.read_bytes()
        places_ = {0, len(before) - 1, *random.integers(0, len(before), 2).tolist()}
        for at in sorted(places_)[:3]:
            flipped = bytearray(before)
            flipped[at] ^= 1 << int(random.integers(8))
            file.write_bytes(bytes(flipped))
            for index in (CaptionIndex(store.path), opened):
                found = answers(store, index)
                assert [hits for hits, _ in found] == expected
                assert all("one by one" in warnings[0] for _, warnings in found), (file, at)
            problems = [problem for problem in check_captions(store.path) if isinstance(problem, Problem)]
            assert [store.path / problem.file for problem in problems] == [file]
            assert "derived: answers read the segments instead" in problems[0].what
        file.write_bytes(before)
    assert answers(store, opened) == whole


def test_flips_in_lances_hint_have_no_effect(store):
    hint = store.path / "captions.lance" / live(store.path).manifest.folder / HINT
    whole = answers(store, CaptionIndex(store.path))
    before = hint.read_bytes()
    for at in range(len(before)):
        hint.write_bytes(before[:at] + bytes([before[at] ^ 2]) + before[at + 1 :])
        assert answers(store, CaptionIndex(store.path)) == whole
        assert check_captions(store.path) == []
    hint.write_bytes(b'{"version":1}')
    assert CaptionIndex(store.path).index_captions(store, ENCODER, flush=True) > 0
    assert rows_in_table(store.path) == all_places(captioned(store))


def test_files_that_go_grow_or_become_something_else_are_noticed(store):
    folder = store.path / "captions.lance" / live(store.path).manifest.folder
    expected = scanned(store)
    for number, listed in enumerate(live(store.path).manifest.files):
        file = folder / listed.name
        before = file.read_bytes()
        if number % 3 == 0:
            file.unlink()
        elif number % 3 == 1:
            file.write_bytes(before + b"\0")
        else:
            file.rename(folder / "aside")
            file.symlink_to(folder / "aside")
        assert [hits for hits, _ in answers(store, CaptionIndex(store.path))] == expected
        named = [found.file for found in check_captions(store.path) if isinstance(found, Problem)]
        assert named == [f"captions.lance/{folder.name}/{listed.name}"]
        file.unlink(missing_ok=True)
        (folder / "aside").unlink(missing_ok=True)
        file.write_bytes(before)
    assert check_captions(store.path) == []


def test_a_damaged_table_is_made_anew_by_the_next_indexer(store):
    for file in [*table_files(store.path)][::3]:
        if not file.is_file() or file.as_posix().endswith(HINT):
            continue
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(bytes(data))
        assert CaptionIndex(store.path).index_captions(store, ENCODER) == len(captioned(store))
        assert check_captions(store.path) == []
        assert rows_in_table(store.path) == all_places(captioned(store))
        assert len(list((store.path / "captions.lance").iterdir())) == 2


def test_an_indexer_at_work_notices_damage_before_it_adds(store):
    index = indexed_to(store, 50)
    file = sorted((store.path / "captions.lance").glob("*.lance/data/*"))[0]
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    assert index.index_captions(store, ENCODER, flush=True) == len(captioned(store))
    assert check_captions(store.path) == []


def test_what_no_manifest_lists_is_not_used_and_goes_with_the_next_indexer(store):
    manifest = live(store.path).manifest
    folder = store.path / "captions.lance" / manifest.folder
    CaptionTable.open(store.path, manifest.folder).add(
        [caption_indexer.CaptionEntry(RECORDING, 4, 0, 1, "red star " * 9, VECTOR)]
    )
    (folder / "data" / "notes.txt").write_text("mine")
    whole = answers(store, CaptionIndex(store.path))
    assert [warnings for _, warnings in whole] == [()] * len(QUERIES)
    assert rows_in_table(store.path).count((RECORDING, 4)) == 1
    notes = check_captions(store.path)
    assert len(notes) == 1
    assert isinstance(notes[0], str)
    assert "4 files are used by nobody" in notes[0]
    CaptionIndex(store.path).index_captions(store, ENCODER, flush=True)
    assert check_captions(store.path) == []
    assert rows_in_table(store.path) == all_places(captioned(store))
    assert not (folder / "data" / "notes.txt").exists()


def test_tables_of_an_older_memdb_are_made_anew(store):
    captions = store.path / "captions.lance"
    table = captions / live(store.path).manifest.folder
    old = captions / manifest_file(ENCODER).removeprefix("captions.lance/").replace(".manifest", ".lance")
    table.rename(old)
    (store.path / manifest_file(ENCODER)).unlink()
    expected = scanned(store)
    found = answers(store, CaptionIndex(store.path))
    assert [hits for hits, _ in found] == expected
    assert check_captions(store.path) == [
        f"captions.lance/{old.name} is used by nobody: the next ingest that indexes captions removes it"
    ]
    assert CaptionIndex(store.path).index_captions(store, ENCODER) == len(captioned(store))
    assert not old.exists()
    assert rows_in_table(store.path) == all_places(captioned(store))


def test_a_manifest_under_another_encoders_name_is_refused(store):
    shutil.copy(store.path / manifest_file(ENCODER), store.path / manifest_file("another"))
    store.encoders = dict.fromkeys(store.encoders, "another")
    found = CaptionIndex(store.path).search(store, "another", vector=VECTOR, limit=5)
    assert places(found) == by_cosine(store, VECTOR, captioned(store))[:5]
    assert "another encoder" in found.warnings[0]


def test_a_manifest_without_bound_is_not_read(store):
    path = store.path / manifest_file(ENCODER)
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse: nobody reads it
    assert [hits for hits, _ in answers(store, CaptionIndex(store.path))] == scanned(store)
    problem, note = check_captions(store.path)
    assert isinstance(problem, Problem)
    assert problem.file == manifest_file(ENCODER)
    assert "used by nobody" in str(note)
    assert CaptionIndex(store.path).index_captions(store, ENCODER) == len(captioned(store))


def test_each_file_is_hashed_once(store, monkeypatch):
    hashed: list[str] = []
    real = CheckedFiles._hashed

    def counting(self: CheckedFiles, path: str, name: str) -> object:
        hashed.append(name)
        return real(self, path, name)

    old = time.time_ns() - 10**9
    for file in table_files(store.path):
        os.utime(file, ns=(old, old))
    monkeypatch.setattr(CheckedFiles, "_hashed", counting)
    listed = {file.name for file in live(store.path).manifest.files}
    assert sorted(hashed) == sorted(listed)
    hashed.clear()
    reader, index = CaptionIndex(store.path), CaptionIndex(store.path)
    answers(store, reader)
    assert sorted(hashed) == sorted(listed)
    hashed.clear()
    answers(store, reader)
    assert hashed == []
    index.index_captions(store, ENCODER)  # it looks through what it finds, once
    hashed.clear()
    index.index_captions(store, ENCODER, flush=True)
    assert set(hashed) == {file.name for file in live(store.path).manifest.files} - listed
    touched = store.path / "captions.lance" / live(store.path).manifest.folder / sorted(listed)[0]
    answers(store, reader)
    for file in table_files(store.path):
        os.utime(file, ns=(old, old))
    answers(store, reader)
    hashed.clear()
    os.utime(touched)
    answers(store, reader)
    assert set(hashed) == {sorted(listed)[0]}


def test_a_change_within_a_tick_of_the_clock_is_noticed(store):
    """Size, time and inode are the same: what was changed so shortly ago is read again."""
    manifest = live(store.path).manifest
    files = CheckedFiles(store.path, manifest.folder)
    path = files.path / manifest.files[0].name
    later = time.time_ns() + 10**10
    os.utime(path, ns=(later, later))
    files.check(manifest)
    with path.open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(later, later))
    with pytest.raises(CorruptionError, match="its bytes differ"):
        files.check(manifest)


def test_many_small_batches_keep_lists_and_folders_short(tmp_path, monkeypatch):
    (tmp_path / "locks").mkdir()
    store, index = FakeStore(tmp_path), CaptionIndex(tmp_path)
    monkeypatch.setattr(caption_indexer, "BATCH_ROWS", 2)
    random = np.random.default_rng(2)
    listed, lying = [], []
    for number in range(260):
        store.add(text=f"word{number} star", vector=random.standard_normal(E))
        if index.index_captions(store, ENCODER):
            listed.append(len(index._indexer._known[ENCODER].manifest.files))
            lying.append(len(table_files(tmp_path)))
    assert len(listed) == 130
    assert max(listed) <= 3 * 50 + 16
    assert max(lying) <= max(listed) + 2  # the manifest and the hint
    assert rows_in_table(tmp_path) == all_places(captioned(store))
    hits = CaptionIndex(tmp_path).search(store, ENCODER, text="word77 word200", limit=2)
    assert {hit.unit for hit in hits} == {77, 200}


def test_captions_that_cannot_be_read_are_looked_at_again(store):
    """A bad read while the table was made hides nothing once the segment can be read."""
    row = captioned(store)[-3]
    store.damaged.add((row.recording_id, row.number))
    indexed_to(store, 60)
    assert live(store.path).manifest.unread == ((row.recording_id, row.number),)
    assert rows_in_table(store.path) == all_places(captioned(store, lambda found: found is not row))
    store.damaged.clear()
    hits = CaptionIndex(store.path).search(store, ENCODER, vector=VECTOR, limit=100)
    assert (places(hits), hits.tail_units) == (by_cosine(store, VECTOR, captioned(store)), 1)
    said = store.captions[row.recording_id, row.number].text
    found = CaptionIndex(store.path).search(store, ENCODER, text=said, limit=100)
    assert (row.recording_id, row.number) in places(found)


def test_commit_numbers_counted_anew_hide_nothing(store):
    """A catalog that is rebuilt may number the commits of two recordings in another order."""
    table = CaptionIndex(store.path)
    store.rows.sort(key=lambda row: (row.recording_id, row.number))
    for commit, row in enumerate(store.rows, 1):
        object.__setattr__(row, "commit_id", commit)
    assert store.add(text="a red star", vector=VECTOR).commit_id == len(store.rows)
    found = table.search(store, ENCODER, vector=VECTOR, limit=100)
    assert places(found) == by_cosine(store, VECTOR, captioned(store))
    assert found.warnings == ()


def test_a_check_changes_no_byte(store):
    before = digest(store.path)
    assert check_captions(store.path) == []
    assert digest(store.path) == before
