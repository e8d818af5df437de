"""Words, BM25 and rank fusion against figures worked out by hand and plain loops."""

from __future__ import annotations

import doctest
import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb import bm25 as bm25_module
from memdb import fusion
from memdb.bm25 import WORD_LETTERS_MAX, bm25, words_of
from memdb.fusion import reciprocal_rank

WORDS = st.lists(st.sampled_from("abcde"), max_size=8)


@pytest.mark.parametrize("module", [bm25_module, fusion])
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)


def test_a_score_worked_out_by_hand():
    documents = [["red", "star"], ["blue", "circle", "red", "red"], ["tree"]]
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    mean = 7 / 3
    expected = [
        idf * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / mean)),
        idf * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 4 / mean)),
        0,
    ]
    np.testing.assert_allclose(bm25(["red"], documents), expected, rtol=1e-12)


@given(query=WORDS, documents=st.lists(WORDS, max_size=12))
def test_a_document_scores_exactly_when_it_holds_a_word_of_the_query(query, documents):
    scores = bm25(query, documents)
    assert [score > 0 for score in scores] == [bool(set(query) & set(document)) for document in documents]


@given(query=WORDS, documents=st.lists(WORDS, min_size=1, max_size=12), data=st.data())
def test_scores_do_not_depend_on_the_order_of_documents_or_of_words(query, documents, data):
    order = data.draw(st.permutations(range(len(documents))))
    scores = bm25(query, documents)
    shuffled = bm25(data.draw(st.permutations(query)), [documents[at] for at in order])
    np.testing.assert_allclose(shuffled, scores[list(order)], rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n", []),
        ('"?!*^~(){}[]:\\/+-&|', []),
        ("It's 10:30 - the man's bag", ["it", "s", "10", "30", "the", "man", "s", "bag"]),
        ("red-star AND (blue OR NOT circle)", ["red", "star", "and", "blue", "or", "not", "circle"]),
        ("snake_case", ["snake", "case"]),
        ("Glasses glass buses bus this ties", ["glasse", "glass", "buse", "bus", "this", "tie"]),
        ("Straße İstanbul ＦＵＬＬ", ["strasse", "istanbul", "full"]),
        ("赤い星", ["赤", "い", "星"]),
        ("x" * 100, ["x" * WORD_LETTERS_MAX]),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


@given(st.text())
def test_words_hold_no_space_and_no_sign_and_stay_what_they_are(text):
    for word in words_of(text):
        assert 0 < len(word) <= WORD_LETTERS_MAX
        assert not set(word) & set(string.whitespace + string.punctuation)
    assert words_of(text) == words_of(text.upper().lower()) or not text.isascii()


@given(st.lists(st.lists(st.integers(0, 20), unique=True), max_size=4))
def test_fusion_is_the_sum_over_lists(lists):
    fused = reciprocal_rank(lists)
    expected = {
        item: sum(1 / (61 + row.index(item)) for row in lists if item in row) for row in lists for item in row
    }
    assert dict(fused) == pytest.approx(expected)
    assert [item for item, _ in fused] == sorted(dict(fused), key=lambda item: (-dict(fused)[item], item))


def test_an_item_counts_once_a_list():
    assert reciprocal_rank([[7, 7, 8]]) == [(7, 1 / 61), (8, 1 / 62)]
