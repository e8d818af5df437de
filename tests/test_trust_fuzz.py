"""A sample of the fuzzing campaign, and what it found."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from memdb.recipes import recipe
from memdb.records import Kind
from memdb.schemas.errors import RecipeError
from memdb.verify import verify_path
from tests.store_cases import fill, new_store
from tools.trust.fuzz import sample
from tools.trust.hostile_records import _with_part, put_together, take_apart


def test_hostile_files_meet_typed_errors(tmp_path: Path) -> None:
    outcome = sample(7, 10, tmp_path)
    assert outcome.details == []
    assert outcome.trials == 10


def test_a_part_of_absurd_length_is_forged_and_met(tmp_path: Path) -> None:
    """The forger itself broke on it, and no input of that kind was ever fed."""
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = tmp_path / "lobby.memdb"
    [file] = (path / "segments").iterdir()
    records = take_apart(file)
    at = next(at for at, record in enumerate(records) if record.kind == Kind.UNIT)
    for column in ("offset", "length"):
        for value in (1 << 32, (1 << 63) - 1, (1 << 64) - 1):
            parts = records[at].parts.copy()
            parts[column][0] = value
            forged = _with_part(replace(records[at], parts=parts), 0, b"x" * 200)
            changed = [*records[:at], forged, *records[at + 1 :]]
            file.write_bytes(put_together(changed, random.Random(1)))
            assert not verify_path(path).ok


@pytest.mark.parametrize("data", [b"x = " + b"[" * 100_000, b"# " + b"x" * 100_000])
def test_a_recipe_that_nests_without_end_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "deep.toml"
    file.write_bytes(data)
    with pytest.raises(RecipeError):
        recipe(file)
    file.write_bytes(b"x = " + b"[" * 5000 + b"]" * 5000)
    with pytest.raises(RecipeError, match="cannot read"):
        recipe(file)
