"""Reference tests of StreamKV (arXiv 2511.07278): K1 to K7 through a store, against loops written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import memdb
from memdb.digest import unit_digest
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.stages import compose
from memdb.query import engine
from memdb.query.retrieve.layer_adaptive import LayerAdaptive
from memdb.query.stored import Readings, StoredKV
from memdb.reader import SliceReader
from memdb.recipes import recipe
from memdb.retain.select_kv import SelectKV, exact_counts
from memdb.retain.select_kv_code import code_retrieve_counts
from memdb.schemas.errors import RecipeError
from memdb.schemas.rows import UnitRow
from memdb.schemas.units import BlockKind
from tests.model_cases import (
    NS,
    QUESTION,
    ingest,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    windowed,
    wrapped,
)
from tests.store_cases import directory_digest

N = 16  # tokens a frame of the tiny model
WINDOW = 80  # five frames
THETA = 0.9  # the noise of `pictures` falls into segments of 4 to 6 frames
SMALL = (
    f"unit.theta={THETA}",
    "encode.chunk_frames=4",
    f"encode.window_tokens={WINDOW}",
    "answer.tokens_max=1",
)
SHOWN = 14


def film(store: Path, *settings: str, shown: Sequence[Any] | None = None, **more: Any) -> None:
    frames = pictures(SHOWN) if shown is None else shown
    ingest(store, frames, recipe="streamkv", codec="raw", settings=[*SMALL, *settings], **more)


def units_of(store: Path) -> list[UnitRow]:
    with reopened(store) as db:
        return db.store.units(db.store.recording("film").id)


def kept(unit: UnitRow) -> list[list[int]]:
    """Per layer the blocks of a unit that it holds."""
    layers = wrapped().shape.layers
    return [unit.slices["block"][unit.slices["layer"] == layer].tolist() for layer in range(layers)]


# K1, K2: segments as they are stored


def test_k1_segments_end_at_the_cuts_and_carry_a_summary_each(tmp_path: Path) -> None:
    a, b, c, d = pictures(4, seed=3)
    shown = [a] * 5 + [b] * 2 + [c] * 6 + [d] * 2  # the cut behind b comes too early for a segment of four
    film(tmp_path / "s", "unit.theta=0.9999", shown=shown)
    spans = [(unit.start_ns // NS, unit.end_ns // NS) for unit in units_of(tmp_path / "s")]
    assert spans == [(0, 5), (5, 13), (13, 15)]
    position = 0
    for unit in units_of(tmp_path / "s"):
        *frames, summary = unit.blocks
        assert {int(frame["kind"]) for frame in frames} == {BlockKind.FRAME}
        assert (int(summary["kind"]), int(summary["tokens"])) == (BlockKind.SUMMARY, N)
        assert (int(summary["start_ns"]), int(summary["end_ns"])) == (unit.start_ns, unit.end_ns)
        position = position or int(frames[0]["position"])
        for block in unit.blocks:  # a summary has places of its own
            assert int(block["position"]) == position
            position += N


def test_k2_a_long_scene_is_few_frames_over_all_of_its_time(tmp_path: Path) -> None:
    film(tmp_path / "s", "unit.frames_max=6", "retain=all", shown=pictures(1) * 20)
    [unit] = units_of(tmp_path / "s")
    frames = unit.blocks[unit.blocks["kind"] == BlockKind.FRAME]
    assert len(frames) == 6
    ends = [0, *(frames["end_ns"] // NS).tolist()]
    assert ends[:-1] == (frames["start_ns"] // NS).tolist()
    assert ends[-1] == 20


# K3, K4, K5, K6: what is stored is what plain loops say


@dataclass
class Plain:
    """The stream of a film by the formulas: tokens of its segments, what they give, and what is kept of it."""

    segments: list[list[int]]
    k: list[Tensor]  # a layer each (H, T, D), fp64, of init, frames and summaries
    v: list[Tensor]
    dots: list[list[Tensor]] = field(default_factory=list)  # a segment, a layer: (frames,) fp32
    cosines: list[list[Tensor]] = field(default_factory=list)


@lru_cache(maxsize=1)
def plain_stream(segments: tuple[tuple[int, ...], ...]) -> Plain:
    """[init | frames, mean | frames, mean | ...] in a window, and each segment read by the guidance prompt alone."""
    own, model = plain(), wrapped()
    row = recipe("streamkv")
    init = own.embed(model.init_ids(str(row.encode.params["init_prompt"])))
    seen = own.see(pictures(SHOWN))  # (F, N, E)
    parts = [init]
    for segment in segments:
        frames = seen[list(segment)]
        parts += [frames.flatten(0, 1), frames.double().mean(0)]
    whole, prompt = torch.cat(parts), own.embed(model.encode_text(SelectKV().prompt))
    heard: list[tuple[Tensor, Tensor, Tensor]] = []
    own.loop(whole, windowed(len(init), WINDOW), heard=heard)
    found = Plain([list(segment) for segment in segments], [k for _, k, _ in heard], [v for _, _, v in heard])
    at = len(init)
    group = own.heads // own.kv_heads
    for segment in segments:
        first, size = at, (len(segment) + 1) * N
        asked: list[tuple[Tensor, Tensor, Tensor]] = []

        def reads(layer: int, x: int, size: int = size) -> tuple[Tensor, Tensor]:
            tokens = torch.arange(x + 1) if x >= size else torch.tensor([x])  # those of the segment are given
            tokens = tokens[x - tokens < WINDOW]
            return tokens, x - tokens

        given = [(k[:, at : at + size], v[:, at : at + size]) for _, k, v in heard]
        own.loop(torch.cat((whole[at : at + size], prompt)), reads, given=given, heard=asked)
        dots, cosines = [], []
        for q, k, _ in asked:
            query = q[:, size:].mean(1).flatten()  # (Hq*D,)
            dot, length = [], []
            for frame in range(len(segment)):
                mean = k[:, frame * N : (frame + 1) * N].mean(1)  # (H, D)
                wide = mean.repeat_interleave(group, 0).flatten()
                dot.append(query @ wide)
                length.append(query.norm() * wide.norm())
            dots.append(torch.stack(dot).float())
            cosines.append((torch.stack(dot) / torch.stack(length)).float())
        found.dots.append(dots)
        found.cosines.append(cosines)
        at = first + size
    return found


@pytest.mark.parametrize("mode", ["fixed", "paper", "code"])
@pytest.mark.parametrize("keep", [0.5, 0.01])
def test_k3_k4_each_layer_keeps_the_frames_that_the_guidance_prompt_asks_for(
    mode: str, keep: float, tmp_path: Path
) -> None:
    film(tmp_path / "s", f"retain.keep={keep}", f"retain.mode={mode}")
    units = units_of(tmp_path / "s")
    segments = tuple(tuple(range(unit.start_ns // NS, unit.end_ns // NS)) for unit in units)
    assert len(segments) > 2
    truth = plain_stream(segments)
    scored = truth.dots if mode == "code" else truth.cosines
    for unit, segment, scores in zip(units, segments, scored, strict=True):
        chosen = [own.tolist() for own in SelectKV(keep, mode).choose(scores)]
        assert kept(unit) == [[*own, len(segment)] for own in chosen]  # and the summary in every layer
        if keep == 0.01 and mode != "code":
            assert {len(own) for own in chosen} == {1}
        if mode != "code":
            assert sum(map(len, chosen)) == len(chosen) * math.ceil(round(keep * len(segment), 9))
    sets = [tuple(own) for unit in units for own in kept(unit)]
    assert len(set(sets)) > len(units), "layers keep different frames"


def test_what_is_stored_is_what_the_window_gives_and_nothing_of_the_prompt(tmp_path: Path) -> None:
    """K3: the summary is the mean place by place; R19: the prompt is in no bank and no window."""
    film(tmp_path / "s")
    units = units_of(tmp_path / "s")
    segments = tuple(tuple(range(unit.start_ns // NS, unit.end_ns // NS)) for unit in units)
    truth = plain_stream(segments)
    assert len(truth.k[0][0]) > 2 * WINDOW
    init = len(wrapped().init_ids(str(recipe("streamkv").encode.params["init_prompt"])))
    with reopened(tmp_path / "s") as db, SliceReader(db.store) as reader:
        row, readings = db.store.recording("film"), Readings()
        kv = StoredKV(db.store, row, reader, backend="exact", sim="dot")
        for layer in range(row.spec.model.shape.layers):
            rows = np.flatnonzero(kv.table.holds(layer))
            assert len(rows) < len(kv.table)
            found, _ = kv.read(layer, rows, torch.device("cpu"), torch.float32, readings)
            assert found is not None
            places = torch.cat([init + int(at) * N + torch.arange(N) for at in rows])
            assert relative(found.k, truth.k[layer][:, places]) < 1e-5
            assert relative(found.v, truth.v[layer][:, places]) < 1e-5
        kv.close()
    assert not readings.bad


def encoder(*settings: str) -> StreamEncoder:
    model, row = wrapped(), recipe("streamkv", codec="raw", settings=(*SMALL, *settings))
    init = model.init_ids(str(row.encode.params["init_prompt"]))
    return StreamEncoder(model, compose(row), init, None)


def ready(count: int = SHOWN) -> list[ReadyFrame]:
    shown, model = pictures(count), wrapped()
    return [ReadyFrame(at, at * NS, (at + 1) * NS, model.prepare(own), own) for at, own in enumerate(shown)]


def test_k5_the_prompt_touches_no_bit_of_what_it_does_not_choose() -> None:
    """Prompts of different lengths that choose the same, and none at all: equal windows, states and units."""
    runs = []
    for setting in (
        "retain.prompt=Keep all.",
        "retain.prompt=Keep people, things, and what they do.",
        "retain=all",
    ):
        coder = encoder(*(() if setting == "retain=all" else ("retain.keep=1.0",)), setting)
        units = coder.step(ready())
        runs.append((coder.state(), [unit_digest(unit) for unit in [*units, *coder.finish()]], coder.state()))
    assert runs[0] == runs[1] == runs[2]


# Retrieval, rebuild and answer, K6


@dataclass
class Stored:
    """What a store holds, a layer each: keys and values (H, blocks * N, D), zeros where it holds no block."""

    kv: list[tuple[Tensor, Tensor]]
    held: list[list[int]]


def stored(db: memdb.Client) -> Stored:
    row, found = db.store.recording("film"), Stored([], [])
    shape = row.spec.model.shape
    with SliceReader(db.store) as reader:
        kv = StoredKV(db.store, row, reader, backend="exact", sim="dot")
        for layer in range(shape.layers):
            rows = np.flatnonzero(kv.table.holds(layer))
            k, v = torch.zeros(2, shape.kv_heads, len(kv.table) * N, shape.head_size)
            own, _ = kv.read(layer, rows, torch.device("cpu"), torch.float32, Readings())
            assert own is not None
            places = torch.cat([int(at) * N + torch.arange(N) for at in rows])
            k[:, places], v[:, places] = own.k, own.v
            found.kv.append((k, v))
            found.held.append(rows.tolist())
        kv.close()
    return found


@pytest.mark.parametrize("mode", ["fixed", "paper", "code"])
def test_k6_two_passes_find_what_plain_loops_find_and_answer_from_it(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer its own number of blocks at its own places: the first answer's logits are those of fp64 loops."""
    r, local = 4, 2 if mode == "code" else 0
    changes = (f"retrieve.blocks={r}", f"retrieve.mode={mode}", f"retrieve.local_blocks={local}")
    film(tmp_path / "s", *changes, shown=pictures(10 if mode == "paper" else SHOWN))
    own, model, took, decided = plain(), wrapped(), [], record_decisions(monkeypatch)
    select = LayerAdaptive.select

    def noted(self: LayerAdaptive, *given: Any) -> Any:
        took.append(select(self, *given).tolist())
        return select(self, *given)

    monkeypatch.setattr(LayerAdaptive, "select", noted)
    with reopened(tmp_path / "s") as db:
        before = directory_digest(tmp_path / "s")
        answer = db.ask(QUESTION, mode="kv")
        assert directory_digest(tmp_path / "s") == before
        there = stored(db)
    assert not answer.warnings
    L = model.shape.layers
    init = own.embed(model.init_ids(str(recipe("streamkv").encode.params["init_prompt"])))
    first: list[tuple[Tensor, Tensor, Tensor]] = []
    own.loop(init, windowed(len(init), 1 << 20), heard=first)
    given = [
        (torch.cat((ik, k.double()), 1), torch.cat((iv, v.double()), 1))
        for (_, ik, iv), (k, v) in zip(first, there.kv, strict=True)
    ]
    n, G = len(init), given[0][0].shape[1]
    group, heads = own.heads // own.kv_heads, own.kv_heads

    def read(text: Tensor, choose: Any) -> Tensor:
        """[init | what `choose` gives each layer for its queries | text] through all layers; logits of the text."""
        heard: list[tuple[Tensor, Tensor, Tensor]] = []
        chosen: dict[int, list[int]] = {}

        def seen(layer: int, x: int) -> tuple[Tensor, Tensor]:
            if x < G:
                return torch.tensor([x]), torch.tensor(
                    [0]
                )  # of it only the keys and values that are given count
            if layer not in chosen:
                chosen[layer] = choose(layer, heard[layer][0][:, G:])
            past = [torch.arange(n), *(n + at * N + torch.arange(N) for at in chosen[layer])]
            tokens = torch.cat((*past, torch.arange(G, x + 1)))
            return tokens, torch.arange(len(tokens)).flip(0)  # consecutive places

        blank = torch.zeros(G, text.shape[1], dtype=torch.float64)
        return own.loop(torch.cat((blank, text.double())), seen, given=given, heard=heard)[G:]

    def scored(layer: int, q: Tensor) -> Tensor:
        query, found = q.mean(1).flatten(), []
        for at in there.held[layer]:
            k = there.kv[layer][0][:, at * N : (at + 1) * N].double().mean(1)
            wide = k.view(heads, 1, -1).expand(-1, group, -1).flatten()
            found.append(query @ wide / (1 if mode == "code" else query.norm() * wide.norm()))
        return torch.stack(found)

    def best(layer: int, q: Tensor, count: int) -> list[int]:
        held, scores = there.held[layer], scored(layer, q)
        older = len(held) - min(local, count)
        top = scores[:older].topk(min(older, count - min(local, count))).indices.tolist()
        return sorted([*(held[at] for at in top), *held[older:]])

    question, scores = own.embed(model.encode_text(QUESTION)), [torch.zeros(0)] * L
    passes: list[list[int]] = []

    def first_pass(layer: int, q: Tensor) -> list[int]:
        scores[layer] = scored(layer, q).float()
        passes.append(best(layer, q, r))
        return passes[-1]

    read(question, first_pass)
    if mode == "code":
        counts = code_retrieve_counts(scores, r, 0.5)
    else:
        counts = exact_counts(scores, r * L, z_scores=mode == "fixed", low=2, high=6)
        assert sum(counts) == r * L
    second: dict[int, list[int]] = {}

    def second_pass(layer: int, q: Tensor) -> list[int]:
        second[layer] = best(layer, q, counts[layer])
        return second[layer]

    read(question, second_pass)
    assert took == [*passes, *(second[layer] for layer in range(L))]
    if mode != "paper":  # whose weights are nearly equal
        assert len({len(own) for own in second.values()}) > 1
    logits = read(own.embed(model.prompt_ids(QUESTION)), lambda layer, q: second[layer])
    assert relative(decided[0], logits[-1]) < 1e-4


