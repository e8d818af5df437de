"""Captions by maximal marginal relevance, against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memdb.query.retrieve.mmr import CaptionMMR, joined_relevance, mmr_order, within_budget
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


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            arrays(np.float32, (n, 4), elements=st.integers(-2, 2)),
            arrays(np.float64, n, elements=st.sampled_from([0.0, 0.5, 1.5, 3.0])),
        )
    )
)
def test_relevance_by_meaning_and_words_is_the_mean_of_two_reciprocal_ranks(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    vectors, matches = case
    query = np.array([1, 2, 0, -1], np.float32)
    found = joined_relevance(vectors, query, matches)
    near = [cosine(vector.astype(np.float64), query.astype(np.float64)) for vector in vectors]
    for row in range(len(vectors)):
        by_meaning = 61 / (61 + sum(other > near[row] + 1e-5 for other in near))
        by_words = 61 / (61 + sum(other > matches[row] for other in matches)) if matches[row] else 0.0
        assume(all(abs(other - near[row]) > 1e-4 or abs(other - near[row]) < 1e-9 for other in near))
        assert found[row] == pytest.approx((by_meaning + by_words) / 2, abs=1e-6)
    assert 0 < float(found.min()) <= float(found.max()) <= 1


def test_a_caption_with_the_words_of_the_question_comes_before_one_that_is_only_near() -> None:
    vectors = np.array([[1, 0.2, 0], [1, 0.3, 0], [0.9, 0.6, 0]], np.float32)
    query = np.array([1, 0, 0], np.float32)
    relevant = joined_relevance(vectors, query, np.array([0.0, 0.0, 2.5]))
    assert [row for row, _ in mmr_order(vectors, query, 1.0, relevant)] == [2, 0, 1]
    assert next(mmr_order(vectors, query, 1.0, relevant))[1] == pytest.approx(cosine(vectors[2], query))


def test_parameters_out_of_range_are_refused() -> None:
    for params in ({"caption_tokens": -1}, {"relevance": -0.1}, {"relevance": 1.1}):
        with pytest.raises(RecipeError):
            CaptionMMR(**params)  # type: ignore[arg-type]
