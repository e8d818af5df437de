"""The equality ladder: through store, close, reopen and rebuild come the logits of one uncut forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import memdb
from memdb.models.uncut import uncut_states
from memdb.models.window import LayerKV
from memdb.query.rebuild.consecutive import Consecutive
from memdb.query.stored import StoredKV
from memdb.schemas.frames import Image
from tests.model_cases import (
    INIT_PROMPT,
    QUESTION,
    SHORT_CAPTIONS,
    TINY,
    PlainModel,
    at_places,
    ingest,
    other_spec,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    windowed,
    wrapped,
)
from tools.films import render_film

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
        return wrapped(self.spec).init_ids(INIT_PROMPT)

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


# About twice what was measured over these films, windows and recipes (fp16 3e-4, bf16 3e-3, int8 4e-3, int4 6e-2).
CODEC_BOUNDS = {"raw": 2e-5, "fp16": 6e-4, "bf16": 7e-3, "int8": 8e-3, "int4": 0.13}


@pytest.mark.parametrize(("recipe", "short"), [("rekv", False), ("hybrid", True)])
@pytest.mark.parametrize("model", ["tiny", "other"])
def test_codecs_lose_what_their_bits_say(
    films: dict[str, Film], model: str, recipe: str, short: bool, tmp_path: Path
) -> None:
    film, lost = films[model], {}
    for codec in CODEC_BOUNDS:
        film.remember(tmp_path / codec, recipe, codec, 64, short=short)
        lost[codec] = relative(logits_of(tmp_path / codec), film.truth(recipe, short=short))
    assert all(lost[codec] < bound for codec, bound in CODEC_BOUNDS.items()), lost
    assert lost["raw"] < lost["fp16"] < lost["int8"] < lost["int4"], lost
    assert lost["fp16"] < lost["bf16"] < lost["int4"], lost


# The path of a question


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    return record_decisions(monkeypatch)


@pytest.fixture(scope="module")
def stores(films: dict[str, Film], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """Stores of the tiny model's film, by recipe and window; nothing dropped, no time text."""
    folder = tmp_path_factory.mktemp("stores")

    def get(recipe: str, short: bool) -> Path:
        store = folder / f"{recipe}-{short}"
        if not store.exists():
            films["tiny"].remember(store, recipe, "raw", 3, short=short)
        return store

    return get


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
@pytest.mark.parametrize("mode", ["kv", "recent"])
def test_an_answer_is_decided_by_the_uncut_logits(
    films: dict[str, Film],
    stores: Callable[[str, bool], Path],
    decided: list[Tensor],
    mode: str,
    recipe: str,
    short: bool,
) -> None:
    """`kv` rebuilds within the retrieval pass, `recent` afterwards; the recipes retrieve more than the film has."""
    film = films["tiny"]
    with reopened(stores(recipe, short)) as db:
        answer = db.ask(QUESTION, mode=mode)
        stop = db.loaded.model().stop_ids
    truth = film.truth(recipe, short=short)
    assert relative(decided[0], truth[-1]) < BOUND
    spans = sorted((span.start_s, span.end_s) for span in answer.evidence if span.tier == "kv")
    assert (spans[0][0], spans[-1][1]) == (0.0, 21.0)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    if not short:
        assert list(answer.token_ids) == film.plain.say(film.embeddings, 4, stop)


def test_captions_stand_between_the_blocks_and_the_question(
    films: dict[str, Film], stores: Callable[[str, bool], Path], decided: list[Tensor]
) -> None:
    film = films["tiny"]
    own, init, prompt = film.plain, len(film.init_ids), len(film.ids)
    with reopened(stores("hybrid", False)) as db:
        spoken = [
            db.store.read_caption(unit).token_ids for unit in db.store.units(db.store.recording("film").id)
        ]
        db.ask(QUESTION, mode="both")
        db.ask(QUESTION, mode="captions")
    said = own.embed([token for ids in spoken for token in ids])
    assert len(spoken) == 2
    assert len(said)
    head, tail = film.embeddings[:-prompt], film.embeddings[-prompt:]
    both = own.forward(torch.cat((head, said, tail)))[-1]
    alone = own.forward(torch.cat((head[:init], said, tail)))[-1]
    assert relative(decided[0], both) < BOUND
    assert relative(decided[1], alone) < BOUND
    assert relative(both, film.whole[-1]) > 100 * BOUND


