"""Dying at every step to the disk, in this process: the cheap form of a kill. See tools/trust for the real one."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memdb.database import Database
from memdb.files import Step, watched
from tests.store_cases import Steps

WHENS = ("before", "torn", "after")


class Killed(BaseException):
    """Nobody catches it on purpose, as nobody catches a SIGKILL."""


class Death:
    """A watch that lets a process die at step `at`, and lets nothing reach the disk from then on.

    `when`: before the step, after it, or in the middle of a write, of which the first half came through.
    """

    def __init__(self, at: int, when: str) -> None:
        self._at, self._when = at, when
        self._done = 0
        self.dead = False

    def before(self, step: Step) -> None:
        if self.dead:
            raise Killed
        if self._done == self._at and self._when != "after":
            if self._when == "torn" and step.what == "write":
                _write(step.path, step.data[: len(step.data) // 2], step.offset)
            self._die()

    def after(self, step: Step) -> None:
        if self._done == self._at and self._when == "after":
            self._die()
        self._done += 1

    def _die(self) -> None:
        self.dead = True
        raise Killed


def _write(path: Path, data: bytes, offset: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk: who dies loses nothing by that, only who loses power does."""
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    plain = Database._open_plain

    def quick(database: Database) -> sqlite3.Connection:
        connection = plain(database)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    monkeypatch.setattr(Database, "_open_plain", quick)


def steps_of(store: Path, work: Callable[[Path], object]) -> list[Step]:
    """Every step of some work on a copy of a store."""
    steps = Steps()
    copy = copied(store, "counted")
    with watched(steps):
        work(copy)
    shutil.rmtree(copy)
    return steps.seen


def deaths(
    store: Path, work: Callable[[Path], object], *, every: int = 1, start: int = 0
) -> Iterator[tuple[Path, str]]:
    """A copy of a closed store for each step of some work at which it died; what it died at, in words.

    `every`, `start`: of each kind of death only every so many steps, beginning with that one.
    """
    steps = steps_of(store, work)
    for shift, when in enumerate(WHENS):
        for at in range((start + shift) % every, len(steps), every):
            if when == "torn" and steps[at].what != "write":
                continue
            copy = copied(store, "killed")
            death = Death(at, when)
            with pytest.raises(Killed), watched(death):
                work(copy)
            yield copy, f"{when} step {at}: {steps[at].what} {steps[at].path.name} {steps[at].name}"
            shutil.rmtree(copy)


def copied(store: Path, name: str) -> Path:
    copy = store.with_name(f"{name}.memdb")
    shutil.copytree(store, copy)
    return copy
