"""A bounded memory from its encoder through the store to a question: budget, moments, exactness, causality."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.ingest.frames import SeenFrame
from memdb.ingest.layer_tokens import chunk_words, layers_together
from memdb.ingest.memory import EncoderMemory
from memdb.ingest.reduce.ctr import CausalTemporal
from memdb.memory import remembered
from memdb.models.window import LayerKV
from memdb.retain import BOUNDED
from memdb.retain.prototypes import prototypes
from memdb.retain.recent import Recent
from memdb.retain.template import Template
from memdb.retain.view import LayerView
from memdb.schemas.errors import RecipeError
from memdb.schemas.keep import split_ids
from memdb.schemas.recipe import Stage
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import BlockKind
from memdb.store import Store
from tests.memory_cases import (
    BUDGET,
    CLIP,
    FRAME_TOKENS,
    METHODS,
    live_context,
    live_scores,
    memory_recipe,
    remembered_film,
    same_keep,
)
from tests.model_cases import (
    INIT_PROMPT,
    NS,
    QUESTION,
    ingest,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    turn,
    wrapped,
)
from tests.store_cases import directory_digest

FRAMES = 14  # four clips of three and one of two


# What its tokens are


def test_tokens_that_ctr_left_know_the_patches_that_they_stood_at(tmp_path: Path) -> None:
    """From the reducer through many rounds of a retainer that compares patches; their blocks are groups."""
    recipe = memory_recipe("tar_van", 40).with_stage("reduce", Stage("ctr", {"tokens": 5}))
    recipe = recipe.with_stage("retain", recipe.retain.with_params(pooling="none"))
    stood: dict[int, list[int]] = {}
    reduce = CausalTemporal.reduce

    def reducing(self: CausalTemporal, *given: Any, numbers: list[int], **more: Any) -> Any:
        tokens, raster = reduce(self, *given, numbers=numbers, **more)
        stood.update(zip(numbers, raster.tolist(), strict=True))
        return tokens, raster

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CausalTemporal, "reduce", reducing)
        moments = remembered_film(tmp_path / "s", pictures(FRAMES), recipe)
    assert sorted(stood) == list(range(FRAMES))
    assert len({tuple(raster) for raster in stood.values()}) > 1
    for layer in moments[-1].layers:
        assert len(layer.id) == 40
        assert set(layer.kind.tolist()) == {int(BlockKind.GROUP)}
        token = (layer.id & 0xFFFF).tolist()
        numbers = layer.frame.tolist()
        assert layer.patch.tolist() == [stood[number][at] for number, at in zip(numbers, token, strict=True)]
    with reopened(tmp_path / "s") as db:
        for mode in ("kv", "recent"):
            assert db.ask(QUESTION, mode=mode).evidence, mode


@pytest.mark.parametrize("raster", [None, torch.tensor([1, 4, 7])])
def test_what_was_merged_of_several_frames_stands_for_no_patch(raster: torch.Tensor | None) -> None:
    alone = SeenFrame(4, 0, NS, torch.zeros(3, 1), b"", raster=raster)
    merged = SeenFrame(5, NS, 4 * NS, torch.zeros(3, 1), b"", raster=raster, count=3)
    ids, position, number, patch, kind = chunk_words(2, [alone, merged], 10, torch.device("cpu"))
    assert ids.tolist() == [(2 << 32) | (block << 16) | at for block in range(2) for at in range(3)]
    assert position.tolist() == [10, 11, 12, 13, 14, 15]
    assert number.tolist() == [4, 4, 4, 5, 5, 5]
    assert patch.tolist() == [*([0, 1, 2] if raster is None else [1, 4, 7]), -1, -1, -1]
    assert set(kind.tolist()) == {int(BlockKind.FRAME if raster is None else BlockKind.GROUP)}


# The budget, at every moment


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(METHODS),
    budget=st.integers(8, 60),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_no_layer_ever_holds_more_than_the_budget(
    name: str, budget: int, chunks: list[int], seed: int
) -> None:
    """Of any stream of chunks, prototypes included; and what is held came in, once, and was never dropped before."""
    made, L, H, D, N = torch.Generator().manual_seed(seed), 3, 2, 4, 4
    options = {"bucket_tokens": 1} if name == "vision_sink" else {}
    retainer = BOUNDED[name](budget_tokens=budget, **options)
    init = [LayerKV(torch.randn(H, 2, D), torch.randn(H, 2, D)) for _ in range(L)]
    memory = EncoderMemory(init, retainer)
    number, start = 0, 2
    seen: list[set[int]] = [set() for _ in range(L)]
    for unit, count in enumerate(chunks):
        T = count * N
        frames = [
            SeenFrame(number + at, (number + at) * NS, (number + at + 1) * NS, torch.zeros(N, 1), b"")
            for at in range(count)
        ]
        fresh = [
            LayerKV(torch.randn(H, T, D, generator=made), torch.randn(H, T, D, generator=made))
            for _ in range(L)
        ]
        heard = [
            torch.rand(len(layer.id) + T, generator=made)
            for layer in memory.layers
            if name in ("template", "vision_sink")
        ]
        before = [set(layer.id.tolist()) for layer in memory.layers]
        made_of = None
        if name == "template":
            at, paid = torch.arange(T), torch.stack([one[-T:] for one in heard])
            k, v = torch.stack([kv.k for kv in fresh]), torch.stack([kv.v for kv in fresh])
            made_of = prototypes(k, v, paid, number + at // N, start + at)
        memory.take(unit, frames, layers_together(fresh), made_of, heard, start, (2, 2))
        for layer, own in enumerate(memory.layers):
            ids = own.id.tolist()
            new = {(unit << 32) | (block << 16) | token for block in range(count) for token in range(N)}
            if name == "template":  # a block of one token for each frame, behind those of the frames
                new |= {(unit << 32) | (block << 16) for block in range(count, 2 * count)}
            assert len(ids) == len(set(ids)) == min(budget, len(before[layer]) + len(new))
            assert set(ids) <= before[layer] | new
            assert not new & seen[layer]
            seen[layer] |= new
            assert own.position.tolist() == sorted(own.position.tolist())
            # Every token still knows where it is from.
            for token_id, position, frame, patch in zip(
                ids, own.position.tolist(), own.frame.tolist(), own.patch.tolist(), strict=True
            ):
                if patch < 0:
                    assert token_id & 0xFFFF == 0
                    assert 2 + frame * N <= position < 2 + (frame + 1) * N
                else:
                    assert position == 2 + frame * N + patch
                    assert token_id & 0xFFFF == patch
        assert all(torch.equal(a.k, b.k) for a, b in zip(memory.init, init, strict=True)), "init tokens stay"
        number, start = number + count, start + T


@dataclass(frozen=True)
class Looking(Template):
    """The same choice, by one that is given keys and values in order."""

    looks: ClassVar[bool] = True

    def order(self, view: LayerView) -> torch.Tensor:
        assert bool((view.position.diff(dim=-1) >= 0).all())
        assert not view.k.isnan().any()
        return super().order(view)


@dataclass(frozen=True)
class Wrong(Recent):
    """Chooses a token twice."""

    def choose(self, view: LayerView) -> torch.Tensor:
        return super().choose(view).clamp(max=3)


def chunk_for(memory: EncoderMemory, unit: int, made: torch.Generator, N: int = 4) -> tuple[Any, ...]:
    """Two frames of N random tokens with their prototypes, as `take` has them."""
    L, (H, _, D) = len(memory.init), memory.init[0].k.shape
    frames = [SeenFrame(n, n * NS, (n + 1) * NS, torch.zeros(N, 1), b"") for n in (2 * unit, 2 * unit + 1)]
    fresh = [LayerKV(*torch.randn(2, H, 2 * N, D, generator=made)) for _ in range(L)]
    heard = [torch.rand(len(layer.id) + 2 * N, generator=made) for layer in memory.layers]
    k, v = torch.stack([kv.k for kv in fresh]), torch.stack([kv.v for kv in fresh])
    paid, at = torch.stack([own[-2 * N :] for own in heard]), torch.arange(2 * N)
    joined = prototypes(k, v, paid, 2 * unit + at // N, unit * 2 * N + at, [2 * unit, 2 * unit + 1])
    return unit, frames, layers_together(fresh), joined, heard, unit * 2 * N, (2, 2)


def test_keys_and_values_follow_their_tokens_where_the_retainer_does_not_look_at_them() -> None:
    none = [LayerKV(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4))] * 3
    memories = [EncoderMemory(none, method(budget_tokens=20)) for method in (Template, Looking)]
    for unit in range(6):
        for memory in memories:
            memory.take(*chunk_for(memory, unit, torch.Generator().manual_seed(unit)))
        if unit == 3:
            for memory in memories:
                memory.forget([Tombstone(0, 2 * NS, 5 * NS, 99, 0)])
        one, two = (dict(memory.tensors()) for memory in memories)
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
        assert not any(bool(kv.k.isnan().any()) for kv in memories[0].kv)


def test_a_choice_that_cannot_be_is_caught_before_its_keep_set_is_stored() -> None:
    none = [LayerKV(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4))] * 3
    memory = EncoderMemory(none, Wrong(budget_tokens=6))
    unit, frames, fresh, _, _, start, grid = chunk_for(memory, 0, torch.Generator())
    memory.take(unit, frames, fresh, None, [], start, grid)
    with pytest.raises(AssertionError, match="do not ascend"):
        memory.keep_set()


def test_a_memory_that_comes_back_goes_on_as_it_would_have() -> None:
    """What the host knows of it, too: the short-term pool is counted there, and the keep set is at hand."""
    none = [LayerKV(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4))] * 3
    went, back = (EncoderMemory(none, Recent(9, short_frames=2)) for _ in range(2))
    for unit in range(6):
        unit, frames, fresh, _, _, start, grid = chunk_for(went, unit, torch.Generator().manual_seed(unit))
        went.take(unit, frames, fresh, None, [], start, grid)
        if unit > 2:
            back.take(unit, frames, fresh, None, [], start, grid)
            assert same_keep(back.keep_set(), went.keep_set())
            assert [held.start_ns for held in back.frames] == [held.start_ns for held in went.frames]
        back.restore(dict(went.tensors()), went.frame_rows(), torch.device("cpu"))
        assert same_keep(back.keep_set(), went.keep_set())


@pytest.mark.parametrize("name", ["tar_van", "vision_sink"])
def test_layers_of_different_lengths_are_decided_each_for_itself(name: str) -> None:
    """After a forgetting layers hold different counts: each goes on as a memory of its own would, in bits."""
    made, L, H, D, N = torch.Generator().manual_seed(3), 3, 2, 4, 4
    retainer = BOUNDED[name](budget_tokens=20)
    none = [LayerKV(torch.zeros(H, 0, D), torch.zeros(H, 0, D))] * L
    whole, apart = EncoderMemory(none, retainer), [EncoderMemory(none[:1], retainer) for _ in range(L)]
    lengths = set()
    for unit in range(8):
        frames = [
            SeenFrame(number, number * NS, (number + 1) * NS, torch.zeros(N, 1), b"")
            for number in (2 * unit, 2 * unit + 1)
        ]
        fresh = [LayerKV(*torch.randn(2, H, 2 * N, D, generator=made)) for _ in range(L)]
        heard: list[torch.Tensor] = []
        if name == "vision_sink":
            heard = [torch.rand(len(layer.id) + 2 * N, generator=made) for layer in whole.layers]
        whole.take(unit, frames, layers_together(fresh), None, heard, unit * 2 * N, (2, 2))
        for layer, alone in enumerate(apart):
            own = heard[layer : layer + 1]
            alone.take(
                unit, frames, layers_together(fresh[layer : layer + 1]), None, own, unit * 2 * N, (2, 2)
            )
        if unit in (3, 5):
            stone = Tombstone(0, 3 * NS, 5 * NS if unit == 3 else 9 * NS, 99, 0)
            for memory in (whole, *apart):
                memory.forget([stone])
        for layer, alone in zip(whole.layers, apart, strict=True):
            assert torch.equal(layer.id, alone.layers[0].id)
            assert torch.equal(layer.k, alone.layers[0].k)
            assert len(layer.id) <= 20
        lengths.add(len({len(layer.id) for layer in whole.layers}))
        held = {number for layer in whole.layers for number in layer.frame.tolist()}
        assert [frame.start_ns // NS for frame in whole.frames] == sorted(held)
    assert lengths > {1}, "they differed, and came together again"


@pytest.mark.parametrize("name", METHODS)
def test_the_keep_sets_are_what_the_encoder_held(name: str, tmp_path: Path) -> None:
    moments = remembered_film(tmp_path / "s", pictures(FRAMES), memory_recipe(name))
    assert len(moments) == -(-FRAMES // CLIP)
    with Store.open(tmp_path / "s") as store:
        row = store.recording("film")
        for moment, unit in zip(moments, store.units(row.id), strict=True):
            keep = store.read_keep(unit)
            assert keep is not None
            assert max(keep.tokens) <= BUDGET
            for layer, own in enumerate(moment.layers):
                order = torch.argsort(own.id)
                assert keep.ids[layer].tolist() == own.id[order].tolist()
                assert keep.positions[layer].tolist() == own.position[order].tolist()
        assert max(keep.tokens) == BUDGET


def test_two_retainers_keep_different_tokens_and_give_different_digests(tmp_path: Path) -> None:
    """No two of the five hold the same sets of one film, and so no two recordings are the same."""
    digests, held = {}, {}
    for name in METHODS:
        moments = remembered_film(tmp_path / name, pictures(FRAMES), memory_recipe(name))
        held[name] = moments[-1].keep
        with reopened(tmp_path / name) as db:
            digests[name] = db.digest("film")["film"]
    assert len(set(digests.values())) == len(METHODS)
    for one, two in itertools.combinations(METHODS, 2):
        assert not same_keep(held[one], held[two]), (one, two)


# Encoding


@pytest.mark.parametrize("frames", [1, 3, 5, 14])
def test_with_room_for_everything_it_is_full_attention(
    frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H2, X6: nothing dropped, nothing quantised, chunks of any length: one forward over [init | frames | prompt]."""
    shown, own, model = pictures(FRAMES), plain(), wrapped()
    decided = record_decisions(monkeypatch)
    ingest(tmp_path / "s", shown, recipe=memory_recipe(budget=4096, frames=frames))
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
        report = db.compare_uncut(((n * 1.0, shown[n]) for n in range(FRAMES)), "film", QUESTION)
    parts = (
        own.embed(model.init_ids(INIT_PROMPT)),
        own.see(shown).flatten(0, 1),
        own.embed(model.prompt_ids(QUESTION)),
    )
    assert relative(decided[0], own.forward(torch.cat(parts))[-1]) < 1e-4
    assert report.relative < 1e-4


