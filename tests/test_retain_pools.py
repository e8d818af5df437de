"""Two pools with hand-over by age (LiveVLM, arXiv 2505.15269, version 2), against queues and walks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.ingest.frames import SeenFrame
from memdb.ingest.layer_tokens import layers_together
from memdb.ingest.memory import EncoderMemory
from memdb.models.window import LayerKV
from memdb.retain import BOUNDED
from memdb.retain.pools import short_from, short_tokens
from memdb.retain.recent import Recent
from memdb.retain.view import LayerView
from memdb.schemas.errors import RecipeError
from memdb.schemas.recording import Tombstone
from tests.model_cases import NS
from tests.retain_cases import Film

L, H, D, N = 2, 2, 4, 4  # layers, heads, head size, tokens a frame


def frames_from(first: int, count: int) -> list[SeenFrame]:
    return [
        SeenFrame(number, number * NS, (number + 1) * NS, torch.zeros(N, 1), b"")
        for number in range(first, first + count)
    ]


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(1, 30),
    short_frames=st.integers(1, 6),
    chunks=st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(0, 12)), min_size=1, max_size=9),
)
def test_tokens_pass_from_one_queue_to_the_other_and_none_comes_back(
    budget: int, short_frames: int, chunks: list[tuple[int, int | None]]
) -> None:
    """Two queues, token by token; after some chunks a span of four frames is forgotten. Both pools keep the newest."""
    none = [LayerKV(torch.zeros(H, 0, D), torch.zeros(H, 0, D))] * L
    memory = EncoderMemory(none, Recent(budget, short_frames=short_frames))
    short: list[int] = []
    long: list[int] = []
    number = start = 0
    for unit, (count, forgotten) in enumerate(chunks):
        T = count * N
        fresh = [LayerKV(torch.randn(H, T, D), torch.randn(H, T, D))] * L
        memory.take(unit, frames_from(number, count), layers_together(fresh), None, [], start, (2, 2))
        number, start = number + count, start + T
        short += range(start - T, start)
        while short and short[0] < start - short_frames * N:  # age, and not how full it is, hands over
            long = [*long, short.pop(0)][-budget:]
        for layer in memory.layers:
            assert layer.position.tolist() == [*long, *short]
        if forgotten is not None:
            memory.forget([Tombstone(0, forgotten * NS, (forgotten + 4) * NS, unit, 0)])
            gone = range(forgotten * N, (forgotten + 4) * N)
            short, long = ([at for at in pool if at not in gone] for pool in (short, long))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(BOUNDED)),
    film=st.builds(Film, frames=st.integers(2, 9), seed=st.integers(0, 10**6), prototypes=st.booleans()),
    short_frames=st.integers(1, 10),
)
def test_the_older_ones_are_decided_as_by_one_pool(name: str, film: Film, short_frames: int) -> None:
    """Whatever method keeps the long-term pool, the short-term one is whole behind it, prototypes included."""
    view = Film(**{**vars(film), "whole": True}).view()
    edge = 13 + max(0, film.frames - short_frames) * film.frame_tokens  # films begin at 13
    long = sum(at < edge for at in view.position.tolist())
    budget = 24
    kept = BOUNDED[name](budget, short_frames=short_frames).choose(view).tolist()
    alone = BOUNDED[name](budget).choose(view.first(long)).tolist() if long else []
    assert kept == [*alone, *range(long, view.tokens)]
    assert len(alone) == min(budget, long)


def test_the_first_tokens_of_a_view_are_its_own() -> None:
    view = Film(prototypes=True).view()
    part = view.first(20)
    assert view.importance is not None
    assert part.importance is not None
    assert torch.equal(part.importance, view.importance[:20])
    for name in ("k", "v"):
        assert torch.equal(getattr(part, name), getattr(view, name)[:, :20])
    for name in ("position", "frame", "patch", "kind"):
        assert torch.equal(getattr(part, name), getattr(view, name)[:20])


def test_layers_in_one_view_have_one_edge() -> None:
    views = [Film(frames=6, whole=True, seed=seed).view() for seed in range(3)]
    for short_frames in (0, 1, 5, 6, 99):
        found = short_tokens(LayerView.stacked(views), short_frames)
        assert found == min(6, short_frames) * 12
    assert short_from(100, 3, 16) == 52


def test_a_pool_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"retain\.short_frames = -1 is too small"):
        Recent(8, short_frames=-1)
