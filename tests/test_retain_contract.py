"""What every retainer of tokens keeps to, whatever it looks at."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memdb.retain import BOUNDED
from memdb.retain.base import Bounded, ascending, best_first, front
from memdb.retain.recent import Recent
from memdb.retain.tar_van import TarVan
from memdb.retain.template import Template
from memdb.retain.uniform import UniformTokens
from memdb.retain.view import LayerView
from memdb.retain.vision_sink import VisionSink
from memdb.schemas.errors import RecipeError
from tests.retain_cases import Film, best, joined, later

# The contract is run by several classes on purpose; what failed in one is no example for another.
INHERITED = settings(
    deadline=None, max_examples=25, database=None, suppress_health_check=[HealthCheck.differing_executors]
)
films = st.builds(
    Film,
    frames=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    whole=st.booleans(),
    exact=st.booleans(),
    prototypes=st.booleans(),
)


class RetainerContract:
    """Inherit and build the method for a budget."""

    def method(self, budget_tokens: int) -> Bounded:
        raise NotImplementedError

    @INHERITED
    @given(films, st.integers(24, 120))
    def test_exactly_the_budget_stays_in_order_of_time(self, film: Film, budget_tokens: int) -> None:
        view = film.view()
        kept = self.method(budget_tokens).choose(view)
        assert kept.dtype == torch.int64
        assert len(kept) == min(view.tokens, budget_tokens)
        places = kept.tolist()
        assert places == sorted(set(places))
        assert set(places) <= set(range(view.tokens))

    @INHERITED
    @given(films, st.integers(24, 120))
    def test_it_decides_the_same_twice_and_changes_nothing(self, film: Film, budget_tokens: int) -> None:
        view, twin = film.view(), film.view()
        method = self.method(budget_tokens)
        assert torch.equal(method.choose(view), method.choose(view))
        assert torch.equal(method.choose(view), self.method(budget_tokens).choose(twin))
        for name in ("k", "v", "position", "frame", "patch", "kind", "importance"):
            assert torch.equal(getattr(view, name), getattr(twin, name)), name

    @INHERITED
    @given(films, st.integers(24, 120))
    def test_what_fits_stays_whole(self, film: Film, budget_tokens: int) -> None:
        method = self.method(budget_tokens)
        view = film.view()
        survivors = view.part(method.choose(view))
        assert method.choose(survivors).tolist() == list(range(survivors.tokens))

    @INHERITED
    @given(films, st.integers(24, 120), st.integers(1, 4))
    def test_layers_decided_at_once_decide_for_themselves(
        self, film: Film, budget_tokens: int, layers: int
    ) -> None:
        """Layers of other content and other survivors, as many in each."""
        method = self.method(budget_tokens)
        views = [replace(film, seed=film.seed + layer).view() for layer in range(layers)]
        fewest = min(view.tokens for view in views)
        places = [torch.linspace(0, view.tokens - 1, fewest).long() for view in views]
        views = [
            replace(view.part(place), importance=view.importance[place])
            for view, place in zip(views, places, strict=True)
            if view.importance is not None
        ]
        together = LayerView.stacked(views)
        kept = method.choose(together)
        alone = [method.choose(view) for view in views]
        assert torch.equal(kept, torch.stack(alone))
        for layer, (view, own) in enumerate(zip(views, alone, strict=True)):
            part, whole = view.part(own), together.part(kept)
            for name in ("k", "v", "position", "frame", "patch", "kind"):
                assert torch.equal(getattr(whole, name)[layer], getattr(part, name)), name
                assert torch.equal(getattr(part, name), _picked(view, name, own)), name

    @pytest.mark.parametrize("prototypes", [False, True])
    def test_a_long_stream_never_holds_more(self, prototypes: bool) -> None:
        method, film = self.method(48), Film(frames=2, prototypes=prototypes)
        memory = film.view()
        for clip in range(1, 30):
            clip_view = replace(film, seed=clip).view()
            memory = joined(memory, later(clip_view, 2 * clip, film.frame_tokens))
            wanted = min(memory.tokens, 48)
            memory = memory.part(method.choose(memory))
            assert memory.tokens == wanted
            assert bool((memory.position.diff() >= 0).all())

    def test_half_precision_decides_like_its_own_values_in_fp32(self) -> None:
        view = Film(exact=False, frames=9, prototypes=True).view()
        half = replace(view, k=view.k.bfloat16(), v=view.v.bfloat16())
        wide = replace(view, k=half.k.float(), v=half.v.float())
        assert torch.equal(self.method(40).choose(half), self.method(40).choose(wide))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("seed", range(20))
    def test_a_gpu_decides_as_a_cpu_does(self, seed: int) -> None:
        for exact in (True, False):
            view = Film(exact=exact, frames=9, prototypes=True, seed=seed).view()
            there = replace(
                view, **{name: value.cuda() for name, value in vars(view).items() if torch.is_tensor(value)}
            )
            assert torch.equal(self.method(40).choose(there).cpu(), self.method(40).choose(view))

    def test_a_budget_of_nothing_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="budget_tokens"):
            self.method(0)


def _picked(view: LayerView, name: str, kept: torch.Tensor) -> torch.Tensor:
    tensor: torch.Tensor = getattr(view, name)
    return tensor[:, kept] if name in ("k", "v") else tensor[kept]


class TestRecent(RetainerContract):
    def method(self, budget_tokens: int) -> Bounded:
        return Recent(budget_tokens)


class TestUniform(RetainerContract):
    def method(self, budget_tokens: int) -> Bounded:
        return UniformTokens(budget_tokens)


class TestTarVan(RetainerContract):
    def method(self, budget_tokens: int) -> Bounded:
        return TarVan(budget_tokens)


class TestTemplate(RetainerContract):
    def method(self, budget_tokens: int) -> Bounded:
        return Template(budget_tokens)


class TestVisionSink(RetainerContract):
    def method(self, budget_tokens: int) -> Bounded:
        return VisionSink(budget_tokens)


def test_every_method_is_held_to_the_contract() -> None:
    held = {type(case().method(48)) for case in RetainerContract.__subclasses__()}
    missing = [method.__name__ for method in BOUNDED.values() if method not in held]
    assert not missing, f"add a class here that inherits RetainerContract and builds {missing}"


def test_the_newest_frame_wins_a_tie_and_in_it_the_lowest_index() -> None:
    score = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    frame = torch.tensor([0, 0, 1, 1, 1])
    assert best_first(score, frame).tolist() == [3, 1, 2, 4, 0]
    assert best_first(score, frame, torch.tensor([0, 1, 1, 1, 0])).tolist() == [4, 0, 3, 1, 2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=20))
def test_the_order_of_ties_is_what_it_says(rows: list[tuple[int, int, int]]) -> None:
    score, frame, tier = (torch.tensor([row[i] for row in rows]) for i in range(3))
    found = best_first(score.float(), frame, tier).tolist()
    assert found == best(score.tolist(), frame.tolist(), tier.tolist())


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38])
            | st.floats(width=32),
            st.integers(0, 3) | st.integers(0, (1 << 29) - 1),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=24,
    ),
    st.sampled_from([None, torch.long, torch.uint8, torch.bool]),
)
def test_one_sort_gives_the_order_of_three(
    rows: list[tuple[float, int, int]], tiers: torch.dtype | None
) -> None:
    """fp64 takes the three sorts: equal scores, infinities, zeros of either sign and NaN stand where they put them."""
    score, frame, tier = (torch.tensor(column) for column in zip(*rows, strict=True))
    asked = None if tiers is None else tier.to(tiers)
    for lead in ((), (2, 1)):  # a row by itself, and one of several
        shown = score.float().expand(*lead, -1)
        own = None if asked is None else asked.expand(*lead, -1)
        found = best_first(shown, frame.expand(*lead, -1), own)
        assert torch.equal(found, best_first(shown.double(), frame.expand(*lead, -1), own))


@settings(deadline=None)
@given(st.permutations(range(9)), st.lists(st.booleans(), min_size=9, max_size=9), st.integers(0, 9))
def test_those_in_front_and_those_that_stay_are_found_without_a_sort(
    order: list[int], first: list[bool], count: int
) -> None:
    found = front(torch.tensor([order, order[::-1]]), torch.tensor([first, first])).tolist()
    for own, was in zip(found, (order, order[::-1]), strict=True):
        assert own == [x for x, is_first in zip(was, first, strict=True) if is_first] + [
            x for x, is_first in zip(was, first, strict=True) if not is_first
        ]
    assert ascending(torch.tensor(order)[:count], 9).tolist() == sorted(order[:count])


def test_no_two_methods_keep_the_same_of_one_film() -> None:
    view: LayerView = Film(frames=12, exact=False, prototypes=True).view()
    kept = {name: tuple(method(48).choose(view).tolist()) for name, method in BOUNDED.items()}
    assert len(set(kept.values())) == len(BOUNDED), kept
