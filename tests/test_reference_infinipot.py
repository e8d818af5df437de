"""Reference tests of InfiniPot-V (arXiv 2506.15745) through its recipe: I1 to I7, on one position id and on three."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memdb.ingest.encode.chunk import OpenMemory
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.layer_tokens import LayerTokens
from memdb.ingest.memory import EncoderMemory
from memdb.ingest.stages import compose, written_out
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.recipes import INFINIPOT_V, adjusted
from memdb.retain.tar_van import TarVan
from memdb.retain.view import LayerView
from memdb.schemas.keep import split_ids
from memdb.schemas.recipe import Recipe
from memdb.schemas.units import Unit
from tests.memory_cases import FRAME_TOKENS as P
from tests.memory_cases import remembered_film, watched_memory
from tests.model_cases import (
    INIT_PROMPT,
    NS,
    QUESTION,
    ingest,
    pictures,
    relative,
    reopened,
    stored_kv,
    wrapped,
)
from tests.qwen_cases import COLUMNS, ROWS, N, ids_by_hand, plain_qwen, qwen, remember
from tests.run_cases import small_model, small_spec
from tests.test_retain_tar_van import plain_tar_van

C = 8  # frames that the memory holds: with blocks of 8 and then 4, as the paper's 24 with 32 and 8


def row(*settings: str, frames: int = C) -> Recipe:
    """The recipe in small."""
    small = ("unit.first_frames=8", "unit.frames=4", "encode.chunk_frames=4", "answer.tokens_max=2")
    return adjusted(INFINIPOT_V, codec="raw", settings=(*small, f"retain.budget_frames={frames}", *settings))


def planted(frames: Tensor, whole: VideoModel) -> VideoModel:
    """A model that sees these tokens (F, N, E) in place of a film: a frame's pixels say its number."""
    model = copy.copy(whole)

    def looked(pixels: Sequence[Any]) -> Tensor:
        return frames[[int(shown[0, 0, 0]) for shown in pixels]]

    model.visual_tokens = looked  # type: ignore[method-assign]
    return model


def streamed(
    frames: Tensor, recipe: Recipe, count: int, whole: VideoModel
) -> Iterator[tuple[StreamEncoder, Unit]]:
    """An encoder without a store, after each unit; the film begins anew where it ends."""
    model, picture = planted(frames, whole), pictures(1)[0]
    stages = compose(written_out(recipe, model, model.shape.frame_tokens))
    encoder = StreamEncoder(model, stages, model.init_ids(INIT_PROMPT), None)
    for start in range(0, count, 4):
        batch = [
            ReadyFrame(at, at * NS, (at + 1) * NS, np.full((2, 2, 3), at % len(frames), np.uint8), picture)
            for at in range(start, start + 4)
        ]
        for unit in encoder.step(batch):
            yield encoder, unit


def held_by(encoder: StreamEncoder) -> EncoderMemory:
    assert isinstance(encoder._encoding, OpenMemory)
    return encoder._encoding.memory


def memories(frames: Tensor, recipe: Recipe) -> list[list[LayerTokens]]:
    """What each layer held after each unit of a planted film."""
    return [list(held_by(encoder).layers) for encoder, _ in streamed(frames, recipe, len(frames), wrapped())]


def of_frame(layer: LayerTokens, number: int) -> set[int]:
    """Patches that are left of a frame."""
    return set(layer.patch[layer.frame == number].tolist())


def static(count: int) -> Tensor:
    frame = torch.randn(1, P, wrapped().shape.embedding_size, generator=torch.Generator().manual_seed(5))
    return frame.repeat(count, 1, 1)


# I1 to I4, in the first layer, where a token's key says what was seen and nothing of what stood around it


def test_i1_of_a_static_film_whole_frames_stay_from_the_newest_back() -> None:
    """TaR alone: every past score is -1, so that of equals the newest win, in whole frames."""
    held = memories(static(40), row("retain.tar=1.0"))
    assert len(held) == 9
    for unit, layers in enumerate(held):
        newest = 8 + 4 * unit  # one past the newest frame
        first = layers[0]
        assert len(first.id) == C * P
        left = {number: len(of_frame(first, number)) for number in set(first.frame.tolist())}
        assert left == dict.fromkeys(range(newest - C, newest), P)
        # I3: at any time the same patch has the same key, which rotated keys would not have.
        for patch in range(P):
            keys = first.k[:, first.patch == patch]
            torch.testing.assert_close(keys, keys[:, :1].expand_as(keys), rtol=1e-5, atol=1e-5)


