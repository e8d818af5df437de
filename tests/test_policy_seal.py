"""What the catalog knows of the policy: a file that is gone, or an older one, is noticed, and nothing else is."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from memdb import policy_seal
from memdb.backup import _Backup, backup
from memdb.client import connect
from memdb.database import CATALOG
from memdb.files import Step, watched
from memdb.folder import POLICY
from memdb.policy import Policy, read_policy, write_policy
from memdb.policy_check import check_policy
from memdb.repair import repair
from memdb.schemas.errors import CorruptionError
from tests.store_cases import fill, new_store
from tests.test_policy import AS_POLICY

OLDER = Policy(when_full="forget-oldest")


class Died(BaseException):
    """What a process that is killed raises."""


class Dies:
    """Dies before a step."""

    def __init__(self, at: int) -> None:
        self._left = at

    def before(self, step: Step) -> None:
        self._left -= 1
        if not self._left:
            raise Died

    def after(self, step: Step) -> None:
        pass


def forget_policies(path: Path) -> None:
    """Let the catalog know nothing, as where none was ever set."""
    with closing(sqlite3.connect(path / CATALOG, isolation_level=None)) as database:
        database.execute("DELETE FROM meta WHERE key = ?", (policy_seal.KEY,))


def set_two(path: Path) -> bytes:
    """Set a policy and then another one; the bytes of the first."""
    with connect(path) as client:
        client.policy(set=OLDER)
        older = (path / POLICY).read_bytes()
        client.policy(set=AS_POLICY)
        assert client.verify().ok
    return older


@pytest.mark.parametrize("harm", ["gone", "older"])
def test_a_policy_that_is_gone_or_an_older_one_is_reported(tmp_path: Path, harm: str) -> None:
    """It is whole in itself, or not there at all: the catalog knows which was set last."""
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = tmp_path / "lobby.memdb"
    older = set_two(path)
    (path / POLICY).unlink()
    if harm == "older":
        (path / POLICY).write_bytes(older)
    with connect(path) as client:
        (problem,) = client.verify().problems
        assert problem.file == POLICY
        assert ("is gone" if harm == "gone" else "is not the one that was set last") in problem.what
        with pytest.raises(CorruptionError, match="memdb policy"):
            client.policy()
        with pytest.raises(CorruptionError, match="memdb policy"):
            client.compact()  # nothing ages by what nobody set
        client.policy(set=AS_POLICY)
        assert client.verify().ok


@pytest.mark.parametrize("harm", ["none", "gone", "older", "nobody knows"])
def test_a_repair_takes_the_policy_as_it_is_and_says_so(tmp_path: Path, bare: None, harm: str) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
    path = tmp_path / "lobby.memdb"
    older = set_two(path)
    if harm in ("gone", "older"):
        (path / POLICY).unlink()
    if harm == "older":
        (path / POLICY).write_bytes(older)
    if harm == "nobody knows":
        (path / CATALOG).unlink()
    before = (path / POLICY).read_bytes() if harm != "gone" else b""
    notes = [note for note in repair(path).notes if POLICY in note]
    told = {"gone": "is not there", "older": "not the one that was set last", "nobody knows": "nobody knows"}
    assert len(notes) == (harm != "none")
    assert all(told[harm] in note for note in notes)
    assert read_policy(path) == (Policy() if harm == "gone" else AS_POLICY if harm != "older" else OLDER)
    assert harm == "gone" or (path / POLICY).read_bytes() == before
    with connect(path) as client:
        assert client.verify().ok
        (path / POLICY).unlink(missing_ok=True)
        assert client.verify().ok == (harm == "gone"), "what was taken is what counts from then on"


@pytest.mark.parametrize("first", [False, True])
def test_whoever_dies_while_setting_a_policy_leaves_no_false_alarm(tmp_path: Path, first: bool) -> None:
    """At any step, before it and after: what lies there is the old one or the new one, and verify is content."""
    with new_store(tmp_path) as store:
        fill(store, 2)
    path, died, at = tmp_path / "lobby.memdb", True, 0
    if not first:
        set_two(path)
    before = (path / POLICY).read_bytes() if not first else None
    seen = set()
    while died:
        died, at = False, at + 1
        try:
            with watched(Dies(at)):
                write_policy(path, Policy(when_full="forget-oldest", store_bytes_max=1 << 40))
        except Died:
            died = True
        assert check_policy(path) == []
        seen.add(read_policy(path))
        if before is None:
            (path / POLICY).unlink(missing_ok=True)
            forget_policies(path)
        else:
            write_policy(path, AS_POLICY)
    assert at > 6
    assert len(seen) == 2


def test_a_backup_while_a_policy_is_set_holds_one_that_its_catalog_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
    path, target = tmp_path / "lobby.memdb", tmp_path / "copy.memdb"
    set_two(path)
    copy_policy = _Backup._policy

    def set_before(self: _Backup) -> None:
        write_policy(path, Policy(store_bytes_max=1 << 40))  # after the catalog was copied
        copy_policy(self)

    monkeypatch.setattr(_Backup, "_policy", set_before)
    assert backup(path, target).problems == []
    assert check_policy(target) == []
    assert read_policy(target) == read_policy(path) == Policy(store_bytes_max=1 << 40)
    (target / POLICY).unlink()
    assert [problem.file for problem in check_policy(target)] == [POLICY]
