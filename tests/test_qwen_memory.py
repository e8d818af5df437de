"""A bounded memory, and frames that CTR reduced, on a model of three position ids a token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface

from memdb.digest import unit_digest
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.stages import compose
from memdb.models.cache import CacheContext
from memdb.models.decode import prefill
from memdb.models.places import LINE, Grid, Next, Places
from memdb.recipes import REKV
from memdb.schemas.errors import RecipeError
from memdb.schemas.recipe import Recipe, Stage
from tests.memory_cases import CLIP, Moment, memory_recipe, watched_memory
from tests.model_cases import INIT_PROMPT, NS, QUESTION, pictures, record_decisions, relative, reopened
from tests.qwen_cases import COLUMNS, ROWS, N, Seen, ids_by_hand, plain_qwen, qwen, remember

RAW = 21  # frames, the last without its partner
PAIRS = 11
BOUND = 1e-4


def logits_of(store: Path) -> Tensor:
    with reopened(store) as db:
        return db._asking().question_logits("film", QUESTION)[1]


def remembered(store: Path, recipe: Recipe) -> list[Moment]:
    with watched_memory() as moments:
        remember(store, pictures(RAW), recipe=recipe)  # type: ignore[arg-type]
    return moments


# Places


@settings(deadline=None, database=None)
@given(
    start=st.integers(0, 40),
    frames=st.integers(1, 9),
    tokens=st.integers(1, 12),
    step=st.fractions(min_value=0, max_value=9, max_denominator=50),
)
def test_ids_follow_from_positions_as_they_are_streamed(start: int, frames: int, tokens: int, step) -> None:  # type: ignore[no-untyped-def]
    grid = Grid(3, 4, step)
    positions = start + torch.arange(frames * tokens)
    streamed = grid.streamed(start, 0, [tokens] * frames)
    assert torch.equal(grid.at(start, positions, tokens), streamed)
    some = positions[:: max(1, tokens // 2)]  # whatever was dropped
    assert torch.equal(grid.at(start, some, tokens), streamed[:, some - start])
    assert LINE.at(start, positions, tokens) is positions


# The memory


@pytest.mark.parametrize("retain", ["uniform", "tar_van", "vision_sink"])
@pytest.mark.parametrize("budget", [20, 1000])
def test_a_question_meets_the_memory_at_the_ids_of_the_film(retain: str, budget: int, tmp_path: Path) -> None:
    """A plain loop over the whole film in which each token sees what its layer's memory held when it came."""
    moments = remembered(tmp_path / "s", memory_recipe(retain, budget))
    own, init, prompt = plain_qwen(), qwen().init_ids(INIT_PROMPT), qwen().prompt_ids(QUESTION)
    n, first = len(init), len(init) + PAIRS * N
    ids = ids_by_hand(n, PAIRS, len(prompt), step=4.0)
    seen_frames = own.see(pictures(RAW)).flatten(0, 1)
    embeddings = torch.cat((own.embed(init), seen_frames, own.embed(prompt)))
    assert len(moments) == 4
    assert any(len(layer.position) < PAIRS * N for layer in moments[-1].layers) == (budget < PAIRS * N)

    def seen(layer: int, token: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(token + 1)
        if token >= n:
            unit, begin = len(moments), first
            if token < first:
                unit = (token - n) // (CLIP * N)
                begin = n + unit * CLIP * N
            held = moments[unit - 1].layers[layer].position if unit else tokens[:0]
            tokens = torch.cat((tokens[:n], held, tokens[begin:]))
        return tokens, (ids[:, token : token + 1] - ids[:, tokens]).T

    truth: Seen = seen
    assert relative(logits_of(tmp_path / "s"), own.loop(embeddings, truth)[first:]) < BOUND


def test_where_nothing_is_dropped_it_is_transformers_own_forward(tmp_path: Path) -> None:
    """From their vision and at their ids, in one forward."""
    remembered(tmp_path / "s", memory_recipe("uniform", 1000))
    own, init, prompt = plain_qwen(), qwen().init_ids(INIT_PROMPT), qwen().prompt_ids(QUESTION)
    embeddings = torch.cat((own.embed(init), own.see(pictures(RAW)).flatten(0, 1), own.embed(prompt)))
    truth = own.forward(embeddings, ids_by_hand(len(init), PAIRS, len(prompt), step=4.0))
    assert relative(logits_of(tmp_path / "s"), truth[-len(prompt) :]) < BOUND


@pytest.mark.parametrize("retain", ["tar_van", "template"])
def test_a_retainer_sees_rows_and_columns_of_the_grid(retain: str, tmp_path: Path) -> None:
    """Every token knows the patch that it stood at, after every chunk; prototypes stand for none."""
    moments = remembered(tmp_path / "s", memory_recipe(retain, 20))
    n = moments[0].init[0].tokens
    for layer in moments[-1].layers:
        whole = layer.patch >= 0
        assert torch.equal(layer.patch[whole], (layer.position[whole] - n) % N)
        place = layer.view((ROWS, COLUMNS), None).patch[whole]
        assert torch.equal(place[:, 0] * COLUMNS + place[:, 1], layer.patch[whole])
    assert any((layer.patch < 0).any() for layer in moments[-1].layers) == (retain == "template")


def test_memory_and_captions_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[init | memory at its ids | captions | prompt], text behind the largest id of any layer."""
    said = {"encoder": "input-embeddings", "tokens_max": 3, "clips": 0, "prompt": "What is there?"}
    recipe = memory_recipe("uniform", 20).with_stage("caption", Stage("blocks", said))
    recipe = recipe.with_stage("retrieve", Stage("all", {"caption_tokens": 400}))
    moments, decided, model = remembered(tmp_path / "s", recipe), record_decisions(monkeypatch), qwen()
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="both")
        row = db.store.recording("film")
        captions = [db.store.read_caption(unit) for unit in db.store.units(row.id)]
    assert {item.tier for item in answer.evidence} == {"kv", "captions"}
    n, ids = moments[-1].init[0].tokens, ids_by_hand(moments[-1].init[0].tokens, PAIRS, 0, step=4.0)
    layers = [layer.position for layer in moments[-1].layers]
    end = Next(max(int(own.max()) for own in layers) + 1, max(int(ids[:, own].max()) for own in layers) + 1)
    context = CacheContext(
        model.rotary,
        moments[-1].init,
        [layer.kv for layer in moments[-1].layers],
        places=[Places(own, ids[:, own], end) for own in layers],
    )
    assert n + 20 == max(context.lengths)
    prefill(model, model.embed([token for caption in captions for token in caption.token_ids]), context)
    assert torch.equal(decided[0], prefill(model, model.embed(model.prompt_ids(QUESTION)), context))


@pytest.mark.parametrize("reduce", [Stage("identity"), Stage("ctr", {"tokens": 4})])
def test_state_and_restore_are_exact(reduce: Stage) -> None:
    """Units that a restored encoder gives are those of one that went on, keep sets included."""
    recipe, model = memory_recipe("tar_van", 20).with_stage("reduce", reduce), qwen()
    recipe = recipe.with_stage("retain", recipe.retain.with_params(pooling="none"))

    def encoder() -> StreamEncoder:
        init = model.init_ids(INIT_PROMPT)
        return StreamEncoder(model, compose(recipe), init, None, sample_fps=1.0, grid=(ROWS, COLUMNS), seed=3)

    frames = [
        ReadyFrame(number, number * NS, (number + 1) * NS, model.prepare(picture, (ROWS, COLUMNS)), picture)
        for number, picture in enumerate(pictures(RAW))
    ]
    goes_on, restored = encoder(), encoder()
    goes_on.step(frames[:8])
    restored.restore(goes_on.state())
    assert restored.state() == goes_on.state()
    assert restored.reach_ns == goes_on.reach_ns == 0
    found = [[*one.step(frames[8:16]), *one.step(frames[16:]), *one.finish()] for one in (goes_on, restored)]
    assert len(found[0]) == 3
    assert [unit_digest(unit) for unit in found[0]] == [unit_digest(unit) for unit in found[1]]


# Frames that CTR reduced


@torch.inference_mode()
def looked_at_by_transformers(shown: list[np.ndarray]) -> Tensor:
    """(F, N) by the probabilities of the last vision layer, as an attention function of our own is asked for them."""
    visual, heard, states = plain_qwen().network.model.visual, [], []

    def attention(module, query, key, value, attention_mask, scaling, **more):  # type: ignore[no-untyped-def]
        rows = (query.double() @ key.double().transpose(2, 3) * scaling).softmax(-1)  # (1, heads, P, P)
        heard.append((module, rows))
        return (rows @ value.double()).to(value.dtype).transpose(1, 2), None

    AttentionInterface.register("noted", attention)
    before = visual.config._attn_implementation
    hook = visual.merger.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    visual.set_attn_implementation("noted")
    try:
        pixels, grid = plain_qwen().patches(shown)
        raster = visual(pixels, grid_thw=grid).pooler_output
    finally:
        visual.set_attn_implementation(before)
        hook.remove()
    frames, patches = int(grid[0, 0]), 4 * N
    last = [rows for module, rows in heard if module is visual.blocks[-1].attn]
    means = torch.cat([rows.mean(1).sum(1)[0] / patches for rows in last])  # (F * P,)
    tokens = means.view(-1, 4).mean(-1)  # in the tower's own order
    order = torch.cdist(raster.double(), states[0].double()).argmin(-1)
    assert len(set(order.tolist())) == frames * N
    return tokens[order].view(frames, N)


@pytest.mark.parametrize("full", [True, False])
def test_saliency_is_the_attention_of_the_last_vision_layer(full: bool) -> None:
    """Over a whole pair of frames, or window by window where the last layer has windows; in raster order."""
    model, shown = qwen(), pictures(5)
    towers = [model._network.model.visual, plain_qwen().network.model.visual]
    before = [tower.fullatt_block_indexes for tower in towers]
    try:
        for tower in towers:
            tower.fullatt_block_indexes = before[0] if full else []
        prepared = [model.prepare(picture, (ROWS, COLUMNS)) for picture in shown]
        tokens, found = model.salient_tokens(prepared)
        assert torch.equal(tokens, model.visual_tokens(prepared))
        truth = looked_at_by_transformers(shown)  # type: ignore[arg-type]
    finally:
        for tower, indexes in zip(towers, before, strict=True):
            tower.fullatt_block_indexes = indexes
    assert found.shape == (3, N)
    assert found.dtype == torch.float32
    assert torch.allclose(4 * found.sum(-1), torch.ones(3)), "every row of probabilities sums to 1"
    assert relative(found, truth) < 1e-5
    assert float(found.std()) > 1e-3 * float(found.mean()), "it is not flat"


@pytest.mark.parametrize("bounded", [False, True])
def test_reduced_frames_go_through_window_or_memory_to_an_answer(bounded: bool, tmp_path: Path) -> None:
    recipe = memory_recipe("uniform", 10) if bounded else REKV
    recipe = recipe.with_stage("reduce", Stage("ctr", {"tokens": 4}))
    remember(tmp_path / "s", pictures(RAW), recipe=recipe)  # type: ignore[arg-type]
    with reopened(tmp_path / "s") as db:
        for mode in ("kv", "recent"):
            answer = db.ask(QUESTION, mode=mode)
            assert answer.evidence, mode
            assert not answer.warnings


def test_more_tokens_than_the_grid_has_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The grid of this film has six; the model could have more."""
    asked = REKV.with_stage("reduce", Stage("ctr", {"tokens": 7}))
    with pytest.raises(RecipeError, match="a frame of this model has 6"):
        remember(tmp_path / "s", pictures(3), recipe=asked)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="give at least 12"):
        remember(tmp_path / "s", pictures(3), recipe=memory_recipe("tar_van", 11))  # type: ignore[arg-type]
