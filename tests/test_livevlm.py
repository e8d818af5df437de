"""Recipe `livevlm` (arXiv 2505.15269, version 2) from frames to answers: V1 to V7, and its two pools."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memdb.client import connect
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.layer_tokens import LayerTokens
from memdb.ingest.memory import EncoderMemory
from memdb.ingest.stages import compose
from memdb.models.cache import CacheContext
from memdb.models.decode import prefill
from memdb.models.load import load_model
from memdb.models.places import LINE, Grid, Next, Places
from memdb.models.protocol import VideoModel
from memdb.query.rebuild.restored import Restored
from memdb.query.retrieve.pages import MemoryPages
from memdb.query.stages import compose as compose_query
from memdb.recipes import LIVEVLM, recipe
from memdb.retain.vision_sink import VisionSink
from memdb.schemas.errors import Interrupted, RecipeError
from memdb.schemas.recipe import Recipe, Stage
from memdb.store import Store
from tests.memory_cases import FRAME_TOKENS, Moment, live_scores, remembered_film, watched_memory
from tests.model_cases import (
    INIT_PROMPT,
    QUESTION,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    wrapped,
)
from tests.qwen_cases import N, remember
from tests.run_cases import (
    CHUNK,
    NAME,
    SMALL,
    content,
    opened,
    small_film,
    small_model,
    small_spec,
    unit_digests,
)
from tests.store_cases import flip
from tests.test_resume import Crash, crash_at, stop_at
from tests.test_retain_vision_sink import plain_sink, strip

FRAMES, CLIP = 14, 3
M, SHORT, PAGE = 40, 2, 4  # long-term tokens, short-term frames, tokens a page


def live(*, codec: str = "raw", retain: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """The recipe at the tiny model's size; `changes` are parameters of retrieve, `consecutive` of rebuild."""
    consecutive = bool(changes.pop("consecutive", False))
    row = LIVEVLM.with_stage("unit", Stage("clip", {"frames": CLIP})).with_stage("write", Stage(codec))
    row = row.with_stage(
        "encode", row.encode.with_params(chunk_frames=4, probe_tokens=8, init_prompt=INIT_PROMPT)
    )
    row = row.with_stage(
        "retain", row.retain.with_params(**{"budget_tokens": M, "short_frames": SHORT} | (retain or {}))
    )
    row = row.with_stage("retrieve", row.retrieve.with_params(page_tokens=PAGE, **changes))
    row = row.with_stage("rebuild", Stage("restored", {"consecutive": consecutive}))
    return row.with_stage("answer", Stage("greedy", {"tokens_max": 2}))


@dataclass
class Pick:
    """One layer's choice of pages by one question: what it was given, and what it gave."""

    q: Tensor
    k: Tensor
    long: int
    at: Tensor


@contextmanager
def watched_picks() -> Iterator[list[Pick]]:
    picks: list[Pick] = []
    pick = MemoryPages.pick

    def picking(self: MemoryPages, q: Tensor, k: Tensor, long: int) -> Tensor:
        at = pick(self, q, k, long)
        picks.append(Pick(q.clone(), k.clone(), long, at))
        return at

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MemoryPages, "pick", picking)
        yield picks


