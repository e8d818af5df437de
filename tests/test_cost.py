"""The cost model: sums over measured figures, corrected by what questions took, kept outside the store."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.paths import cache_dir
from memdb.query.cost import Asked, CostFile, Costs, Holdings, cost_key, predict
from memdb.schemas.plan import MemorySize, Sizes
from memdb.schemas.question import MODES
from tests import plan_cases as cases
from tests.plan_cases import ASKED, COSTS, HELD

SIZES = Sizes(10, 100, 20)


def test_a_prediction_is_the_sum_that_can_be_done_by_hand() -> None:
    found = predict("both", SIZES, ASKED, HELD, COSTS)

    def forward(tokens: float, context: float) -> float:
        return 1.0 + 0.01 * tokens + 1e-5 * tokens * context

    kv, init, stamps = 10 * 16, 12, 10 * 2
    whole = init + kv + stamps + 100
    assert found.stages_ms == {
        "captions": pytest.approx(7.0),
        "retrieve": pytest.approx(4 * (0.2 + 10 * 0.1 + kv * 0.001) + 4 * 0.05 + forward(7, init + kv)),
        "rebuild": pytest.approx(forward(stamps + 100, init + kv) + 4 * 0.001 * kv),
        "prefill": pytest.approx(forward(15, whole)),
        "decode": pytest.approx(20 * forward(1, whole + 15 + 10)),
    }
    assert found.total_ms == pytest.approx(sum(found.stages_ms.values()))
    assert found.context_tokens == whole + 15 + 20
    assert found.gpu_bytes == found.context_tokens * 4096
    assert found.read_bytes == 10 * 4 * 2048


def test_two_passes_are_paid_for_and_the_longest_layer_has_room() -> None:
    """StreamKV: the question goes through the layers twice, and one of them may bring back half as much again."""
    asked = replace(ASKED, passes=2, spread=1.5)
    once, twice = (predict("kv", SIZES, each, HELD, COSTS) for each in (ASKED, asked))
    assert twice.stages_ms["retrieve"] == pytest.approx(2 * once.stages_ms["retrieve"])
    assert twice.read_bytes == 2 * once.read_bytes
    assert twice.context_tokens == once.context_tokens + 5 * 16
    assert {**twice.stages_ms, "retrieve": 0} == {**once.stages_ms, "retrieve": 0}
    for sizes, mode in ((SIZES, "recent"), (SIZES, "captions"), (replace(SIZES, blocks=HELD.blocks), "kv")):
        assert predict(mode, sizes, asked, HELD, COSTS) == predict(mode, sizes, ASKED, HELD, COSTS)


def test_each_mode_pays_for_its_own_tiers() -> None:
    stages = {mode: set(predict(mode, SIZES, ASKED, HELD, COSTS).stages_ms) for mode in MODES[1:]}
    assert "retrieve" not in stages["captions"]
    assert "captions" not in stages["kv"] | stages["recent"]
    assert stages["both"] == stages["captions"] | stages["kv"]
    kv, recent = (predict(mode, SIZES, ASKED, HELD, COSTS).stages_ms["retrieve"] for mode in ("kv", "recent"))
    assert recent < kv  # nothing is ranked, and the question is not run twice
    assert predict("captions", SIZES, ASKED, HELD, COSTS).read_bytes == 0


def test_a_memory_that_a_question_chooses_from_costs_the_question_once_more() -> None:
    whole = replace(HELD, memory=MemorySize(blocks=6, tokens=50, read_bytes=999))
    chosen = replace(HELD, memory=MemorySize(blocks=6, tokens=50, read_bytes=999, chosen=True))
    one, two = (predict("kv", SIZES, ASKED, held, COSTS) for held in (whole, chosen))
    again = 1.0 + 0.01 * 7 + 1e-5 * 7 * (12 + 50)  # seven tokens against init tokens and memory
    assert two.stages_ms["retrieve"] - one.stages_ms["retrieve"] == pytest.approx(4 * 0.05 + again)
    for name in ("prefill", "decode"):
        assert two.stages_ms[name] == one.stages_ms[name]
    assert (two.read_bytes, two.context_tokens) == (999, one.context_tokens)
    recent = [predict("recent", SIZES, ASKED, held, COSTS) for held in (HELD, chosen)]
    assert recent[0] == recent[1]


def test_a_memory_may_have_more_blocks_than_there_are_frames() -> None:
    """Prototypes are blocks, too: the context is as long as the memory is, and the times in it."""
    memory = MemorySize(blocks=6, tokens=50, read_bytes=999)
    many = replace(memory, blocks=6 + 10 * HELD.blocks)
    few, more = (predict("kv", SIZES, ASKED, replace(HELD, memory=one), COSTS) for one in (memory, many))
    assert few.context_tokens == more.context_tokens
    timed = predict("kv", replace(SIZES, time_tokens=9), ASKED, replace(HELD, memory=memory), COSTS)
    assert timed.context_tokens == few.context_tokens + 9


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["captions", "kv", "both", "recent"]),
    cases.sizes,
    st.tuples(*(st.integers(0, 50),) * 3),
    cases.asked,
    cases.holdings(),
    cases.costs,
)
def test_more_never_costs_less(
    mode: str, sizes: Sizes, more: tuple[int, int, int], asked: Asked, held: Holdings, costs: Costs
) -> None:
    larger = Sizes(sizes.blocks + more[0], sizes.caption_tokens + more[1], sizes.answer_tokens + more[2])
    small, large = (predict(mode, each, asked, held, costs) for each in (sizes, larger))
    assert small.total_ms <= large.total_ms * (1 + 1e-12)
    assert small.gpu_bytes <= large.gpu_bytes
    assert small.read_bytes <= large.read_bytes
    assert small.context_tokens <= large.context_tokens


def test_learning_brings_predictions_to_what_questions_take() -> None:
    """Each question's stages take their own multiple of what was measured: the gap shrinks with every one."""
    costs = replace(COSTS, ratios={})
    truth = {
        stage: ms * factor
        for (stage, ms), factor in zip(
            predict("both", SIZES, ASKED, HELD, costs).stages_ms.items(),
            (3.0, 0.4, 1.7, 10.0, 1.0),
            strict=True,
        )
    }
    gaps = []
    for _ in range(25):
        predicted = predict("both", SIZES, ASKED, HELD, costs).stages_ms
        gaps.append({stage: abs(predicted[stage] - ms) for stage, ms in truth.items()})
        costs.learn(predicted, truth)
    for stage, ms in truth.items():
        falling = [gap[stage] for gap in gaps]
        assert all(b <= a + 1e-9 for a, b in pairwise(falling)), stage
        assert falling[-1] < 0.01 * ms
        assert costs.ratios[stage] == pytest.approx(
            truth[stage] / predict("both", SIZES, ASKED, HELD, COSTS).stages_ms[stage], rel=0.01
        )


