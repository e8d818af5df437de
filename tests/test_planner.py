"""The planner: which mode, at which sizes, within which budget, and what it says of itself."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memdb.query.cost import Asked, Costs, Holdings, predict
from memdb.query.plan import PREFERENCE
from memdb.schemas.errors import NoPlanFits, QuestionError
from memdb.schemas.plan import KINDS, Plan, Predicted, Sizes
from memdb.schemas.question import MODES, Budget
from tests import plan_cases as cases
from tests.plan_cases import ASKED, COSTS, FULL, HELD, planned

NO_KV = replace(HELD, blocks=0, block_tokens=0.0, slice_bytes=0.0)
NO_CAPTIONS = replace(HELD, captions=0, caption_tokens=0, caption_tokens_longest=0)


def needs(predicted: Predicted) -> dict[str, float]:
    return {
        "latency_ms_max": predicted.total_ms,
        "gpu_bytes_max": predicted.gpu_bytes,
        "read_bytes_max": predicted.read_bytes,
        "context_tokens_max": predicted.context_tokens,
    }


def fits(predicted: Predicted, budget: Budget) -> bool:
    limits = budget.as_json()
    return all(limits[name] is None or need <= limits[name] for name, need in needs(predicted).items())


def able(mode: str, held: Holdings, full: Sizes) -> bool:
    kv, captions = held.blocks > 0, held.captions > 0 and full.caption_tokens > 0
    needed = {"auto": True, "captions": captions, "kv": kv, "both": kv and captions, "recent": kv}
    return needed[mode]


def outcome(budget: Budget, given_: dict[str, Any]) -> Plan | NoPlanFits | QuestionError:
    try:
        return planned(budget, **given_)
    except (NoPlanFits, QuestionError) as error:
        return error


def as_tuple(sizes: Sizes) -> tuple[int, ...]:
    return sizes.blocks, sizes.caption_tokens, sizes.answer_tokens


# Which mode


@pytest.mark.parametrize(
    ("kind", "held", "mode"),
    [
        ("gist", HELD, "captions"),
        ("detail", HELD, "kv"),
        ("count", HELD, "both"),
        ("now", HELD, "recent"),
        ("gist", NO_CAPTIONS, "kv"),
        ("detail", NO_KV, "captions"),
        ("now", NO_KV, "captions"),
    ],
)
def test_auto_takes_the_best_mode_for_the_kind_that_is_stored(kind: str, held: Holdings, mode: str) -> None:
    plan = planned(kind=kind, held=held)
    assert plan.mode == mode
    assert plan.reasons[0] == "the test says so"
    assert (plan.sizes.blocks > 0) == (mode != "captions")
    assert (plan.sizes.caption_tokens > 0) == (mode in ("captions", "both"))


def test_every_kind_has_an_order_of_all_modes() -> None:
    assert set(PREFERENCE) == set(KINDS)
    for order in PREFERENCE.values():
        assert sorted(order) == ["both", "captions", "kv", "recent"]


def test_slower_reads_turn_a_question_for_detail_to_the_captions() -> None:
    budget = Budget(latency_ms_max=planned().predicted_ms)
    assert planned(budget).mode == "kv"
    slower = replace(COSTS, read_base=COSTS.read_base + 200)
    assert planned(budget, costs=slower).mode == "captions"


def test_a_mode_that_was_asked_for_is_taken_or_refused_but_never_changed() -> None:
    for mode in ("captions", "kv", "both", "recent"):
        assert planned(mode=mode, kind="gist").mode == mode
    with pytest.raises(QuestionError, match="no KV is stored"):
        planned(mode="kv", held=NO_KV)
    with pytest.raises(QuestionError, match="no captions are stored"):
        planned(mode="captions", held=NO_CAPTIONS)


# The budget


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    cases.kinds,
    cases.sizes,
    cases.asked,
    cases.holdings(),
    cases.costs,
    cases.budgets,
)
def test_a_plan_fits_every_budget_or_the_nearest_one_that_is_named_does(
    data: st.DataObject,
    kind: str,
    full: Sizes,
    asked: Asked,
    held: Holdings,
    costs: Costs,
    budget: Budget,
) -> None:
    usable = [mode for mode in MODES if able(mode, held, full)]
    assume("captions" in usable or "kv" in usable)
    mode = data.draw(st.sampled_from(usable))
    given_: dict[str, Any] = {
        "mode": mode,
        "kind": kind,
        "full": full,
        "asked": asked,
        "held": held,
        "costs": costs,
    }
    plan = outcome(budget, given_)
    if isinstance(plan, QuestionError):  # not even the smallest plan would stand in the model's context
        assert isinstance(outcome(Budget(), given_), QuestionError)
        return
    if isinstance(plan, NoPlanFits):
        limits = {name: value for name, value in budget.as_json().items() if value is not None}
        nearest = plan.nearest
        assert nearest.keys() == limits.keys()
        assert all(nearest[name] >= value for name, value in limits.items())
        assert nearest != limits
        budget = Budget(**nearest)  # type: ignore[arg-type]
        plan = outcome(budget, given_)
        assert isinstance(plan, Plan)
    assert fits(plan.predicted, budget)
    assert plan.predicted == predict(plan.mode, plan.sizes, asked, held, costs)
    assert plan.predicted.context_tokens <= held.context_tokens_max
    assert all(part <= whole for part, whole in zip(as_tuple(plan.sizes), as_tuple(full), strict=True))
    assert plan.sizes.answer_tokens >= 1
    assert (plan.sizes.blocks > 0) == (plan.mode != "captions")
    if plan.mode in ("captions", "both") and full.caption_tokens > held.caption_tokens_longest:
        assert plan.sizes.caption_tokens >= min(held.caption_tokens, held.caption_tokens_longest + 1)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["captions", "kv", "both", "recent"]),
    st.sampled_from(["latency_ms_max", "gpu_bytes_max", "read_bytes_max", "context_tokens_max"]),
    cases.costs,
    st.floats(0.01, 1.2),
    st.floats(0.01, 1.0),
)
def test_a_tighter_budget_never_buys_more(
    mode: str, name: str, costs: Costs, wide: float, narrow: float
) -> None:
    whole = needs(planned(mode=mode, costs=costs).predicted)[name]
    assume(whole * wide * narrow >= 1)
    try:
        small = planned(Budget(**{name: int(whole * wide * narrow)}), mode=mode, costs=costs)  # type: ignore[arg-type]
    except NoPlanFits:
        return
    large = planned(Budget(**{name: int(whole * wide)}), mode=mode, costs=costs)  # type: ignore[arg-type]
    assert all(a <= b for a, b in zip(as_tuple(small.sizes), as_tuple(large.sizes), strict=True))


def test_budgets_shrink_step_by_step() -> None:
    whole = planned(mode="both")
    seen = []
    for share in (1.0, 0.8, 0.6, 0.5, 0.3, 0.25):
        seen.append(planned(Budget(latency_ms_max=whole.predicted_ms * share), mode="both").sizes)
    assert seen[0] == whole.sizes
    assert len(set(seen)) >= 4
    for larger, smaller in pairwise(seen):
        assert all(a >= b for a, b in zip(as_tuple(larger), as_tuple(smaller), strict=True))


def test_both_shares_a_context_that_is_too_small_between_the_tiers() -> None:
    room = 800
    plan = planned(Budget(context_tokens_max=room), mode="both")
    assert 0 < plan.sizes.blocks < FULL.blocks
    assert 0 < plan.sizes.caption_tokens < FULL.caption_tokens
    whole = planned(mode="both").sizes
    assert plan.sizes.blocks / whole.blocks == pytest.approx(
        plan.sizes.caption_tokens / whole.caption_tokens, abs=0.03
    )
    assert room * 0.9 < plan.predicted.context_tokens <= room


@pytest.mark.parametrize(("beside", "wanted"), [(0, 1000), (240, 240), (5000, 1000)])
def test_both_reads_no_more_captions_than_are_to_stand_beside_kv(beside: int, wanted: int) -> None:
    asked = replace(ASKED, beside_tokens=beside)
    assert planned(mode="both", asked=asked).sizes.caption_tokens == wanted
    assert planned(mode="captions", asked=asked).sizes.caption_tokens == 1000


def test_a_question_that_is_longer_than_the_context_is_refused_and_says_why() -> None:
    with pytest.raises(QuestionError, match=r"takes 40000 tokens.*context of 32768: shorten it"):
        planned(asked=replace(ASKED, prompt_tokens=40_000))
    with pytest.raises(NoPlanFits) as caught:  # the budget is too small here, not the model
        planned(Budget(context_tokens_max=20))
    assert fits(planned(Budget(**caught.value.nearest)).predicted, Budget(**caught.value.nearest))  # type: ignore[arg-type]


def test_no_plan_fits_names_the_nearest_budget_in_words_that_can_be_typed() -> None:
    huge = replace(HELD, slice_bytes=1_234_567.0)
    with pytest.raises(NoPlanFits) as caught:
        planned(Budget(latency_ms_max=5000, read_bytes_max=1000), mode="kv", held=huge)
    error = caught.value
    assert error.exit_code == 4
    assert error.nearest == {"latency_ms_max": 5000, "read_bytes_max": 4 * 1_234_567}
    assert "read_bytes_max 4938268" in str(error)
    assert "mode kv" in str(error)
    assert re.search(r"reads 4938268 bytes, more than read_bytes_max 1000", str(error))


# What it says


def test_alternatives_carry_figures() -> None:
    budget = Budget(latency_ms_max=planned(mode="captions").predicted_ms)
    plan = planned(budget, kind="count")
    assert plan.mode == "both"  # shrunk: the best mode at less is tried before the next
    assert plan.rejected
    tried = next(other for other in plan.rejected if other.mode == "both")
    full = predict("both", tried.sizes, ASKED, HELD, COSTS)
    assert tried.predicted_ms == full.total_ms > budget.latency_ms_max  # type: ignore[operator]
    assert f"{full.total_ms:.1f} ms" in tried.why
    for other in plan.rejected:
        assert other.predicted_ms == predict(other.mode, other.sizes, ASKED, HELD, COSTS).total_ms
    assert {other.mode for other in plan.rejected} == {"captions", "kv", "both", "recent"}
    text = plan.explain()
    for other in plan.rejected:
        assert f"rejected {other.mode} ({other.predicted_ms:.2f} ms): {other.why}" in text
    assert "shrunk to" in text


def test_what_is_missing_is_said() -> None:
    plan = planned(kind="count", held=NO_KV)
    assert plan.mode == "captions"
    assert {(o.mode, o.why) for o in plan.rejected} == {
        (mode, "no KV is stored up to this moment") for mode in ("both", "kv", "recent")
    }


def test_explain_puts_what_it_took_beside_what_was_predicted() -> None:
    plan = planned()
    after = plan.after({"retrieve": 12.345, "total": 99.5})
    assert "took" not in plan.explain()
    assert re.search(r"retrieve +predicted +[\d.]+ ms, took +12\.3[45] ms", after.explain())
    assert re.search(r"total +predicted +[\d.]+ ms, took +99\.50 ms", after.explain())
    assert after.as_json()["mode"] == plan.as_json()["mode"]


def test_a_plan_depends_on_its_arguments_alone() -> None:
    """The same again, with other questions between, in another order, and in another process."""
    random.seed(1)
    asked = [(kind, ms) for kind in KINDS for ms in (None, 40.0, 120.0)]

    def all_of(order: list[tuple[str, float | None]]) -> dict[tuple[str, float | None], Plan]:
        return {(kind, ms): planned(Budget(latency_ms_max=ms), kind=kind) for kind, ms in order}

    first = all_of(asked)
    random.shuffle(asked)
    before = replace(COSTS, ratios=dict(COSTS.ratios))
    assert all_of(asked) == first
    assert before == COSTS  # and it leaves them as they were


def test_planning_needs_no_torch_and_no_model() -> None:
    script = (
        "import sys; import memdb.query.plan, memdb.query.cost, memdb.query.kinds;"
        "print([name for name in ('torch', 'transformers', 'lancedb', 'faiss', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
