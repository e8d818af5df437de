"""What was forgotten takes nobody's place in a search, and after a purge no byte of it is in captions.lance."""

from __future__ import annotations

import errno
from pathlib import Path

import lancedb
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memdb import caption_indexer, caption_search
from memdb.bm25 import words_of
from memdb.caption_check import check_captions
from memdb.caption_table import CaptionTable, manifest_file
from memdb.captions import CaptionIndex
from memdb.compact import compact
from memdb.files import Step, watched
from memdb.forget import forget
from memdb.schemas.units import Caption
from memdb.store import Store
from memdb.table_files import HINT


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return filled(tmp_path)


def crowded(path: Path, *, best: int, left: int) -> FakeStore:
    """`best` captions that match better than the `left` that come after them, all in the table."""
    (path / "locks").mkdir()
    store, random = FakeStore(path), np.random.default_rng(4)
    for number in range(best + left):
        near = number < best
        noise = random.standard_normal(E) * (0.01 if near else 0.5)
        store.add(text="star" if near else "a star passes by the old house", vector=VECTOR + noise)
    CaptionIndex(path).index_captions(store, ENCODER, flush=True)
    return store


@pytest.mark.parametrize("told", [0, 32])
@pytest.mark.parametrize("limit", [1, 10, 30])
def test_a_search_for_ten_finds_ten_whatever_was_forgotten(tmp_path, limit, told, monkeypatch):
    """Of 330 captions the 300 best are gone, though the table, told so or not, still ranks them first."""
    monkeypatch.setattr(caption_search, "_STONES_TOLD_MAX", told)
    store = crowded(tmp_path, best=300, left=30)
    store.forget(RECORDING, 0, 299)
    index = CaptionIndex(tmp_path)
    assert len(rows_in_table(tmp_path)) == 330
    by_vector = index.search(store, ENCODER, vector=VECTOR, limit=limit)
    assert places(by_vector) == by_cosine(store, VECTOR, captioned(store))[:limit]
    assert by_vector.warnings == ()
    for query in ({"text": "stars"}, {"text": "star", "vector": VECTOR}):
        found = index.search(store, ENCODER, **query, limit=limit)
        assert len(found) == limit
        assert {hit.unit for hit in found} <= set(range(300, 330))
    assert len(index.search(store, ENCODER, text="star", limit=1000)) == 30


def test_a_whole_recording_that_is_gone_takes_nobodys_place(tmp_path):
    store = crowded(tmp_path, best=40, left=0)
    for _ in range(12):
        store.add(recording_id=OTHER, text="an old star", vector=-VECTOR + 0.1)
    CaptionIndex(tmp_path).index_captions(store, ENCODER, flush=True)
    index = CaptionIndex(tmp_path)
    index.search(store, ENCODER, vector=VECTOR, text="star", limit=50)
    store.forget_recording(RECORDING)
    for query in ({"vector": VECTOR}, {"text": "star"}, {"text": "star", "vector": VECTOR}):
        found = index.search(store, ENCODER, **query, limit=10)
        assert len(found) == 10
        assert {hit.recording_id for hit in found} == {OTHER}
    assert {place[0] for place in index._kept._kept} == {OTHER}


def test_damaged_captions_take_nobodys_place(tmp_path):
    store = crowded(tmp_path, best=40, left=12)
    store.damaged = {(RECORDING, number) for number in range(40)}
    found = CaptionIndex(tmp_path).search(store, ENCODER, vector=VECTOR, limit=10)
    whole = captioned(store, lambda row: row.number >= 40)
    assert places(found) == by_cosine(store, VECTOR, whole)[:10]


