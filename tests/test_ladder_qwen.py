"""The equality ladder with three ids a token: through store and rebuild come transformers' own logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memdb.models.places import Grid
from memdb.models.window import WindowContext
from memdb.query.rebuild.consecutive import Consecutive
from tests.model_cases import (
    INIT_PROMPT,
    QUESTION,
    SHORT_CAPTIONS,
    pictures,
    record_decisions,
    relative,
    reopened,
    timed,
)
from tests.qwen_cases import (
    COLUMNS,
    ROWS,
    N,
    Seen,
    causal_at,
    ids_by_hand,
    plain_qwen,
    qwen,
    remember,
    windowed_at,
)

BOUND = 1e-4  # of the largest logit, fp32 with nothing lost
# Rates and raw frames whose pairs have no later time than columns (0 and 2; 0, 1 and 2): both rules for text agree.
SHORT_FILMS = [(2.0, 3), (4.0, 5)]
WINDOW = 29  # tokens; 21 frames make eleven pairs of six


@pytest.fixture(scope="module")
def init_ids() -> list[int]:
    return qwen().init_ids(INIT_PROMPT)


@pytest.fixture(scope="module")
def prompt_ids() -> list[int]:
    return qwen().prompt_ids(QUESTION)


def settings_of(recipe: str, chunk: int, *more: str) -> list[str]:
    own = [f"encode.chunk_frames={chunk}", "rebuild.time_text_s=0", "answer.tokens_max=2", *more]
    return [*own, *SHORT_CAPTIONS] if recipe == "hybrid" else own


def logits_of(store: Path) -> Tensor:
    with reopened(store) as db:
        return db._asking().question_logits("film", QUESTION)[1]


@pytest.mark.parametrize(("fps", "frames"), SHORT_FILMS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_a_short_film_gives_the_logits_of_transformers_untouched(
    recipe: str,
    chunk: int,
    fps: float,
    frames: int,
    tmp_path: Path,
    init_ids: list[int],
    prompt_ids: list[int],
) -> None:
    """From pixels and token ids alone: their vision, their `get_rope_index`, their rotation, one forward."""
    if 2 / fps < 1 and plain_qwen().truncates_seconds:
        pytest.skip("this transformers cuts the seconds between frames to whole ones")
    shown = pictures(frames)
    truth = plain_qwen().whole(shown, init_ids, prompt_ids, fps)[-len(prompt_ids) :]
    remember(tmp_path / "s", shown, fps=fps, recipe=recipe, settings=settings_of(recipe, chunk))
    assert relative(logits_of(tmp_path / "s"), truth) < BOUND


class Film:
    """A film that is longer than its frames are wide, and an odd number of frames."""

    def __init__(self, init_ids: list[int], prompt_ids: list[int]) -> None:
        own = plain_qwen()
        self.shown = pictures(21)
        self.seen = own.see(self.shown)
        self.n, self.prompt = len(init_ids), len(prompt_ids)
        self.embeddings = torch.cat((own.embed(init_ids), self.seen.flatten(0, 1), own.embed(prompt_ids)))
        self.ids = ids_by_hand(self.n, 11, self.prompt, step=4.0)
        self.whole = own.forward(self.embeddings, self.ids)[-self.prompt :]

    def short(self, recipe: str) -> Tensor:
        """By a plain loop with the short window. Its ceiling: 28 tokens are 4 frames of 6, which last 16 ids."""
        wide = None if recipe == "rekv" else len(self.embeddings) - self.prompt
        seen = windowed_at(self.ids, self.n, WINDOW, 16, wide_from=wide)
        return plain_qwen().loop(self.embeddings, seen)[-self.prompt :]


@pytest.fixture(scope="module")
def film(init_ids: list[int], prompt_ids: list[int]) -> Film:
    return Film(init_ids, prompt_ids)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_a_long_film_gives_them_with_text_behind_the_largest_id(
    film: Film, recipe: str, chunk: int, tmp_path: Path
) -> None:
    remember(tmp_path / "s", film.shown, recipe=recipe, settings=settings_of(recipe, chunk))
    assert relative(logits_of(tmp_path / "s"), film.whole) < BOUND


def test_segments_give_them_too_where_nothing_is_dropped_or_summed_up(film: Film, tmp_path: Path) -> None:
    changes = (
        "unit.theta=0.9",
        "retain.keep=1.0",
        "encode.summary=false",
        f"encode.init_prompt={INIT_PROMPT}",
    )
    remember(tmp_path / "s", film.shown, recipe="streamkv", settings=[*changes, "encode.chunk_frames=4"])
    assert relative(logits_of(tmp_path / "s"), film.whole) < BOUND


def test_the_profile_code_walks_frame_by_frame_to_the_same_logits(film: Film, tmp_path: Path) -> None:
    remember(tmp_path / "s", film.shown, settings=settings_of("rekv", 64), profile="code")
    assert relative(logits_of(tmp_path / "s"), film.whole) < BOUND


@pytest.mark.parametrize("walk", [1, 4, 6, 25])
def test_how_many_queries_are_attended_at_once_does_not_matter(film: Film, walk: int) -> None:
    """With a window that binds within one forward, init tokens near and far in one step."""
    model, states = qwen(), []
    frames = film.embeddings[film.n : -film.prompt]
    with torch.inference_mode():
        for own in (walk, 1024):
            context = WindowContext(
                model.rotary, WINDOW, walk_tokens=own, placing=model.placing(1.0, (ROWS, COLUMNS))
            )
            model.forward(film.embeddings[: film.n], context)
            parts = []
            for first, last in ((0, 5), (5, 6), (6, 11)):
                context.expect_frames([N] * (last - first))
                parts.append(model.forward(frames[first * N : last * N], context))
            states.append(torch.cat(parts))
    assert relative(*states) < 1e-5


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_a_window_that_binds_is_the_plain_loop(film: Film, recipe: str, chunk: int, tmp_path: Path) -> None:
    settings = settings_of(recipe, chunk, f"encode.window_tokens={WINDOW}")
    remember(tmp_path / "s", film.shown, recipe=recipe, settings=settings)
    truth = film.short(recipe)
    assert qwen().placing(1.0, (ROWS, COLUMNS)).ceiling(WINDOW) == 16
    assert relative(logits_of(tmp_path / "s"), truth) < BOUND
    assert relative(truth, film.whole.double()) > 100 * BOUND


def test_each_axis_matters(film: Film) -> None:
    """The guard of the equalities above: flat times, rows or columns give other logits."""
    for axis in range(3):
        ids = film.ids.clone()
        ids[axis, film.n : -film.prompt] = film.n
        other = plain_qwen().forward(film.embeddings, ids)[-film.prompt :]
        assert relative(other, film.whole) > 10 * BOUND
    line = torch.arange(len(film.embeddings)).expand(3, -1)
    assert relative(plain_qwen().forward(film.embeddings, line)[-film.prompt :], film.whole) > 10 * BOUND


def test_the_loop_is_the_forward_of_transformers(film: Film) -> None:
    found = plain_qwen().loop(film.embeddings, causal_at(film.ids))[-film.prompt :]
    assert relative(found.float(), film.whole) < BOUND


@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_the_truth_that_the_tools_print_is_the_same(
    film: Film, recipe: str, short: bool, tmp_path: Path
) -> None:
    more = [f"encode.window_tokens={WINDOW}"] if short else []
    remember(tmp_path / "s", film.shown, recipe=recipe, settings=settings_of(recipe, 4, *more))
    with reopened(tmp_path / "s") as db:
        report = db.compare_uncut(timed(film.shown), "film", QUESTION)
    assert report.relative < BOUND
    assert report.context_tokens == len(film.embeddings)
    truth = film.short(recipe) if short else film.whole
    assert report.largest_logit == pytest.approx(float(truth.abs().max()), rel=1e-4)


# The path of a question


@pytest.mark.parametrize("mode", ["kv", "recent"])
@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_an_answer_is_decided_by_the_uncut_logits(
    film: Film, recipe: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(tmp_path / "s", film.shown, recipe=recipe, settings=settings_of(recipe, 3))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode=mode)
    assert not answer.warnings
    assert relative(decided[0], film.whole[-1]) < BOUND
    spans = sorted((span.start_s, span.end_s) for span in answer.evidence if span.tier == "kv")
    assert (spans[0][0], spans[-1][1]) == (0.0, 21.0)


def test_captions_stand_behind_the_largest_id(
    film: Film, prompt_ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(tmp_path / "s", film.shown, recipe="hybrid", settings=settings_of("hybrid", 3, "unit.frames=4"))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        rows = db.store.units(db.store.recording("film").id)
        spoken = [token for unit in rows for token in db.store.read_caption(unit).token_ids]
        db.ask(QUESTION, mode="both")
    own, behind = plain_qwen(), film.prompt + len(spoken)
    tail = own.embed([*spoken, *prompt_ids])
    ids = ids_by_hand(film.n, 11, behind, step=4.0)
    truth = own.forward(torch.cat((film.embeddings[: -film.prompt], tail)), ids)[-1]
    assert len(rows) == 3
    assert len(spoken)
    assert relative(decided[0], truth) < BOUND


def test_a_caption_over_the_clip_reads_it_at_its_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rLiVS without recurrent tokens: [init | clip | prompt], one clip, from scratch, in transformers' own words."""
    shown, words = pictures(6), "Describe what is happening in this video."
    settings = ["unit.frames=3", "reduce.clips=0", "caption.tokens_max=4", f"caption.prompt={words}"]
    remember(tmp_path / "s", shown, recipe="rlivs", settings=settings, codec=None)
    with reopened(tmp_path / "s") as db:
        [unit] = db.store.units(db.store.recording("film").id)
        said = db.store.read_caption(unit).token_ids
        init = [int(token) for token in db.store.recording("film").spec.init_ids]
    own, prompt = plain_qwen(), qwen().prompt_ids(words)
    whole, told = torch.cat((own.embed(init), own.see(shown).flatten(0, 1), own.embed(prompt))), list[int]()
    while len(told) < 4:
        ids = ids_by_hand(len(init), 3, len(prompt) + len(told), step=4.0)
        token = int(own.forward(torch.cat((whole, own.embed(told))), ids)[-1].argmax())
        if token in qwen().stop_ids:
            break
        told.append(token)
    assert list(said) == told
    assert told


