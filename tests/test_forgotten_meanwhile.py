"""A recording that is listed may be forgotten as a whole before it is looked at: what asks over all goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memdb
import memdb.client
import memdb.store
from memdb import oldest
from memdb.age import Ager, due_now
from memdb.catalog import Catalog
from memdb.forget import forget
from memdb.policy import Age
from memdb.store import Store
from tests.question_cases import House


@pytest.fixture
def store(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """hall, roof and yard. Who forgets waits for readers only a moment before it leaves its log for later."""
    monkeypatch.setattr("memdb.database._BUSY_S", 0.2)
    return Path(shutil.copytree(house.store, tmp_path / "house.memdb"))


def forgetting(path: Path, method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method, before whose first call another process forgets all recordings but the first."""

    def called(*args: Any, **options: Any) -> Any:
        with Store.open(path, write=True) as other:
            for row in other.recordings()[1:]:
                forget(other, row.name)
        return method(*args, **options)

    return called


def test_sizes_are_those_of_one_moment(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with memdb.connect(store, create=False) as db:
        before = {row.name: row.units for row in db.stats().recordings}
        with monkeypatch.context() as patched:
            patched.setattr(Catalog, "dead_bytes", forgetting(store, Catalog.dead_bytes))
            found = db.stats()
        assert {row.name: row.units for row in found.recordings} == before
        assert [row.name for row in db.stats().recordings] == ["hall"]


@pytest.mark.parametrize("before", ["recording_digest", "_content_marks", "_digest"])
def test_digests_are_of_what_is_there(store: Path, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgotten before it is looked up, before its marks are, or before its rows: none of these is damage."""
    place = memdb.client if before == "recording_digest" else memdb.store
    with memdb.connect(store, create=False) as db:
        whole = db.digest()
        method, calls = getattr(place, before), 0

        def called(*args: Any) -> Any:
            """The second call is about roof: by then it is gone, and yard as well."""
            nonlocal calls
            calls += 1
            second = 3 if before == "_content_marks" else 2  # the marks are looked at twice each
            return (forgetting(store, method) if calls == second else method)(*args)

        with monkeypatch.context() as patched:
            patched.setattr(place, before, called)
            assert db.digest() == {"hall": whole["hall"]}
        assert calls > 1


def test_what_is_due_is_of_one_moment(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ages, now_ns = (Age(after_ns=0, codec="int4"),), time.time_ns()
    with Store.open(store) as own:
        before = due_now(own, ages, now_ns)
        assert set(before) == {"yard"}  # hall is int4 already, and roof has no KV
        with monkeypatch.context() as patched:
            patched.setattr(Ager, "due", forgetting(store, Ager.due))
            assert due_now(own, ages, now_ns) == before
        assert due_now(own, ages, now_ns) == {}


def test_who_makes_room_goes_on_where_somebody_else_made_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []

    def late(one: Store, name: str, **span: Any) -> Any:
        """Another one forgets the same recording first, once."""
        named.append(name)
        if len(named) == 1:
            with Store.open(store, write=True) as other:
                forget(other, name)
        return forget(one, name, **span)

    monkeypatch.setattr(oldest, "forget", late)
    oldest.make_room(store, 1 << 60, own="", move_on=lambda: None)
    assert len(named) > 1
    with Store.open(store) as left:
        assert left.recordings() == []