def test_k7_nothing_dropped_and_no_summary_is_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, own, model = pictures(SHOWN), plain(), wrapped()
    decided = record_decisions(monkeypatch)
    changes = ("retain.keep=1.0", "encode.summary=false", "encode.window_tokens=15000")
    film(tmp_path / "s", *changes)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
        assert answer.plan.sizes.blocks == SHOWN
    prompt = str(recipe("streamkv").encode.params["init_prompt"])
    parts = (
        own.embed(model.init_ids(prompt)),
        own.see(shown).flatten(0, 1),
        own.embed(model.prompt_ids(QUESTION)),
    )
    assert relative(decided[0], own.forward(torch.cat(parts))[-1]) < 1e-4
    assert len(units_of(tmp_path / "s")) > 2


# Budgets, profiles, controls, what cannot be


def test_a_budget_is_a_bound_for_the_layer_that_holds_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[list[int]] = []
    rebuild = engine.rebuild

    def noted(*given: Any) -> Any:
        context = rebuild(*given)
        lengths.append(context.lengths)
        return context

    monkeypatch.setattr(engine, "rebuild", noted)
    film(tmp_path / "s", "retrieve.blocks=6", "retrieve.band=1.0")
    taken, prompt = [], len(wrapped().prompt_ids("What?"))
    for tokens in (130, 180, 260):
        with reopened(tmp_path / "s") as db:
            answer = db.ask("What?", mode="kv", context_tokens_max=tokens)
        predicted = answer.plan.predicted
        assert max(lengths[-1]) + prompt + 1 <= predicted.context_tokens <= tokens
        assert answer.used.read_bytes <= predicted.read_bytes
        assert answer.used.gpu_bytes <= predicted.gpu_bytes
        taken.append(answer.plan.sizes.blocks)
    assert taken == sorted(set(taken)), "room for more is used"


