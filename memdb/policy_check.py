"""The policy's part of `memdb verify`."""

from __future__ import annotations

from pathlib import Path

from memdb.policy import read_policy
from memdb.schemas.errors import CorruptionError
from memdb.verify import Problem


def check_policy(store_path: Path) -> list[Problem]:
    """A damaged policy is no loss of footage, but nothing ages by it and nothing is limited."""
    try:
        read_policy(store_path)
    except CorruptionError as error:
        return [Problem(error.file, str(error))]
    return []
