"""The client over one small store: modes, moments, budgets, other models, threads, and what a question leaves."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from memdb.client import Client, connect
from memdb.query.cost import CostFile, Costs
from memdb.query.engine import Engine
from memdb.reader import SliceReader
from memdb.schemas.answer import Answer
from memdb.schemas.errors import BudgetError, ModelMismatch, NoPlanFits, QuestionError, UnknownRecording
from memdb.schemas.question import Budget, Question
from tests.question_cases import FILM_S, MODEL, House, ingest_small
from tests.store_cases import directory_digest
from tools.films import render_film

DETAIL = "What colour was the star?"
BY_KIND = {
    "captions": "Give me a summary of everything.",
    "kv": DETAIL,
    "both": "How many shapes were there?",
    "recent": "What is to be seen right now?",
}


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[Client]:
    with house.open() as found:
        yield found


def engine_of(client: Client) -> Engine:
    return client._asking()


def content(answer: Answer) -> tuple[Any, ...]:
    """What an answer says, without how long it took."""
    return (
        answer.text,
        answer.token_ids,
        answer.evidence,
        answer.plan.mode,
        answer.plan.sizes,
        answer.warnings,
    )


def starts(answer: Answer, tier: str) -> list[float]:
    """Where the evidence of a tier begins, in time order."""
    return sorted(item.start_s for item in answer.evidence if item.tier == tier)


# Modes


@pytest.mark.parametrize("mode", ["captions", "kv", "both", "recent"])
def test_auto_picks_every_mode_by_the_question(client: Client, mode: str) -> None:
    answer = client.ask(BY_KIND[mode], recording="hall")
    assert answer.plan.mode == mode
    assert {other.mode for other in answer.plan.rejected} == {"captions", "kv", "both", "recent"} - {mode}
    assert all(other.predicted_ms > 0 for other in answer.plan.rejected)
    tiers = {"captions": {"captions"}, "both": {"captions", "kv"}}.get(mode, {"kv"})
    assert {item.tier for item in answer.evidence} == tiers
    assert content(client.ask(BY_KIND[mode], recording="hall", mode=mode))[:3] == content(answer)[:3]


def test_a_slowed_reader_changes_the_plan(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same question and budget over two disks, each measured by its own engine.

    All but the figures of reading are the fast one's, so that what else this machine does cannot decide. Mode
    both costs the most, so some plan fits a budget that it just fits on the fast disk.
    """
    question = Question(BY_KIND["both"], recording="hall")
    with house.open() as client:

        def measured(delay_s: float) -> tuple[Engine, Costs]:
            monkeypatch.setenv("MEMDB_CACHE_DIR", str(tmp_path / f"{delay_s}"))
            reader = SliceReader(client.store, delay_s=delay_s)
            engine = Engine(
                client.store, client.loaded.model(), client.loaded.question_vectors, reader=reader
            )
            engine.prepare(question)
            assert engine._costs is not None
            return engine, replace(engine._costs[1], ratios={})

        fast, slow = measured(0.0), measured(0.005)
        reading = {"read_base": slow[1].read_base, "read_block": slow[1].read_block}
        assert sum(reading.values()) >= 5.0
        slow[0]._costs = CostFile("of-this-test"), replace(fast[1], **reading)
        plan = fast[0].ask(question).plan
        limit_ms = plan.predicted_ms * 1.001
        budgeted = replace(question, budget=Budget(latency_ms_max=limit_ms))
        fast[0]._costs = CostFile("of-this-test"), replace(fast[1], ratios={})
        assert fast[0].ask(budgeted).plan.sizes == plan.sizes
        turned = slow[0].ask(budgeted).plan
        assert plan.mode == "both"
        assert (turned.mode, turned.sizes) != (plan.mode, plan.sizes)
        assert turned.predicted_ms <= limit_ms
        assert any(other.mode == "both" and other.predicted_ms > limit_ms for other in turned.rejected)
        for engine, _ in (fast, slow):
            engine.close()


def test_what_questions_take_corrects_what_is_predicted(client: Client) -> None:
    """Asked often enough, a mode's prediction is nearer to what it takes than the first one was."""
    engine = engine_of(client)
    engine.prepare(Question(DETAIL, "kv", "hall"))
    assert engine._costs is not None
    costs = engine._costs[1]
    before = dict(costs.ratios)
    answer = client.ask(DETAIL, recording="hall", mode="kv")
    for stage, ms in answer.plan.predicted.stages_ms.items():
        old, new = before.get(stage, 1.0), costs.ratios[stage]
        took = answer.timings_ms[stage]
        assert (new - old) * (took - ms) >= 0, stage  # towards what it took


