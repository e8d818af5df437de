"""The key pages' part of `memdb verify`: damage there is no loss, but it is damage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from memdb.index.page_sizes import KeySizes
from memdb.index.pages import PageProblem, verify_pages
from memdb.schemas.errors import MemdbError
from memdb.schemas.times import to_s
from memdb.store import Store
from memdb.verify import Problem


def check_pages(store_path: Path) -> list[Problem]:
    """Problems of every pages file of a store. They are derived data: the next ingest makes them anew."""
    found = []
    with ExitStack() as opened:
        store: Store | None = None
        with suppress(MemdbError):  # told by whoever verifies the catalog
            store = opened.enter_context(Store.open(store_path))
        for path in sorted((store_path / "keys").glob("*.pages")):
            problems: Sequence[PageProblem] = ()
            with suppress(FileNotFoundError):  # a compaction removed it meanwhile
                problems = _problems(store, path)
            for problem in problems:
                found.append(
                    Problem(
                        file=problem.file,
                        what=f"{problem.what} (derived: answers read the segments instead)",
                        start_s=None if problem.start_ns is None else to_s(problem.start_ns),
                        end_s=None if problem.end_ns is None else to_s(problem.end_ns),
                    )
                )
    return found


def _problems(store: Store | None, path: Path) -> Sequence[PageProblem]:
    """Of one file, beside its recording's row where there is one."""
    recording_id = path.name[:32]
    with suppress(MemdbError):  # it was forgotten, and compaction removes its pages; or its row is damaged
        if store is not None:
            sizes = KeySizes.of(store.recording_by_id(recording_id).spec.model.shape)
            return verify_pages(path, sizes, lambda: store.recording_by_id(recording_id).units)
    return verify_pages(path)
