"""Questions that name times: which words are times, and that nothing outside the span is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from memdb.cli import cli
from memdb.client import Client
from memdb.index.key_search import KeySearch
from memdb.query.retrieve.topk import BlockTopK, Rows
from memdb.query.spans import AROUND_SLACK_S, AT_SLACK_S, named
from memdb.schemas.answer import Answer
from memdb.schemas.errors import BudgetError, UsageError
from memdb.schemas.times import format_time, to_ns, to_s
from tests.question_cases import FILM_S, House

WATERMARK_S = 1200.0
STARTED_NS = 1_795_161_600_000_000_000  # 2026-11-20T08:00:00Z
BLOCKS = 8  # that the house's recipe retrieves
ASK = "what was there {}?"
Bounds = tuple[float | None, float | None]


def bounds(text: str, started_at_ns: int | None = STARTED_NS) -> Bounds | None:
    found = named(text)
    if found is None:
        return None
    start, end = found.bounds_ns(started_at_ns, to_ns(WATERMARK_S))
    return None if start is None else to_s(start), None if end is None else to_s(end)


TABLE: dict[str, Bounds] = {
    "how often was a bar seen between 00:10:00 and 00:11:00?": (600, 660),
    "Between 10:00 and 11:00, how often was a bar seen?": (600, 660),
    "what happened from 1:00:00 to 1:30:30.5?": (3600, 5430.5),
    "what happened from 10:00 until 11:00": (600, 660),
    "what is seen 00:00:10 - 00:00:20?": (10, 20),
    "between 00:11:00 and 00:10:00?": (600, 660),
    "was there more between 00:01:00 and 00:02:00 than between 00:05:00 and 00:06:00?": (60, 360),
    "what was seen at 00:12:30?": (750 - AT_SLACK_S, 750 + AT_SLACK_S),
    "what was seen at 00:00:01?": (0, 1 + AT_SLACK_S),
    "what was seen around 12:30?": (750 - AROUND_SLACK_S, 750 + AROUND_SLACK_S),
    "which star came before 01:00:00?": (None, 3600),
    "up to 01:00:00, which star came?": (None, 3600),
    "which star came after 01:00:00?": (3600, None),
    "since 59:59 how many stars came?": (3599, None),
    "what came from 00:10:00 on?": (600, None),
    "what came after 00:10:00 and before 00:20:00?": (600, 1200),
    "what happened in the first 10 minutes?": (None, 600),
    "what happened in the last 5 minutes?": (900, None),
    "the last five minutes: what happened?": (900, None),
    "what happened over the past hour?": (0, None),
    "what happened in the final 90 s of it, the last 90 seconds?": (1110, None),
    "what happened in the first 1.5 hours?": (None, 5400),
    "at 2026-11-20T08:01:00Z, what was seen?": (60 - AT_SLACK_S, 60 + AT_SLACK_S),
    "between 2026-11-20T08:01:00Z and 2026-11-20T10:02:00+02:00?": (60, 120),
    "before 2026-11-20 08:01": (None, 60),
    "after 2026-11-20T07:00:00Z": (0, None),
}
NO_TIMES = (
    "what was the score, 3:2 or 2:3?",
    "was the score 3:20 at half time?",
    "which was seen first, the red star or the blue bar?",
    "what was the last thing?",
    "what was the first second digit?",
    "who came at 10:30 am?",
    "who left before 5:15 p.m.?",
    "is the aspect ratio 16:9?",
    "was it at 1:90:00?",
    "was it at 12:99?",
    "was it at 00:10:00:00?",
    "before 00:10:00 or after 00:20:00?",
    "between 3:2 and 4:5?",
    "at 99999999999:00:00?",
    "in the last 0 minutes?",
    "after 3 minutes",
    "which digit was beside the star at 5?",
)


@pytest.mark.parametrize("text", TABLE)
def test_times_are_read(text: str) -> None:
    assert bounds(text) == TABLE[text]


@pytest.mark.parametrize("text", NO_TIMES)
def test_what_is_no_time_is_none(text: str) -> None:
    assert named(text) is None


def test_the_words_and_what_is_left_of_them() -> None:
    found = named("Between 00:10:00 and 00:11:00, how often was a bar seen?")
    assert found is not None
    assert (found.words, found.rest) == ("Between 00:10:00 and 00:11:00", ", how often was a bar seen?")


def test_a_wall_clock_needs_a_start() -> None:
    with pytest.raises(BudgetError, match="--started-at"):
        bounds("what was there at 2026-11-20T08:01:00Z?", started_at_ns=None)


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.sampled_from(("between {} and {}", "from {} to {}")))
def test_any_two_clocks_are_a_span(one: int, other: int, words: str) -> None:
    text = words.format(format_time(one), format_time(other))
    assert bounds(text) == (min(one, other), max(one, other))


@given(st.text(max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    found = named(text)
    assert found is None or found.words


# Over a store


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[Client]:
    with house.open() as found:
        yield found


def spans_of(answer: Answer, tier: str) -> list[tuple[float, float]]:
    return sorted((item.start_s, item.end_s) for item in answer.evidence if item.tier == tier)


@pytest.mark.parametrize("mode", ["kv", "both", "captions", "auto"])
def test_a_short_span_is_taken_whole_and_alone(client: Client, mode: str) -> None:
    answer = client.ask(ASK.format("between 00:00:09 and 00:00:14"), recording="hall", mode=mode)
    blocks, captions = spans_of(answer, "kv"), spans_of(answer, "captions")
    if answer.plan.mode != "captions":  # a block a second; runs end with their clip of 4 s
        assert blocks == [(9.0, 12.0), (12.0, 14.0)]
        assert all(item.score == 1.0 for item in answer.evidence if item.tier == "kv")
    if answer.plan.mode in ("captions", "both"):
        assert captions == [(8.0, 12.0), (12.0, 16.0)]  # whole clips
    assert answer.watermark_s == FILM_S
    assert any("between 00:00:09 and 00:00:14" in reason for reason in answer.plan.reasons)
    assert answer.warnings == ()


def test_a_span_that_is_given_wins_over_the_words(client: Client) -> None:
    text = ASK.format("between 00:00:09 and 00:00:14")
    answer = client.ask(text, recording="hall", mode="kv", start_s=2, end_s="00:00:04")
    assert spans_of(answer, "kv") == [(2.0, 4.0)]
    open_end = client.ask(text, recording="hall", mode="kv", start_s="2026-11-20T08:00:22Z")
    assert spans_of(open_end, "kv") == [(22.0, 24.0)]
    with pytest.raises(UsageError, match="let it end after it starts"):
        client.ask(text, start_s=5, end_s=5)


def test_the_last_seconds_are_those_before_the_moment_that_is_asked_about(client: Client) -> None:
    answer = client.ask(ASK.format("in the last 3 seconds"), recording="hall", mode="kv", at=12)
    assert spans_of(answer, "kv") == [(9.0, 12.0)]


@pytest.mark.parametrize("mode", ["kv", "both", "captions", "auto"])
@pytest.mark.parametrize("recording", ["hall", None])
def test_beyond_the_recording_there_is_an_answer_with_a_warning(
    client: Client, mode: str, recording: str | None
) -> None:
    answer = client.ask(ASK.format("at 05:00:00"), recording=recording, mode=mode)
    assert answer.evidence == ()
    assert [warning for warning in answer.warnings if "nothing is kept from 04:59:58 to 05:00:02" in warning]
    assert answer.token_ids


def test_recent_stays_recent(client: Client) -> None:
    plain = client.ask(ASK.format("here"), recording="hall", mode="recent")
    timed = client.ask(ASK.format("before 00:00:04"), recording="hall", mode="recent")
    assert spans_of(timed, "kv") == spans_of(plain, "kv")
    assert plain.warnings == ()
    assert any("newest frames only" in warning for warning in timed.warnings)


def test_a_wall_clock_without_a_start_searches_the_whole(client: Client) -> None:
    answer = client.ask(ASK.format("at 2026-11-20T08:00:05Z"), recording="yard", mode="kv")
    assert any("yard was searched as a whole" in warning for warning in answer.warnings)
    assert len(spans_of(answer, "kv")) > 1


@pytest.mark.parametrize(("start_s", "end_s"), [(2, 21), (0, 9.5), (7.25, None), (None, 13)])
def test_retrieval_in_a_span_is_brute_force_over_it(
    client: Client, monkeypatch: pytest.MonkeyPatch, start_s: float | None, end_s: float | None
) -> None:
    """The blocks of every layer are the best of those that overlap, by a plain product over all of them."""
    chosen: list[tuple[Rows, Rows]] = []
    select = BlockTopK.select

    def checked(
        self: BlockTopK,
        search: KeySearch,
        layer: int,
        query: npt.NDArray[np.float32],
        allowed: npt.NDArray[np.bool_],
        blocks: int,
    ) -> Rows:
        rows = select(self, search, layer, query, allowed, blocks)
        table = search.table
        inside = [
            row
            for row, block in enumerate(table.blocks)
            if to_s(int(block["end_ns"])) > (start_s or 0)
            and to_s(int(block["start_ns"])) < (end_s or FILM_S)
        ]
        scores = table.layer_keys(layer).astype(np.float32) @ query
        best = sorted(inside, key=lambda row: (-scores[row], row))[:blocks]
        chosen.append((rows, np.array(sorted(best))))
        return rows

    monkeypatch.setattr(BlockTopK, "select", checked)
    values: dict[str, Any] = {"start_s": start_s, "end_s": end_s}
    answer = client.ask(ASK.format("here"), recording="hall", mode="kv", **values)
    assert len(chosen) == 4  # layers
    for rows, best in chosen:
        assert len(rows) == BLOCKS
        np.testing.assert_array_equal(rows, best)
    assert answer.plan.sizes.blocks == BLOCKS


def test_the_command_line_takes_a_span(house: House) -> None:
    words = [ASK.format("here"), "--store", str(house.store), "--recording", "hall", "--mode", "kv", "--json"]
    ran = CliRunner().invoke(cli, ["ask", *words, "--start", "00:00:02", "--end", "4"])
    assert ran.exit_code == 0, ran.output
    assert [(item["start_s"], item["end_s"]) for item in json.loads(ran.stdout)["evidence"]] == [(2.0, 4.0)]


def test_all_captions_of_a_span_stand_in_time_order_with_their_words(client: Client) -> None:
    """Captions alone, in a span: exactly those whose clip reaches into it."""
    answer = client.ask(ASK.format("in the first 9 seconds"), recording="roof", mode="captions")
    assert set(spans_of(answer, "captions")) <= {(0.0, 4.0), (4.0, 8.0), (8.0, 12.0)}
    assert answer.evidence