def test_blocks_that_were_chosen_are_renumbered_in_time_alone_with_times_between(
    film: Film, prompt_ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer holds other frames; the plain loop places them, the times and the question by hand."""
    settings = ["rebuild.time_text_s=5", "retrieve.blocks=5", "answer.tokens_max=1", *SHORT_CAPTIONS]
    remember(tmp_path / "s", film.shown, recipe="hybrid", settings=settings)
    held: list[list[int]] = []
    rebuild = Consecutive.rebuild

    def recorded(self: Consecutive, *given: object, **more: object) -> object:
        held[:] = [mine.tolist() for mine in given[3]]  # type: ignore[attr-defined]
        return rebuild(self, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Consecutive, "rebuild", recorded)
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
    assert all(len(mine) == 5 for mine in held)
    assert len({tuple(mine) for mine in held}) > 1
    own, n, union = plain_qwen(), film.n, sorted(set().union(*held))
    stamped: list[int] = []
    begun = union[0]
    for row in union:  # a pair lasts two seconds; the time stands behind its run
        if row + 1 not in union or 2 * (row + 1 - begun) >= 5:
            stamped.append(row)
            begun = min((later for later in union if later > row), default=row)
    texts = [qwen().encode_text(f"[00:00:{2 * row:02d}]") for row in stamped]
    first = n + 11 * N
    stamps = own.embed([token for ids in texts for token in ids])
    whole = torch.cat((film.embeddings[:first], stamps, film.embeddings[-film.prompt :]))
    layers = [placed_by_hand(n, mine, stamped, [len(ids) for ids in texts], film.prompt) for mine in held]

    def seen(layer: int, token: int) -> tuple[Tensor, Tensor]:
        if token < first:
            return causal_at(film.ids)(layer, token)
        order, ids = layers[layer]
        tokens = torch.nonzero((order >= 0) & (order <= order[token]))[:, 0]
        return tokens, (ids[:, token : token + 1] - ids[:, tokens]).T

    truth: Seen = seen
    assert relative(decided[0], own.loop(whole, truth)[-1]) < BOUND


def placed_by_hand(
    n: int, mine: list[int], stamped: list[int], sizes: list[int], prompt: int
) -> tuple[Tensor, Tensor]:
    """Order (T,), -1 where a token is not there, and ids (3, T) of [init | 11 frames | times | question]."""
    T = n + 11 * N + sum(sizes) + prompt
    order, ids = torch.full((T,), -1), torch.zeros(3, T, dtype=torch.long)
    count, highest, base, nth = 0, -1, 0, 0

    def text(start: int, size: int) -> None:
        nonlocal count, highest, nth
        for token in range(start, start + size):
            order[token], ids[:, token] = count, highest + 1
            count, highest, nth = count + 1, highest + 1, 0

    text(0, n)
    at = n + 11 * N
    for row in range(11):
        if row in mine:
            base = highest + 1 if nth == 0 else base
            for i in range(N):
                token = n + row * N + i
                order[token], count = count, count + 1
                ids[:, token] = torch.tensor([base + 4 * nth, base + i // COLUMNS, base + i % COLUMNS])
            nth += 1
            highest = max(highest, int(ids[:, n + row * N : n + (row + 1) * N].max()))
        if row in stamped:
            text(at, sizes[stamped.index(row)])
            at += sizes[stamped.index(row)]
    text(at, prompt)
    return order, ids


def test_the_grid_of_the_tests_is_the_models() -> None:
    placing = qwen().placing(1.0, qwen().frame_grid(64, 96))
    assert isinstance(placing, Grid)
    assert (placing.rows, placing.columns, float(placing.step)) == (ROWS, COLUMNS, 4.0)
    assert np.prod([placing.rows, placing.columns]) == N
