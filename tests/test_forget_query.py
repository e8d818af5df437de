"""What was forgotten is in no answer of a question that starts afterwards, whoever had the store open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb.applying import REWRITE
from memdb.bm25 import bm25, words_of
from memdb.catalog import Catalog
from memdb.client import Client
from memdb.contents import husk
from memdb.digest import unit_digest
from memdb.index.key_search import search_keys
from memdb.index.key_table import KeyTable
from memdb.models.protocol import VideoModel
from memdb.query import engine
from memdb.query.retrieve.mmr import joined_relevance, mmr_order
from memdb.query.retrieve.topk import BlockTopK
from memdb.query.stored import Readings, StoredKV
from memdb.reader import SliceReader
from memdb.schemas.errors import QuestionError, UnknownRecording
from memdb.schemas.rows import UnitRow
from memdb.sealed import SealedSegment, read_unit
from memdb.store import Store
from tests.run_cases import (
    NAME,
    RANKED,
    SETTINGS,
    ingested,
    opened,
    run,
    small_film,
    small_model,
    small_spec,
)

NS = 10**9
SECONDS = 24
BLOCKS = 6  # a layer that a question takes
SPAN = (7.5, 13.2)  # seconds: blocks 7 to 13, and every clip of three frames that one of them is in
GONE = set(range(7, 14))
MODES = {"rekv": ("kv", "recent", "auto"), "rlivs": ("captions", "auto")}
MODES["hybrid"] = ("kv", "captions", "both", "recent", "auto")
QUESTION = "what was there before the star?"


@dataclass(frozen=True)
class House:
    model: VideoModel
    film: Path
    stores: dict[str, Path]  # by recipe; nobody changes them

    def copy(self, recipe: str, folder: Path) -> Path:
        return Path(shutil.copytree(self.stores[recipe], folder / "s.memdb"))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("forgetting")
    model, film = small_model(small_spec(folder)), small_film(folder / "film.mp4", SECONDS)
    stores = {recipe: folder / f"{recipe}.memdb" for recipe in RANKED}
    for recipe, store in stores.items():
        made(store, model, film, recipe)
    return House(model, film, stores)


def made(store: Path, model: VideoModel, film: Any, recipe: str, **more: Any) -> None:
    limits = ["answer.tokens_max=4"]
    if recipe != "rlivs":
        limits.append(f"retrieve.blocks={BLOCKS}")
    if recipe != "rekv":
        limits.append("retrieve.caption_tokens=400")
    ingested(store, model, film, recipe, settings=(*SETTINGS[recipe], *limits), **more)


@dataclass
class Seen:
    """What the questions of an engine had before them."""

    opened: list[Any] = field(default_factory=list)
    got: Any = None
    chosen: Any = None
    queries: list[Any] = field(default_factory=list)  # of each layer (H*D,)


@contextmanager
def looking(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    seen, report, select = Seen(), engine.report, BlockTopK.select

    def watched(session: Any, question: Any, scope: Any, decided: Any, got: Any, *rest: Any) -> Any:
        seen.opened, seen.got, seen.chosen = list(scope), got, decided.chosen
        return report(session, question, scope, decided, got, *rest)

    def selecting(self: BlockTopK, search: Any, layer: int, query: Any, *rest: Any) -> Any:
        seen.queries.append(query)
        return select(self, search, layer, query, *rest)

    with patch.context() as patched:
        patched.setattr(engine, "report", watched)
        patched.setattr(BlockTopK, "select", selecting)
        yield seen


def forget_in(client: Client, start_s: float | None = SPAN[0], end_s: float | None = SPAN[1]) -> Any:
    """By another connection than the one that asks."""
    with opened(client.store.path, client.loaded._model or pytest.fail("no model"), create=False) as other:
        return other.forget(NAME, start_s=start_s, end_s=end_s)


def rows_of(store: Path) -> list[UnitRow]:
    with Store.open(store) as found:
        return found.units(found.recording(NAME).id)


def clips_left(store: Path) -> set[tuple[float, float]]:
    """Spans of the units that have a caption and do not overlap what is forgotten: from the store as it was."""
    with Store.open(store) as found:
        return {
            (row.start_ns / NS, row.end_ns / NS)
            for row in found.units(found.recording(NAME).id)
            if row.caption_tokens and not (row.start_ns < SPAN[1] * NS and row.end_ns > SPAN[0] * NS)
        }


def truth_keys(store: Path) -> list[Any]:
    """Per layer the representative keys (24, H*D) as they were written."""
    with Store.open(store) as found, KeyTable.open(found, found.recording(NAME).id) as table:
        return [np.array(table.layer_keys(layer)) for layer in range(table.layers)]


def truth_kv(store: Path, layer: int, rows: Any) -> torch.Tensor:
    """(H, tokens, D) keys and values of blocks, from the store as it was."""
    with Store.open(store) as found, SliceReader(found) as reader:
        kv = StoredKV(found, found.recording(NAME), reader, backend="exact", sim="dot")
        read, whole = kv.read(layer, np.asarray(rows), torch.device("cpu"), torch.float32, Readings())
        kv.close()
        assert read is not None
        assert len(whole) == len(rows)
        return torch.cat((read.k, read.v))


# A question before, a forget by another, the same question after


@pytest.mark.parametrize(("recipe", "mode"), [(recipe, mode) for recipe in RANKED for mode in MODES[recipe]])
def test_a_connection_that_is_open_answers_from_what_is_left(
    house: House, recipe: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks as an exact search over the remaining ones finds them, with the bits that they had; captions likewise."""
    store = house.copy(recipe, tmp_path)
    with opened(store, house.model, create=False) as client, looking(monkeypatch) as seen:
        client.ask(QUESTION, mode=mode)
        forget_in(client)
        seen.queries.clear()
        answer = client.ask(QUESTION, mode=mode)
    assert not answer.warnings
    assert answer.evidence
    for item in answer.evidence:
        assert item.end_s <= 7 or item.start_s >= 14 or item.tier == "captions"
        assert item.end_s <= SPAN[0] or item.start_s >= SPAN[1]
    left = [row for row in range(SECONDS) if row not in GONE]
    if recipe != "rlivs":
        assert np.flatnonzero(seen.chosen.blocks).tolist() == left
    if seen.got.rows:
        keys = truth_keys(house.stores[recipe])
        for layer, (rows, kv) in enumerate(zip(seen.got.rows, seen.got.kv, strict=True)):
            if seen.queries:
                want = search_keys(keys[layer][left], seen.queries[layer], BLOCKS)
                assert rows.tolist() == sorted(left[row] for row in want.rows)
            else:
                assert rows.tolist() == left[-BLOCKS:]
            assert torch.equal(torch.cat((kv.k, kv.v)), truth_kv(house.stores[recipe], layer, rows))
    spans = [(at.start_ns / NS, at.end_ns / NS) for _, at in seen.got.captions]
    if answer.plan.mode in ("captions", "both"):
        assert len(set(spans)) == len(spans)
        assert set(spans) == clips_left(house.stores[recipe]), "all of them fit into the budget"
    else:
        assert not spans
    assert bool(seen.got.rows) == (answer.plan.mode != "captions")