@pytest.mark.parametrize("name", ["uniform", "recent", "tar_van"])
def test_a_chunk_is_encoded_against_what_the_memory_holds(name: str, tmp_path: Path) -> None:
    """Each unit's keys and values, by a plain loop in fp64 over [init | memory | chunk] at original positions."""
    shown, own, model = pictures(9), plain(), wrapped()
    moments = remembered_film(tmp_path / "s", shown, memory_recipe(name))
    stored = [_unit_kv(tmp_path / "s", unit) for unit in range(3)]
    n, frames = len(model.init_ids(INIT_PROMPT)), own.see(shown)
    for unit in (1, 2):
        memory = moments[unit - 1].layers
        lengths = {len(layer.id) for layer in memory}
        assert lengths == {min(BUDGET, unit * CLIP * FRAME_TOKENS)}
        M, C = lengths.pop(), CLIP * FRAME_TOKENS
        given = [
            (torch.cat((init.k, layer.k), 1), torch.cat((init.v, layer.v), 1))
            for init, layer in zip(moments[unit].init, memory, strict=True)
        ]
        chunk = frames[unit * CLIP : (unit + 1) * CLIP].flatten(0, 1)
        embeddings = torch.cat((torch.zeros(n + M, chunk.shape[1]), chunk))
        start = n + unit * C
        places = [torch.cat((torch.arange(n), own.position, start + torch.arange(C))) for own in memory]

        def seen(layer: int, x: int, places: Any = places) -> Any:
            tokens = torch.arange(x + 1)
            return tokens, places[layer][x] - places[layer][tokens]

        heard: list[Any] = []
        own.loop(embeddings, seen, given=given, heard=heard, reach=1000)
        for layer, (_, k, v) in enumerate(heard):
            assert relative(stored[unit][layer].k, k[:, n + M :]) < 1e-4
            assert relative(stored[unit][layer].v, v[:, n + M :]) < 1e-4


