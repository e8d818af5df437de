"""What kind of question it is: rules first, examples where none decides."""

from __future__ import annotations

import itertools
import re

import numpy as np
import numpy.typing as npt
import pytest

from memdb.query.kinds import EXAMPLES, RULES, KindOf, by_rules
from memdb.query.plan import PREFERENCE
from memdb.schemas.plan import KINDS


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("What is happening right now?", "now"),
        ("How many people came in?", "count"),
        ("When did the lights go out?", "when"),
        ("What did she do before leaving?", "order"),
        ("Summarise the morning.", "gist"),
        ("Where was the red star?", "place"),
        ("Which direction did the car go?", "motion"),
        ("What colour was the badge?", "detail"),
        ("WHAT COLOR WAS IT?", "detail"),
        ("How many cars passed before noon?", "count"),  # the first rule wins
    ],
)
def test_words_decide(text: str, kind: str) -> None:
    found, why = by_rules(text)
    assert found == kind
    word = re.search(r"says '(.+?)'", why)
    assert word is not None
    assert word[1].lower() in text.lower()


@pytest.mark.parametrize("text", ["Did he knowingly err?", "The whenever-clause", "discount it", "nowhere"])
def test_a_rule_wants_whole_words(text: str) -> None:
    assert by_rules(text) == ("detail", "no rule matches the question, so it is treated as one for detail")


def test_rules_and_examples_name_kinds_that_the_planner_knows() -> None:
    assert {kind for kind, _ in RULES} | set(EXAMPLES) == set(KINDS) == set(PREFERENCE)
    for kind, pattern in RULES:
        assert not any(re.search(pattern, text, re.I) for texts in EXAMPLES.values() for text in texts), kind


def letters(text: str) -> npt.NDArray[np.float32]:
    """A unit vector of letter pairs: an embedding that can be checked by hand."""
    vector = np.zeros(26 * 26, np.float32)
    plain = [ord(c) - 97 for c in text.lower() if "a" <= c <= "z"]
    for a, b in itertools.pairwise(plain):
        vector[26 * a + b] += 1
    return vector / max(np.linalg.norm(vector), 1e-12)


def test_the_nearest_example_decides_where_no_word_does() -> None:
    kind_of = KindOf(letters)
    for kind, texts in EXAMPLES.items():
        for text in texts:
            assert kind_of(text) == (kind, f"the question is most like one for {kind} (cosine 1.00)")
    near, why = kind_of("Was there ever a cat?")
    assert near == "absent"
    assert "absent" in why


def test_a_rule_is_asked_before_any_embedding() -> None:
    def refuse(text: str) -> npt.NDArray[np.float32]:
        raise AssertionError(text)

    assert KindOf(refuse)("How many stars?")[0] == "count"


def test_examples_are_embedded_once() -> None:
    seen: list[str] = []

    def embed(text: str) -> npt.NDArray[np.float32]:
        seen.append(text)
        return letters(text)

    kind_of = KindOf(embed)
    kind_of.prepare()
    count = len(seen)
    assert sorted(seen) == sorted(text for texts in EXAMPLES.values() for text in texts)
    kind_of.prepare()
    kind_of("Did anything odd take place?")
    assert len(seen) == count + 1
