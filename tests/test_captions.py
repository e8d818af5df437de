"""A caption search finds the same, however much of it the table answers and whatever became of the table."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import store_cases
from caption_cases import VECTOR, E, by_cosine, captioned, digest, filled, indexed_to, live, places
from fake_store import ENCODER, OTHER, RECORDING, SECOND_NS, FakeStore

from memdb import caption_indexer, caption_table
from memdb.bm25 import words_of
from memdb.captions import CaptionIndex
from memdb.locks import FileLock
from memdb.schemas.errors import ModelMismatch, UsageError
from memdb.store import Store


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path)


LAGS = [0, 1, 20, 33, 60]


@pytest.mark.parametrize("lag_commit", LAGS)
@pytest.mark.parametrize("limit", [1, 7, 100])
def test_vectors_come_in_the_order_of_their_cosines_at_any_lag(store, lag_commit, limit):
    index = indexed_to(store, lag_commit)
    hits = index.search(store, ENCODER, vector=VECTOR, limit=limit)
    assert places(hits) == by_cosine(store, VECTOR, captioned(store))[:limit]
    assert {hit.how for hit in hits} == {"vector"}
    assert hits.tail_units == sum(row.commit_id > hits.indexed_commit for row in captioned(store))
    assert hits.warnings == ()


def test_captions_said_twice_score_the_same_whoever_found_them(store):
    said = store.captions[RECORDING, 0]
    index = indexed_to(store, 30)
    hits = index.search(store, ENCODER, vector=said.vector, limit=6)
    copies = [
        row for row in captioned(store) if store.captions[row.recording_id, row.number].text == said.text
    ]
    copies = [
        row
        for row in copies
        if np.array_equal(store.captions[row.recording_id, row.number].vector, said.vector)
    ]
    assert len({hit.score for hit in hits[: len(copies)] if hit.score > 1 - 1e-9}) == 1
    assert places(hits)[: len(copies)] == [(row.recording_id, row.number) for row in copies]


@pytest.mark.parametrize("lag_commit", LAGS)
@pytest.mark.parametrize("text", ["red star", "STARS!", "blue", "slowly", "passes", "purple"])
def test_words_find_what_holds_one_of_them_at_any_lag(store, lag_commit, text):
    index = indexed_to(store, lag_commit)
    hits = index.search(store, ENCODER, text=text, limit=100)
    wanted = set(words_of(text))

    def holds(row) -> bool:
        return bool(wanted & set(words_of(store.captions[row.recording_id, row.number].text)))

    assert set(places(hits)) == {(row.recording_id, row.number) for row in captioned(store, holds)}
    assert len(set(places(hits))) == len(hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert {hit.how for hit in hits} <= {"text"}


@pytest.mark.parametrize("lag_commit", LAGS)
def test_both_find_the_same_at_any_lag_and_say_how(store, lag_commit):
    index = indexed_to(store, lag_commit)
    hits = index.search(store, ENCODER, text="red star", vector=VECTOR, limit=100)
    assert set(places(hits)) == {(row.recording_id, row.number) for row in captioned(store)}
    for hit in hits:
        words = set(words_of(store.captions[hit.recording_id, hit.unit].text))
        assert hit.how == ("both" if words & {"red", "star"} else "vector")


def test_a_caption_first_in_both_lists_comes_first(store):
    store.add(text="a purple hexagon", vector=VECTOR)
    for commit in (0, 30, 61):
        index = indexed_to(store, commit)
        first = index.search(store, ENCODER, text="the purple hexagon", vector=VECTOR, limit=3)[0]
        assert (first.unit, first.how) == (store.rows[-1].number, "both")
        assert first.score == pytest.approx(2 / 61)
        shutil.rmtree(store.path / "captions.lance", ignore_errors=True)


@pytest.mark.parametrize("lag_commit", [0, 25, 60])
@pytest.mark.parametrize(
    ("start_s", "end_s"),
    [
        (None, None),
        (10, 20),
        (10, 10.5),
        (11, 11),
        (None, 4),
        (30, None),
        (500, None),
        (20, 10),
        (None, 1e10),
        (1e10, None),
        (1e10, 2e10),
    ],
)
def test_only_captions_that_overlap_the_span(store, lag_commit, start_s, end_s):
    start_ns = None if start_s is None else int(start_s * SECOND_NS)
    end_ns = None if end_s is None else int(end_s * SECOND_NS)
    inside = captioned(
        store, lambda r: (end_ns is None or r.start_ns < end_ns) and (start_ns is None or r.end_ns > start_ns)
    )
    index = indexed_to(store, lag_commit)
    for limit in (2, 100):
        hits = index.search(store, ENCODER, vector=VECTOR, start_ns=start_ns, end_ns=end_ns, limit=limit)
        assert places(hits) == by_cosine(store, VECTOR, inside)[:limit]
    hits = index.search(store, ENCODER, text="passes", start_ns=start_ns, end_ns=end_ns, limit=100)
    assert set(places(hits)) == {(row.recording_id, row.number) for row in inside}


@pytest.mark.parametrize("lag_commit", [0, 25, 60])
def test_recordings_and_a_commit_bound_the_search(store, lag_commit):
    index = indexed_to(store, lag_commit)
    mine = captioned(store, lambda row: row.recording_id == OTHER)
    hits = index.search(store, ENCODER, vector=VECTOR, recordings=[OTHER], limit=100)
    assert places(hits) == by_cosine(store, VECTOR, mine)
    early = captioned(store, lambda row: row.commit_id < 20)
    for query in ({"vector": VECTOR}, {"text": "passes"}):
        hits = index.search(store, ENCODER, **query, before_commit=20, limit=100)
        assert set(places(hits)) == {(row.recording_id, row.number) for row in early}
    assert len(index.search(store, ENCODER, vector=VECTOR, recordings=[])) == 0
    assert len(index.search(store, ENCODER, vector=VECTOR, recordings=["'; DROP TABLE x"])) == 0


ODD = [
    '"', "'", '"red', "red:star", "red AND", "NOT", "OR OR", "(red", "red)", "red*", "^red", "-red", "--",
    "+red -star", "red~2", "[a TO b]", "\\", "red\\", "/red/", "red\x00star", "%_", "; DROP TABLE captions",
    "red " * 500, "赤い星", "é",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_odd_questions_are_plain_words(store, text):
    index = indexed_to(store, 40)
    hits = index.search(store, ENCODER, text=text, limit=100)
    wanted = set(words_of(text))
    expected = captioned(
        store, lambda row: wanted & set(words_of(store.captions[row.recording_id, row.number].text))
    )
    assert set(places(hits)) == {(row.recording_id, row.number) for row in expected}
    assert hits.warnings == ()


@pytest.mark.parametrize("text", ["", "   ", "?!", None])
def test_without_a_word_only_the_vector_counts(store, text):
    index = indexed_to(store, 40)
    assert len(index.search(store, ENCODER, text=text)) == 0
    with_vector = index.search(store, ENCODER, text=text, vector=VECTOR, limit=5)
    assert with_vector.hits == index.search(store, ENCODER, vector=VECTOR, limit=5).hits


def test_odd_captions_are_found_or_harmless(tmp_path):
    (tmp_path / "locks").mkdir()
    store = FakeStore(tmp_path)
    for text in ['"; --', "", "x" * 500, "赤い星", "null\x00byte", "café"]:
        store.add(text=text, vector=np.zeros(E) if text == "" else np.ones(E))
    store.add(text="not a number", vector=np.full(E, np.nan))
    for commit in (0, 3, 7):
        index = indexed_to(store, commit)
        assert places(index.search(store, ENCODER, text="CAFE")) == [(RECORDING, 5)]
        assert places(index.search(store, ENCODER, text="星")) == [(RECORDING, 3)]
        assert places(index.search(store, ENCODER, text="x" * 300)) == [(RECORDING, 2)]
        assert places(index.search(store, ENCODER, text="number")) == [(RECORDING, 6)]
        for limit in (3, 100):  # vectors without direction are found by words only, and crowd nobody out
            hits = index.search(store, ENCODER, vector=VECTOR, limit=limit)
            assert places(hits) == [(RECORDING, number) for number in (0, 2, 3, 4, 5)][:limit]
        shutil.rmtree(tmp_path / "captions.lance", ignore_errors=True)


def test_a_batch_waits_for_its_rows_and_a_flush_does_not(tmp_path):
    store = filled(tmp_path, 20)
    index = CaptionIndex(tmp_path)
    assert index.index_captions(store, ENCODER) == 0
    assert not (tmp_path / "captions.lance").exists()
    assert index.index_captions(store, ENCODER, flush=True) == len(captioned(store))
    assert index.index_captions(store, ENCODER, flush=True) == 0
    assert index.search(store, ENCODER, vector=VECTOR).indexed_commit == store.last_commit()


def test_only_one_indexes_and_the_other_does_not_wait(store):
    with FileLock(store.path / "locks" / "derived.lock", held_message=""):
        assert CaptionIndex(store.path).index_captions(store, ENCODER, flush=True) == 0
    assert CaptionIndex(store.path).index_captions(store, ENCODER, flush=True) > 0


def test_many_appends_are_merged_and_indexes_kept_up(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_indexer, "_FRAGMENTS_MAX", 5)
    monkeypatch.setattr(caption_table, "_TIME_INDEX_ROWS", 20)
    whole = filled(tmp_path, 60)
    index = CaptionIndex(tmp_path)
    rows, whole.rows = whole.rows, []
    for row in rows:
        whole.rows.append(row)
        if row.has_caption and row.commit_id % 4 == 0:
            index.index_captions(whole, ENCODER, flush=True)
    manifest, table = live(tmp_path).manifest, live(tmp_path).table._table
    assert manifest.fragments == table.stats()["fragment_stats"]["num_fragments"] < 5
    assert {column for kept in table.list_indices() for column in kept.columns} == {"words", "start_ns"}
    assert len(list((tmp_path / "captions.lance").iterdir())) == 2  # the manifest, and one folder
    hits = index.search(whole, ENCODER, vector=VECTOR, limit=100, start_ns=10 * SECOND_NS)
    assert places(hits) == by_cosine(whole, VECTOR, captioned(whole, lambda r: r.end_ns > 10 * SECOND_NS))
    text = index.search(whole, ENCODER, text="star", limit=100)
    expected = captioned(whole, lambda r: "star" in whole.captions[r.recording_id, r.number].text)
    assert set(places(text)) == {(row.recording_id, row.number) for row in expected}


def test_a_search_changes_no_byte(store):
    reader = CaptionIndex(store.path)
    before = digest(store.path)
    reader.search(store, ENCODER, text="red star", vector=VECTOR)
    assert digest(store.path) == before  # no table, and none was made
    indexed_to(store, 40)
    before = digest(store.path)
    for query in ({"vector": VECTOR}, {"text": "red star"}, {"text": "red", "vector": VECTOR}):
        assert len(reader.search(store, ENCODER, **query, start_ns=0)) == 10
    assert digest(store.path) == before


def test_without_lancedb_the_search_is_exact_and_says_so(store, monkeypatch):
    expected = indexed_to(store, 60).search(store, ENCODER, text="red", vector=VECTOR, limit=100)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    hits = CaptionIndex(store.path).search(store, ENCODER, text="red", vector=VECTOR, limit=100)
    assert set(places(hits)) == set(places(expected))
    assert "pip install lancedb" in hits.warnings[0]


def test_a_caption_damaged_in_its_segment_is_left_out(store):
    broken = captioned(store)[4]
    store.damaged.add((broken.recording_id, broken.number))
    index = indexed_to(store, 60)
    hits = index.search(store, ENCODER, vector=VECTOR, limit=100)
    assert places(hits) == by_cosine(store, VECTOR, captioned(store, lambda row: row is not broken))


def test_encoders_have_tables_of_their_own(store):
    store.encoders[OTHER] = "another-encoder"
    index = indexed_to(store, 60)
    index.index_captions(store, "another-encoder", flush=True)
    hits = index.search(store, "another-encoder", vector=VECTOR, limit=100)
    assert {hit.recording_id for hit in hits} == {OTHER}
    assert {hit.recording_id for hit in index.search(store, ENCODER, text="passes", limit=100)} == {RECORDING}
    assert len(index.search(store, "no such encoder", vector=VECTOR)) == 0


def test_calls_that_make_no_sense_are_refused(store):
    index = indexed_to(store, 60)
    with pytest.raises(UsageError, match="at least 1"):
        index.search(store, ENCODER, text="red", limit=0)
    with pytest.raises(UsageError, match="finite"):
        index.search(store, ENCODER, vector=[float("nan")] * E)
    assert len(index.search(store, ENCODER, vector=np.zeros(E))) == 0  # it says nothing
    assert {hit.how for hit in index.search(store, ENCODER, vector=np.zeros(E), text="red")} == {"text"}
    with pytest.raises(ModelMismatch, match="3 values"):
        index.search(store, ENCODER, vector=[1.0, 2.0, 3.0])


def test_the_tail_is_read_once(store):
    index = indexed_to(store, 20)
    index.search(store, ENCODER, vector=VECTOR, text="red")
    reads = store.caption_reads
    index.search(store, ENCODER, vector=VECTOR, text="red")
    assert store.caption_reads == reads


def test_a_real_store_is_searched_while_it_grows_and_stays_as_it_was(tmp_path):
    real, names = store_cases.new_store(tmp_path), ["lobby", "yard"]
    writers = [real.writer(store_cases.spec(name)) for name in names]
    with Store.open(real.path) as reader:
        index, searching = CaptionIndex(real.path), CaptionIndex(real.path)
        for number in range(30):
            for writer in writers:
                writer.append([store_cases.unit(number, caption=number % 4 != 1)])
            if number % 10 == 8:
                index.index_captions(real, "fake", flush=number > 20)
            before = store_cases.directory_digest(real.path)
            hits = searching.search(reader, "fake", vector=VECTOR, text=f"unit {number} stars", limit=100)
            assert store_cases.directory_digest(real.path) == before
            expected = {
                (writer.recording.id, n) for writer in writers for n in range(number + 1) if n % 4 != 1
            }
            assert set(places(hits)) == expected
        text = searching.search(reader, "fake", text="7", limit=10)
        assert {(hit.unit, hit.start_ns) for hit in text} == {(7, 7 * store_cases.UNIT_NS)}
        assert len(text) == 2
    for writer in writers:
        writer.close()
    real.close()


def test_threads_share_an_index(store):
    index = indexed_to(store, 30)
    expected = index.search(store, ENCODER, vector=VECTOR, text="red star", limit=20).hits
    fresh = CaptionIndex(store.path)

    def search(_: int):
        return fresh.search(store, ENCODER, vector=VECTOR, text="red star", limit=20).hits

    with ThreadPoolExecutor(4) as pool:
        assert all(hits == expected for hits in pool.map(search, range(12)))