@dataclass
class Chosen:
    """What a question with times chose and saw, computed by plain loops alone."""

    rows: list[list[int]]  # per layer, the frames that it holds
    logits: Tensor  # (T, V) of the prompt


def chosen_plainly(film: Film, text: str, blocks: int, every_s: int) -> Chosen:
    """ReKV's retrieval pass and a rebuilt context with times, from the formulas."""
    own, model = film.plain, wrapped(film.spec)
    n, N = len(film.init_ids), len(film.embeddings[len(film.init_ids) : -len(film.ids)]) // len(film.shown)
    frames, encoded = len(film.shown), windowed(n, film.short_tokens)
    first = n + frames * N  # of what comes after the frames
    head = film.embeddings[:first]
    question = own.embed(model.encode_text(text))

    # The pass: in each layer the mean query, summed over its group, against the mean key of every frame.
    rows: list[list[int]] = []
    heard: list[tuple[Tensor, Tensor, Tensor]] = []

    def passing(layer: int, x: int) -> tuple[Tensor, Tensor]:
        if x < first:
            return encoded(layer, x)
        if len(rows) == layer:
            q, k, _ = heard[layer]
            query = q[:, first:].mean(1).view(own.kv_heads, -1, own.head_size).sum(1)  # (H, D)
            keys = k[:, n:first].view(own.kv_heads, frames, N, own.head_size).mean(2)  # (H, F, D)
            best = torch.einsum("hd,hfd->f", query, keys).topk(blocks).indices
            rows.append(sorted(best.tolist()))
        tokens = [
            *range(n),
            *(n + row * N + i for row in rows[layer] for i in range(N)),
            *range(first, x + 1),
        ]
        return torch.tensor(tokens), len(tokens) - 1 - torch.arange(len(tokens))

    own.loop(torch.cat((head, question)), passing, heard=heard)

    # The rebuilt context: a time behind each run that some layer holds, and behind every `every_s` in a run.
    held = sorted(set().union(*rows))
    stamped: list[int] = []
    begun = held[0]
    for row in held:
        if row + 1 not in held or row + 1 - begun >= every_s:
            stamped.append(row)
            begun = min((later for later in held if later > row), default=row)
    stamps = [model.encode_text(f"[00:00:{row:02d}]") for row in stamped]
    texts = [own.embed(ids) for ids in stamps]
    whole = torch.cat((head, *texts, film.embeddings[-len(film.ids) :]))
    places = []
    for mine in rows:
        place, at = np.full(len(whole), -1), n
        place[:n] = np.arange(n)
        stamp_at = first
        for row in range(frames):
            if row in mine:
                place[n + row * N : n + (row + 1) * N] = np.arange(at, at + N)
                at += N
            if row in stamped:
                size = len(stamps[stamped.index(row)])
                place[stamp_at : stamp_at + size] = np.arange(at, at + size)
                stamp_at, at = stamp_at + size, at + size
        place[stamp_at:] = np.arange(at, at + len(whole) - stamp_at)
        places.append(place)
    logits = own.loop(whole, at_places(places, first, encoded))
    return Chosen(rows, logits[-len(film.ids) :])


