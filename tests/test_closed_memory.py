"""A bounded memory without the gaps that dropped tokens left, and with times between its tokens."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memdb
from memdb.models.cache import CacheContext
from memdb.models.decode import prefill
from memdb.models.places import LINE, Grid, Places, closed_up
from memdb.query.rebuild import restored
from memdb.query.rebuild.consecutive import Consecutive
from memdb.query.stages import compose
from memdb.query.stored import Readings
from memdb.recipes import REKV, adjusted
from memdb.schemas.errors import RecipeError
from memdb.schemas.recipe import Recipe, Stage
from memdb.schemas.times import format_time
from tests.memory_cases import FRAME_TOKENS, Moment, memory_recipe, remembered_film, watched_memory
from tests.model_cases import (
    QUESTION,
    TINY,
    ingest,
    pictures,
    record_decisions,
    relative,
    reopened,
    timed,
    wrapped,
)
from tests.qwen_cases import N, remember
from tests.test_livevlm import live

FRAMES = 14


def closed(recipe: Recipe, time_text_s: float) -> Recipe:
    return recipe.with_stage("rebuild", Stage("restored", {"consecutive": True, "time_text_s": time_text_s}))


# Places


@settings(deadline=None)
@given(
    held=st.sets(st.integers(0, 59), min_size=1),
    start=st.integers(0, 20),
    grid=st.sampled_from([LINE, Grid(2, 3, Fraction(7, 2))]),
)
def test_closing_up_keeps_the_order_and_the_place_in_the_frame(held: set[int], start: int, grid: Any) -> None:
    positions = torch.tensor(sorted(held)) + start
    found = closed_up(grid, start, positions, 6)
    frames = sorted({token // 6 for token in held})
    if grid == LINE:
        assert found.tolist() == list(range(start, start + len(held)))
    else:
        wanted = [start + frames.index(token // 6) * 6 + token % 6 for token in sorted(held)]
        assert found.tolist() == wanted
    assert closed_up(grid, start, found, 6).tolist() == found.tolist()  # closed up once, it has no gaps left


# Answering


def dated(moment: Moment, every_s: int) -> Tensor:
    """Scores (V,) of an answer's first token over [init | tokens and times], every place counted by hand.

    A time stands behind what is left of a frame where the next frame is none that any layer holds, or a stretch is
    as long as `every_s`; but never so soon after the last one.
    """
    model, size, parts, n = wrapped(), FRAME_TOKENS, moment.layers, moment.init[0].tokens
    held = sorted({(at - n) // size for part in parts for at in part.position.tolist()})
    marks: list[int] = []
    begun = held[0]
    for frame, later in zip(held, [*held[1:], None], strict=True):
        if later == frame + 1 and later - begun < every_s:
            continue
        if not marks or frame - marks[-1] >= every_s:
            marks.append(frame)
        begun = later if later is not None else begun
    texts = [model.encode_text(f"[{format_time(frame)}]") for frame in marks]
    own, written = [], []
    for part in parts:
        place, blocks, stamps = n, [], []
        frames = [(at - n) // size for at in part.position.tolist()]
        for frame in range(max(held) + 1):
            for _ in range(frames.count(frame)):
                blocks.append(place)
                place += 1
            if frame in marks:
                for _ in texts[marks.index(frame)]:
                    stamps.append(place)
                    place += 1
        own.append(Places.line(torch.tensor(blocks), place))
        written.append(Places.line(torch.tensor(stamps), place))
    context = CacheContext(model.rotary, moment.init, [part.kv for part in parts], places=own)
    context.place_next(written)
    with torch.inference_mode():
        model.forward(model.embed([token for ids in texts for token in ids]), context)
    return prefill(model, model.embed(model.prompt_ids(QUESTION)), context)


@pytest.mark.parametrize("every_s", [1, 3, 60])
@pytest.mark.parametrize("name", ["uniform", "tar_van", "template", "vision_sink", "pages"])
def test_times_stand_behind_what_they_date_in_every_layer(
    name: str, every_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where layers hold tokens of different frames, prototypes, or only what a question chose of its pages."""
    recipe = live(ratio=1.0) if name == "pages" else memory_recipe(name)
    moments = remembered_film(tmp_path / "s", pictures(FRAMES), closed(recipe, every_s))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
    assert torch.equal(decided[0], dated(moments[-1], every_s))
    assert answer.warnings == ()
    assert answer.plan.predicted.context_tokens >= answer.used.context_tokens


