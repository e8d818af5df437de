"""The two controls over tokens: the newest, and evenly spaced ones."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.retain.recent import Recent
from memdb.retain.uniform import GOLDEN, UniformTokens
from memdb.retain.view import LayerView
from memdb.schemas.units import BlockKind
from tests.retain_cases import Film


def strip(positions: Tensor) -> LayerView:
    """Tokens of whom nothing but the position matters."""
    T = len(positions)
    blank = torch.zeros(1, T, 2)
    kind = torch.full((T,), int(BlockKind.FRAME))
    return LayerView(blank, blank, positions, positions, torch.zeros(T, 2).long(), kind, (1, 1))


def kept_positions(method: UniformTokens | Recent, positions: Tensor) -> Tensor:
    return positions[method.choose(strip(positions))]


def test_recent_keeps_the_end() -> None:
    view = Film(frames=5, prototypes=True).view()
    assert Recent(17).choose(view).tolist() == list(range(view.tokens - 17, view.tokens))


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 200))
def test_even_spacing_is_that_of_the_golden_sequence(length: int, budget_tokens: int) -> None:
    """The lowest ranks by exact fractions, and no more than three distances between neighbours."""
    kept = kept_positions(UniformTokens(budget_tokens), torch.arange(length)).tolist()
    rank = [Fraction(p * GOLDEN, 1 << 32) % 1 for p in range(length)]
    assert kept == sorted(sorted(range(length), key=rank.__getitem__)[:budget_tokens])
    assert len({b - a for a, b in pairwise(kept)}) <= 3
    if len(kept) > 2 and budget_tokens < length:
        ideal = length / budget_tokens
        assert all(b - a < 2 * ideal for a, b in pairwise(kept))


@pytest.mark.parametrize("step", [1, 7, 100, 999])
def test_thinning_step_by_step_is_thinning_at_once(step: int) -> None:
    method = UniformTokens(64)
    memory = torch.empty(0, dtype=torch.long)
    for start in range(0, 2000, step):
        memory = torch.cat((memory, torch.arange(start, min(2000, start + step))))
        memory = kept_positions(method, memory)
    assert torch.equal(memory, kept_positions(method, torch.arange(2000)))


def test_both_halves_of_a_long_stream_are_remembered_alike() -> None:
    kept = kept_positions(UniformTokens(1000), torch.arange(500_000))
    first = int((kept < 250_000).sum())
    assert abs(first - 500) <= 2
