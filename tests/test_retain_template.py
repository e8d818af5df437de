"""Template retention and prototypes (StreamMem, arXiv 2508.15717): M1 to M4, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.models.rotary import Rotary
from memdb.retain.attention import importance
from memdb.retain.base import Bounded
from memdb.retain.prototypes import prototypes
from memdb.retain.recent import Recent
from memdb.retain.template import Template, prune_order
from memdb.retain.view import LayerView
from memdb.schemas.errors import RecipeError
from memdb.schemas.units import BlockKind
from tests.retain_cases import Film, best, joined, later


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_prune(view: LayerView, method: Template) -> list[int]:
    """The spared prototypes first, then everything by importance, until the budget is used up."""
    assert view.importance is not None
    order = best(view.importance.tolist(), view.frame.tolist())
    kept: list[int] = []
    for token in order:
        if bool(view.prototype[token]) and len(kept) < int(method.prototype_share * method.budget_tokens):
            kept.append(token)
    for token in order:
        if token not in kept and len(kept) < method.budget_tokens:
            kept.append(token)
    return sorted(kept)


@settings(deadline=None, max_examples=150)
@given(
    st.builds(Film, frames=st.integers(1, 12), seed=st.integers(0, 10**6), prototypes=st.booleans()),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.05, 0.25, 1.0]),
)
def test_it_is_the_rule_one_token_at_a_time(case: Film, budget_tokens: int, prototype_share: float) -> None:
    view, method = case.view(), Template(budget_tokens, prototype_share)
    assert method.choose(view).tolist() == plain_prune(view, method)


def test_prototypes_stay_within_their_share_and_compete_beyond_it() -> None:
    """Eight prototypes of which a budget of 16 spares four; of the others one is important by itself."""
    view = Film(frames=24, prototypes=True).view()
    ours = view.prototype.nonzero().flatten()
    received = torch.full((view.tokens,), 0.5)
    received[ours] = torch.arange(8) / 100  # less than any other token
    received[ours[0]] = 0.9
    kept = Template(16, 0.25).choose(replace(view, importance=received)).tolist()
    assert [int(token) for token in ours if int(token) in kept] == ours[[0, 5, 6, 7]].tolist()
    assert len(kept) == 16


def test_without_prototypes_it_is_the_order_of_importance() -> None:
    order = prune_order(torch.tensor([1.0, 3, 2]), torch.zeros(3, dtype=torch.bool), torch.arange(3), 2)
    assert order.tolist() == [1, 2, 0]


def test_the_budget_holds_over_any_stream_prototypes_included() -> None:
    """M1."""
    method, case = Template(32), Film(frames=2, grid=(2, 2))
    memory = case.view()
    for clip in range(1, 100):
        new = later(replace(case, seed=clip).view(), 2 * clip, 4)
        memory = joined(memory, new)
        added = prototypes(memory.k, memory.v, torch.ones(memory.tokens), memory.frame, memory.position)
        newest = added.frame >= 2 * clip
        memory = merged_in(memory, added.k[:, newest], added.position[newest], added.frame[newest])
        seen = importance(normal(4, 3, 8, seed=clip), memory.k, 8**-0.5)
        memory = memory.part(method.choose(replace(memory, importance=seen)))
        assert memory.tokens <= 32
    assert memory.tokens == 32
    assert int(memory.prototype.sum()) >= 8  # their share is full


def merged_in(memory: LayerView, k: Tensor, position: Tensor, frame: Tensor) -> LayerView:
    """Prototypes set into a memory where they belong in time."""
    n = len(position)
    place = torch.cat((memory.position, position))
    order = torch.sort(place, stable=True).indices
    joint = LayerView(
        torch.cat((memory.k, k), 1),
        torch.cat((memory.v, k), 1),
        place,
        torch.cat((memory.frame, frame)),
        torch.cat((memory.patch, torch.full((n, 2), -1))),
        torch.cat((memory.kind, torch.full((n,), int(BlockKind.PROTOTYPE)))),
        memory.grid,
    )
    return joint.part(order)


def test_what_the_template_asks_for_survives_every_later_prune() -> None:
    """M2: the template's query is the key of one token of the first clip."""
    H, D, N = 2, 32, 8
    wanted = torch.zeros(D)
    wanted[0] = 6.0
    method = Template(2 * N)
    memory = None
    for clip in range(20):
        view = Film(frames=1, grid=(2, 4), H=H, D=D, seed=clip, whole=True, exact=False).view()
        k = view.k.clone()
        k[..., 0] = 0  # orthogonal to the query
        if clip == 0:
            k[:, 3] = wanted
        view = later(replace(view, k=k), clip, N)
        memory = view if memory is None else joined(memory, view)
        received = importance(wanted.expand(4, 1, D), memory.k, D**-0.5)
        memory = memory.part(method.choose(replace(memory, importance=received)))
    assert memory is not None
    assert int(memory.position[0]) == 13 + 3
    assert torch.equal(memory.k[0, 0], wanted)