def plain_pick(q: Tensor, k: Tensor, long: int, ratio: float) -> list[int]:
    """Page by page in fp64: mean key, mean query, heads of a group against their own key."""
    mean, group = q.double().mean(1), q.shape[0] // k.shape[0]
    pages = [list(range(at, min(at + PAGE, long))) for at in range(0, long, PAGE)]
    keys = [k[:, page].double().mean(1) for page in pages]
    scores = [sum(float(mean[head] @ key[head // group]) for head in range(q.shape[0])) for key in keys]
    count = math.ceil(ratio * len(pages) - 1e-9)
    best = sorted(sorted(range(len(pages)), key=lambda page: -scores[page])[:count])
    return [token for page in best for token in pages[page]] + list(range(long, k.shape[1]))


def long_of(moment: Moment, layer: LayerTokens) -> int:
    """Of a layer's tokens those that are older than the newest frames of the stream."""
    end = moment.init[0].tokens + min(FRAMES, (moment.unit + 1) * CLIP) * FRAME_TOKENS
    return int((layer.position < end - SHORT * FRAME_TOKENS).sum())


def chosen_scores(
    moment: Moment, chosen: Sequence[Tensor], *, consecutive: bool = False, captions: Sequence[int] = ()
) -> Tensor:
    """Scores of the first token of an answer over [init | these tokens of the encoder's memory], placed by hand."""
    model = wrapped()
    parts = [layer.at(at) for layer, at in zip(moment.layers, chosen, strict=True)]
    behind = max(int(layer.position.max()) for layer in moment.layers) + 1
    places = [Places.line(part.position, behind) for part in parts]
    if consecutive:
        n = moment.init[0].tokens
        places = [Places.line(torch.arange(n, n + len(part.id)), n + len(part.id)) for part in parts]
    context = CacheContext(model.rotary, moment.init, [part.kv for part in parts], places=places)
    if captions:
        prefill(model, model.embed(list(captions)), context)
    return prefill(model, model.embed(model.prompt_ids(QUESTION)), context)


# The two pools (V1, V2, V3, V6)


@pytest.mark.parametrize(("top", "B"), [(0.5, 1), (0.0, 1), (0.25, 4)])
def test_v1_v2_v6_what_is_held_is_a_walk_over_what_was_handed_over(
    top: float, B: int, tmp_path: Path
) -> None:
    """Per unit and layer: the last two frames whole, of older tokens those that the walk over their scores takes."""
    heard: list[list[Tensor]] = []
    take = EncoderMemory.take

    def hearing(self: EncoderMemory, *given: Any) -> None:
        heard.append(list(given[4]))
        take(self, *given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EncoderMemory, "take", hearing)
        moments = remembered_film(
            tmp_path / "s", pictures(FRAMES), live(retain={"top": top, "bucket_tokens": B})
        )
    n, covered = moments[0].init[0].tokens, 0
    for unit, (moment, paid) in enumerate(zip(moments, heard, strict=True)):
        before, now = (min(FRAMES, at * CLIP) * FRAME_TOKENS + n for at in (unit, unit + 1))
        edge = max(n, now - SHORT * FRAME_TOKENS)
        for layer, own in enumerate(moment.layers):
            held = moments[unit - 1].layers[layer].position.tolist() if unit else []
            came = [*held, *range(before, now)]
            score = dict(zip(came, paid[layer].tolist(), strict=True))
            older = [at for at in came if at < edge]
            kept = older
            if len(older) > M:
                view = strip([score[at] for at in older], older)
                kept = [older[at] for at in plain_sink(view, M, B, int(top * M))]
                best = sorted(older, key=lambda at: -score[at])[: int(top * M)]
                assert set(best) <= set(kept)
                if top == 0 and not covered & 1 << layer:  # nothing was dropped before: every stretch is full
                    stretches = [math.ceil((at + 1) * M / (older[-1] + 1)) for at in kept]
                    complete = [s for s in range(1, M + 1) if s > math.ceil((n + 1) * M / (older[-1] + 1))]
                    assert set(complete) <= set(stretches)
                    covered |= 1 << layer
            assert len(kept) == min(M, len(older))
            assert own.position.tolist() == [*kept, *range(edge, now)]
    assert covered == (15 if top == 0 else 0)
    assert len(moments[-1].layers[0].id) == M + SHORT * FRAME_TOKENS


# Pages (V4 to V7)


@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("ratio", [0.4, 0.0])
def test_v4_v6_v7_a_question_reads_the_pages_of_a_plain_loop_where_they_stood(
    ratio: float, consecutive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of every moment. Keys come back unrotated and bit for bit, and stand at their own positions, or closed up."""
    moments = remembered_film(tmp_path / "s", pictures(FRAMES), live(ratio=ratio, consecutive=consecutive))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        for moment in moments:
            with watched_picks() as picks:
                answer = db.ask(QUESTION, mode="kv", at=min(FRAMES, (moment.unit + 1) * CLIP))
            assert not answer.warnings
            assert len(picks) == len(moment.layers)
            for pick, own in zip(picks, moment.layers, strict=True):
                assert torch.equal(pick.k, own.k)
                assert pick.long == long_of(moment, own)
                assert pick.at.tolist() == plain_pick(pick.q, pick.k, pick.long, ratio)
            chosen = [pick.at for pick in picks]
            truth = chosen_scores(moment, chosen, consecutive=consecutive)
            assert torch.equal(decided[-1], truth)
            longest = max(len(at) for at in chosen)
            assert answer.used.context_tokens <= answer.plan.predicted.context_tokens
            assert answer.used.context_tokens >= moment.init[0].tokens + longest
            assert answer.used.read_bytes <= answer.plan.predicted.read_bytes
    if ratio == 0:  # the newest two frames alone
        assert [at.tolist() for at in chosen] == [list(range(M, M + SHORT * FRAME_TOKENS))] * 4


def test_deeper_layers_choose_by_what_shallower_ones_brought_back(tmp_path: Path) -> None:
    """The queries that choose, by a loop in fp64 over [init | what each layer chose | question] at their positions."""
    [*_, moment] = remembered_film(tmp_path / "s", pictures(FRAMES), live())
    with reopened(tmp_path / "s") as db, watched_picks() as picks:
        db.ask(QUESTION, mode="kv")
    own, model, n = plain(), wrapped(), moment.init[0].tokens
    parts = [layer.at(pick.at) for layer, pick in zip(moment.layers, picks, strict=True)]
    [C] = {len(part.id) for part in parts}
    question = own.embed(model.encode_text(QUESTION))
    behind = max(int(layer.position.max()) for layer in moment.layers) + 1
    places = [
        torch.cat((torch.arange(n), part.position, behind + torch.arange(len(question)))) for part in parts
    ]
    given = [
        (torch.cat((init.k, part.k), 1), torch.cat((init.v, part.v), 1))
        for init, part in zip(moment.init, parts, strict=True)
    ]

    def seen(layer: int, x: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(x + 1)
        return tokens, places[layer][x] - places[layer][tokens]

    heard: list[Any] = []
    own.loop(
        torch.cat((torch.zeros(n + C, question.shape[1]), question)),
        seen,
        given=given,
        heard=heard,
        reach=1000,
    )
    for (q, _, _), pick in zip(heard, picks, strict=True):
        assert relative(pick.q, q[:, n + C :]) < 1e-4
    assert len({tuple(pick.at.tolist()) for pick in picks}) > 1, "layers choose for themselves"


def test_v5_all_pages_are_the_whole_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through the ladder, and where nothing was dropped it is full attention."""
    moments = remembered_film(tmp_path / "s", pictures(FRAMES), live(ratio=1.0))
    whole = live(ratio=1.0, retain={"budget_tokens": 4096})
    remembered_film(tmp_path / "s", pictures(FRAMES), whole, recording="whole")
    decided, shown, own, model = record_decisions(monkeypatch), pictures(FRAMES), plain(), wrapped()
    with reopened(tmp_path / "s") as db:
        for moment in moments:
            db.ask(QUESTION, recording="film", mode="kv", at=min(FRAMES, (moment.unit + 1) * CLIP))
            assert torch.equal(decided[-1], live_scores(moment))
        db.ask(QUESTION, recording="whole", mode="kv")
        report = db.compare_uncut(((n * 1.0, shown[n]) for n in range(FRAMES)), "whole", QUESTION)
    texts = own.embed(model.init_ids(INIT_PROMPT)), own.embed(model.prompt_ids(QUESTION))
    uncut = own.forward(torch.cat((texts[0], own.see(shown).flatten(0, 1), texts[1])))[-1]
    assert relative(decided[-1], uncut) < 1e-4
    assert report.relative < 1e-4


def test_captions_stand_behind_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode both: [init | chosen tokens at their positions | captions | prompt], and captions change no choice."""
    said = {"encoder": "input-embeddings", "tokens_max": 3, "clips": 0, "prompt": "What is there?"}
    row = live(caption_tokens=400).with_stage("caption", Stage("blocks", said))
    [*_, moment] = remembered_film(tmp_path / "s", pictures(FRAMES), row)
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        with watched_picks() as picks:
            answer = db.ask(QUESTION, mode="both")
        units = db.store.units(db.store.recording("film").id)
        ids = [token for unit in units for token in db.store.read_caption(unit).token_ids]
    assert {item.tier for item in answer.evidence} == {"kv", "captions"}
    truth = chosen_scores(moment, [pick.at for pick in picks], captions=ids)
    assert torch.equal(decided[0], truth)
    assert not torch.equal(truth, chosen_scores(moment, [pick.at for pick in picks]))
    assert answer.used.context_tokens <= answer.plan.predicted.context_tokens


def test_mode_recent_is_frames_and_auto_finds_what_fits(tmp_path: Path) -> None:
    remembered_film(tmp_path / "s", pictures(FRAMES), live(blocks=1))
    with reopened(tmp_path / "s") as db:
        recent = db.ask(QUESTION, mode="recent")
        assert [(item.start_s, item.end_s) for item in recent.evidence] == [(FRAMES - 1, FRAMES)]
        whole = db.ask(QUESTION, mode="auto")
        assert whole.plan.mode == "kv"
        small = whole.plan.predicted.context_tokens - SHORT * FRAME_TOKENS
        assert db.ask(QUESTION, mode="auto", context_tokens_max=small).plan.mode == "recent"
        span = db.ask(QUESTION, mode="kv", start_s=0, end_s=6)
        assert span.evidence
        assert all(item.end_s <= 6 for item in span.evidence)


def test_a_layer_of_which_nothing_is_whole_leaves_the_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question keeps its place in it, and deeper layers choose by what they then hear."""
    [*_, moment] = remembered_film(tmp_path / "s", pictures(FRAMES), live())
    with Store.open(tmp_path / "s") as store:
        for unit in store.units(store.recording("film").id):
            for piece in unit.slices[unit.slices["layer"] == 0]:
                flip(
                    tmp_path / "s" / "segments" / unit.segment, unit.payload_offset + int(piece["offset"]) + 3
                )
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db, watched_picks() as picks:
        answer = db.ask(QUESTION, mode="kv")
    [warning] = answer.warnings
    assert "damaged blocks were left out" in warning
    assert [torch.equal(pick.k, own.k) for pick, own in zip(picks, moment.layers[1:], strict=True)] == [
        True
    ] * 3
    chosen = [torch.zeros(0, dtype=torch.long), *(pick.at for pick in picks)]
    assert torch.equal(decided[-1], chosen_scores(moment, chosen))


# Forgetting


@pytest.mark.parametrize("span", [(1, 4), (13, 14)])
def test_what_is_forgotten_leaves_both_pools_and_moves_nothing_between_them(
    span: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the newest frame, too: of the pool there is one frame left, and no older token takes its place."""
    [*_, moment] = remembered_film(tmp_path / "s", pictures(FRAMES), live())
    decided = record_decisions(monkeypatch)
    with connect(tmp_path / "s") as db:
        db.forget("film", start_s=span[0], end_s=span[1])
        db.compact()
        assert db.verify().problems == []
    layers = [
        own.at(((own.frame < span[0]) | (own.frame >= span[1])).nonzero()[:, 0]) for own in moment.layers
    ]
    left = Moment(moment.unit, moment.init, layers, moment.keep)
    with reopened(tmp_path / "s") as db, watched_picks() as picks:
        answer = db.ask(QUESTION, mode="kv")
    assert not answer.warnings
    for pick, own in zip(picks, layers, strict=True):
        assert torch.equal(pick.k, own.k)
        assert pick.long == long_of(moment, own)
    assert torch.equal(decided[-1], chosen_scores(left, [pick.at for pick in picks]))
    assert len({pick.k.shape[1] - pick.long for pick in picks}) == 1


def test_what_a_compaction_gathered_is_read_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under keep = "memory" the read is the memory itself, and the pages are the same."""
    remembered_film(tmp_path / "s", pictures(FRAMES), live(), started_at="2025-06-01T00:00:00Z")
    (tmp_path / "age.toml").write_text('[[age]]\nafter = "1 d"\nkeep = "memory"\n')
    decided, answers = record_decisions(monkeypatch), []
    for gathered in (False, True):
        if gathered:
            with connect(tmp_path / "s") as db:
                db.policy(set=tmp_path / "age.toml")
                db.compact(age_now=True)
        with reopened(tmp_path / "s") as db:
            answers.append(db.ask(QUESTION, mode="kv"))
    assert torch.equal(decided[0], decided[1])
    before, after = answers
    assert after.warnings == ()
    assert after.used.context_tokens == before.used.context_tokens
    assert after.used.read_bytes < before.used.read_bytes


# The store


@dataclass(frozen=True)
class Bench:
    model: VideoModel
    film: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("livevlm")
    return Bench(small_model(small_spec(folder)), small_film(folder / "film.mp4", 18))


def taken_in(bench: Bench, store: Path, row: Recipe | str, **more: Any) -> Any:
    with opened(store, bench.model) as client:
        return client.ingest(bench.film, recording=NAME, recipe=row, sample_fps=1, **more)


SMALL_RECIPE = live(codec="fp16", retain={"budget_tokens": 12, "short_frames": 2})  # of frames of four tokens


def test_stopped_or_dead_at_any_batch_it_ends_with_the_same_digest(bench: Bench, tmp_path: Path) -> None:
    taken_in(bench, tmp_path / "whole", SMALL_RECIPE)  # four batches of four frames and one of two
    whole = unit_digests(tmp_path / "whole")
    for batch in range(4):
        for dies in (False, True):
            store = tmp_path / f"{batch}-{dies}"
            with pytest.MonkeyPatch.context() as patch:
                if dies:
                    patch.setattr(StreamEncoder, "state_bytes", 0 if batch % 2 else 1 << 40)
                    crash_at(patch, batch + 1)
                stop = None if dies else stop_at(patch, batch)
                with pytest.raises(Crash if dies else Interrupted):
                    taken_in(bench, store, SMALL_RECIPE, stop=stop)
            before = unit_digests(store)
            assert before == whole[: CHUNK * (batch + 1) // CLIP]
            report = taken_in(bench, store, SMALL_RECIPE)
            assert report.replayed_units == (len(before) if dies and not batch % 2 else 0)
            assert content(store) == content(tmp_path / "whole")


CONTROLS: dict[str, Recipe] = {
    "unit": SMALL_RECIPE.with_stage("unit", Stage("frame")),
    "reduce": SMALL_RECIPE.with_stage("reduce", Stage("merge")),
    "encode": SMALL_RECIPE.with_stage("encode", SMALL_RECIPE.encode.with_params(probe_tokens=1)),
    "write": SMALL_RECIPE.with_stage("write", Stage("bf16")),
    "retain": replace(
        SMALL_RECIPE.with_stage("retain", Stage("recent", {"budget_tokens": 12, "short_frames": 2})),
        encode=Stage("chunk", {"chunk_frames": 4, "init_prompt": INIT_PROMPT}),
    ),
    "one pool": SMALL_RECIPE.with_stage(
        "retain", SMALL_RECIPE.retain.with_params(budget_tokens=20, short_frames=0)
    ),
    "top": SMALL_RECIPE.with_stage("retain", SMALL_RECIPE.retain.with_params(top=1.0)),
}


def test_the_digest_is_another_with_a_control_in_place_of_any_stage(bench: Bench, tmp_path: Path) -> None:
    found = {}
    for name, row in {"own": SMALL_RECIPE, **CONTROLS}.items():
        taken_in(bench, tmp_path / name, row)
        found[name] = content(tmp_path / name)
    assert len(set(found.values())) == len(found), found


def test_the_named_recipe_with_settings_ingests_answers_and_verifies(bench: Bench, tmp_path: Path) -> None:
    """As `memdb ingest --recipe livevlm` has it; its states stay small beside its units."""
    settings = ("unit.frames=3", "encode.chunk_frames=4", "retain.budget_tokens=12", "retain.short_frames=2")
    taken_in(bench, tmp_path / "s", "livevlm", settings=settings)
    with opened(tmp_path / "s", bench.model) as db:
        for mode in ("kv", "recent", "auto"):
            answer = db.ask(QUESTION, mode=mode)
            assert answer.evidence, mode
            assert not answer.warnings
        assert db.verify().ok
        stats = db.stats().recordings[0]
    assert stats.written_ratio is not None
    assert stats.written_ratio < 2.5


def test_positions_beyond_those_of_training_are_said_and_may_be_closed_up(tmp_path: Path) -> None:
    """R11: a model of 112 positions and a film of 30 frames of four tokens; the memory itself is far smaller."""
    config = json.loads(json.dumps(SMALL))
    config["text_config"]["max_position_embeddings"] = 112
    (tmp_path / "short.json").write_text(json.dumps(config))
    model = load_model(f"random:7:{tmp_path / 'short.json'}", device="cpu", dtype="float32")
    own = Bench(model, small_film(tmp_path / "film.mp4", 30))
    said = {}
    for name, consecutive in (("restored", False), ("closed", True)):
        row = SMALL_RECIPE.with_stage("rebuild", Stage("restored", {"consecutive": consecutive}))
        taken_in(own, tmp_path / name, row)
        with opened(tmp_path / name, model) as db:
            said[name] = db.ask("Where?", recording=NAME, mode="kv").warnings
    [warning] = said["restored"]
    assert "more than the 112 that the model was trained on (R11)" in warning
    assert "rebuild.consecutive = true" in warning
    assert said["closed"] == ()


# Seats on a grid


def test_closed_up_frames_keep_rows_and_columns() -> None:
    """Three ids a token, of frames of 2 x 3 tokens of which some are left: renumbered in time alone (1.11)."""
    grid, n, size = Grid(2, 3, Fraction(7, 2)), 5, 6
    positions = np.array([n + 1, n + 4, n + 2 * size + 0, n + 7 * size + 5])  # of frames 0, 0, 2 and 7
    found = Restored(consecutive=True).seat(grid, n, positions, size, Next(0, 0))
    wanted = []
    for nth, within in ((0, 1), (0, 4), (1, 0), (2, 5)):
        wanted.append((n + math.floor(nth * grid.step), n + within // 3, n + within % 3))
    assert found.ids.T.tolist() == [list(ids) for ids in wanted]
    assert found.order.tolist() == [5, 6, 7, 8]
    assert found.end == Next(9, max(max(ids) for ids in wanted) + 1)
    on_line = Restored(consecutive=True).seat(LINE, n, positions, size, Next(0, 0))
    assert (on_line.ids.tolist(), on_line.end) == ([5, 6, 7, 8], Next(9, 9))
    kept = Restored().seat(LINE, n, positions, size, Next(99, 99))
    assert (kept.ids.tolist(), kept.end) == (positions.tolist(), Next(99, 99))


@pytest.mark.parametrize("consecutive", [False, True])
def test_all_pages_of_three_ids_a_token_are_the_whole_memory(
    consecutive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Qwen2.5-VL: what a question chose layer by layer is what is rebuilt of everything, in either seating."""
    row = live(ratio=1.0, consecutive=consecutive, retain={"budget_tokens": 20, "short_frames": 2})
    with watched_memory() as moments:
        remember(tmp_path / "s", pictures(21), recipe=row)  # type: ignore[arg-type]
    assert {len(layer.id) for layer in moments[-1].layers} == {20 + 2 * N}
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        assert not db.ask(QUESTION, mode="kv").warnings
        logits = db._asking().question_logits("film", QUESTION)[1]
    assert relative(decided[0], logits[-1]) < 1e-5


# Composing


def test_the_row_is_the_papers_and_its_values_are_settable() -> None:
    stages = compose(LIVEVLM)
    assert stages.retain == VisionSink(12_288, 1, 0.5, short_frames=32)
    changed = recipe(
        "livevlm", settings=("retain.short_frames=8", "encode.probe_tokens=49", "retrieve.ratio=0.2")
    )
    assert compose(changed).retain == VisionSink(12_288, 1, 0.5, short_frames=8)
    assert recipe("livevlm", profile="paper").unit.params["unit_s_max"] == 0
    with pytest.raises(RecipeError, match="no code was released"):
        recipe("livevlm", profile="code")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("write=int4",), r"R12\).*this codec rounds it"),
        (("retrieve=all",), r"R12b\).*pages are found by page keys"),
        (("index=mean_key",), r"R12b\)"),
        (("encode=window",), r"not legal \(R8c"),
        (("rebuild=consecutive",), r"not legal \(R2\)"),
        (("retrieve.ratio=1.5",), r"retrieve\.ratio = 1\.5 is no share: give 0 to 1"),
        (("retrieve.page_tokens=0",), "too small"),
        (("retain.short_frames=-1",), "too small"),
        (("retain.bucket_tokens=5",), "is no multiple"),
        (("encode.probe=none", "encode.probe_tokens=0"), "R18"),
    ],
)
def test_what_cannot_be_is_refused_when_composed(settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        composed(settings)


def composed(settings: tuple[str, ...]) -> None:
    row = recipe("livevlm", settings=settings)
    compose(row)
    compose_query(row)
