"""Captions by maximal marginal relevance, against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memdb.query.retrieve.mmr import CaptionMMR, mmr_order, within_budget
from memdb.schemas.errors import RecipeError


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def plain_mmr(vectors: np.ndarray, query: np.ndarray, relevance: float) -> list[int]:
    """The formula as it stands in the paper, in fp64, every maximum computed anew."""
    vectors, query = vectors.astype(np.float64), query.astype(np.float64)
    left, chosen = list(range(len(vectors))), []
    while left:
        scores = [
            relevance * cosine(vectors[i], query)
            - (1 - relevance) * max((cosine(vectors[i], vectors[j]) for j in chosen), default=0.0)
            for i in left
        ]
        chosen.append(left.pop(int(np.argmax(scores))))
    return chosen


@pytest.mark.parametrize("relevance", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_the_formula(relevance: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(60, 16)).astype(np.float32)
    query = random.normal(size=16).astype(np.float32)
    found = list(mmr_order(vectors, query, relevance))
    assert [row for row, _ in found] == plain_mmr(vectors, query, relevance)
    for row, score in found:
        assert score == pytest.approx(cosine(vectors[row], query), abs=1e-5)


def test_what_was_said_already_comes_last() -> None:
    query = np.array([1, 0, 0], np.float32)
    vectors = np.array([[9, 1, 0], [9, 1.1, 0], [1, 0, 1]], np.float32)
    assert [row for row, _ in mmr_order(vectors, query, 0.5)] == [0, 2, 1]
    assert [row for row, _ in mmr_order(vectors, query, 1.0)] == [0, 1, 2]


def test_ties_go_to_the_earlier_caption() -> None:
    vectors = np.ones((4, 3), np.float32)
    assert [row for row, _ in mmr_order(vectors, np.ones(3, np.float32), 0.5)] == [0, 1, 2, 3]


@settings(deadline=None, max_examples=50)
@given(
    arrays(np.float32, st.tuples(st.integers(0, 12), st.just(4)), elements=st.floats(-2, 2, width=32)),
    st.floats(0, 1),
)
def test_every_caption_comes_exactly_once_also_those_without_direction(
    vectors: np.ndarray, relevance: float
) -> None:
    rows = [row for row, _ in mmr_order(vectors, np.array([1, 0, 0, 0], np.float32), relevance)]
    assert sorted(rows) == list(range(len(vectors)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=30), st.integers(0, 300))
def test_the_budget_is_kept_and_the_first_that_does_not_fit_ends_it(tokens: list[int], budget: int) -> None:
    order = [(row, 1.0 - row / 100) for row in range(len(tokens))]
    picks = within_budget(iter(order), tokens, budget)
    if sum(tokens) <= budget:
        assert picks == order
        return
    assert picks == order[: len(picks)]
    assert sum(tokens[row] for row, _ in picks) < budget or not picks
    assert sum(tokens[row] for row, _ in order[: len(picks) + 1]) >= budget


def test_parameters_out_of_range_are_refused() -> None:
    for params in ({"caption_tokens": -1}, {"relevance": -0.1}, {"relevance": 1.1}):
        with pytest.raises(RecipeError):
            CaptionMMR(**params)  # type: ignore[arg-type]
