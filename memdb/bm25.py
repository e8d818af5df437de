"""Ranking by words: BM25 over a handful of texts, and the one way in which texts become words.

Captions and questions become words here and nowhere else, so that the search table, which holds these words
and splits at spaces only, agrees with an exact scan, and so that no sign in a question can mean anything to
a parser.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD_LETTERS_MAX = 40

_K1, _B = 1.2, 0.75
# Scripts that write no spaces: each sign is a word of its own.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_SIGNS}]|[^\\W_{_SIGNS}]+")


def words_of(text: str) -> list[str]:
    """Words in lower case, without accents and signs, plurals folded.

    >>> words_of('Two "red" Stars: café-bodies!')
    ['two', 'red', 'star', 'cafe', 'body']
    """
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = unicodedata.normalize("NFKC", plain)
    return [_singular(word[:WORD_LETTERS_MAX]) for word in _WORD.findall(plain)]


def _singular(word: str) -> str:
    """The English plural folded, by endings alone: bodies, stars, but glass, bus, this."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def bm25(query: Sequence[str], documents: Sequence[Sequence[str]]) -> npt.NDArray[np.float64]:
    """(documents,): the BM25 score of each document (k1 1.2, b 0.75); 0 where it holds no word of the query.

    A word counts once in the query. Its weight is log(1 + (n - f + 0.5) / (f + 0.5)), where f of n documents
    hold it, which is never negative.
    """
    scores = np.zeros(len(documents))
    if not len(documents):
        return scores
    counts = [Counter(document) for document in documents]
    lengths = np.array([len(document) for document in documents], np.float64)
    norm = _K1 * (1 - _B + _B * lengths / max(float(lengths.mean()), 1.0))
    for word in sorted(set(query)):
        found = np.array([count[word] for count in counts], np.float64)
        holding = np.count_nonzero(found)
        weight = np.log1p((len(documents) - holding + 0.5) / (holding + 0.5))
        scores += weight * found * (_K1 + 1) / (found + norm)
    return scores