def test_of_whole_frames_it_is_the_context_of_consecutive_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On three position ids, too: the newest frames, as one run with one time behind them."""
    held = 4 * N
    with watched_memory():
        remember(
            tmp_path / "s",
            pictures(20),
            recipe=closed(memory_recipe("recent", held), 60.0),  # type: ignore[arg-type]
        )
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
        session = db._asking()._session
        model, kv = session.model, next(iter(session._opened.values()))
        blocks, spec, readings = kv.table.blocks, kv.row.spec, Readings()
        rows = [torch.arange(len(blocks) - 4, len(blocks)).numpy()] * model.shape.layers
        found = [kv.read(i, own, model.device, model.dtype, readings)[0] for i, own in enumerate(rows)]
        context = Consecutive(time_text_s=60.0).rebuild(
            model, session.init(spec), blocks, rows, found, None, placing=model.placing(1.0, spec.grid)
        )
        scores = prefill(model, model.embed(model.prompt_ids(QUESTION)), context)
    assert relative(decided[0], scores) < 1e-5


def test_the_ladder_writes_no_times(tmp_path: Path) -> None:
    shown = pictures(FRAMES)
    ingest(tmp_path / "s", shown, recipe=closed(memory_recipe("uniform", 4096), 1.0))
    with reopened(tmp_path / "s") as db:
        report = db.compare_uncut(((n * 1.0, shown[n]) for n in range(FRAMES)), "film", QUESTION)
    assert report.relative < 1e-4


@pytest.mark.parametrize("every_s", [0.7, 4.4, 11.6])
def test_there_is_room_for_every_time_also_where_starts_have_fractions(
    every_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    written = restored.written_stamps

    def counted(*given: Any, **options: Any) -> Any:
        marks, ids = written(*given, **options)
        model, starts, union, every_ns, most = given
        free = written(model, starts, union, every_ns, None, **options)
        assert ids == free[1], most
        texts.extend(mark.text for mark in marks)
        return marks, ids

    recipe = closed(memory_recipe("uniform", 6), every_s)
    with memdb.connect(tmp_path / "s", model=TINY, device="cpu") as db:
        db.ingest(timed(pictures(33), step_s=0.4), recording="film", recipe=recipe, sample_fps=2.5)
    monkeypatch.setattr(restored, "written_stamps", counted)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
    assert texts
    assert answer.plan.predicted.context_tokens >= answer.used.context_tokens


def test_seconds_too_short_to_be_any_are_refused() -> None:
    for rebuild in (Stage("restored", {"consecutive": True}), Stage("consecutive")):
        for few in (1e-10, 5e-4):
            recipe = REKV if rebuild.method == "consecutive" else memory_recipe()
            with pytest.raises(RecipeError, match=r"give 0 for none, or at least 0\.001"):
                compose(recipe.with_stage("rebuild", rebuild.with_params(time_text_s=few)))


def test_times_have_no_room_where_gaps_stay() -> None:
    gaps = memory_recipe().with_stage("rebuild", Stage("restored", {"time_text_s": 4.0}))
    with pytest.raises(RecipeError, match=r"no room between them: set rebuild\.consecutive = true"):
        compose(gaps)
    with pytest.raises(RecipeError, match="has no parameter 'time_text_s'"):
        compose(adjusted(memory_recipe(), settings=("rebuild.time_text_s=4",)))


def test_times_that_have_no_room_in_the_context_are_left_out(tmp_path: Path) -> None:
    """A bound on the context takes times first: the memory itself is the answer's ground."""
    remembered_film(tmp_path / "s", pictures(FRAMES), closed(memory_recipe("uniform"), 1.0))
    used = []
    with reopened(tmp_path / "s") as db:
        free = db.ask(QUESTION, mode="kv")
        for less in range(0, 140, 9):
            room = free.plan.predicted.context_tokens - less
            used.append(db.ask(QUESTION, mode="kv", context_tokens_max=room).used.context_tokens)
            assert used[-1] <= room
        recent = db.ask(QUESTION, mode="recent")
    assert used[0] == free.used.context_tokens
    assert used == sorted(used, reverse=True)
    assert len(set(used)) > 2
    assert recent.used.context_tokens > FRAMES * FRAME_TOKENS + FRAMES  # a time behind each frame there, too