def test_i1_only_recent_frames_stay_where_they_fill_the_budget_of_tar() -> None:
    """C = r p: of the frames before nothing is left."""
    held = memories(static(28), row("retain.tar=1.0", "retain.recent=1.0"))
    assert set(held[-1][0].frame.tolist()) == set(range(20, 28))


def test_i2_the_patch_that_changed_survives_and_its_neighbours_do_not() -> None:
    film = static(60)
    film[2, 5] = torch.randn(film.shape[-1], generator=torch.Generator().manual_seed(6))
    left = [of_frame(layers[0], 2) for layers in memories(film, row("retain.tar=1.0"))]
    assert left == [set(range(P)), *[{5}] * (len(left) - 1)]
    assert len(left) == 14


@pytest.mark.parametrize("seed", range(2))
def test_i4_where_tar_takes_recent_frames_alone_the_largest_values_fill_the_rest(seed: int) -> None:
    """In every layer: what is kept of the past has no smaller norm than what is dropped of it."""
    film = torch.randn(12, P, wrapped().shape.embedding_size, generator=torch.Generator().manual_seed(seed))
    recipe = row("retain.tar=0.25", "retain.pooling=none")
    [_, layers] = memories(film, recipe)
    [_, whole] = memories(film, row("retain.tar=0.25", frames=40))
    for kept, every in zip(layers, whole, strict=True):
        norms = every.v.norm(dim=-1).mean(0)
        past = every.frame < 10
        stays = torch.isin(every.id, kept.id)
        assert bool(stays[~past].all()), "two recent frames are whole"
        assert int(stays.sum()) == C * P
        assert float(norms[past & stays].min()) >= float(norms[past & ~stays].max()) - 1e-5


# I5


def test_i5_a_thousand_frames_stay_within_the_budget_of_every_moment(tmp_path: Path) -> None:
    """C after each round, a block more before it; the init tokens stay as they are, bit for bit."""
    small = small_model(small_spec(tmp_path))
    N, E = small.shape.frame_tokens, small.shape.embedding_size
    film = torch.randn(40, N, E, generator=torch.Generator().manual_seed(1))
    came: list[int] = []
    choose = TarVan.choose

    def counted(self: TarVan, view: LayerView) -> Tensor:
        came.append(view.tokens)
        return choose(self, view)

    init: list[LayerKV] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TarVan, "choose", counted)
        for encoder, unit in streamed(film, row(), 1000, small):
            assert unit.keep is not None
            assert set(unit.keep.tokens) == {C * N}
            memory = held_by(encoder)
            init = init or copy.deepcopy(memory.init)
            assert all(len(layer.id) == C * N for layer in memory.layers)
    assert came == [8 * N] + [(8 + 4) * N] * 248
    pairs = zip(init, memory.init, strict=True)
    assert all(torch.equal(a.k, b.k) and torch.equal(a.v, b.v) for a, b in pairs)
    assert {layer.k.dtype for layer in memory.layers} == {small.dtype}
    assert int(memory.layers[0].position.max()) == len(small.init_ids(INIT_PROMPT)) + 1000 * N - 1


# I6, I7, and the recipe as a whole


@contextmanager
def watched_choices() -> Iterator[list[tuple[TarVan, LayerView, Tensor]]]:
    """Every choice of a layer: what it was made of, and what was chosen."""
    found: list[tuple[TarVan, LayerView, Tensor]] = []
    choose = TarVan.choose

    def choosing(self: TarVan, view: LayerView) -> Tensor:
        kept = choose(self, view)
        for layer in range(len(view.k)):
            parts = {
                name: getattr(view, name)[layer] for name in ("k", "v", "position", "frame", "patch", "kind")
            }
            found.append((self, replace(view, importance=None, **parts), kept[layer]))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TarVan, "choose", choosing)
        yield found


@pytest.mark.parametrize("settings", [(), ("retain.pooling=none",)])
def test_every_choice_is_the_formula_one_token_at_a_time(settings: tuple[str, ...], tmp_path: Path) -> None:
    """Of a film, in all layers and rounds, with the pooling that the norms of each layer ask for (I7)."""
    with watched_choices() as choices:
        ingest(tmp_path / "s", pictures(20), recipe=row(*settings))
    assert len(choices) == 4 * 4
    for method, view, kept in choices:
        assert kept.tolist() == (
            list(range(view.tokens)) if view.tokens <= method.budget_tokens else plain_tar_van(view, method)
        )


