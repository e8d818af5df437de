"""Reference tests of ReKV (arXiv 2503.00540): R1 to R7, and the profile `code`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.query.retrieve.topk import BlockTopK, grouped
from memdb.schemas.errors import RecipeError
from memdb.schemas.fingerprint import ModelShape
from memdb.store import Store
from tests.model_cases import (
    INIT_PROMPT,
    QUESTION,
    Planted,
    asked,
    ingest,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    stored_kv,
    wrapped,
)

# R1: everything is recalled


@pytest.mark.parametrize("blocks", [12, 64])
def test_r1_full_recall_is_full_attention(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer tokens than W, r >= T, nothing dropped: the logits of one forward over [init | frames | prompt]."""
    shown, own, model = pictures(12), plain(), wrapped()
    decided = record_decisions(monkeypatch)
    ingest(tmp_path / "s", shown, codec="raw", settings=[f"retrieve.blocks={blocks}", "answer.tokens_max=1"])
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
    parts = (
        own.embed(model.init_ids(INIT_PROMPT)),
        own.see(shown).flatten(0, 1),
        own.embed(model.prompt_ids(QUESTION)),
    )
    assert relative(decided[0], own.forward(torch.cat(parts))[-1]) < 1e-4


# R2, R3, R5: keys that are made for a question


def test_r2_each_layer_finds_its_own_needle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame a layer is aligned to that layer's query, all others are orthogonal to it.

    A deeper layer's query depends on what shallower ones found, so the needles are laid layer by layer.
    """
    film, needles = Planted.random(9), [6, 2, 8, 0]
    for layer, needle in enumerate(needles):
        film.write(tmp_path / str(layer), "retrieve.blocks=1")
        _, queries = asked(tmp_path / str(layer), monkeypatch)
        for frame in range(film.frames):
            film.point(layer, frame, queries[layer], 5.0 if frame == needle else 0.0)
    film.write(tmp_path / "whole", "retrieve.blocks=1")
    rows, _ = asked(tmp_path / "whole", monkeypatch)
    assert rows == [[needle] for needle in needles]


def test_r3_the_newest_frame_is_there_only_if_it_is_retrieved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local window is no part of the context of an answer."""
    film, r = Planted.random(7), 3
    layers = wrapped().shape.layers
    for layer in range(layers):
        film.write(tmp_path / str(layer), f"retrieve.blocks={r}")
        _, queries = asked(tmp_path / str(layer), monkeypatch)
        for frame in range(film.frames):
            film.point(layer, frame, queries[layer], 0.0 if frame == film.frames - 1 else 1.0 + frame)
    film.write(tmp_path / "few", f"retrieve.blocks={r}")
    film.write(tmp_path / "all", f"retrieve.blocks={film.frames}")
    assert asked(tmp_path / "few", monkeypatch)[0] == [[3, 4, 5]] * layers
    assert asked(tmp_path / "all", monkeypatch)[0] == [list(range(film.frames))] * layers


def test_r5_lengths_of_keys_count_for_dot_and_not_for_cos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In layer 0, whose query depends on nothing that is stored: a frame's keys ten times as long."""
    film = Planted.random(8)
    found: dict[tuple[str, bool], list[int]] = {}
    for sim in ("dot", "cos"):
        film.write(tmp_path / sim, "retrieve.blocks=2", f"retrieve.sim={sim}")
    query = asked(tmp_path / "dot", monkeypatch)[1][0]
    for frame in range(film.frames):
        film.point(0, frame, query, 1.0 + frame)
    for long in (False, True):
        if long:
            film.keys[0][3] *= 10
        for sim in ("dot", "cos"):
            path = tmp_path / f"{sim}-{long}"
            film.write(path, "retrieve.blocks=2", f"retrieve.sim={sim}")
            found[sim, long] = asked(path, monkeypatch)[0][0]
    assert found["dot", False] == [6, 7]
    assert found["dot", True] == [3, 7]
    means = torch.stack([k.mean(1).flatten() for k in film.keys[0]]).double()
    cosine = means @ torch.from_numpy(query).double() / means.norm(dim=1)
    assert found["cos", False] == found["cos", True] == sorted(cosine.topk(2).indices.tolist())