spans = st.tuples(st.sampled_from([RECORDING, OTHER]), st.integers(0, 39), st.integers(1, 12))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    forgotten=st.lists(spans, max_size=6),
    told=st.integers(0, 4),
    lag=st.integers(0, 60),
    late=st.booleans(),
    limit=st.integers(1, 12),
    text=st.sampled_from(["red star", "slowly", "a green square", "circle"]),
)
def test_a_search_finds_what_a_scan_finds_under_any_forgetting(
    tmp_path_factory, forgotten, told, lag, late, limit, text
):
    """With and without a table, which was made before or after the forgetting, and is told of some of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_search, "_STONES_TOLD_MAX", told)
        compare_with_scan(tmp_path_factory.mktemp("store"), forgotten, lag, late, limit, text)


def compare_with_scan(
    path: Path, forgotten: list[tuple[str, int, int]], lag: int, late: bool, limit: int, text: str
) -> None:
    store = filled(path)
    index = CaptionIndex(store.path) if late else indexed_to(store, lag)
    index.search(store, ENCODER, text=text, vector=VECTOR, limit=limit)  # the cache is to be warm
    for name, first, count in forgotten:
        last = min(first + count, len(store.rows_of(name))) - 1
        if first <= last:
            store.forget(name, first, last)
    if late:
        indexed_to(store, lag)
    bare = CaptionIndex(store.path / "no table here")
    found = index.search(store, ENCODER, vector=VECTOR, limit=limit)
    assert places(found) == by_cosine(store, VECTOR, captioned(store))[:limit]
    assert found.hits == bare.search(store, ENCODER, vector=VECTOR, limit=limit).hits
    wanted = set(words_of(text))
    holding = captioned(
        store, lambda row: wanted & set(words_of(store.captions[row.recording_id, row.number].text))
    )
    found = index.search(store, ENCODER, text=text, limit=limit)
    assert len(found) == min(limit, len(holding))
    assert set(places(found)) <= {(row.recording_id, row.number) for row in holding}
    everything = index.search(store, ENCODER, text=text, limit=100)
    assert set(places(everything)) == {(row.recording_id, row.number) for row in holding}
    both = index.search(store, ENCODER, text=text, vector=VECTOR, limit=100)
    assert set(places(both)) == {(row.recording_id, row.number) for row in captioned(store)}
    assert set(index._kept._kept) <= {(row.recording_id, row.number) for row in captioned(store)}


def test_what_was_kept_of_forgotten_captions_goes_with_the_next_search(store):
    index = indexed_to(store, 20)
    index.search(store, ENCODER, vector=VECTOR, text="red", limit=100)
    assert set(index._kept._kept) == set(all_places(captioned(store)))
    store.forget(RECORDING, 3, 30)
    index.search(store, ENCODER, text="words that nobody said", limit=1)
    assert set(index._kept._kept) == set(all_places(captioned(store)))


# Purging

SECRET = "the bearded neighbour unlocks vault zq9x7"


def with_secrets(path: Path) -> tuple[FakeStore, list[Caption]]:
    """A table with secrets in its merged part, in what was added since, and in old versions."""
    store, random = filled(path, 60), np.random.default_rng(9)
    secrets = []
    for number in range(3):
        row = store.add(text=f"{SECRET} {number}k{number}v", vector=random.standard_normal(E))
        secrets.append(store.captions[RECORDING, row.number])
        for _ in range(4):
            store.add(text="a red star passes", vector=random.standard_normal(E))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caption_indexer, "_FRAGMENTS_MAX", 2 if number == 1 else 50)
            CaptionIndex(path).index_captions(store, ENCODER, flush=True)
    assert live(path).manifest.fragments == 2
    return store, secrets


def traces(path: Path, secrets: list[Caption]) -> set[str]:
    """Every piece of a secret that is found in any file of captions.lance, with the file."""
    found = set()
    for file in table_files(path):
        data = file.read_bytes()
        for said in secrets:
            pieces = [said.vector.tobytes(), np.asarray(said.vector, np.float16).tobytes()]
            for text in (said.text, " ".join(words_of(said.text))):
                pieces += [word.encode() for word in text.split() if word in words_of(SECRET) or "k" in word]
            own = [piece for piece in pieces if piece not in (b"the",) and piece in data]
            found |= {f"{file.name}: {piece!r}" for piece in own}
    return found


def forget_secrets(store: FakeStore, secrets: list[Caption]) -> None:
    for (name, number), said in list(store.captions.items()):
        if said in secrets:
            store.forget(name, number, number)


def test_after_a_purge_no_byte_of_what_was_forgotten_is_there(tmp_path):
    store, secrets = with_secrets(tmp_path)
    index = CaptionIndex(tmp_path)
    before = traces(tmp_path, secrets)
    # The search for traces finds what is there: each vector in a data file, words in data and index.
    for said in secrets:
        assert any(repr(said.vector.tobytes()) in trace for trace in before)
    assert sum("zq9x7" in trace for trace in before) >= 2
    assert live(tmp_path).table.matching(["zq9x7"], 9, "")  # its index of words says so in a form of its own
    contents = {file.read_bytes() for file in table_files(tmp_path) if not file.as_posix().endswith(HINT)}
    assert not index.holds_forgotten(store)
    forget_secrets(store, secrets)
    assert index.holds_forgotten(store)
    old = {path.name for path in (tmp_path / "captions.lance").glob("*.lance")}
    assert traces(tmp_path, secrets) == before
    index.purge(store)
    assert traces(tmp_path, secrets) == set()
    assert live(tmp_path).table.matching(["zq9x7"], 9, "") == []
    # Whatever form a caption may take in a file of LanceDB's: no file is one of those that knew it.
    assert not contents & {file.read_bytes() for file in table_files(tmp_path)}
    assert not old & {path.name for path in (tmp_path / "captions.lance").iterdir()}
    assert not index.holds_forgotten(store)
    assert check_captions(tmp_path) == []
    assert rows_in_table(tmp_path) == all_places(captioned(store))
    found = CaptionIndex(tmp_path).search(store, ENCODER, vector=VECTOR, limit=100)
    assert places(found) == by_cosine(store, VECTOR, captioned(store))
    assert (found.warnings, found.tail_units) == ((), 0)


def test_a_purge_with_nothing_forgotten_changes_no_byte(tmp_path):
    store, _ = with_secrets(tmp_path)
    before = digest(tmp_path)
    CaptionIndex(tmp_path).purge(store)
    assert digest(tmp_path) == before
    nothing = FakeStore(tmp_path / "nowhere")
    assert not CaptionIndex(nothing.path).holds_forgotten(nothing)
    CaptionIndex(nothing.path).purge(nothing)
    assert not nothing.path.exists()


def test_leftovers_of_killed_indexers_are_purged_too(tmp_path):
    """Rows that came through without a manifest, a folder that never became the table, one half removed."""
    store, secrets = with_secrets(tmp_path)
    forget_secrets(store, secrets)
    index = CaptionIndex(tmp_path)
    index.purge(store)
    folder = live(tmp_path).manifest.folder
    entry = caption_indexer.CaptionEntry(RECORDING, 1, 0, 1, secrets[0].text, secrets[0].vector)
    captions = tmp_path / "captions.lance"
    for leave in (
        lambda: CaptionTable.open(tmp_path, live(tmp_path).manifest.folder).add([entry]),
        lambda: CaptionTable.create(tmp_path, caption_indexer.new_folder(ENCODER), [entry]),
        lambda: (captions / folder.split("-")[0]).with_suffix(".lance").mkdir(),
        lambda: (captions / f"{folder.split('-')[0]}.manifest.tmp").write_text(SECRET),
        lambda: (tmp_path / manifest_file("gone")).write_text(SECRET),
    ):
        assert not index.holds_forgotten(store)
        leave()
        assert index.holds_forgotten(store)
        index.purge(store)
        assert traces(tmp_path, secrets) == set()
        assert sorted(path.suffix for path in captions.iterdir()) == [".lance", ".manifest"]
        assert rows_in_table(tmp_path) == all_places(captioned(store))


def test_a_table_whose_recordings_are_all_gone_is_purged_away(store):
    indexed_to(store, 60)
    store.forget_recording(RECORDING)
    index = CaptionIndex(store.path)
    assert index.holds_forgotten(store)
    index.purge(store)
    assert rows_in_table(store.path) == all_places(captioned(store))
    store.forget_recording(OTHER)
    index.purge(store)
    assert list((store.path / "captions.lance").iterdir()) == []


def test_a_damaged_table_is_purged_away(store):
    indexed_to(store, 60)
    with (store.path / manifest_file(ENCODER)).open("r+b") as file:
        file.write(b"x")
    index = CaptionIndex(store.path)
    assert index.holds_forgotten(store)  # nobody can say
    index.purge(store)
    assert list((store.path / "captions.lance").iterdir()) == []
    assert index.index_captions(store, ENCODER) == len(captioned(store))


def test_where_a_table_cannot_be_made_anew_the_old_one_goes_all_the_same(tmp_path, monkeypatch):
    store, secrets = with_secrets(tmp_path)
    forget_secrets(store, secrets)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(lancedb.db.LanceDBConnection, "create_table", full)
        CaptionIndex(tmp_path).purge(store)
    assert list((tmp_path / "captions.lance").iterdir()) == []
    found = CaptionIndex(tmp_path).search(store, ENCODER, vector=VECTOR, limit=9)
    assert places(found) == by_cosine(store, VECTOR, captioned(store))[:9]


class Account:
    """What happens in captions.lance, in order."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def before(self, step: Step) -> None:
        pass

    def after(self, step: Step) -> None:
        self.steps.append(step)