def _unit_kv(path: Path, unit: int) -> list[LayerKV]:
    """A unit's stored keys and values, a layer each, its frames' only."""
    from memdb.query.stored import Readings, StoredKV
    from memdb.reader import SliceReader

    with Store.open(path) as store, SliceReader(store) as reader:
        row, readings = store.recording("film"), Readings()
        kv = StoredKV(store, row, reader, backend="exact", sim="dot")
        rows = np.flatnonzero((kv.table.blocks["unit"] == unit) & (kv.table.blocks["kind"] == 1))
        found = [
            kv.read(layer, rows, torch.device("cpu"), torch.float32, readings)[0]
            for layer in range(row.spec.model.shape.layers)
        ]
        kv.close()
        assert not readings.bad
        return [layer for layer in found if layer is not None]


# Asking


@pytest.mark.parametrize("name", METHODS)
def test_a_question_of_a_reopened_store_finds_the_encoders_own_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit with codec raw, the prototypes of `template` included, and the same again after another reopen."""
    moments = remembered_film(tmp_path / "s", pictures(FRAMES), memory_recipe(name))
    decided = record_decisions(monkeypatch)
    for _ in range(2):
        with reopened(tmp_path / "s") as db:
            answer = db.ask(QUESTION, mode="kv")
            assert not answer.warnings
    assert torch.equal(decided[0], live_scores(moments[-1]))
    assert torch.equal(decided[0], decided[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_so_in_half_precision_too(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = remembered_film(tmp_path / "s", pictures(FRAMES), memory_recipe("template"), dtype=dtype)
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s", dtype=dtype) as db:
        db.ask(QUESTION, mode="kv")
    assert torch.equal(decided[0], live_scores(moments[-1], dtype=dtype))


def test_int4_is_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is what is asked of; the encoder's own copy stays at compute precision."""
    decided, truth = record_decisions(monkeypatch), {}
    for codec in ("raw", "int8", "int4"):
        moments = remembered_film(tmp_path / codec, pictures(FRAMES), memory_recipe(codec=codec))
        truth[codec] = live_scores(moments[-1])
        with reopened(tmp_path / codec) as db:
            db.ask(QUESTION, mode="kv")
    assert torch.equal(truth["raw"], truth["int4"]), "the codec is no part of the encoding"
    errors = [relative(scores, truth["raw"]) for scores in decided]
    assert errors[0] == 0
    assert 0 < errors[1] < 0.05
    assert errors[1] < errors[2] < 0.5


