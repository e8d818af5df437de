"""Searching captions through the client: by meaning and words, over one recording or all, in a span."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memdb.bm25 import words_of
from memdb.client import Client, connect
from memdb.schemas.errors import BudgetError, UnknownRecording, UsageError
from tests.question_cases import FILM_S, House
from tests.store_cases import flip


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[Client]:
    with house.open() as found:
        yield found


def captions(client: Client, recording: str) -> list[tuple[float, float, str, Any]]:
    row = client.store.recording(recording)
    found = []
    for unit in client.store.units(row.id):
        caption = client.store.read_caption(unit)
        found.append((unit.start_ns / 1e9, unit.end_ns / 1e9, caption.text, np.asarray(caption.vector)))
    return found


def test_no_model_is_loaded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a search loaded a Video-LLM")

    monkeypatch.setattr("memdb.models.load.load_model", refuse)
    with house.open() as client:
        assert {hit.recording for hit in client.search("anything at all")} == {"hall"}
        # Without it the captions of rlivs are found by their words.
        word = words_of(captions(client, "roof")[0][2])[0]
        found = client.search(word, recording="roof")
        assert found
        assert all(hit.how == "text" and word in words_of(hit.caption) for hit in found)


def test_a_caption_finds_itself_first(client: Client) -> None:
    for start_s, end_s, text, _ in captions(client, "hall"):
        best = client.search(text, recording="hall")[0]
        assert (best.start_s, best.end_s, best.caption) == (start_s, end_s, text)
        assert best.how == "both"


def test_meaning_alone_ranks_by_cosine(client: Client) -> None:
    query = "zzzz"  # no caption has the word
    vector = client.loaded.vectors("all-MiniLM-L6-v2").of_question(query)
    rows = captions(client, "hall")
    cosines = [float(v @ vector / np.linalg.norm(v) / np.linalg.norm(vector)) for *_, v in rows]
    hits = client.search(query, recording="hall")
    order = np.argsort(-np.asarray(cosines), kind="stable")
    assert [hit.start_s for hit in hits] == [rows[i][0] for i in order]
    assert all(hit.how == "vector" for hit in hits)


def test_a_limit_takes_the_best(client: Client) -> None:
    whole = client.search("star", recording="hall", limit=50)
    assert len(whole) == 6
    for limit in (1, 3):
        assert client.search("star", recording="hall", limit=limit) == whole[:limit]


@pytest.mark.parametrize(
    "span", [(0, 8), (8, 16), ("00:00:04.5", "00:00:05"), (None, 4), (20, None), (5, 400)]
)
def test_a_span_finds_what_overlaps_it(client: Client, span: tuple[Any, Any]) -> None:
    start, end = span
    low = {"00:00:04.5": 4.5, None: 0.0}.get(start, start)
    high = {"00:00:05": 5.0, None: FILM_S}.get(end, end)
    hits = client.search("star", recording="hall", start_s=start, end_s=end, limit=50)
    expected = {a for a, b, _, _ in captions(client, "hall") if a < high and b > low}
    assert {hit.start_s for hit in hits} == expected != set()


def test_the_wall_clock_is_understood_where_it_is_known(client: Client) -> None:
    hits = client.search("star", recording="hall", start_s="2026-11-20T08:00:20Z")
    assert {hit.start_s for hit in hits} == {20.0}
    with pytest.raises(BudgetError, match="is not known"):
        client.search("star", recording="roof", start_s="2026-11-20T08:00:20Z")


def test_all_recordings_are_fused_by_rank(house: House) -> None:
    """A list an encoder; a caption that leads its own list cannot be behind one that is second in the other."""
    with house.open() as client:
        client.loaded.model()  # so that both encoders take part
        apart = {name: client.search("red star", recording=name, limit=50) for name in ("hall", "roof")}
        both = client.search("red star", limit=50)
    assert len(both) == 12
    for name, hits in apart.items():
        own = [hit.start_s for hit in both if hit.recording == name]
        assert own == [hit.start_s for hit in hits]
    assert {hit.recording for hit in both[:2]} == {"hall", "roof"}
    assert all(a.score >= b.score for a, b in itertools.pairwise(both))


def test_a_damaged_caption_is_left_out(house: House, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(house.store, tmp_path / "copy.memdb"))
    with connect(copy, create=False) as client:
        row = client.store.recording("hall")
        unit = client.store.units(row.id)[2]
        span = unit.parts[1]
        before = client.search("star", recording="hall", limit=50)
        flip(copy / "segments" / unit.segment, span.offset + 3)
    with connect(copy, create=False) as client:
        after = client.search("star", recording="hall", limit=50)
    assert [hit.start_s for hit in after] == [
        hit.start_s for hit in before if hit.start_s != unit.start_ns / 1e9
    ]


def test_searches_that_cannot_find_are_refused(client: Client) -> None:
    for bad in ({"text": " "}, {"text": "x", "limit": 0}, {"text": "x", "start_s": 5, "end_s": 5}):
        with pytest.raises(UsageError):
            client.search(**bad)  # type: ignore[arg-type]
    with pytest.raises(UnknownRecording):
        client.search("x", recording="cellar")
    assert client.search("x", recording="yard") == []  # it keeps KV only