def test_times_stand_in_their_places_and_see_what_is_before_them(
    films: dict[str, Film], decided: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer holds other blocks; the truth chooses them itself, and prefills the times by a plain loop."""
    film, blocks = films["tiny"], 6
    settings = [f"encode.window_tokens={film.short_tokens}", "rebuild.time_text_s=3.0", *SHORT_CAPTIONS]
    settings += [f"retrieve.blocks={blocks}", "answer.tokens_max=1"]
    ingest(tmp_path / "s", film.shown, recipe="hybrid", codec="raw", settings=settings)
    held: list[list[int]] = []
    rebuild = Consecutive.rebuild

    def recorded(
        self: Consecutive, model: Any, init: Any, table: Any, rows: Any, *rest: Any, **more: Any
    ) -> Any:
        held[:] = [mine.tolist() for mine in rows]
        return rebuild(self, model, init, table, rows, *rest, **more)

    monkeypatch.setattr(Consecutive, "rebuild", recorded)
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
    truth = chosen_plainly(film, QUESTION, blocks, every_s=3)
    assert held == truth.rows
    assert len({tuple(mine) for mine in held}) > 1  # the layers differ, else this says little
    assert relative(decided[0], truth.logits[-1]) < BOUND
    assert relative(decided[0], film.short["hybrid"][-1]) > 100 * BOUND


@pytest.mark.parametrize("harm", ["zeroed", "swapped"])
@pytest.mark.parametrize("mode", ["kv", "recent"])
def test_every_block_and_its_place_matter(
    stores: Callable[[str, bool], Path],
    decided: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    harm: str,
) -> None:
    """X10, and the guard of all equalities above: one frame gone or two exchanged give other logits."""
    read, N = StoredKV.read, 16
    harmed: list[int] = []

    def damaged(self: StoredKV, layer: int, *rest: Any) -> Any:
        found, rows = read(self, layer, *rest)
        if found is not None and harmed:
            order = torch.arange(found.tokens).view(-1, N)
            if harm == "swapped":
                order[harmed] = order[harmed[::-1]]
            found = LayerKV(found.k[:, order.flatten()], found.v[:, order.flatten()])
            if harm == "zeroed":
                for row in harmed:
                    found.k[:, row * N : (row + 1) * N] = 0
                    found.v[:, row * N : (row + 1) * N] = 0
        return found, rows

    monkeypatch.setattr(StoredKV, "read", damaged)
    with reopened(stores("rekv", False)) as db:
        for rows in ([], [], [0, 1], [5, 6], [3, 17]):
            harmed[:] = rows if harm == "swapped" else rows[:1]
            db.ask(QUESTION, mode=mode)
    whole, again, *others = decided
    assert torch.equal(whole, again)
    assert all(relative(other, whole) > 10 * BOUND for other in others)


@pytest.mark.parametrize("mode", ["kv", "both"])
def test_stored_keys_and_values_answer_without_film_and_without_vision(
    decided: list[Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    film = tmp_path / "film.mp4"
    render_film(film, seconds=6, fps=5, width=96, height=64)
    with memdb.connect(tmp_path / "s", model=TINY, device="cpu") as db:
        settings = [*SHORT_CAPTIONS, "unit.frames=4", "answer.tokens_max=6"]
        db.ingest(film, recipe="hybrid", settings=settings, sample_fps=2.0)
        first = db.ask(QUESTION, mode=mode)
    film.unlink()

    def blind(*args: object, **kwargs: object) -> None:
        raise AssertionError("a question looked at a frame")

    with reopened(tmp_path / "s") as db:
        network = db.loaded.model()._network  # type: ignore[attr-defined]
        monkeypatch.setattr(type(db.loaded.model()), "visual_tokens", blind)
        monkeypatch.setattr(network.model.vision_tower, "forward", blind)
        second = db.ask(QUESTION, mode=mode)
        with pytest.raises(AssertionError):
            db.loaded.model().visual_tokens([])
    assert {span.tier for span in second.evidence} == ({"kv"} if mode == "kv" else {"kv", "captions"})
    assert second.token_ids == first.token_ids
    assert len(second.token_ids)
    assert torch.equal(decided[0], decided[1])


# Half precision on a CPU: about twice what was measured against the fp32 truth of the same weights.
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.05), ("float16", 0.006)])
def test_half_precision_ends_near_the_same_logits(
    films: dict[str, Film], decided: list[Tensor], tmp_path: Path, dtype: str, bound: float
) -> None:
    film, store = films["tiny"], tmp_path / "s"
    settings = ["rebuild.time_text_s=0", f"encode.window_tokens={film.short_tokens}", *SHORT_CAPTIONS]
    ingest(store, film.shown, recipe="hybrid", codec="raw", settings=settings, dtype=dtype)
    with reopened(store, dtype=dtype) as db:
        answer = db.ask(QUESTION, mode="kv")
    assert answer.facts["dtype"] == dtype
    assert not answer.warnings
    assert relative(decided[0], film.short["hybrid"][-1]) < bound