@pytest.mark.parametrize("name", ["uniform", "template"])
def test_as_of_a_moment_its_own_memory_answers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last unit that had ended by then, and nothing that came later."""
    moments = remembered_film(tmp_path / "s", pictures(FRAMES), memory_recipe(name))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        for unit, moment in enumerate(moments):
            end_s = min(FRAMES, (unit + 1) * CLIP)
            for at in (end_s, end_s + 0.9):
                if at < min(FRAMES, (unit + 2) * CLIP):
                    db.ask(QUESTION, mode="kv", at=at)
                    assert torch.equal(decided[-1], live_scores(moment)), (unit, at)
        row = db.store.recording("film")
        assert remembered(db.store, row, CLIP * NS - 1).keep is None
        assert [remembered(db.store, row, at * NS).unit for at in (3, 5, 6, 14, 99)] == [0, 0, 1, 4, 4]
    assert len(decided) == 2 * len(moments) - 2


def test_x4_the_past_does_not_depend_on_the_future(tmp_path: Path) -> None:
    """Two films that part after nine frames: the units before are the same bytes."""
    shown, other = pictures(FRAMES), pictures(FRAMES, seed=1)
    found = []
    for name, film in (("a", shown), ("b", shown[:9] + other[9:])):
        remembered_film(tmp_path / name, film, memory_recipe("tar_van"))
        with Store.open(tmp_path / name) as store:
            found.append([row.digest for row in store.units(store.recording("film").id)])
    same = [one == two for one, two in zip(*found, strict=True)]
    assert same == [True, True, True, False, False]


def test_x5_a_question_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the directory nor the other question's answer, in whatever order (R10)."""
    remembered_film(tmp_path / "s", pictures(FRAMES), memory_recipe("template"))
    before, decided = directory_digest(tmp_path / "s"), record_decisions(monkeypatch)
    questions = (QUESTION, "Where was the bright square, and what came after it?")
    for order in (questions, questions[::-1]):
        with reopened(tmp_path / "s") as db:
            for text in order:
                db.ask(text, mode="kv")
    assert directory_digest(tmp_path / "s") == before
    assert torch.equal(decided[0], decided[3])
    assert torch.equal(decided[1], decided[2])
    assert not torch.equal(decided[0], decided[1])


