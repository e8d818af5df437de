"""A sample of the fuzzing campaign, and what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdb.recipes import recipe
from memdb.schemas.errors import RecipeError
from tools.trust.fuzz import sample


def test_hostile_files_meet_typed_errors(tmp_path: Path) -> None:
    outcome = sample(7, 20, tmp_path)
    assert outcome.details == []
    assert outcome.trials == 20


@pytest.mark.parametrize("data", [b"x = " + b"[" * 100_000, b"# " + b"x" * 100_000])
def test_a_recipe_that_nests_without_end_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "deep.toml"
    file.write_bytes(data)
    with pytest.raises(RecipeError):
        recipe(file)
    file.write_bytes(b"x = " + b"[" * 5000 + b"]" * 5000)
    with pytest.raises(RecipeError, match="cannot read"):
        recipe(file)
