"""What a recording's stored recipe says is what questions over it do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from memdb.caption_rows import KeptCaptions, Said
from memdb.client import connect
from memdb.query import captions
from memdb.query.stages import compose
from memdb.recipes import HYBRID
from memdb.schemas.errors import CorruptionError, RecipeError
from memdb.schemas.recipe import Stage
from memdb.schemas.rows import UnitRow
from memdb.store import Store
from tests.question_cases import MODEL, House, ingest_small


@pytest.mark.parametrize("weights", [(0.9, 0.7), (0.2, 0.3), (0.5, 0.5)])
def test_over_several_recordings_captions_are_ranked_by_the_largest_of_their_weights(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[float, float]
) -> None:
    seen: list[float] = []
    rank = captions.rank

    def looked(*args: Any, relevance: float, **options: Any) -> captions.Ranked:
        seen.append(relevance)
        return rank(*args, relevance=relevance, **options)

    with connect(tmp_path / "two.memdb", model=MODEL) as client:
        for name, weight in zip("ab", weights, strict=True):
            ingest_small(client, house.film, name, "hybrid", settings=(f"retrieve.relevance={weight}",))
        client.ask(
            "What is red?", recording="a", mode="captions"
        )  # costs are measured first, over all captions
        monkeypatch.setattr(captions, "rank", looked)
        for name, wanted in (("a", weights[0]), ("b", weights[1]), (None, max(weights))):
            seen.clear()
            assert client.ask("What is red?", recording=name, mode="captions").evidence
            assert set(seen) == {wanted}


def test_words_count_where_a_recipe_of_those_that_are_asked_says_so(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with words the table's own state makes no difference: they are read from the segments."""
    seen: list[bool] = []
    rank = captions.rank

    def looked(*args: Any, words: bool, **options: Any) -> captions.Ranked:
        seen.append(words)
        return rank(*args, words=words, **options)

    said: dict[str | None, list[Any]] = {}
    with connect(tmp_path / "two.memdb", model=MODEL) as client:
        for name, words in (("a", "true"), ("b", "false")):
            ingest_small(client, house.film, name, "hybrid", settings=(f"retrieve.words={words}",))
        client.ask("What is red?", mode="captions")
        monkeypatch.setattr(captions, "rank", looked)
        for name, wanted in (("a", True), ("b", False), (None, True)):
            seen.clear()
            said[name] = list(client.ask("What is red?", recording=name, mode="captions").evidence)
            assert set(seen) == {wanted}
    shutil.rmtree(tmp_path / "two.memdb" / "captions.lance")
    with connect(tmp_path / "two.memdb", model=MODEL, create=False) as client:
        for name, evidence in said.items():
            assert list(client.ask("What is red?", recording=name, mode="captions").evidence) == evidence


def test_a_caption_whose_words_are_damaged_is_told_of_and_ranked_without_them(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = KeptCaptions.read

    def damaged(self: KeptCaptions, store: Store, row: UnitRow) -> Said | None:
        if row.number == 1:
            raise CorruptionError("no words")
        return read(self, store, row)

    monkeypatch.setattr(KeptCaptions, "read", damaged)
    with connect(tmp_path / "one.memdb", model=MODEL) as client:
        ingest_small(client, house.film, "a", "hybrid")
        answer = client.ask("What is red?", mode="captions")
        [warning] = [text for text in answer.warnings if "without their words" in text]
        assert warning.startswith("1 damaged caption")
        nothing = client.ask("?!", mode="captions")
        assert not any("words" in text for text in nothing.warnings)  # none is asked for, so none is read


def test_a_stored_recipe_that_no_question_could_follow_is_refused() -> None:
    """Another hand may have written it: captions alone would be read, and KV is there that nothing reads."""
    odd = HYBRID.with_stage("retrieve", Stage("mmr", {"caption_tokens": 100}))
    with pytest.raises(RecipeError, match=r"not legal \(R14d\)"):
        compose(odd)
