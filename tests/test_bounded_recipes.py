"""Recipes `infinipot-v` and `streammem` from command to answer: resume, forgetting, controls, profiles, bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from memdb.client import connect
from memdb.ingest.encoder import StreamEncoder
from memdb.memory import remembered
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import Interrupted
from memdb.schemas.keep import split_ids
from tests.model_cases import pictures, timed
from tests.run_cases import (
    CHUNK,
    NAME,
    SETTINGS,
    command,
    content,
    ingest_words,
    ingested,
    opened,
    small_film,
    small_model,
    small_spec,
    unit_digests,
    unit_rows,
)
from tests.store_cases import directory_digest
from tests.test_qwen_ingest import SMALL as SMALL_QWEN
from tests.test_resume import Crash, crash_at, stop_at

NAMES = ("infinipot-v", "streammem")
FRAMES = 22  # five batches of four and one of two
BUDGET = 20  # tokens: five frames of four
QUESTION = "what was there before the star?"
NS = 10**9


@dataclass(frozen=True)
class Bench:
    spec: str
    model: VideoModel
    film: Path
    whole: dict[str, Path]  # by recipe; nobody changes them


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bounded")
    spec = small_spec(folder)
    model, film = small_model(spec), small_film(folder / "film.mp4", FRAMES)
    whole = {name: folder / f"{name}.memdb" for name in NAMES}
    for name, store in whole.items():
        ingested(store, model, film, name)
    return Bench(spec, model, film, whole)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_makes_the_same_recording_and_answers_from_it(
    bench: Bench, name: str, tmp_path: Path
) -> None:
    """Its recipe is written out; every moment has a keep set within the budget; a question changes nothing."""
    store = tmp_path / "s.memdb"
    assert command(*ingest_words(store, bench.spec, bench.film, name)).code == 0
    assert content(store) == content(bench.whole[name])
    before = directory_digest(store)
    for mode in ("kv", "recent", "auto"):
        ran = command("ask", QUESTION, "--store", str(store), "--mode", mode, "--json")
        assert ran.code == 0, ran.err
        assert ran.json["evidence"], mode
        assert ran.json["warnings"] == []
    assert directory_digest(store) == before
    assert command("verify", "--store", str(store)).code == 0
    with connect(store, create=False) as db:
        row = db.store.recording(NAME)
        assert row.spec.recipe.name == name
        assert row.spec.recipe.retain.params["budget_tokens"] == BUDGET
        for unit in db.store.units(row.id):
            keep = db.store.read_keep(unit)
            assert keep is not None
            assert max(keep.tokens) <= BUDGET
            assert all((split_ids(ids)[0] <= unit.number).all() for ids in keep.ids)
        assert set(keep.tokens) == {BUDGET}


@pytest.mark.parametrize("name", NAMES)
def test_stopped_or_dead_at_any_batch_it_ends_with_the_same_digest(
    bench: Bench, name: str, tmp_path: Path
) -> None:
    """Stopped, its state was saved; dead, the last one serves, with what came after it encoded and compared again."""
    whole = unit_digests(bench.whole[name])
    for batch in range(FRAMES // CHUNK):
        for dies in (False, True):
            store = tmp_path / f"{batch}-{dies}.memdb"
            with pytest.MonkeyPatch.context() as patch:
                if dies:
                    patch.setattr(StreamEncoder, "state_bytes", 0 if batch % 2 else 1 << 40)
                    crash_at(patch, batch + 1)
                stop = None if dies else stop_at(patch, batch)
                with pytest.raises(Crash if dies else Interrupted):
                    ingested(store, bench.model, bench.film, name, stop=stop)
            before = unit_digests(store)
            assert before == whole[: len(before)]
            report = ingested(store, bench.model, bench.film, name)
            assert report.epoch == 0
            assert report.replayed_units == (len(before) if dies and not batch % 2 else 0)
            assert content(store) == content(bench.whole[name])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_forgotten_is_in_no_memory(bench: Bench, name: str, tmp_path: Path) -> None:
    """Neither now nor as of any moment; the rest still answers, and the recording verifies."""
    store = tmp_path / "s.memdb"
    ingested(store, bench.model, bench.film, name)
    with connect(store) as db:
        assert db.forget(NAME, start_s=7, end_s=13).states > 0
        db.compact()
        assert db.verify().ok
    with opened(store, bench.model, create=False) as db:
        for at in (None, 14, 20):
            answer = db.ask(QUESTION, mode="kv", at=at)
            assert answer.evidence
            assert all(item.end_s <= 7 or item.start_s >= 13 for item in answer.evidence), answer.evidence
        row = db.store.recording(NAME)
        assert remembered(db.store, row).keep is not None
    assert content(store) != content(bench.whole[name])


CONTROLS: dict[str, dict[str, tuple[str, ...]]] = {
    "infinipot-v": {
        "unit": ("unit=clip", "unit.frames=3"),
        "unit.first_frames": ("unit.first_frames=4",),
        "reduce": ("reduce=ctr", "reduce.tokens=3", "retain.pooling=none"),
        "encode": ("encode.init_prompt=Look.",),
        "write": ("write=int8",),
        "retain": ("retain=uniform", f"retain.budget_tokens={BUDGET}"),
        "retain, newest": ("retain=recent", f"retain.budget_tokens={BUDGET}"),
        "retain.tar": ("retain.tar=1.0",),
        "rebuild": ("rebuild=yarn",),
    },
    "streammem": {
        "unit": ("unit=block", "unit.first_frames=6", "unit.frames=3"),
        "reduce": ("reduce=identity",),
        "encode": ("encode.probe=text", "encode.probe_text=Keep what is said."),
        "write": ("write=int8",),
        "retain": ("retain=uniform", f"retain.budget_tokens={BUDGET}", "encode.probe=none"),
        "retain, newest": ("retain=recent", f"retain.budget_tokens={BUDGET}", "encode.probe=none"),
        "retain.prototype_share": ("retain.prototype_share=0.0",),
        "rebuild": ("rebuild=original",),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_another_method_in_any_stage_is_another_recording(bench: Bench, name: str, tmp_path: Path) -> None:
    digests = {"": content(bench.whole[name])}
    for control, changes in CONTROLS[name].items():
        store = tmp_path / control
        settings = (*SETTINGS[name], *changes)
        codec = None if control == "write" else "int4"
        ingested(store, bench.model, bench.film, name, settings=settings, codec=codec)
        digests[control] = content(store)
    assert len(set(digests.values())) == len(digests), digests


def test_the_two_keep_different_tokens_of_one_film(bench: Bench) -> None:
    """Of the times that they remember, no layer's are the same."""
    held = {}
    for name in NAMES:
        with connect(bench.whole[name], create=False) as db:
            row = db.store.recording(NAME)
            keep = remembered(db.store, row).keep
            assert keep is not None
            starts = {unit.number: unit.blocks["start_ns"] for unit in db.store.units(row.id)}
            held[name] = [
                sorted(int(starts[unit][block]) for unit, block, _ in zip(*split_ids(ids), strict=True))
                for ids in keep.ids
            ]
    assert all(one != two for one, two in zip(held["infinipot-v"], held["streammem"], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_waits_for_whole_units_and_fixed_does_not(bench: Bench, name: str, tmp_path: Path) -> None:
    """A frame a minute: `fixed` closes a unit after two minutes, the papers know no time."""
    lasting = {}
    for profile in ("fixed", "paper"):
        with opened(tmp_path / profile, bench.model) as db:
            db.ingest(
                timed(pictures(13), step_s=60.0),
                recording=NAME,
                recipe=name,
                profile=profile,
                settings=SETTINGS[name],
                sample_fps=1 / 60,
            )
            row = db.store.recording(NAME)
            assert row.spec.recipe.profile == profile
            units = db.store.units(row.id)
            lasting[profile] = [round((unit.end_ns - unit.start_ns) / NS / 60) for unit in units]
    assert max(lasting["fixed"]) == 2
    assert max(lasting["paper"]) > 2
    assert sum(lasting["fixed"]) == sum(lasting["paper"]) == 13


@pytest.mark.parametrize("name", NAMES)
def test_an_ingest_writes_less_than_two_and_a_half_times_its_units(
    bench: Bench, name: str, tmp_path: Path
) -> None:
    """With the papers' own units: a memory of three units of eight frames, whose state is no small thing."""
    film, store = small_film(tmp_path / "long.mp4", 200), tmp_path / "s.memdb"
    budget = "retain.budget_frames=24" if name == "infinipot-v" else f"retain.budget_tokens={24 * 4}"
    settings = ("encode.chunk_frames=8", budget)
    ingested(store, bench.model, film, name, settings=settings)
    with connect(store, create=False) as db:
        found = db.stats().recordings[0]
        keep = remembered(db.store, db.store.recording(NAME)).keep
    assert found.written_ratio is not None
    assert 1 < found.written_ratio < 2.5
    assert found.bytes["keep_sets"] > 0
    assert keep is not None
    assert set(keep.tokens) == {24 * 4}


@pytest.mark.parametrize("name", NAMES)
def test_both_go_on_three_position_ids(name: str, tmp_path: Path) -> None:
    """A pair of frames is a frame; stopped in between, the recording is the same; budget and factor are the model's."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL_QWEN))
    spec = f"random-qwen:7:{path}"
    model, film = small_model(spec), small_film(tmp_path / "film.mp4", 31)
    ingested(tmp_path / "whole", model, film, name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingested(tmp_path / "again", model, film, name, stop=stop_at(patch, 1))
    assert 0 < len(unit_rows(tmp_path / "again")) < len(unit_rows(tmp_path / "whole"))
    ingested(tmp_path / "again", model, film, name)
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    with opened(tmp_path / "whole", model, create=False) as db:
        for mode in ("kv", "recent"):
            answer = db.ask(QUESTION, mode=mode)
            assert answer.evidence
            assert not answer.warnings
        assert db.verify().ok
        row = db.store.recording(NAME)
        params = row.spec.recipe.retain.params
        assert params["budget_tokens"] == (5 * 6 if name == "infinipot-v" else BUDGET)
        if name == "streammem":
            assert row.spec.recipe.rebuild.params["factor"] == 1.0
        frames = [block for unit in db.store.units(row.id) for block in unit.blocks if block["kind"] == 1]
        assert {int(block["tokens"]) for block in frames} == {6}
        assert np.all(np.diff([int(block["position"]) for block in frames]) == 6)


def test_the_map_shows_them() -> None:
    ran = command("recipes")
    assert ran.code == 0
    rows = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert "infinipot-v block identity chunk none fp16 tar_van mean_key all original greedy" in rows
    assert "streammem clip merge chunk none fp16 template mean_key all yarn greedy" in rows


def test_a_budget_in_frames_gives_way_to_one_in_tokens(tmp_path: Path, bench: Bench) -> None:
    store = tmp_path / "s.memdb"
    settings = (*SETTINGS["infinipot-v"], "retain.budget_tokens=12")
    ingested(store, bench.model, bench.film, "infinipot-v", settings=settings)
    with connect(store, create=False) as db:
        row = db.store.recording(NAME)
        keep = remembered(db.store, row).keep
        assert row.spec.recipe.retain.params["budget_tokens"] == 12
        assert row.spec.recipe.retain.params["budget_frames"] == 0
    assert keep is not None
    assert set(keep.tokens) == {12}