def test_mode_both_reads_the_memory_and_the_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[init | memory at its positions | captions behind the largest | prompt]; captions come of the clip's own KV."""
    from memdb.models.decode import prefill

    shown = pictures(FRAMES)
    said = {"encoder": "input-embeddings", "tokens_max": 3, "clips": 0, "prompt": "What is there?"}
    recipe = memory_recipe().with_stage("caption", Stage("blocks", said))
    recipe = recipe.with_stage("retrieve", Stage("all", {"caption_tokens": 400}))
    moments = remembered_film(tmp_path / "both", shown, recipe)
    silent = remembered_film(tmp_path / "silent", shown, memory_recipe())
    for one, two in zip(moments, silent, strict=True):
        assert same_keep(one.keep, two.keep)
        assert all(torch.equal(a.k, b.k) for a, b in zip(one.layers, two.layers, strict=True))
    decided, model = record_decisions(monkeypatch), wrapped()
    with reopened(tmp_path / "both") as db:
        answer = db.ask(QUESTION, mode="both")
        row = db.store.recording("film")
        captions = [db.store.read_caption(unit) for unit in db.store.units(row.id)]
    assert {item.tier for item in answer.evidence} == {"kv", "captions"}
    assert all(caption.token_ids for caption in captions)
    context = live_context(moments[-1])
    used = max(context.lengths)
    assert answer.used.context_tokens > used
    ids = [token for caption in captions for token in caption.token_ids]
    prefill(model, model.embed(ids), context)
    assert torch.equal(decided[0], prefill(model, model.embed(model.prompt_ids(QUESTION)), context))


