"""The equality ladder: through store, close, reopen and rebuild come the logits of one uncut forward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memdb.models.uncut import uncut_states
from memdb.schemas.frames import Image
from tests.model_cases import (
    QUESTION,
    SHORT_CAPTIONS,
    TINY,
    PlainModel,
    ingest,
    other_spec,
    pictures,
    plain,
    relative,
    reopened,
    windowed,
    wrapped,
)

BOUND = 1e-4  # of the largest logit, fp32 with nothing lost


@dataclass
class Film:
    """Frames of one film, the model that sees them, and what an untouched network makes of them."""

    spec: str
    shown: list[Image]
    short_tokens: int  # a window smaller than the film

    @property
    def plain(self) -> PlainModel:
        return plain(self.spec)

    @cached_property
    def ids(self) -> list[int]:
        return wrapped(self.spec).prompt_ids(QUESTION)

    @cached_property
    def init_ids(self) -> list[int]:
        return wrapped(self.spec).init_ids("You are a helpful assistant.")

    @cached_property
    def embeddings(self) -> Tensor:
        """[init | all frames | prompt] (T, E), seen and embedded by transformers alone."""
        own = self.plain
        return torch.cat((own.embed(self.init_ids), own.see(self.shown).flatten(0, 1), own.embed(self.ids)))

    @cached_property
    def whole(self) -> Tensor:
        """Logits (T, V) of the prompt: one ordinary forward of transformers."""
        return self.plain.forward(self.embeddings)[-len(self.ids) :]

    @cached_property
    def short(self) -> dict[str, Tensor]:
        """The same by a plain loop with the mask of the short window, by recipe: `rekv` asks through it, too."""
        n, W, T = len(self.init_ids), self.short_tokens, len(self.embeddings)
        masks = {"rekv": windowed(n, W), "hybrid": windowed(n, W, wide_from=T - len(self.ids))}
        return {
            name: self.plain.loop(self.embeddings, mask)[-len(self.ids) :] for name, mask in masks.items()
        }

    def truth(self, recipe: str, *, short: bool) -> Tensor:
        return self.short[recipe] if short else self.whole

    def remember(self, store: Path, recipe: str, codec: str, chunk: int, *, short: bool) -> None:
        settings = [f"encode.chunk_frames={chunk}", "rebuild.time_text_s=0", "answer.tokens_max=4"]
        if short:
            settings.append(f"encode.window_tokens={self.short_tokens}")
        if recipe == "hybrid":
            settings += SHORT_CAPTIONS
        ingest(store, self.shown, model=self.spec, recipe=recipe, codec=codec, settings=settings)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Film]:
    other = other_spec(tmp_path_factory.mktemp("model"))
    return {
        "tiny": Film(TINY, pictures(21), short_tokens=150),
        "other": Film(other, pictures(70, seed=1), short_tokens=131),
    }


def logits_of(store: Path) -> Tensor:
    with reopened(store) as db:
        return db._asking().question_logits("film", QUESTION)[1]


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
@pytest.mark.parametrize("model", ["tiny", "other"])
def test_nothing_is_lost_on_the_way(
    films: dict[str, Film], model: str, recipe: str, chunk: int, short: bool, tmp_path: Path
) -> None:
    film = films[model]
    film.remember(tmp_path / "s", recipe, "raw", chunk, short=short)
    assert relative(logits_of(tmp_path / "s"), film.truth(recipe, short=short)) < BOUND


@pytest.mark.parametrize("model", ["tiny", "other"])
def test_a_short_window_is_another_truth(films: dict[str, Film], model: str) -> None:
    """Else the tests above would pass with any mask."""
    film = films[model]
    for recipe in ("rekv", "hybrid"):
        assert relative(film.short[recipe], film.whole.double()) > 100 * BOUND
    assert relative(film.short["rekv"], film.short["hybrid"]) > 100 * BOUND


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
@pytest.mark.parametrize("model", ["tiny", "other"])
def test_the_truth_that_the_tools_print_is_that_of_transformers(
    films: dict[str, Film], model: str, short: bool, recipe: str
) -> None:
    film, own = films[model], wrapped(films[model].spec)
    with torch.inference_mode():
        states = uncut_states(
            own,
            film.embeddings,
            init_tokens=len(film.init_ids),
            window=film.short_tokens if short else 15_000,
            unwindowed_tail=0 if recipe == "rekv" else len(film.ids),
        )
        found = own.logits(states[-len(film.ids) :])
    assert relative(found, film.truth(recipe, short=short)) < BOUND