def test_one_absurd_question_does_not_rule_a_mode_out_for_ever() -> None:
    costs = replace(COSTS, ratios={})
    predicted = predict("kv", SIZES, ASKED, HELD, costs).stages_ms
    costs.learn(predicted, {stage: ms * 1e9 for stage, ms in predicted.items()})
    assert all(ratio <= 0.7 + 0.3 * 50 for ratio in costs.ratios.values())
    for _ in range(30):
        costs.learn(predict("kv", SIZES, ASKED, HELD, costs).stages_ms, predicted)
    assert all(ratio == pytest.approx(1.0, abs=0.05) for ratio in costs.ratios.values())


def test_stages_that_did_not_run_teach_nothing() -> None:
    costs = replace(COSTS, ratios={"retrieve": 2.0})
    costs.learn({"retrieve": 0.0, "decode": 5.0, "prefill": 3.0}, {"retrieve": 7.0, "decode": 10.0})
    assert costs.ratios["retrieve"] == 2.0
    assert costs.ratios["decode"] == pytest.approx(1.3)
    assert "prefill" not in costs.ratios


# The file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMDB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(cases.costs)
@settings(max_examples=50, deadline=None)
def test_costs_come_back_as_they_were_saved(tmp_path_factory: pytest.TempPathFactory, costs: Costs) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMDB_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "costs-cache"))
        CostFile("a").save(costs)
        assert CostFile("a").load() == costs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "{}",
        '{"ratios": {}}',
        json.dumps(asdict(COSTS) | {"read_base": "slow"}),
        json.dumps(asdict(COSTS) | {"read_base": float("nan")}),
        json.dumps(asdict(COSTS) | {"read_base": -1}),
        json.dumps(asdict(COSTS) | {"ratios": {"decode": float("inf")}}),
        json.dumps(asdict(COSTS) | {"ratios": [1]}),
        json.dumps(asdict(COSTS) | {"another": 1}),
        json.dumps(asdict(COSTS) | {"read_base": 10**400}),
        "[" * 60_000,
    ],
)
def test_a_file_that_is_no_cost_file_is_measured_again(cache: Path, text: str) -> None:
    CostFile("a").save(COSTS)
    [path] = (cache / "costs").iterdir()
    path.write_text(text)
    assert CostFile("a").load() is None


def test_a_place_that_cannot_be_written_costs_nothing_but_the_memory(cache: Path) -> None:
    cache.write_text("a file stands where the folder would")
    CostFile("a").save(COSTS)
    assert CostFile("a").load() is None
    assert cache.read_text() == "a file stands where the folder would"


def test_every_store_model_device_and_dtype_has_costs_of_its_own(tmp_path: Path) -> None:
    base = (tmp_path, "s" * 32, "m" * 32, "cpu", "torch.float32")
    others = [(tmp_path / "x", "t" * 32, "n" * 32, "cuda", "torch.float16")[i] for i in range(5)]
    keys = {cost_key(*base)} | {cost_key(*(*base[:i], others[i], *base[i + 1 :])) for i in range(5)}  # type: ignore[arg-type]
    assert len(keys) == 6
    assert cost_key(*base) == cost_key(*base)


def test_costs_live_outside_every_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEMDB_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "memdb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "memdb"
