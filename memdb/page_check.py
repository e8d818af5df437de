"""The key pages' part of `memdb verify`: damage there is no loss, but it is damage."""

from __future__ import annotations

from pathlib import Path

from memdb.index.pages import verify_pages
from memdb.schemas.times import to_s
from memdb.verify import Problem


def check_pages(store_path: Path) -> list[Problem]:
    """Problems of every pages file of a store. They are derived data: the next ingest makes them anew."""
    found = []
    for path in sorted((store_path / "keys").glob("*.pages")):
        for problem in verify_pages(path):
            found.append(
                Problem(
                    file=problem.file,
                    what=f"{problem.what} (derived: answers read the segments instead)",
                    start_s=None if problem.start_ns is None else to_s(problem.start_ns),
                    end_s=None if problem.end_ns is None else to_s(problem.end_ns),
                )
            )
    return found