def test_a_power_cut_after_a_compaction_brings_nothing_back(tmp_path):
    """No name of an old file is gone from memory only: the folder is synced after the last is removed."""
    real = store_cases.new_store(tmp_path)
    store_cases.fill(real, 12)
    CaptionIndex(real.path).index_captions(real, "fake", flush=True)
    captions = real.path / "captions.lance"
    old = {path.name for path in captions.iterdir() if path.is_dir()}
    forget(real, "lobby", start_ns=0, end_ns=store_cases.UNIT_NS)
    account = Account()
    with watched(account):
        compact(real)
    steps = [(step.what, step.path) for step in account.steps]
    removed = [at for at, step in enumerate(steps) if step == ("remove_folder", captions / next(iter(old)))]
    synced = [at for at, step in enumerate(steps) if step == ("sync_folder", captions)]
    assert removed
    assert max(removed) < max(synced)
    assert len(rows_in_table(real.path, "fake")) == 11
    real.close()


def test_forgetting_in_a_real_store_reaches_the_table(tmp_path):
    real = store_cases.new_store(tmp_path)
    store_cases.fill(real, 24, batch=6)
    index = CaptionIndex(real.path)
    index.index_captions(real, "fake", flush=True)
    recording = real.recording("lobby")
    gone = [real.read_caption(real.unit(recording.id, number)) for number in range(4, 9)]
    with Store.open(real.path) as reader:
        searching = CaptionIndex(reader.path)
        assert len(searching.search(reader, "fake", text="star", limit=100)) == 24
        forget(real, "lobby", start_ns=4 * store_cases.UNIT_NS, end_ns=9 * store_cases.UNIT_NS)
        for query in ({"text": "star"}, {"vector": gone[0].vector}, {"text": "4", "vector": gone[2].vector}):
            hits = searching.search(reader, "fake", **query, limit=19)
            assert {hit.unit for hit in hits} == {*range(4), *range(9, 24)}
        assert not {unit for _, unit in searching._kept._kept} & set(range(4, 9))
        folder = real.path / "captions.lance"

        def holding() -> list[str]:
            return [
                str(file)
                for file in folder.rglob("*")
                if file.is_file() and any(said.vector.tobytes() in file.read_bytes() for said in gone)
            ]

        assert holding()
        assert index.holds_forgotten(real)
        index.purge(real)
        assert not index.holds_forgotten(real)
        assert holding() == []
        hits = searching.search(reader, "fake", text="star", limit=100)
        assert {hit.unit for hit in hits} == {*range(4), *range(9, 24)}
        assert hits.warnings == ()
    real.close()


def test_no_space_is_told_from_other_trouble_by_its_words():
    from memdb.caption_table import no_space

    assert no_space(OSError(errno.ENOSPC, "x")) == errno.ENOSPC
    assert no_space(RuntimeError("External error: No space left on device (os error 28)")) == errno.ENOSPC
    assert no_space(RuntimeError("Disk quota exceeded")) == errno.EDQUOT
    assert no_space(RuntimeError("(os error 2)")) == 0
    assert no_space(OSError(errno.EIO, "x")) == 0