# R4: order and runs


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeySearch]:
    path = tmp_path_factory.mktemp("runs") / "s"
    Planted.random(23).write(path)
    with Store.open(path) as store:
        table = KeyTable.open(store, store.recording("film").id)
        yield KeySearch(table, backend="exact")
        table.close()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    group=st.integers(1, 5),
    runs=st.integers(1, 6),
    allowed=st.lists(st.booleans(), min_size=23, max_size=23),
)
def test_r4_rows_come_in_the_order_of_time_and_in_whole_runs(
    search: KeySearch, seed: int, group: int, runs: int, allowed: list[bool]
) -> None:
    query = np.random.default_rng(seed).normal(size=search.table.key_size).astype(np.float32)
    blocks = group * runs
    method = BlockTopK(blocks=blocks, group=group)
    rows = method.select(search, 1, query, np.array(allowed), blocks).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) <= blocks
    candidates = np.flatnonzero(allowed)
    if len(candidates) <= blocks:
        assert rows == candidates.tolist()
        return
    scores = search.table.read_rows(1).astype(np.float64) @ query
    parts = [candidates[at : at + group].tolist() for at in range(0, len(candidates), group)]
    best = sorted(parts, key=lambda part: -float(np.mean(scores[part])))[:runs]
    assert rows == sorted(row for part in best for row in part)


def test_r4_a_short_tail_is_a_run_of_its_own() -> None:
    rows = np.arange(10, 17, dtype=np.int64)
    scores = np.array(
        [1, 1, 1, 5, 0, 0, 4], np.float32
    )  # runs of 3: means 1, 5 / 3, and 4 for the tail alone
    assert grouped(scores, rows, 3, 1).tolist() == [16]
    assert grouped(scores, rows, 3, 2).tolist() == [13, 14, 15, 16]
    assert grouped(np.ones(7, np.float32), rows, 3, 1).tolist() == [10, 11, 12]  # ties go to the earlier run


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_r4_no_more_than_a_plan_has_room_for_where_that_is_less_than_a_run(
    search: KeySearch, blocks: int
) -> None:
    query = np.ones(search.table.key_size, np.float32)
    rows = BlockTopK(blocks=8, group=4).select(search, 1, query, np.ones(23, bool), blocks)
    assert 1 <= len(rows) <= blocks
    assert len(rows) == rows[-1] - rows[0] + 1, "neighbours"


@pytest.mark.parametrize(("blocks", "group"), [(10, 3), (2, 4), (7, 2)])
def test_r4_r_must_be_a_multiple_of_the_group(blocks: int, group: int) -> None:
    with pytest.raises(RecipeError, match="no multiple"):
        BlockTopK(blocks=blocks, group=group)
    with pytest.raises(RecipeError):
        BlockTopK(blocks=0)


# R6: how far a frame reaches


def test_r6_a_frame_reaches_one_window_a_layer(tmp_path: Path) -> None:
    """Another early frame: keys of layer l are the same bits wherever it lies more than l * (W - 1) tokens back.

    That is within the l * (W + N) of the paper's walk, and it is exact: the frame before that limit does change.
    """
    W, N, changed, frames = 40, 16, 2, 16
    shown = pictures(frames)
    other = [*shown]
    other[changed] = pictures(1, seed=9)[0]
    keys = []
    for name, film in (("a", shown), ("b", other)):
        for chunk in (1, 5):
            store = tmp_path / f"{name}{chunk}"
            settings = [f"encode.window_tokens={W}", f"encode.chunk_frames={chunk}"]
            ingest(store, film, codec="raw", settings=settings)
            with reopened(store) as db:
                keys.append([kv.k.split(N, 1) for kv in stored_kv(db)])
    for before, after in ((keys[0], keys[2]), (keys[1], keys[3])):
        for layer, (mine, theirs) in enumerate(zip(before, after, strict=True)):
            differs = [frame for frame in range(frames) if not torch.equal(mine[frame], theirs[frame])]
            # the nearest of a later frame's tokens stands (frame - changed - 1) * N + 1 behind the last changed
            reached = [
                frame
                for frame in range(changed, frames)
                if frame == changed or (frame - changed - 1) * N + 1 <= layer * (W - 1)
            ]
            assert differs == reached
            assert all((frame - changed - 1) * N < layer * (W + N) for frame in reached[1:])
    assert reached[-1] < frames - 1  # the deepest layer's reach ends within the film