@pytest.mark.parametrize(("method", "survives"), [(Template(24), True), (Recent(24), False)])
def test_an_early_token_that_matters_outlives_a_hundred_clips(method: Bounded, survives: bool) -> None:
    """M3, with the newest tokens alone as the control."""
    case = Film(frames=1, grid=(2, 4), whole=True)
    memory = case.view()
    for clip in range(1, 101):
        memory = joined(memory, later(replace(case, seed=clip).view(), clip, 8))
        received = torch.where(memory.position == 15, 0.9, 0.1)
        memory = memory.part(method.choose(replace(memory, importance=received)))
        assert memory.tokens <= 24
    assert bool((memory.position == 15).any()) == survives


@pytest.mark.parametrize("seed", range(10))
def test_a_prototype_is_the_weighted_mean_one_token_at_a_time(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    sizes = [3, 1, 5, 2]
    T = sum(sizes)
    frame = torch.cat([torch.full((size,), 4 * i + 7) for i, size in enumerate(sizes)])
    k, v, received = (
        normal(2, T, 8, seed=seed),
        normal(2, T, 8, seed=seed + 50),
        torch.rand(T, generator=random),
    )
    position = torch.arange(100, 100 + 3 * T, 3)
    found = prototypes(k, v, received, frame, position)
    assert found.frame.tolist() == [7, 11, 15, 19]
    for i, number in enumerate(found.frame.tolist()):
        inside = [j for j in range(T) if frame[j] == number]
        mass = sum(float(received[j]) for j in inside)
        weights = [float(received[j]) / mass for j in inside]
        assert sum(weights) == pytest.approx(1)
        for mean, of in ((found.k, k), (found.v, v)):
            want = sum(w * of[:, j].double() for w, j in zip(weights, inside, strict=True))
            assert isinstance(want, Tensor)
            torch.testing.assert_close(mean[:, i].double(), want, rtol=1e-5, atol=1e-6)
            low, high = of[:, inside].min(1).values, of[:, inside].max(1).values
            assert bool(((mean[:, i] >= low - 1e-6) & (mean[:, i] <= high + 1e-6)).all())  # M4
        place = sum(w * int(position[j]) for w, j in zip(weights, inside, strict=True))
        assert int(found.position[i]) == int(place + 0.5)
        assert float(found.mass[i]) == pytest.approx(mass, rel=1e-6)


def test_a_prototype_of_equal_tokens_is_that_token_and_rotated_ones_would_shrink() -> None:
    """M4: 196 equal keys, side by side."""
    N, D = 196, 128
    k = normal(1, 1, D).expand(1, N, D).contiguous()
    received, place = torch.rand(N, generator=torch.Generator().manual_seed(0)), torch.arange(N)
    frame = torch.zeros(N, dtype=torch.long)
    found = prototypes(k, k, received, frame, place)
    torch.testing.assert_close(found.k[:, 0], k[:, 0], rtol=1e-5, atol=1e-6)
    rotary = Rotary(1.0 / 10_000 ** (torch.arange(0, D, 2) / D))
    turned = prototypes(rotary.rotate(k, 0), k, received, frame, place)
    assert float(turned.k[0, 0].norm() / k[0, 0].norm()) < 0.9


def test_a_frame_that_received_nothing_weighs_its_tokens_alike() -> None:
    k = torch.tensor([[[1.0], [3.0], [5.0]]])
    found = prototypes(k, k, torch.zeros(3), torch.tensor([0, 0, 1]), torch.tensor([4, 7, 9]))
    assert found.k.flatten().tolist() == [2.0, 5.0]
    assert found.position.tolist() == [6, 9]
    assert found.mass.tolist() == [0, 0]


def test_half_precision_rounds_once() -> None:
    k = normal(2, 40, 8).bfloat16()
    received, frame = torch.rand(40, generator=torch.Generator().manual_seed(1)), torch.arange(40) // 20
    half = prototypes(k, k, received, frame, torch.arange(40))
    wide = prototypes(k.float(), k.float(), received, frame, torch.arange(40))
    assert torch.equal(half.k, wide.k.bfloat16())


def test_parameters_out_of_range_are_refused() -> None:
    for params in ({"budget_tokens": 0}, {"prototype_share": -0.1}, {"prototype_share": 1.1}):
        with pytest.raises(RecipeError):
            Template(**params)  # type: ignore[arg-type]