def test_mode_recent_is_the_newest_frames_whole_at_their_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the memory kept of them it knows nothing."""
    from memdb.models.cache import CacheContext
    from memdb.models.decode import prefill
    from memdb.models.places import Places

    model = wrapped()
    recipe = memory_recipe(budget=32).with_stage("retrieve", Stage("all", {"blocks": 4}))
    moments = remembered_film(tmp_path / "s", pictures(FRAMES), recipe)
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="recent")
    spans = sorted((item.start_s, item.end_s) for item in answer.evidence)
    assert spans == [(10, 12), (12, 14)], "frames of two units"
    n = moments[0].init[0].tokens
    found = [_unit_kv(tmp_path / "s", unit) for unit in (3, 4)]
    kv = [one.part(FRAME_TOKENS).plus(two) for one, two in zip(*found, strict=True)]
    end = n + 14 * FRAME_TOKENS
    places = Places.line(torch.arange(n + 10 * FRAME_TOKENS, end), end)
    context = CacheContext(model.rotary, moments[0].init, kv, places=[places] * 4)
    scores = prefill(model, model.embed(model.prompt_ids(QUESTION)), context)
    assert torch.equal(decided[0], scores)


def test_a_span_takes_what_the_memory_holds_of_it(tmp_path: Path) -> None:
    remembered_film(tmp_path / "s", pictures(FRAMES), memory_recipe())
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv", start_s=3, end_s=6)
        whole = db.ask(QUESTION, mode="kv")
        row = db.store.recording("film")
        keep = remembered(db.store, row).keep
        assert keep is not None
        units, _, _ = split_ids(keep.ids[0])
        expected = int((units == 1).sum())  # frames 3 to 5 are unit 1
    used = [one.used.context_tokens for one in (answer, whole)]
    assert used[1] - used[0] == BUDGET - expected
    assert all(item.start_s >= 3 and item.end_s <= 6 for item in answer.evidence)


def test_the_plan_knows_the_size_and_a_budget_that_is_too_small_takes_another_mode(tmp_path: Path) -> None:
    recipe = memory_recipe().with_stage("retrieve", Stage("all", {"blocks": 1}))
    remembered_film(tmp_path / "s", pictures(FRAMES), recipe)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
        predicted = answer.plan.predicted
        assert predicted.context_tokens >= answer.used.context_tokens
        assert predicted.context_tokens - answer.used.context_tokens <= answer.plan.sizes.answer_tokens
        assert predicted.read_bytes >= answer.used.read_bytes
        small = predicted.context_tokens - BUDGET + FRAME_TOKENS  # one frame fits, the memory does not
        other = db.ask(QUESTION, mode="auto", context_tokens_max=small)
        assert other.plan.mode == "recent"
        assert other.used.context_tokens <= small
        rejected = {item.mode: item.why for item in other.plan.rejected}
        assert f"more than {small}" in rejected["kv"]


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_is_a_bound_for_the_newest_frames_as_well(name: str, tmp_path: Path) -> None:
    """Prototypes are blocks of one token: they must not make frames look small."""
    remembered_film(tmp_path / "s", pictures(FRAMES), memory_recipe(name))
    with reopened(tmp_path / "s") as db:
        least = db.ask(QUESTION, mode="recent").used.context_tokens - FRAMES * FRAME_TOKENS
        for room in (least + 3 * FRAME_TOKENS + 20, least + 6 * FRAME_TOKENS + 20):
            answer = db.ask(QUESTION, mode="recent", context_tokens_max=room)
            assert answer.used.context_tokens <= answer.plan.predicted.context_tokens <= room


# Composing


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (memory_recipe("tar_van", 31), "budget_tokens = 31 is too small for frames of 16 tokens: give at least 32"),
        (memory_recipe("recent", 0), "retain.budget_tokens = 0 is too small: give at least 1"),
        (memory_recipe("template", probe="none"), "(R18): retain 'template' looks at the importance of a probe"),
        (memory_recipe("uniform", probe="template"), "(R18): retain 'uniform' looks at none"),
        (memory_recipe("template", probe="text"), "give both, or neither"),
        (memory_recipe("template", probe="ears"), "choose one of none, text, template, recent"),
        (memory_recipe("vision_sink", probe="recent"), "give both, or neither"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_when_composed(recipe: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        ingest(tmp_path / "s", pictures(1), recipe=recipe)
    assert says in str(caught.value)
    assert not (tmp_path / "s" / "segments").exists() or not list((tmp_path / "s" / "segments").iterdir())


def test_policy_and_budget_are_part_of_the_encoding(tmp_path: Path) -> None:
    """R8: stored KV depends on them, so a recording does not go on under others."""
    from memdb.schemas.errors import EncodingMismatch

    ingest(tmp_path / "s", pictures(6), recipe=memory_recipe("uniform"))
    for other in (memory_recipe("uniform", BUDGET + 1), memory_recipe("recent"), memory_recipe(frames=2)):
        with pytest.raises(EncodingMismatch):
            ingest(tmp_path / "s", pictures(9), recipe=other)


# Probes


@pytest.mark.parametrize("name", ["template", "vision_sink"])
def test_what_a_probe_pays_is_the_softmax_of_its_rows(name: str, tmp_path: Path) -> None:
    """Of the second chunk: rows of whole attention in fp64 over [init | memory | chunk], mean over heads and rows."""
    shown, own, model = pictures(6), plain(), wrapped()
    heard: list[list[torch.Tensor]] = []
    take = EncoderMemory.take

    def hearing(self: EncoderMemory, *rest: Any) -> None:
        heard.append(list(rest[4]))
        take(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncoderMemory, "take", hearing)
        moments = remembered_film(tmp_path / "s", shown, memory_recipe(name))
    n, C = len(model.init_ids(INIT_PROMPT)), CLIP * FRAME_TOKENS
    memory = moments[0].layers
    M = len(memory[0].id)
    chunk = own.see(shown)[CLIP:].flatten(0, 1)
    if name == "template":
        chunk = torch.cat((chunk, own.embed(model.prompt_ids(""))))
    given = [
        (torch.cat((init.k, layer.k), 1), torch.cat((init.v, layer.v), 1))
        for init, layer in zip(moments[1].init, memory, strict=True)
    ]
    places = [torch.cat((torch.arange(n), one.position, n + C + torch.arange(len(chunk)))) for one in memory]

    def seen(layer: int, x: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.arange(x + 1)
        return tokens, places[layer][x] - places[layer][tokens]

    computed: list[Any] = []
    own.loop(
        torch.cat((torch.zeros(n + M, chunk.shape[1]), chunk)), seen, given=given, heard=computed, reach=1000
    )
    rows = range(n + M + C, n + M + len(chunk)) if name == "template" else range(n + M + C - 8, n + M + C)
    for layer, (q, k, _) in enumerate(computed):
        wide = k.repeat_interleave(own.heads // own.kv_heads, 0)
        total = torch.zeros(n + M + C, dtype=torch.float64)
        for row in rows:
            keys = min(row + 1, n + M + C)  # a probe's own tokens are none of the memory's
            cos, sin = own.angles(places[layer][row] - places[layer][:keys])
            scores = (turn(q[:, row : row + 1], cos, sin) * wide[:, :keys]).sum(-1) / np.sqrt(own.head_size)
            total[:keys] += scores.softmax(-1).mean(0)
        assert relative(heard[1][layer], (total / len(rows))[n:]) < 1e-4


def test_r19_probe_text_leaves_nothing_behind(tmp_path: Path) -> None:
    """The same selections under another probe: what is stored and remembered is that of a run without one."""
    model, shown = wrapped(), pictures(FRAMES)
    texts = ["Keep what is said.", "Keep people, things and their colours, and count them, please."]
    runs = []
    for at, text in enumerate([*texts, None]):
        probe = {"probe": "none"} if text is None else {"probe": "text", "probe_text": text}
        retain = "uniform" if text is None else "template"
        recipe = memory_recipe(retain, 4096, **probe)  # room for everything: nothing is selected
        moments = remembered_film(tmp_path / str(at), shown, recipe)
        runs.append([_unit_kv(tmp_path / str(at), unit) for unit in range(len(moments))])
        frames = [layer.id[layer.kind == 1] for layer in moments[-1].layers]
        assert all(len(ids) == FRAMES * FRAME_TOKENS for ids in frames)
        assert all(int(layer.position.max()) < len(model.init_ids(INIT_PROMPT)) + FRAMES * FRAME_TOKENS
                   for layer in moments[-1].layers)  # fmt: skip
    # Prototypes are in the memory of the first two, so that only the first chunk sees the same in all three.
    for one, two in zip(runs[0][0], runs[2][0], strict=True):
        assert relative(one.k, two.k) < 1e-5
        assert relative(one.v, two.v) < 1e-5
