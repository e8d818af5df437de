"""Vision sink buckets (LiveVLM, arXiv 2505.15269, version 2): V1 to V3, against the walk from token to token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.retain.view import LayerView
from memdb.retain.vision_sink import VisionSink, buckets
from memdb.schemas.errors import RecipeError
from memdb.schemas.units import BlockKind
from tests.retain_cases import Film, best, joined, later


def strip(score: list[float], position: list[int] | None = None) -> LayerView:
    """Tokens of whom only score and position matter."""
    T = len(score)
    place = torch.tensor(position if position is not None else list(range(T)))
    blank, kind = torch.zeros(1, T, 1), torch.full((T,), int(BlockKind.FRAME))
    return LayerView(blank, blank, place, place, torch.zeros(T, 2).long(), kind, (1, 1), torch.tensor(score))


def plain_sink(view: LayerView, M: int, B: int, R: int) -> list[int]:
    assert view.importance is not None
    P, N = int(view.position.max()) + 1, M // B
    stretch = [math.ceil(((p + 1) * N) / P) for p in view.position.tolist()]
    order = best(view.importance.tolist(), view.frame.tolist())
    kept, count = order[: min(R, M)], [0] * (N + 1)
    for token in kept:
        count[stretch[token]] += 1
    for token in order[R:]:
        if len(kept) < M and count[stretch[token]] < B:
            kept.append(token)
            count[stretch[token]] += 1
    for token in order:  # the walk ended short
        if len(kept) < M and token not in kept:
            kept.append(token)
    return sorted(kept)


@settings(deadline=None, max_examples=150)
@given(
    st.builds(
        Film,
        frames=st.integers(1, 12),
        seed=st.integers(0, 10**6),
        exact=st.booleans(),
        prototypes=st.booleans(),
    ),
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_it_is_the_walk_from_token_to_token(case: Film, stretches: int, B: int, top: float) -> None:
    view, M = case.view(), stretches * B
    kept = VisionSink(M, B, top).choose(view)
    if view.tokens > M:
        assert kept.tolist() == plain_sink(view, M, B, int(top * M))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=60),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.5]),
)
def test_it_is_the_walk_where_old_stretches_are_sparse(score: list[float], M: int, top: float) -> None:
    """Survivors of earlier rounds: few old tokens, many new ones, so that the walk ends short."""
    T = len(score)
    position = sorted({int(10_000 * (1 - 2.0 ** (-i / 3))) + i for i in range(T)})
    view = strip(score, position)
    kept = VisionSink(M, 1, top).choose(view).tolist()
    assert kept == (list(range(T)) if T <= M else plain_sink(view, M, 1, int(top * M)))


@pytest.mark.parametrize("top", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("length", [60, 100, 1000])
def test_the_size_is_exact_and_the_best_are_among_the_kept(top: float, length: int) -> None:
    """V1, M = 100."""
    score = torch.rand(length, generator=torch.Generator().manual_seed(length)).tolist()
    kept = VisionSink(100, 1, top).choose(strip(score)).tolist()
    assert len(kept) == min(100, length)
    assert set(sorted(range(length), key=lambda i: -score[i])[: int(top * 100)]) <= set(kept)


def test_every_stretch_keeps_its_own_and_plain_attention_would_not() -> None:
    """V2: 60 locally high scores; without a top, one token of each of 100 stretches, its best."""
    score = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    score[200:260] += 5
    kept = VisionSink(100, 1, 0.0).choose(strip(score.tolist()))
    stretch = buckets(torch.arange(1000), 100)
    assert stretch[kept].tolist() == list(range(100))
    assert kept.tolist() == [int(score[i : i + 10].argmax()) + i for i in range(0, 1000, 10)]
    crowd = VisionSink(100, 1, 1.0).choose(strip(score.tolist()))
    assert len(stretch[crowd].unique()) < 50


def test_the_worked_example_of_the_paper() -> None:
    """V3: the 256th of 1,000 positions is in the third of 10 stretches."""
    assert int(buckets(torch.arange(1000), 10)[255]) + 1 == 3
    for P, N in ((1000, 10), (7, 3), (5, 12), (1, 1)):
        found = buckets(torch.arange(P), N).tolist()
        assert [b + 1 for b in found] == [math.ceil(p / (P / N) - 1e-9) for p in range(1, P + 1)]


def test_stretches_follow_original_positions_over_many_rounds() -> None:
    """Old stretches keep their tokens: after 40 clips no tenth of the stream is forgotten, and none is crowded."""
    case = Film(frames=2, grid=(4, 5), whole=True, exact=False)
    memory = case.view()
    for clip in range(1, 40):
        new = later(replace(case, seed=clip).view(), 2 * clip, 20)
        memory = joined(memory, new)
        received = torch.rand(memory.tokens, generator=torch.Generator().manual_seed(clip))
        memory = memory.part(VisionSink(100, 1, 0.0).choose(replace(memory, importance=received)))
    tenths = torch.bincount(buckets(memory.position, 10), minlength=10)
    assert int(tenths.sum()) == 100
    assert int(tenths.min()) >= 5


def test_capacity_counts_the_top_tokens_too() -> None:
    """Two stretches of 4 tokens, B = 2: the top two stand in the first, so the others come from the second."""
    assert VisionSink(4, 2, 0.5).choose(strip([9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 0.0])).tolist() == [
        0,
        1,
        5,
        6,
    ]


def test_parameters_out_of_range_are_refused() -> None:
    bad: list[dict[str, float]] = [{"bucket_tokens": 0}, {"top": -0.5}, {"top": 1.5}, {"budget_tokens": 0}]
    for params in bad:
        with pytest.raises(RecipeError):
            VisionSink(**params)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no multiple"):
        VisionSink(10, 3)
