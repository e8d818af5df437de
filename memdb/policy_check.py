"""The policy's part of `memdb verify`."""

from __future__ import annotations

from pathlib import Path

from memdb.policy import read_policy
from memdb.schemas.errors import CorruptionError
from memdb.verify import Problem


def check_policy(store_path: Path) -> list[Problem]:
    """A policy that is damaged, gone or an older one is no loss of footage, but nothing ages as it was set."""
    try:
        read_policy(store_path)
    except CorruptionError as error:
        return [Problem(error.file, str(error))]
    return []