# What a question leaves behind


def questions() -> list[dict[str, Any]]:
    """Twenty: every mode, with recordings named and not, moments, budgets and streams."""
    found: list[dict[str, Any]] = [
        {"text": text, "mode": mode, "recording": "hall"}
        for mode in BY_KIND
        for text in (DETAIL, BY_KIND[mode])
    ]
    found += [{"text": text} for text in BY_KIND.values()]
    found += [{"text": DETAIL, "recording": "yard", "mode": mode} for mode in ("auto", "kv", "recent")]
    found += [{"text": DETAIL, "recording": "roof", "mode": mode} for mode in ("auto", "captions")]
    found += [
        {"text": DETAIL, "recording": "hall", "mode": mode, "at": "00:00:12"} for mode in ("kv", "both")
    ]
    found += [{"text": DETAIL, "recording": "hall", "context_tokens_max": 200}]
    return found


def test_twenty_questions_leave_the_directory_as_it_was(house: House) -> None:
    assert len(questions()) == 20
    before = directory_digest(house.store)
    with house.open() as client:
        for asked in questions():
            assert client.ask(**asked).token_ids is not None
        client.search("red star", limit=3)
        client.stats()
        client.digest()
        assert client.verify().ok
    assert directory_digest(house.store) == before


@contextmanager
def powerless(folder: Path) -> Iterator[None]:
    """The folder without a right to write, for a while; root lays its power down for as long."""
    places = [folder, *folder.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in places}
    for path, mode in modes.items():
        path.chmod((mode | 0o444 | (0o111 if path.is_dir() else 0)) & ~0o222)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_store_that_cannot_be_written_answers_all_the_same(house: House, client: Client) -> None:
    """Costs cannot be kept either where root's own cache is out of reach: they are measured again."""
    expected = [content(client.ask(**asked)) for asked in questions()]
    found, digest = client.search("red star"), client.digest()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        copy = Path(shutil.copytree(house.store, Path(folder) / "copy.memdb"))
        with powerless(copy):
            with pytest.raises(PermissionError):
                (copy / "new").touch()
            with connect(copy, create=False) as locked:
                assert [content(locked.ask(**asked)) for asked in questions()] == expected
                assert locked.search("red star") == found
                assert locked.digest() == digest
                assert locked.verify().ok


# A moment in the past


