"""The bench of the stages: every moment counted once, what does nothing named, on a machine that only encodes."""

from __future__ import annotations

import itertools
import sys
import time

import pytest
import torch

from memdb.ingest.stages import compose
from memdb.models.load import load_model
from memdb.recipes import RECIPES
from tests.test_imports import REFUSE, run
from tools.bench_stages import HEAD, bench, line
from tools.stages.calls import idle
from tools.stages.ground import BUDGETS, SETTINGS, settled
from tools.stages.measure import moved, row
from tools.stages.meter import Call, Meter, metered

CPU = torch.device("cpu")


def test_every_recipe_has_its_figures() -> None:
    said: list[str] = []
    found = bench(list(RECIPES), 4, "tiny", "cpu", said.append)
    assert found["failed"] == {}
    assert [own["recipe"] for own in found["rows"]] == list(RECIPES)
    for own in found["rows"]:
        assert 0 < own["percent_low"] <= own["percent"] <= own["percent_high"]  # one batch may be held up
        assert own["percent"] < 100, own
        assert own["percent"] <= own["percent_without_captions"]
        assert own["vision_ms"] > 0 < own["encode_ms"]
        assert own["frames"] >= 4
        for stage in ("reduce", "retain", "index"):
            assert (own[f"{stage}_ms"] is None) == (stage in own["idle"])
            assert own[f"{stage}_ms"] is None or own[f"{stage}_ms"] > 0
    idle_of = {own["recipe"]: sorted(own["idle"]) for own in found["rows"]}
    assert idle_of["rekv"] == ["reduce", "retain"]
    assert idle_of["streamkv"] == idle_of["infinipot-v"] == idle_of["livevlm"] == ["reduce"]
    assert idle_of["streamingtom"] == idle_of["rlivs"] == idle_of["hybrid"] == ["retain"]
    assert idle_of["streammem"] == []
    assert any(text.startswith("rekv: no reduce: identity") for text in said)


def test_a_recipe_that_fails_is_told_of_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "rekv", ("encode.chunk_frames=0",))
    said: list[str] = []
    found = bench(["rekv", "infinipot-v"], 1, "tiny", "cpu", said.append)
    assert found["failed"].keys() == {"rekv"}
    assert [own["recipe"] for own in found["rows"]] == ["infinipot-v"]
    assert any(text.startswith("rekv") and "failed" in text for text in said)


def test_it_needs_no_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    """`livevlm` is packed as fp16, which a machine that only encodes need not be able to compress."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    found = bench(["livevlm"], 1, "tiny", "cpu", lambda text: None)
    assert found["failed"] == {}


def test_the_meter_counts_every_moment_once_to_the_innermost_span(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    meter = Meter(CPU)
    meter.start()  # 0
    with meter.span("encode"), meter.span("retain"), meter.span("retain"):  # 1, 2, 3
        pass  # 4, 5, 6
    # and 7 when it is read
    assert meter.read() == {"rest": 2000.0, "encode": 2000.0, "retain": 3000.0}


def test_calls_are_wrapped_while_it_lasts_and_count_where_they_should() -> None:
    class Own:
        def double(self, x: int) -> int:
            return 2 * x

    plain, meter = Own.double, Meter(CPU)
    meter.start()
    with metered(meter, [Call(Own, "double", "retain", lambda _own, x: x > 1)]):
        assert Own().double(1) == 2
        assert "retain" not in meter.read()
        assert Own().double(2) == 4
        assert meter.read()["retain"] > 0
    assert Own.double is plain


def test_rows_that_ride_along_are_the_retainers() -> None:
    assert moved({"encode": 100.0, "retain": 1.0, "vision": 3.0}, 0.04) == {
        "encode": 96.0,
        "retain": 5.0,
        "vision": 3.0,
    }


def test_a_row_in_closed_form() -> None:
    batches = [
        {"vision": 1.0, "encode": 8.0, "caption": 11.0, "reduce": 5.0, "index": index}
        for index in (0.2, 0.4, 2.0)
    ]
    model = load_model("random:0", device="cpu")
    chosen = settled("hybrid", model, 1.0)
    nothing = {**idle(compose(chosen)), "reduce": "not counted here"}
    found = row("hybrid", batches, nothing, 96, 16, 15_000, 4, chosen)
    assert (found.reduce_ms, found.retain_ms, found.index_ms) == (None, None, 0.4)
    assert found.percent == pytest.approx(2.0)
    assert found.percent_low == pytest.approx(1.0)
    assert found.percent_high == pytest.approx(10.0)
    assert found.percent_without_captions == pytest.approx(100 * 0.4 / 9)
    assert found.is_met
    assert found.frames == 48
    assert len(line(found).split("<=")[0]) == len(HEAD.split("mark")[0])
    assert found.settings["encode"]["window_tokens"] == 15_000  # type: ignore[index]


def test_budgets_of_the_full_size_are_the_recipes_own() -> None:
    model = load_model("random:0", device="cpu")
    for name, plain in RECIPES.items():
        chosen = settled(name, model, 1.0)
        for stage, params in BUDGETS.items():
            for param in params:
                if param in getattr(plain, stage).params:
                    assert getattr(chosen, stage).params[param] == getattr(plain, stage).params[param]


def test_it_runs_without_tables_video_or_faiss() -> None:
    blocked = ("lancedb", "pyarrow", "faiss", "av", "lance", "sentence_transformers")
    script = "from tools.bench_stages import bench\nbench(['streammem'], 1, 'tiny', 'cpu', print)\n"
    assert "% (low-high)" in run(REFUSE.format(blocked=blocked) + script)
