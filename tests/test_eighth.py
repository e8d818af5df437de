"""An eighth method takes one file and one line, as CONTRIBUTING says: a stranger's retainer and encoder, end to end."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb.client import connect
from memdb.ingest.encode import ENCODERS
from memdb.memory import remembered
from memdb.retain import RETAINERS
from memdb.schemas.errors import Interrupted, RecipeError
from tests.memory_cases import BUDGET, live_scores, watched_memory
from tests.model_cases import QUESTION, ingest, pictures, record_decisions, reopened
from tests.test_memory_store import without_span
from tests.test_resume import stop_at

FOLDER = Path(__file__).parent / "eighth"
FILE = FOLDER / "key_norm.py"
RECIPE = """
base = "uniform"
write = "raw"
[unit]
method = "clip"
frames = 3
[encode]
method = "chunk"
chunk_frames = 4
[retain]
method = "key_norm"
budget_tokens = 56
[answer]
tokens_max = 2
"""


def strangers(file: Path, name: str = "KeyNorm") -> Any:
    """The class in a file that is no part of memdb."""
    found = importlib.util.spec_from_file_location(f"strangers_{file.stem}", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look there
    found.loader.exec_module(module)
    return getattr(module, name)


def test_one_file_and_one_line_are_an_eighth_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ingests within its budget, keeps what its formula says, reopens, answers, forgets, verifies."""
    path = tmp_path / "key_norm.toml"
    path.write_text(RECIPE)
    shown = pictures(11)
    with pytest.raises(RecipeError, match="stage 'retain' has no method 'key_norm': choose one of"):
        ingest(tmp_path / "s", shown, recipe=str(path))

    monkeypatch.setitem(RETAINERS, "key_norm", strangers(FILE))  # the one line

    with watched_memory() as moments:
        ingest(tmp_path / "s", shown, recipe=str(path))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
        assert not answer.warnings
        assert torch.equal(decided[-1], live_scores(moments[-1]))
        found = remembered(db.store, db.store.recording("film")).keep
        assert found is not None
        assert found.same(moments[-1].keep)
        assert found.tokens == [BUDGET] * len(found.ids)
        digest = db.digest()["film"]
        assert db.verify().ok
    held_by_hand(moments)
    ingest(
        tmp_path / "control", shown, recipe=str(path), settings=("retain=uniform", "retain.budget_tokens=56")
    )
    with reopened(tmp_path / "control") as db:
        assert db.digest()["film"] != digest
    with connect(tmp_path / "s") as db:
        db.forget("film", start_s=0, end_s=3)
        db.compact()
        assert db.verify().ok
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
        assert torch.equal(decided[-1], live_scores(without_span(moments[-1], 0, 3)))
    with pytest.raises(RecipeError, match=r"retain\.newest_tokens = -1 is too small"):
        ingest(tmp_path / "x", shown, recipe=str(path), settings=("retain.newest_tokens=-1",))
    with pytest.raises(RecipeError, match=r"retain\.key_norm has no parameter 'size'"):
        ingest(tmp_path / "x", shown, recipe=str(path), settings=("retain.size=1",))
    newest = ("retain.newest_tokens=20",)
    ingest(tmp_path / "newest", shown, recipe=str(path), settings=newest)
    with reopened(tmp_path / "newest") as db:
        found = remembered(db.store, db.store.recording("film")).keep
        assert found is not None
        last = max(int(at.max()) for at in found.positions)
        assert all(set(range(last - 19, last + 1)) <= set(at.tolist()) for at in found.positions)
    with pytest.raises(RecipeError, match=r"R18.*looks at none: leave encode\.probe"):
        ingest(tmp_path / "x", shown, recipe=str(path), settings=("encode.probe=template",))


def held_by_hand(moments: list[Any]) -> None:
    """Of memory and chunk the tokens with the smallest keys: none that went is smaller than one that stayed."""
    for before, after in pairwise(moments):
        for old, new in zip(before.layers, after.layers, strict=True):
            norms = {int(one): float(k) for one, k in zip(old.id, norm(old.k), strict=True)}
            stays = {int(one): float(k) for one, k in zip(new.id, norm(new.k), strict=True)}
            gone = [value for one, value in norms.items() if one not in stays]
            assert not gone or min(gone) >= max(stays.values()) - 1e-6
            assert np.diff(new.position.numpy()).min() > 0


def norm(k: torch.Tensor) -> torch.Tensor:
    """(T,): mean over heads of each token's length, one number at a time."""
    return torch.stack(
        [torch.stack([head.square().sum().sqrt() for head in token]).mean() for token in k.swapaxes(0, 1)]
    )


def test_one_that_hears_a_probe_says_so_in_its_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No list elsewhere names it: R18 asks the class."""

    hearing = strangers(FILE)
    hearing.hears = True
    monkeypatch.setitem(RETAINERS, "hearing", hearing)
    settings = ("retain=hearing", "retain.budget_tokens=56", "unit.frames=3")
    with pytest.raises(RecipeError, match=r"R18.*set encode\.probe"):
        ingest(tmp_path / "s", pictures(4), recipe="uniform", settings=settings)
    ingest(tmp_path / "s", pictures(4), recipe="uniform", settings=(*settings, "encode.probe=template"))


def test_one_file_and_one_line_are_another_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ingests, goes on where it stopped, answers, forgets; every unit has the bits that it has alone."""
    shown, settings = pictures(11), ("encode=apart", "encode.chunk_frames=4", "unit=clip", "unit.frames=3")
    monkeypatch.setitem(ENCODERS, "apart", strangers(FOLDER / "apart.py", "Apart"))  # the one line
    ingest(tmp_path / "s", shown, recipe="rekv", settings=settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingest(tmp_path / "t", shown, recipe="rekv", settings=settings, stop=stop_at(patch, 1))
    ingest(tmp_path / "t", shown, recipe="rekv", settings=settings)
    ingest(tmp_path / "last", shown[9:], recipe="rekv", settings=settings)
    with (
        reopened(tmp_path / "s") as db,
        reopened(tmp_path / "t") as again,
        reopened(tmp_path / "last") as own,
    ):
        assert again.digest() == db.digest()
        assert not db.ask(QUESTION, mode="kv").warnings
        keys = [
            one.store.read_keys(one.store.unit(one.store.recording("film").id, unit))
            for one, unit in ((db, 3), (own, 0))
        ]
        assert np.array_equal(keys[0], keys[1])
    with connect(tmp_path / "t") as db:
        db.forget("film", start_s=0, end_s=3)
        assert db.verify().ok
