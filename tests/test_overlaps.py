"""What bounded retainers agree on: the table, and that no two keep the same of one film."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb.retain import BOUNDED
from memdb.schemas.keep import KeepSet
from tests.model_cases import pictures, wrapped
from tools import overlaps

BUDGET, FRAMES, CLIP = 48, 9, 3


def test_no_two_retainers_keep_the_same_of_one_film() -> None:
    kept = overlaps.kept_sets(wrapped(), pictures(FRAMES), BUDGET, clip=CLIP)
    assert kept.keys() == BOUNDED.keys()
    found = overlaps.overlaps(kept, FRAMES * wrapped().shape.frame_tokens)
    assert found.kept == ((BUDGET,) * wrapped().shape.layers,) * len(BOUNDED)
    same = np.eye(len(kept), dtype=bool)
    assert (found.layers[:, same] == 1).all()
    assert (found.layers[:, ~same] < 1).all(), "in every layer"
    assert np.array_equal(found.layers, found.layers.swapaxes(1, 2))
    assert found.mean[~same].max() < 0.9, "and not by a token or two"


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_the_index_is_that_of_jaccard(one: set[int], other: set[int]) -> None:
    found = overlaps.jaccard(*(np.array(sorted(each), np.int64) for each in (one, other)))
    assert found == (len(one & other) / len(one | other) if one | other else 1)


def test_the_table_is_the_mean_over_layers() -> None:
    def keep(*layers: list[int]) -> KeepSet:
        ids = tuple(np.array(layer, np.int64) for layer in layers)
        return KeepSet(ids, ids)

    found = overlaps.overlaps({"a": keep([1, 2], [3]), "b": keep([2, 4], [3])}, 8)
    assert found.mean.tolist() == [[1, (1 / 3 + 1) / 2], [(1 / 3 + 1) / 2, 1]]
    lines = overlaps.table(found).splitlines()
    assert lines[2] == "| a | 1.00 | 0.67 | 2 of 8 |"
    assert found.chance == pytest.approx((1.5 / 8) / (2 - 1.5 / 8))


def test_the_command_prints_every_pair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "random:0", "--frames", "6", "--budget", "32", "--clip", "3", "--json"]
    monkeypatch.setattr(sys, "argv", ["overlaps", *words])
    assert overlaps.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["overlaps"].keys() == BOUNDED.keys() == found["kept"].keys()
    assert all(row.keys() == BOUNDED.keys() for row in found["overlaps"].values())
    words[5] = "3"
    monkeypatch.setattr(sys, "argv", ["overlaps", *words])
    assert overlaps.main() == 2
    assert "is too small for frames of 16 tokens" in capsys.readouterr().err
