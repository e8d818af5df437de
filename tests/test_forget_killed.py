"""A forgetting of a whole recording that was sealed, by a process that died before it committed it."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdb import forget as forgetting
from memdb.store import Store
from tests.store_cases import fill, new_store


def test_whoever_opens_for_writing_carries_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader sees it at once; a writing store, and what is read through it, must not show the recording again."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with new_store(tmp_path) as store:
        fill(store, 2, "door")
        fill(store, 3)
        with monkeypatch.context() as patch:
            patch.setattr(forgetting, "forget_recording", die)
            with pytest.raises(KeyboardInterrupt):
                forgetting.forget(store, "door")
        path = store.path
    with Store.open(path) as reader:
        assert [row.name for row in reader.recordings()] == ["lobby"]
    with Store.open(path, write=True) as writing:
        assert [row.name for row in writing.recordings()] == ["lobby"]
        assert len(writing.catalog.forgotten()) == 1