@pytest.fixture(scope="module")
def half(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A store whose ingest stopped at half time: a film that is the first half of the other, frame for frame."""
    folder = tmp_path_factory.mktemp("half")
    film = folder / "half.mp4"
    render_film(film, seconds=FILM_S / 2, fps=8, width=160, height=96, scene_s=3.0)
    with connect(folder / "half.memdb", model=MODEL) as client:
        ingest_small(client, film, "hall", "hybrid")
        ingest_small(client, film, "roof", "rlivs")
        yield client


@pytest.mark.parametrize(
    ("recording", "mode"), [("hall", "captions"), ("hall", "kv"), ("hall", "both"), ("hall", "recent")]
)
def test_as_of_a_moment_is_as_if_the_ingest_had_stopped_there(
    client: Client, half: Client, recording: str, mode: str
) -> None:
    then = client.ask(DETAIL, recording=recording, mode=mode, at=FILM_S / 2)
    stopped = half.ask(DETAIL, recording=recording, mode=mode)
    assert then.evidence
    assert all(item.end_s <= FILM_S / 2 for item in then.evidence)
    assert then.token_ids == stopped.token_ids
    assert then.evidence == stopped.evidence
    assert then.watermark_s == stopped.watermark_s == FILM_S / 2
    assert then.as_of_s == FILM_S / 2


def test_a_moment_within_a_unit_uses_what_had_ended_by_then(client: Client) -> None:
    answer = client.ask(DETAIL, recording="hall", mode="both", at="00:00:10.500")
    blocks = [item for item in answer.evidence if item.tier == "kv"]
    captions = [item for item in answer.evidence if item.tier == "captions"]
    assert max(item.end_s for item in blocks) <= 10.5
    assert max(item.end_s for item in captions) <= 8.0  # the third clip ends at 12 s
    wall = client.ask(DETAIL, recording="hall", mode="both", at="2026-11-20T08:00:10.5Z")
    assert content(wall) == content(answer)


def test_before_anything_was_stored_there_is_nothing_to_answer_from(client: Client) -> None:
    with pytest.raises(QuestionError, match="stored up to this moment"):
        client.ask(DETAIL, recording="hall", mode="kv", at=0)
    with pytest.raises(BudgetError):
        client.ask(DETAIL, recording="hall", at="-3")
    with pytest.raises(BudgetError):
        client.ask(DETAIL, recording="hall", at=1e300)


def test_recent_is_the_newest_blocks_and_says_how_old(client: Client) -> None:
    answer = client.ask(DETAIL, recording="hall", mode="recent")
    blocks = answer.plan.sizes.blocks
    spans = sorted((item.start_s, item.end_s) for item in answer.evidence)
    assert spans[0][0] == FILM_S - blocks
    assert spans[-1][1] == FILM_S
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(item.score == 1.0 for item in answer.evidence)
    assert (answer.as_of_s, answer.lag_s) == (FILM_S, 0.0)
    late = client.ask(DETAIL, recording="hall", mode="recent", at=60)
    assert (late.as_of_s, late.lag_s) == (60.0, 60.0 - FILM_S)


@pytest.mark.parametrize("mode", ["kv", "both"])
def test_hybrid_answers_for_now_from_the_newest(client: Client, mode: str) -> None:
    """Keys find what fits a question, and cannot tell which of it is there now."""
    for at in (None, 10.0):
        answer = client.ask("What is seen right now?", recording="hall", mode=mode, at=at)
        end_s = FILM_S if at is None else at
        blocks = sorted((item.start_s, item.end_s) for item in answer.evidence if item.tier == "kv")
        assert blocks[0][0] == end_s - answer.plan.sizes.blocks
        assert blocks[-1][1] == end_s
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(blocks))
        assert any("this moment" in reason for reason in answer.plan.reasons)
        captions = starts(answer, "captions")
        assert bool(captions) == (mode == "both")
        last = 4.0 * (end_s // 4 - 1)  # the last clip that is whole: those of the house have 4 s
        assert captions == [last - 4.0 * back for back in reversed(range(len(captions)))]
    searched = client.ask(DETAIL, recording="hall", mode=mode)
    assert not any("this moment" in reason for reason in searched.plan.reasons)


# Several recordings


def test_without_a_name_captions_come_from_all_and_kv_from_one(client: Client) -> None:
    answer = client.ask(DETAIL, mode="both")
    kv = {item.recording for item in answer.evidence if item.tier == "kv"}
    captions = [item for item in answer.evidence if item.tier == "captions"]
    assert len(kv) == 1
    assert kv <= {"hall", "yard"}
    assert {item.recording for item in captions} == {"hall", "roof"}  # two encoders, by turns
    assert set(answer.plan.recordings) == {"hall", "yard", "roof"}
    # The recording whose KV is read is that of the best caption that has KV: only hall has both.
    assert kv == {"hall"}


def test_only_rlivs_has_captions_and_only_rekv_has_kv(house: House, tmp_path: Path) -> None:
    with connect(tmp_path / "two.memdb", model=MODEL) as client:
        ingest_small(client, house.film, "yard", "rekv")
        ingest_small(client, house.film, "roof", "rlivs")
        answer = client.ask(DETAIL, mode="both")
        assert {(item.recording, item.tier) for item in answer.evidence} == {
            ("yard", "kv"),
            ("roof", "captions"),
        }
        assert answer.warnings == ()


def test_two_recordings_of_kv_alone_say_which_was_read(house: House, tmp_path: Path) -> None:
    with connect(tmp_path / "kv.memdb", model=MODEL) as client:
        ingest_small(client, house.film, "first", "rekv")
        ingest_small(client, house.film, "second", "rekv")
        answer = client.ask(DETAIL)
        assert {item.recording for item in answer.evidence} == {"second"}
        assert any("second was read" in warning for warning in answer.warnings)
        with pytest.raises(QuestionError, match="no captions"):
            client.ask(DETAIL, mode="captions")


def test_unknown_recordings_are_named_with_those_that_there_are(client: Client) -> None:
    with pytest.raises(UnknownRecording, match="'hall', 'roof', 'yard'"):
        client.ask(DETAIL, recording="cellar")


# Another model


def test_another_model_reads_the_captions_and_never_the_kv(house: House) -> None:
    with house.open() as here, house.open("random:1") as there:
        ours = here.ask(DETAIL, recording="hall", mode="captions")
        answer = there.ask(DETAIL, recording="hall", mode="captions")
        # Ranked by the same sentence encoder: the same captions, read by other eyes.
        assert answer.evidence == ours.evidence
        assert answer.text != ours.text
        for mode in ("kv", "both", "recent"):
            with pytest.raises(ModelMismatch, match=r"means nothing to 'random:1'.*or with mode captions"):
                there.ask(DETAIL, recording="hall", mode=mode)
        with pytest.raises(ModelMismatch, match=r"ask with that model$"):
            there.ask(DETAIL, recording="yard")
        auto = there.ask(DETAIL, recording="hall")
        assert auto.plan.mode == "captions"
        assert any("reads captions only" in warning for warning in auto.warnings)


def test_captions_whose_encoder_left_with_its_model_are_ranked_by_words(house: House) -> None:
    with house.open() as here, house.open("random:1") as there:
        spoken = [(item.unit, item.caption) for item in everything(here, "roof")]
        _unit, caption = spoken[2]
        assert caption
        words = caption.split()[:4]
        answer = there.ask(" ".join(words), recording="roof", mode="captions")
        best = answer.evidence[0]
        assert best.score > 0
        # The best is one that shares the most of the question's words.
        shared = {text: len(set(words) & set(str(text).split())) for _, text in spoken}
        assert shared[best.caption] == max(shared.values())
        assert any("ranked by words" in warning for warning in answer.warnings)
        assert here.ask(caption, recording="roof", mode="captions").warnings == ()
        # Without a common word the newest come first.
        strange = there.ask("qqqq zzzz", recording="roof", mode="captions")
        newest = max(item.start_s for item in everything(here, "roof"))
        assert newest in {item.start_s for item in strange.evidence}
        assert all(item.score == 0 for item in strange.evidence)
        # And over all recordings both ways take part.
        both = there.ask(caption, mode="captions")
        assert {item.recording for item in both.evidence} == {"hall", "roof"}


@dataclass(frozen=True)
class Said:
    unit: int
    start_s: float
    caption: str


def everything(client: Client, recording: str) -> list[Said]:
    """All captions of a recording."""
    units = client.store.units(client.store.recording(recording).id)
    return [Said(unit.number, unit.start_ns / 1e9, client.store.read_caption(unit).text) for unit in units]


# Budgets


@pytest.mark.parametrize("mode", ["captions", "kv", "both", "recent"])
@pytest.mark.parametrize("recording", ["hall", "yard", "roof", None])
@pytest.mark.parametrize("name", ["context_tokens_max", "gpu_bytes_max", "read_bytes_max"])
def test_what_is_used_stays_within_the_budget(
    client: Client, recording: str | None, mode: str, name: str
) -> None:
    used = {
        "context_tokens_max": "context_tokens",
        "gpu_bytes_max": "gpu_bytes",
        "read_bytes_max": "read_bytes",
    }
    try:
        whole = client.ask(DETAIL, recording=recording, mode=mode)
    except QuestionError:
        assert (recording, mode) in {("yard", "captions"), ("yard", "both")} or recording == "roof"
        return
    full = getattr(whole.used, used[name])
    for share in (1.0, 0.7, 0.4, 0.2):
        limit = int(full * share)
        if not limit:
            continue
        try:
            answer = client.ask(DETAIL, recording=recording, mode=mode, **{name: limit})  # type: ignore[arg-type]
        except NoPlanFits as error:
            nearest = error.nearest[name]
            answer, limit = (
                client.ask(DETAIL, recording=recording, mode=mode, **{name: nearest}),
                int(nearest),
            )  # type: ignore[arg-type]
        assert getattr(answer.used, used[name]) <= limit
        assert answer.evidence


def test_a_late_answer_says_so_and_is_given(client: Client) -> None:
    engine = engine_of(client)
    engine.prepare(Question(DETAIL, recording="hall"))
    assert engine._costs is not None
    file, costs = engine._costs
    engine._costs = file, Costs(0, 0, 0, 0, 0, 0, 0, 0, 0)  # a machine that thinks it takes no time
    try:
        answer = client.ask(DETAIL, recording="hall", latency_ms_max=0.001)
    finally:
        engine._costs = file, costs
    assert any("late" in warning for warning in answer.warnings)
    assert answer.used.latency_ms > 0.001
    assert answer.token_ids


def test_nothing_is_computed_where_no_plan_fits(client: Client) -> None:
    with pytest.raises(NoPlanFits) as caught:
        client.ask(DETAIL, recording="hall", latency_ms_max=0.0001)
    assert client.ask(
        DETAIL, recording="hall", latency_ms_max=caught.value.nearest["latency_ms_max"] * 100
    ).token_ids


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), True, "9"])
def test_absurd_budgets_are_refused(client: Client, limit: Any) -> None:
    for name in ("latency_ms_max", "gpu_bytes_max", "read_bytes_max", "context_tokens_max"):
        with pytest.raises(BudgetError, match=name):
            client.ask(DETAIL, **{name: limit})


@pytest.mark.parametrize("text", ["", "  \n", "why " * 30_000])
def test_questions_that_are_none_are_refused(client: Client, text: str) -> None:
    with pytest.raises(QuestionError):
        client.ask(text, recording="hall")


def test_a_question_longer_than_the_context_is_refused(client: Client) -> None:
    longest = client.loaded.model().shape.context_tokens_max
    with pytest.raises(QuestionError, match="shorten it"):
        client.ask("?!" * min(longest, 49_000), recording="hall", mode="captions")


# Streams, threads, key frames


@pytest.mark.parametrize("mode", ["captions", "kv"])
def test_pieces_are_the_text(client: Client, mode: str) -> None:
    pieces: list[str] = []
    answer = client.ask(DETAIL, recording="hall", mode=mode, on_text=pieces.append)
    assert "".join(pieces) == answer.text != ""
    assert len(pieces) > 1
    assert all(pieces)


def test_two_threads_get_what_they_get_one_after_the_other(client: Client) -> None:
    asked: list[Callable[[], object]] = [
        lambda i=i, mode=mode: content(client.ask(f"{DETAIL} {'and then ' * i}", recording="hall", mode=mode))
        for i in range(4)
        for mode in ("captions", "kv", "both")
    ] + [lambda: client.search("red star", limit=4)]
    expected = [each() for each in asked]
    gate = threading.Barrier(2)

    def run(order: int) -> list[object]:
        gate.wait()
        return [each() for each in asked[::order]]

    with ThreadPoolExecutor(2) as threads:
        forward, backward = threads.submit(run, 1), threads.submit(run, -1)
        assert forward.result() == expected
        assert backward.result() == expected[::-1]


def test_key_frames_are_the_jpegs_of_the_store(client: Client, tmp_path: Path) -> None:
    answer = client.ask(DETAIL, recording="hall", mode="both", save_frames=tmp_path / "frames")
    row = client.store.recording("hall")
    saved = {item.keyframe for item in answer.evidence}
    assert len(saved) > 1
    assert None not in saved
    for item in answer.evidence:
        assert item.keyframe is not None
        jpeg = Path(item.keyframe).read_bytes()
        assert jpeg == client.store.read_keyframe(client.store.unit(row.id, item.unit))
        assert jpeg.startswith(b"\xff\xd8")
        assert jpeg.endswith(b"\xff\xd9")
    assert {str(path) for path in (tmp_path / "frames").iterdir()} == saved
    plain = client.ask(DETAIL, recording="hall", mode="both")
    assert all(item.keyframe is None for item in plain.evidence)


def test_an_answer_as_json_has_what_is_promised(client: Client) -> None:
    row = client.ask(DETAIL, recording="hall", mode="both").as_json()
    assert {"text", "evidence", "plan", "timings_ms", "watermark_s", "warnings"} <= row.keys()
    timings = row["timings_ms"]
    assert isinstance(timings, dict)
    stages = {name: ms for name, ms in timings.items() if name != "total"}
    assert {"open", "plan", "captions", "retrieve", "rebuild", "prefill", "decode"} == stages.keys()
    assert sum(stages.values()) <= timings["total"] + 0.01
    assert row["watermark_s"] == FILM_S
