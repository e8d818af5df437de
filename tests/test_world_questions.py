"""Questions of the world: answers that follow from the plan, and the chance of a guess."""

from __future__ import annotations

import pytest

from memdb.world.questions import ABSENT, KINDS, WHEN_SLACK_S, Asker, Question, clock
from memdb.world.scenes import plan, scene_at
from memdb.world.vocabulary import SPLITS, combinations

SECONDS = 1200


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return Asker(plan(5, SECONDS), 5).some(20)


def test_every_kind_is_asked_and_no_guess_is_sure(questions: list[Question]) -> None:
    assert {question.kind for question in questions} == set(KINDS)
    assert all(question.choices > 1 for question in questions)


def test_answers_about_one_thing_are_what_the_plan_says_there(questions: list[Question]) -> None:
    scenes, checked = plan(5, SECONDS), 0
    for question in questions:
        if question.about in ("colour", "shape", "place", "motion", "digit", "texture") and question.kind in (
            "gist",
            "detail",
            "place",
            "motion",
        ):
            [(start_s, _)] = question.spans
            assert question.answer == getattr(scene_at(scenes, start_s), question.about)
            assert question.is_right(f" {question.answer}.")
            assert not question.is_right(ABSENT)
            checked += 1
    assert checked > 40


def test_a_time_is_right_inside_its_span_and_a_little_around(questions: list[Question]) -> None:
    for question in (one for one in questions if one.kind == "when"):
        [(start_s, end_s)] = question.spans
        assert question.is_right(clock(start_s))
        assert question.is_right(clock(end_s + WHEN_SLACK_S))
        assert not question.is_right(clock(end_s + WHEN_SLACK_S + 1))
        assert not question.is_right("soon")


def test_no_combination_is_in_two_splits() -> None:
    parts = [set(combinations(split)) for split in SPLITS]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 2 * 10 * 8 * 10 * 7