def test_i6_after_many_rounds_every_token_knows_where_and_when_it_was_seen(tmp_path: Path) -> None:
    """Its keys and values are those that are stored under its frame and patch."""
    moments = remembered_film(tmp_path / "s", pictures(32), row())
    assert len(moments) == 7
    n = moments[0].init[0].tokens
    with reopened(tmp_path / "s") as db:
        stored = stored_kv(db)
        blocks = [
            (unit.number, at)
            for unit in db.store.units(db.store.recording("film").id)
            for at in range(len(unit.blocks))
        ]
    first = {pair: number * P for number, pair in enumerate(blocks)}  # where a block's tokens begin
    for moment in moments:
        for layer, own in enumerate(moment.layers):
            assert torch.equal(own.position, n + own.frame * P + own.patch)
            units, places, tokens = (part.tolist() for part in split_ids(own.id.numpy()))
            assert tokens == own.patch.tolist()
            at = torch.tensor(
                [first[unit, block] + token for unit, block, token in zip(units, places, tokens, strict=True)]
            )
            assert torch.equal(at, own.frame * P + own.patch)
            assert torch.equal(stored[layer].k[:, at], own.k)
            assert torch.equal(stored[layer].v[:, at], own.v)
    assert len(set(moments[-1].layers[0].frame.tolist())) > 8, "of more frames than fit as a whole"


def test_with_room_for_everything_it_is_full_attention(tmp_path: Path) -> None:
    """H2 for the recipe."""
    shown = pictures(14)
    ingest(tmp_path / "s", shown, recipe=row(frames=100))
    with reopened(tmp_path / "s") as db:
        report = db.compare_uncut(((at * 1.0, shown[at]) for at in range(14)), "film", QUESTION)
    assert report.relative < 1e-4


# On three position ids


def test_on_three_ids_a_question_meets_the_memory_at_the_ids_of_the_film(tmp_path: Path) -> None:
    """A plain loop over the whole film in which each token sees what its layer's memory held when it came."""
    pairs = 14
    recipe = row("unit.first_frames=6", "unit.frames=3", frames=5)
    with watched_memory() as moments:
        remember(tmp_path / "s", pictures(2 * pairs), recipe=recipe)  # type: ignore[arg-type]
    own, init, prompt = plain_qwen(), qwen().init_ids(INIT_PROMPT), qwen().prompt_ids(QUESTION)
    n, end = len(init), len(init) + pairs * N
    ids = ids_by_hand(n, pairs, len(prompt), step=4.0)
    begins = [n, *(n + (6 + 3 * unit) * N for unit in range(3))]  # of the units, the last one of two pairs
    assert len(moments) == len(begins)
    assert all(len(layer.id) == 5 * N for layer in moments[-1].layers)
    for layer in moments[-1].layers:
        place = layer.view((ROWS, COLUMNS), None).patch
        assert torch.equal(n + layer.frame // 2 * N + place[:, 0] * COLUMNS + place[:, 1], layer.position)

    def seen(layer: int, token: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(token + 1)
        if token >= n:
            unit = len(moments) if token >= end else sum(token >= begin for begin in begins) - 1
            held = moments[unit - 1].layers[layer].position if unit else tokens[:0]
            tokens = torch.cat((tokens[:n], held, tokens[end if token >= end else begins[unit] :]))
        return tokens, (ids[:, token : token + 1] - ids[:, tokens]).T

    embeddings = torch.cat((own.embed(init), own.see(pictures(2 * pairs)).flatten(0, 1), own.embed(prompt)))
    with reopened(tmp_path / "s") as db:
        found = db._asking().question_logits("film", QUESTION)[1]
    assert relative(found, own.loop(embeddings, seen)[end:]) < 1e-4


def test_a_budget_in_frames_is_of_frames_as_the_reducer_leaves_them() -> None:
    model = small_model("random:0")
    for settings, tokens in (((), P), (("reduce=ctr", "reduce.tokens=3", "retain.pooling=none"), 3)):
        written = written_out(row(*settings, frames=10), model, P)
        assert written.retain.params["budget_tokens"] == 10 * tokens
        compose(written).check_frames(P)