# R7: the size of the bank


def test_r7_the_bank_has_the_bytes_of_all_tokens(tmp_path: Path) -> None:
    shape, frames = wrapped().shape, 7
    ingest(tmp_path / "s", pictures(frames), codec="fp16")
    with reopened(tmp_path / "s") as db:
        units = db.store.units(db.store.recording("film").id)
    raw = sum(int(unit.slices["raw_bytes"].sum()) for unit in units)
    assert raw == frames * shape.layers * 2 * shape.kv_heads * shape.frame_tokens * shape.head_size * 2
    assert raw == shape.kv_bytes(frames * shape.frame_tokens, 2)


def test_r7_an_hour_of_the_published_models() -> None:
    large = ModelShape(28, 28, 4, 128, 3584, 196, 32_768)
    small = ModelShape(24, 14, 2, 64, 896, 196, 32_768)
    assert large.kv_bytes(196, 2) == 11_239_424
    assert small.kv_bytes(196, 2) == 2_408_448
    assert large.kv_bytes(1800 * 196, 2) / 2**30 == pytest.approx(18.84, abs=0.005)
    assert small.kv_bytes(1800 * 196, 2) / 2**30 == pytest.approx(4.04, abs=0.005)


# The profile `code`: in the step in which they leave the window, init tokens are read twice


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_profile_code_encodes_as_the_released_code_does(chunk: int, tmp_path: Path) -> None:
    """Through the whole network: keys and values of a plain loop that reads some init tokens twice."""
    shown, own, model = pictures(9), plain(), wrapped()
    init, N, W = model.init_ids(INIT_PROMPT), model.shape.frame_tokens, 100
    n = len(init)
    whole = torch.cat((own.embed(init), own.see(shown).flatten(0, 1)))
    twice: set[int] = set()

    def seen(layer: int, x: int) -> tuple[Tensor, Tensor]:
        if x < n:
            return torch.arange(x + 1), x - torch.arange(x + 1)
        end = n + ((x - n) // N + 1) * N  # of this step of one frame
        apart = torch.arange(min(n, max(0, end - W)))
        near = torch.arange(max(0, x - W + 1), x + 1)
        if set(apart.tolist()) & set(near.tolist()):
            twice.add(x)
        return torch.cat((apart, near)), torch.cat((torch.full_like(apart, W - 1), x - near))

    heard: list[tuple[Tensor, Tensor, Tensor]] = []
    own.loop(whole, seen, heard=heard)
    settings: Sequence[str] = [f"encode.window_tokens={W}", f"encode.chunk_frames={chunk}"]
    for profile in ("code", "fixed"):
        ingest(tmp_path / profile, shown, codec="raw", settings=settings, profile=profile)
    with reopened(tmp_path / "code") as code, reopened(tmp_path / "fixed") as fixed:
        found, other = stored_kv(code), stored_kv(fixed)
    for kv, (_, k, v) in zip(found, heard, strict=True):
        assert relative(kv.k, k[:, n:]) < 1e-5
        assert relative(kv.v, v[:, n:]) < 1e-5
    assert twice
    differs = (found[1].k - other[1].k).abs().amax((0, 2)) > 1e-4  # what layer 0's attention did
    assert set((torch.nonzero(differs)[:, 0] + n).tolist()) == twice