def test_a_damaged_block_is_left_out_and_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes meet it."""
    film(tmp_path / "s", "retrieve.blocks=4", "retain=all")
    [segment] = (tmp_path / "s" / "segments").iterdir()
    data = bytearray(segment.read_bytes())
    with reopened(tmp_path / "s") as db, SliceReader(db.store) as reader:
        kv = StoredKV(db.store, db.store.recording("film"), reader, backend="exact", sim="dot")
        pieces = kv.pieces([0], [np.arange(len(kv.table))]).table
        kv.close()
    for offset in pieces["offset"].tolist():  # the first layer of every block
        data[offset + 5] ^= 1
    segment.write_bytes(data)
    took, select = [], LayerAdaptive.select

    def noted(self: LayerAdaptive, search: Any, layer: int, *given: Any) -> Any:
        rows = select(self, search, layer, *given)
        if layer == 0:
            took.append(set(rows.tolist()))
        return rows

    monkeypatch.setattr(LayerAdaptive, "select", noted)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
    assert len(took) == 2
    assert took[0] & took[1]
    [warning] = answer.warnings
    assert f"and {len(took[0] | took[1]) - 3} more; run memdb verify" in warning


def test_the_newest_blocks_come_first_where_some_are_local(tmp_path: Path) -> None:
    film(tmp_path / "s")
    with reopened(tmp_path / "s") as db, SliceReader(db.store) as reader:
        kv = StoredKV(db.store, db.store.recording("film"), reader, backend="exact", sim="dot")
        allowed, query = np.ones(len(kv.table), bool), np.ones(kv.table.key_size, np.float32)
        held = np.flatnonzero(kv.table.holds(1))
        for blocks in range(1, len(held) + 2):
            for local in (0, 1, 3):
                rows = LayerAdaptive(local_blocks=local).select(kv.search, 1, query, allowed, blocks)
                assert len(rows) == min(blocks, len(held))
                assert (np.diff(rows) > 0).all()
                newest = held[len(held) - min(local, blocks, len(held)) :]
                assert set(newest) <= set(rows)
                scores = LayerAdaptive(mode="code").scores(kv.search, 1, query, allowed, 7.0)
                older = dict(zip(held.tolist(), scores.tolist(), strict=True))
                left, out = set(rows) - set(newest), set(held) - set(rows)
                assert not left or not out or min(older[at] for at in left) >= max(older[at] for at in out)
        kv.close()


def test_a_control_in_any_stage_that_encodes_gives_another_digest(tmp_path: Path) -> None:
    controls: dict[str, tuple[str, ...]] = {
        "whole": (),
        "unit": ("unit=clip", "unit.frames=4"),
        "reduce": ("reduce=merge", "reduce.delta=0.9"),
        "no summary": ("encode.summary=false",),
        "retain": ("retain=all",),
        "code": ("retain.mode=code",),
        "index and query": ("retrieve=topk", "rebuild.time_text_s=4.0"),
    }
    digests = {}
    for name, changes in controls.items():
        film(tmp_path / name, *changes, shown=pictures(9))
        with reopened(tmp_path / name) as db:
            digests[name] = db.digest()["film"]
    assert digests.pop("index and query") == digests["whole"]
    assert len(set(digests.values())) == len(digests)


def test_what_is_forgotten_takes_the_summary_of_its_segment_along(tmp_path: Path) -> None:
    """It is a mean of what was forgotten, too. The other frames of the segment stay, and so do other segments."""
    film(tmp_path / "s", "retain.keep=0.5")
    before = units_of(tmp_path / "s")
    gone = int(before[0].blocks["start_ns"][1] // NS)
    with reopened(tmp_path / "s") as db:
        db.forget("film", start_s=gone, end_s=gone + 1)
        for compacted in (False, True):
            if compacted:
                db.compact()
            first, *others = db.store.units(db.store.recording("film").id)
            left = [int(row["start_ns"] // NS) for row in first.blocks if row["tokens"]]
            assert left == [0, *range(2, len(before[0].blocks) - 1)]
            assert BlockKind.SUMMARY not in first.blocks["kind"][first.blocks["tokens"] > 0].tolist()
            assert [unit.digest for unit in others] == [unit.digest for unit in before[1:]]
            answer = db.ask(QUESTION, mode="kv")
            assert not answer.warnings
            assert answer.evidence
            assert db.verify().ok


def test_profiles_are_those_of_paper_and_code() -> None:
    paper, code = (recipe("streamkv", profile=name) for name in ("paper", "code"))
    assert compose(paper).retain == SelectKV(keep=0.4, mode="paper")
    assert compose(code).retain == SelectKV(keep=0.6, mode="code", band=1.0)
    assert (paper.retrieve.params["blocks"], paper.retrieve.params["local_blocks"]) == (8, 0)
    assert (code.retrieve.params["blocks"], code.retrieve.params["local_blocks"]) == (64, 8)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["retrieve.blocks=129"], "no layer is given more than 128"),
        (["retrieve.mode=mean"], "choose one of paper, code, fixed"),
        (["retrieve.band=-1"], "too small"),
        (["retain.prompt="], "retain.prompt is empty"),
        (["retain.keep=0"], "no share"),
        (["encode=window"], "not legal (R18b)"),
        (["reduce=ctr"], "not legal (R5b)"),
        (["encode=chunk"], "not legal (R8b)"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        film(tmp_path / "s", *settings)
    assert says in str(caught.value)
