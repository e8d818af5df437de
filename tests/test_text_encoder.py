"""MiniLM without sentence-transformers gives its vectors, whatever stands beside a text in a batch."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from memdb.models.text_encoder import MiniLM, load_text_encoder, minilm_folder
from memdb.schemas.errors import ModelNotFound

SENTENCES = [
    "A red star moves from left to right across a dark wall.",
    "where was the red star?",
    "Two people enter through the glass door and sit down at the table.",
    "The lobby is empty.",
    "",
    "   ",
    "STAR",
    "Zoë öffnet die Tür 🎈 日本",
    "a" * 300,
    "the blue circle waits below the green triangle and then " * 60,  # beyond the model's 256 tokens
    "12:04:33",
    "x",
]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM()


def test_it_needs_no_sentence_transformers_and_prints_nothing() -> None:
    script = (
        "import sys\n"
        "from memdb.models.text_encoder import load_text_encoder\n"
        "load_text_encoder().encode(['a red star'])\n"
        "assert 'sentence_transformers' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_vectors_are_those_of_sentence_transformers(minilm: MiniLM) -> None:
    other = load_text_encoder(str(minilm_folder()))
    found, wanted = minilm.encode(SENTENCES), other.encode(SENTENCES)
    assert found.shape == wanted.shape == (len(SENTENCES), minilm.size)
    assert other.size == minilm.size == 384
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=0)
    assert other.encode([]).shape == (0, 384)
    # A folder without a model, and a name that is not here, say what to do.
    with pytest.raises(ModelNotFound, match="unset HF_HUB_OFFLINE"):
        load_text_encoder("nobody/no-such-encoder")


def test_vectors_have_length_one_and_likeness_means_likeness(minilm: MiniLM) -> None:
    vectors = minilm.encode(SENTENCES)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > vectors[2] @ vectors[1] + 0.2
    assert minilm.encode([]).shape == (0, 384)


def test_a_vector_does_not_depend_on_its_batch(minilm: MiniLM) -> None:
    texts = [f"{sentence} {number}" for number in range(6) for sentence in SENTENCES]
    together = minilm.encode(texts)
    for row in (0, 9, 17, 40, 71):
        np.testing.assert_allclose(minilm.encode([texts[row]])[0], together[row], atol=1e-6, rtol=0)
    np.testing.assert_allclose(minilm.encode(texts[::-1])[::-1], together, atol=1e-6, rtol=0)


def test_a_long_text_is_cut_at_the_models_maximum(minilm: MiniLM) -> None:
    words = "star " * 254  # with [CLS] and [SEP]: 256 tokens
    cut, longer, shorter = minilm.encode([words, words + "circle " * 500, "star " * 253])
    np.testing.assert_allclose(cut, longer, atol=1e-6)
    assert np.abs(cut - shorter).max() > 1e-6


def test_threads_get_the_same_vectors_as_one(minilm: MiniLM) -> None:
    texts = SENTENCES[:6]
    wanted = minilm.encode(texts)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: minilm.encode(texts), range(8)):
            np.testing.assert_array_equal(found, wanted)


def test_the_name_is_the_model_and_its_weights(minilm: MiniLM) -> None:
    again = load_text_encoder("sentence-transformers/all-MiniLM-L6-v2")
    assert again.name == minilm.name == load_text_encoder().name
    stem, _, digest = minilm.name.partition("@")
    assert stem == "all-MiniLM-L6-v2"
    assert len(bytes.fromhex(digest)) == 16


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFound):
        load_text_encoder(name)