@pytest.mark.parametrize("recipe", ["rlivs", "hybrid"])
def test_captions_that_are_left_are_ranked_as_if_the_others_had_never_been(
    house: House, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = house.copy(recipe, tmp_path)
    with opened(store, house.model, create=False) as client, looking(monkeypatch) as seen:
        client.ask(QUESTION, mode="captions")
        forget_in(client)
        client.ask(QUESTION, mode="captions")
        table = seen.opened[0].kv.table
        vectors = client.loaded.vectors(client.store.recording(NAME).spec.caption_encoder)
        with Store.open(house.stores[recipe]) as before:
            kept = [row for row in before.units(before.recording(NAME).id) if row.caption_tokens]
            kept = [row for row in kept if (row.start_ns / NS, row.end_ns / NS) in clips_left(before.path)]
            captions = [before.read_caption(row) for row in kept]
        said, query = np.stack([one.vector for one in captions]), vectors.of_question(QUESTION)
        relevant = None
        if recipe == "hybrid":
            matches = bm25(words_of(QUESTION), [words_of(one.text) for one in captions])
            relevant = joined_relevance(said, query, matches)
        order = list(mmr_order(said, query, 0.5, relevant))
        assert client._engine is not None
        candidates, found = client._engine._session.rank(seen.opened, QUESTION, [])[0]
        assert [(candidates[row].unit, score) for row, score in found] == [
            (kept[row].number, pytest.approx(score)) for row, score in order
        ]
        gone = table.captions["tokens"] == 0
        assert not table.caption_vectors()[gone].any()


@pytest.mark.parametrize("recipe", ["rlivs", "hybrid"])
def test_search_export_and_key_frames_have_nothing_of_it(house: House, recipe: str, tmp_path: Path) -> None:
    store = house.copy(recipe, tmp_path)
    left = clips_left(store)
    with opened(store, house.model, create=False) as client:
        mode = "captions"
        old = client.ask(QUESTION, mode=mode)  # loads the model: from here on vectors rank, too
        words = [row.caption for row in client.search(QUESTION, limit=99)]
        texts = {(hit.start_s, hit.end_s): hit.caption for hit in client.search(" ".join(words), limit=99)}
        assert set(texts) > left
        forget_in(client)
        for words_of in (QUESTION, *(text for span, text in texts.items() if span not in left)):
            hits = client.search(words_of, limit=99)
            assert {(hit.start_s, hit.end_s) for hit in hits} == left
            assert [hit.caption for hit in hits] == [texts[hit.start_s, hit.end_s] for hit in hits]
            assert client.search(words_of, start_s=SPAN[0], end_s=SPAN[1], limit=99) == []
        assert client.export(NAME, tmp_path / "said.jsonl") >= len(left)
        lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
        assert all(line["end_s"] <= SPAN[0] or line["start_s"] >= SPAN[1] for line in lines)
        client.export(NAME, tmp_path / "said.srt", format="srt")
        assert (tmp_path / "said.srt").read_text().count(" --> ") == len(lines)
        shown = client.ask(QUESTION, mode=mode, save_frames=tmp_path / "frames")
        assert {(item.start_s, item.end_s) for item in shown.evidence if item.keyframe} == left
        # An answer of before, whose pictures are asked for now: those of the span are gone.
        late = client.save_frames(old, tmp_path / "late")
        assert {(item.start_s, item.end_s) for item in late.evidence if item.keyframe} == left
        assert late.warnings == old.warnings
    assert sorted(path.name for path in (tmp_path / "late").iterdir()) == sorted(
        path.name for path in (tmp_path / "frames").iterdir()
    )


def test_as_of_a_moment_and_the_watermark_are_of_what_is_left(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = house.copy("hybrid", tmp_path)
    with opened(store, house.model, create=False) as client, looking(monkeypatch) as seen:
        assert client.ask(QUESTION, mode="recent").as_of_s == SECONDS
        forget_in(client)
        answer = client.ask(QUESTION, mode="recent", at=10)
        assert (answer.as_of_s, answer.watermark_s, answer.lag_s) == (10, 7, 3)
        assert [rows.tolist() for rows in seen.got.rows] == [list(range(1, 7))] * 2
        forget_in(client, 20, None)
        answer = client.ask(QUESTION, mode="recent")
        assert (answer.as_of_s, answer.watermark_s, answer.lag_s) == (20, 20, 0)
        assert [rows.tolist() for rows in seen.got.rows] == [list(range(14, 20))] * 2
        forget_in(client, 0, 8)
        with pytest.raises(QuestionError, match="no KV is stored up to this moment"):
            client.ask(QUESTION, mode="kv", at=10)


def test_a_process_that_forgets_by_the_command(house: House, tmp_path: Path) -> None:
    store = house.copy("hybrid", tmp_path)
    with opened(store, house.model, create=False) as client:
        client.ask(QUESTION, mode="both")
        words = ("--start", "00:00:07.5", "--end", "13.2")
        told = run("forget", "--store", str(store), "--recording", NAME, *words, "--json").json
        assert (told["units"], told["blocks"]) == (3, len(GONE))
        answer = client.ask(QUESTION, mode="both")
    assert all(item.end_s <= SPAN[0] or item.start_s >= SPAN[1] for item in answer.evidence)


# Everything, or the recording itself


@pytest.mark.parametrize("recipe", RANKED)
def test_a_recording_of_which_nothing_is_left_says_so(house: House, recipe: str, tmp_path: Path) -> None:
    store = house.copy(recipe, tmp_path)
    with opened(store, house.model, create=False) as client:
        client.ask(QUESTION)
        forget_in(client, 0, None)
        for mode in ("auto", *MODES[recipe]):
            for named in (NAME, None):
                with pytest.raises(QuestionError, match="everything that was kept of 'lobby' is forgotten"):
                    client.ask(QUESTION, mode=mode, recording=named)
        assert client.search(QUESTION) == []
        assert client.verify().problems == []
        made(store, house.model, house.film, recipe, recording="yard")
        answer = client.ask(QUESTION)
        assert {item.recording for item in answer.evidence} == {"yard"}
    with opened(store, house.model, create=False) as new:  # which never saw it otherwise
        with pytest.raises(QuestionError, match="is forgotten"):
            new.ask(QUESTION, recording=NAME)
        assert {item.recording for item in new.ask(QUESTION).evidence} == {"yard"}


@pytest.mark.parametrize("recipe", RANKED)
def test_captions_stay_where_only_the_kv_ends(house: House, recipe: str, tmp_path: Path) -> None:
    """`kv_from_unit`: units below have no KV any more. A question for it says so, or takes the captions."""
    store = house.copy(recipe, tmp_path)
    end_kv(store)
    with opened(store, house.model, create=False) as client:
        if recipe != "rlivs":
            with pytest.raises(QuestionError, match="no KV is stored up to this moment"):
                client.ask(QUESTION, mode="kv")
        if recipe == "rekv":
            with pytest.raises(QuestionError, match="cannot answer here"):
                client.ask(QUESTION)
        else:
            assert client.ask(QUESTION).plan.mode == "captions"
            assert len(client.search(QUESTION, limit=99)) == len(
                [r for r in rows_of(store) if r.caption_tokens]
            )


def end_kv(store: Path) -> None:
    """What ageing does at last, without its rewriting: from the last unit on there is KV, and it has none yet."""
    catalog = Catalog(store / "catalog.sqlite", write=True)
    row = next(row for row in catalog.recordings() if row.name == NAME)
    segment = SealedSegment(catalog, store / "segments", row, REWRITE)
    segment.seal(kv_from_unit=row.units)
    segment.close()
    catalog.close()


@pytest.mark.parametrize("recipe", RANKED)
def test_a_name_begun_again_is_another_recording_for_an_open_connection(
    house: House, recipe: str, tmp_path: Path
) -> None:
    store = house.copy(recipe, tmp_path)
    with opened(store, house.model, create=False) as client:
        old = client.ask(QUESTION, recording=NAME)
        known = client.store.recording(NAME).id
        forget_in(client, None, None)
        with pytest.raises(UnknownRecording, match="no recording is named 'lobby'"):
            client.ask(QUESTION, recording=NAME)
        with pytest.raises(QuestionError, match="holds nothing yet"):
            client.ask(QUESTION)
        assert client.search(QUESTION) == []
        assert all(item.keyframe is None for item in client.save_frames(old, tmp_path / "late").evidence)
        made(store, house.model, house.film, recipe)
        again = client.ask(QUESTION, recording=NAME)
        assert client.store.recording(NAME).id != known
        assert (again.token_ids, again.evidence) == (old.token_ids, old.evidence), (
            "the same film, the same bits"
        )
        assert client._engine is not None
        assert known not in client._engine._session._opened


# A question that is running


@pytest.mark.parametrize("recipe", RANKED)
@pytest.mark.parametrize("moment", ["decide", "bring_back", "rebuild", "report"])
def test_a_question_that_runs_meanwhile_ends_and_the_next_sees_nothing(
    house: House, recipe: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgotten in its course: a span, then all of it. It ends with what it read by then."""
    store = house.copy(recipe, tmp_path)
    mode = MODES[recipe][0] if recipe != "hybrid" else "both"
    forgets: list[Callable[[], object]] = []
    stage = getattr(engine, moment)

    def forgetting(*args: Any, **more: Any) -> Any:
        if forgets:
            forgets.pop()()
        return stage(*args, **more)

    monkeypatch.setattr(engine, moment, forgetting)
    with opened(store, house.model, create=False) as client:
        client.ask(QUESTION, mode=mode)
        forgets.append(lambda: forget_in(client))
        assert client.ask(QUESTION, mode=mode).text is not None
        assert not forgets
        answer = client.ask(QUESTION, mode=mode)
        assert not answer.warnings
        assert all(item.end_s <= SPAN[0] or item.start_s >= SPAN[1] for item in answer.evidence)
        forgets.append(lambda: forget_in(client, None, None))
        assert client.ask(QUESTION, mode=mode).text is not None
        assert not forgets
        with pytest.raises(UnknownRecording):
            client.ask(QUESTION, mode=mode, recording=NAME)


def test_the_store_holds_what_the_tests_above_believe(house: House, tmp_path: Path) -> None:
    """Units after the forget, from the disk, are those of before without what overlaps."""
    for recipe in RANKED:
        store = house.copy(recipe, tmp_path / recipe)
        with Store.open(store) as found:
            recording = found.recording(NAME)
            before = [read_unit(store / "segments", recording, row) for row in found.units(recording.id)]
        with opened(store, house.model, create=False) as client:
            client.loaded.model()
            forget_in(client)
        want = [
            husk(unit, round(SPAN[0] * NS), round(SPAN[1] * NS), 0)
            if unit.start_ns < SPAN[1] * NS and unit.end_ns > SPAN[0] * NS
            else unit
            for unit in before
        ]
        assert [row.digest for row in rows_of(store)] == [unit_digest(unit) for unit in want]
