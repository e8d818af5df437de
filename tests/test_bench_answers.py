"""The answer benchmark: its rows read what they say, its scores are those of plain sums, and its quick form."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb.client import connect
from memdb.world.questions import ABSENT, KINDS
from tools.answers.asking import run
from tools.answers.ground import OTHER, Ground, ground
from tools.answers.job import Job, Outcome
from tools.answers.marks import marks
from tools.answers.plots import plots
from tools.answers.rows import ROWS
from tools.answers.score import Line, by_age, chances, line, lines, pairs, sign_test
from tools.answers.table import write
from tools.answers.tap import Truth
from tools.bench_answers import quick

BLOCKS = 6


def quiet(what: str, done: float, whole: float) -> None:
    assert 0 <= done <= whole, what


def small(folder: Path) -> Job:
    """A random model over 64 painted seconds: what is asked and read is real, what is said means nothing."""
    return Job(
        folder=folder,
        length_s=64,
        per_kind=1,
        codecs=("int4", "raw"),
        settings=(
            f"retrieve.blocks={BLOCKS}",
            "retrieve.caption_tokens=60",
            "caption.tokens_max=6",
            "answer.tokens_max=3",
        ),
        model="random:0",
        device="cpu",
        paint=True,
        film_size=(64, 36),
        cold=True,
        reuse=True,
    )


@dataclass(frozen=True, eq=False)
class Ran:
    job: Job
    outcomes: list[Outcome]
    folder: Path

    def row(self, name: str, codec: str = "int4") -> list[Outcome]:
        return [found for found in self.outcomes if (found.row, found.codec) == (name, codec)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("answers")
    job = small(folder / "work")
    outcomes, ingested = run(job, quiet)
    write(folder / "out", job, outcomes, ingested)
    return Ran(job, outcomes, folder)


@pytest.fixture(scope="module")
def asked(ran: Ran) -> Iterator[Ground]:
    with ground(ran.job, 1, False, quiet) as found:
        yield found


def test_every_question_is_asked_in_every_row_and_of_both_codecs(ran: Ran) -> None:
    asked = {found.number for found in ran.row("kv")}
    assert len({found.kind for found in ran.row("kv")}) >= 7  # a minute has no unambiguous order, perhaps
    for name, row in ROWS.items():
        numbers = {found.number for found in ran.row(name)}
        assert numbers == (
            asked if row.kinds == KINDS else {f.number for f in ran.row("kv") if f.kind == "detail"}
        )
    for name in ("kv", "both"):
        assert {found.number for found in ran.row(name, "raw")} == asked
    assert not ran.row("captions", "raw")
    assert {found.mode for found in ran.row("last4")} == {"recent"}


def test_the_oracle_has_the_true_spans_and_the_last_frames_have_what_is_near(ran: Ran) -> None:
    oracle = [found for found in ran.row("oracle") if found.recall is not None]
    assert oracle
    assert {found.recall for found in oracle} == {1.0}
    for found in ran.row("last4"):
        if found.recall_kv and found.kind != "order":
            assert found.age_s < 4
    assert all(found.recall is None for found in ran.outcomes if found.kind in ("count", "absent", "now"))
    assert all(found.recall_captions is None for found in ran.row("kv"))
    assert all(found.recall_kv is None for found in ran.row("captions"))


def test_a_tap_that_takes_nothing_away_changes_no_answer(asked: Ground, ran: Ran) -> None:
    said = {found.number: found.said for found in ran.row("kv")}
    with connect(asked.client.store.path, create=False, device="cpu") as plain:
        for number, question in list(enumerate(asked.questions))[:3]:
            answer = plain.ask(question.text, recording="int4", mode="kv", at=question.at_s)
            assert answer.text == said[number]


@pytest.mark.parametrize("name", ["uniform", "random", "oracle", "last4", "zeroed", "shuffled"])
def test_a_row_reads_what_it_says(asked: Ground, name: str) -> None:
    tap, row = asked.tap, ROWS[name]
    spans, at_s = ((20, 31),), 48.0
    tap.turn(None, "stored")
    tap.ask(Truth(7, spans, at_s))
    asked.client.ask("what was red?", recording="int4", mode="kv", at=at_s)
    chosen = dict(tap.taken)
    tap.turn(row.pick, row.content)
    tap.ask(Truth(7, spans, at_s))
    asked.client.ask("what was red?", recording="int4", mode=row.mode, at=at_s)
    taken = dict(tap.taken)
    assert len(taken) == len(chosen) == 4  # layers
    first = taken[0].tolist()
    if name == "uniform":
        assert np.diff(taken[0]).tolist() == [8] * (BLOCKS - 1)
        assert first[0] == 4
    elif name == "random":
        assert len(set(first)) == BLOCKS
        assert max(first) < at_s
        assert all(rows.tolist() == first for rows in taken.values())
    elif name == "oracle":
        assert min(first) == 20
        assert max(first) == 30
        assert len(first) == BLOCKS
    elif name == "last4":
        assert first == [44, 45, 46, 47]
    elif name == "zeroed":  # what layer 0 chooses is of the question alone
        assert first == chosen[0].tolist()
    else:
        assert first != chosen[0].tolist()
        assert len(set(first)) == len(first)


def test_zeroed_and_shuffled_content_is_that(asked: Ground) -> None:
    """Keys and values as the model gets them: 0, or those of other blocks, bit for bit."""
    import torch

    from memdb.query.stored import Readings

    client, tap = asked.client, asked.tap
    tap.turn(None, "stored")
    tap.ask(Truth())
    client.ask("what was red?", recording="int4", mode="kv")
    kv = client._asking()._session._opened[client.store.recording("int4").id]
    rows = np.arange(64)
    model = client.loaded.model()

    def read(content: str) -> torch.Tensor:
        tap.turn(None, content)
        found, whole = kv.read(2, rows, model.device, model.dtype, Readings())
        assert found is not None
        assert whole.tolist() == rows.tolist()
        H, D = found.k.shape[0], found.k.shape[2]
        return torch.stack((found.k, found.v)).view(2, H, 64, -1, D)

    stored, zero, shuffled = read("stored"), read("zero"), read("shuffled")
    assert not zero.any()
    order = kv._shuffled()  # type: ignore[attr-defined]
    assert sorted(order.tolist()) == rows.tolist()
    assert torch.equal(shuffled, stored[:, :, torch.from_numpy(order)])
    assert not torch.equal(shuffled, stored)


def test_the_files_hold_every_outcome_and_two_plots(ran: Ran) -> None:
    out = ran.folder / "out"
    rows = [json.loads(text) for text in (out / "outcomes.jsonl").read_text().splitlines()]
    assert [Outcome(**row) for row in rows] == ran.outcomes
    summary = json.loads((out / "summary.json").read_text())
    assert [row["row"] for row in summary["rows"]] == [*ROWS, "kv", "both"]
    assert {pair["row"] for pair in summary["pairs"]} == {"kv", "both"}
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ROWS)
    if importlib.util.find_spec("matplotlib"):
        files = plots(out, ran.outcomes, "int4")
        assert [path.read_bytes()[:8] for path in files] == [b"\x89PNG\r\n\x1a\n"] * 2


def test_the_same_seed_gives_the_same_questions_and_answers(ran: Ran) -> None:
    job = replace(ran.job, rows=("random", "both"), codecs=("int4",))
    again, ingested = run(job, quiet)

    def content(found: Outcome) -> Outcome:
        return replace(found, latency_ms=0.0)

    assert [content(found) for found in again] == [
        content(found) for name in ("random", "both") for found in ran.row(name)
    ]
    assert [one.ingest_s for one in ingested] == [0.0]  # nothing was ingested twice


def test_the_other_recording_is_another(asked: Ground) -> None:
    digests = asked.client.digest()
    assert digests.keys() == {"int4", "raw", OTHER}
    assert len(set(digests.values())) == 3


# Scores


def outcome(kind: str, right: bool, number: int = 0, **changes: object) -> Outcome:
    plain = Outcome(
        "kv",
        "kv",
        "int4",
        1,
        number,
        kind,
        kind,
        "?",
        "red",
        "red",
        right,
        4,
        10.0,
        100,
        1,
        None,
        None,
        None,
        5.0,
        None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_macro_is_the_mean_over_kinds_not_over_questions() -> None:
    found = [outcome("gist", True, n) for n in range(8)] + [
        outcome("detail", n > 0, 10 + n) for n in range(2)
    ]
    found += [outcome(kind, False, 20) for kind in KINDS if kind not in ("gist", "detail")]
    scored = line(found)
    assert scored.by_kind["gist"] == 1.0
    assert scored.by_kind["detail"] == 0.5
    assert scored.macro == pytest.approx(1.5 / 9)
    assert scored.past == pytest.approx(1.5 / 8)
    assert scored.macro_error == pytest.approx((0.25 / 2) ** 0.5 / 9)
    assert line(found[:8]).macro is None  # of one kind alone there is no mean over kinds


def test_what_is_called_absent_counts_where_it_was_there() -> None:
    found = [
        outcome("absent", True, said=ABSENT),
        outcome("gist", False, said=f"{ABSENT}."),
        outcome("gist", True),
    ]
    assert line(found).called_absent == 0.5


def test_chance_is_of_each_question_once() -> None:
    found = [outcome("gist", True, 1, choices=4), outcome("gist", True, 1, row="both", choices=4)]
    found.append(outcome("gist", False, 2, choices=8))
    assert chances(found) == {"gist": (1 / 4 + 1 / 8) / 2}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_pairs_count_the_same_questions(rights: list[tuple[bool, bool]]) -> None:
    found = [
        outcome("gist", right, number, codec=codec)
        for number, both in enumerate(rights)
        for codec, right in zip(("raw", "int4"), both, strict=True)
    ]
    found.append(outcome("gist", True, 1000, codec="raw"))  # asked of one alone: no pair
    [pair] = pairs(found, ("raw", "int4"))
    assert pair.asked == len(rights)
    assert pair.difference == pytest.approx(
        (sum(b for _, b in rights) - sum(a for a, _ in rights)) / len(rights)
    )
    assert 0 < pair.p <= 1


def test_the_sign_test_in_closed_form() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(3, 3) == 1.0
    assert sign_test(1, 4) == sign_test(4, 1) == pytest.approx(2 * 6 / 32)


def test_recall_by_age_takes_each_question_once() -> None:
    found = [
        outcome("gist", True, n, recall=float(n % 2), age_s=age)
        for n, age in enumerate((0, 60, 61, 299, 9999))
    ]
    found.append(outcome("count", True, 9))
    assert by_age(found) == [(60.0, 0.5, 2), (300.0, 0.5, 2), (10800.0, 0.0, 1)]


def test_marks_compare_the_rows_that_there_are() -> None:
    def of(row: str, right: bool) -> list[Outcome]:
        return [outcome(kind, right, n, row=row) for n, kind in enumerate(KINDS)]

    found = [*of("both", True), *of("last4", False), outcome("detail", False, 1, row="zeroed")]
    found.append(outcome("gist", False, 0, row="both", codec="raw"))
    said = {mark.what: mark.is_reached for mark in marks(found, ("int4", "raw"))}
    assert said["both, macro average, %"]
    assert said["both above the last four frames, past, points"]
    assert said["control zeroed, detail above chance, standard errors"]
    assert not said["int4 and raw apart, both, points"]
    assert not any("uniform" in what for what in said)
    assert marks(found, ("fp16",)) == []


# The quick form


def test_the_memory_remembers(tmp_path: Path) -> None:
    """A broken memory fails the build: both tiers are far above the last frames, and above chance."""
    outcomes, _ = run(replace(quick(tmp_path), rows=("kv", "both", "last4")), quiet)
    found: dict[str, Line] = {one.row: one for one in lines(outcomes)}
    chance = [value for kind, value in chances(outcomes).items() if kind != "absent"]
    both, last = found["both"], found["last4"]
    assert both.errors == 0
    assert both.macro is not None
    assert both.past is not None
    assert last.past is not None
    assert both.macro > max(0.7, sum(chance) / len(chance) + 0.3)
    assert both.past > last.past + 0.3
    assert found["kv"].recall_kv is not None
    assert found["kv"].recall_kv > 0.8
