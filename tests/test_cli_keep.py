"""forget, compact and policy from the command line: what they print, and what they do on a terminal and in a pipe."""

from __future__ import annotations

import os
import pty
import select
import sys
from pathlib import Path

import pytest

from memdb.progress import BytesBar
from memdb.store import Store
from tests.run_cases import command
from tests.store_cases import UNIT_NS, fill, flip, new_store

UNIT_S = UNIT_NS // 10**9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with new_store(tmp_path) as store:
        fill(store, 6)
        fill(store, 3, "yard")
        return store.path


def test_forget_and_compact_say_what_they_did(path: Path) -> None:
    words = ["forget", "--store", str(path), "--recording", "lobby", "--start", "00:00:02", "--end", "6"]
    ran = command(*words)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "lobby 00:00:02 - 00:00:06: forgot 2 captions and 4 blocks in 2 units",
        f"run memdb compact --store {path} to remove the bytes from the disk",
    ]
    whole = command("forget", "--store", str(path), "--recording", "yard", "--json")
    assert whole.json == {
        "recording": "yard",
        "whole": True,
        "start_s": 0.0,
        "end_s": 3.0 * UNIT_S,
        "units": 3,
        "captions": 3,
        "blocks": 6,
        "states": 0,
    }
    ran = command("compact", "--store", str(path))
    assert (ran.code, ran.err) == (0, "")
    lines = sorted(ran.out.splitlines())
    assert any(line.startswith("a forgotten recording: ") for line in lines)
    assert any(line.startswith("lobby: ") and line.endswith("1 segments written anew") for line in lines)
    assert any(line.endswith("bytes freed in all") for line in lines)
    again = command("compact", "--store", str(path), "--json").json
    assert [(done["recording"], done["segments"], done["left"]) for done in again["recordings"]] == [
        ("lobby", 0, [])
    ]
    assert again["left"] == []


def test_what_is_left_is_told_and_is_no_error(path: Path) -> None:
    command("forget", "--store", str(path), "--recording", "lobby", "--end", "2")
    with Store.open(path) as store:
        row = store.unit(store.recording("lobby").id, 3)
    flip(path / "segments" / row.segment, row.payload_offset)
    ran = command("compact", "--store", str(path))
    assert ran.code == 0
    assert f"  left: segments/{row.segment}" in ran.out
    assert command("verify", "--store", str(path)).code == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["forget", "--recording", "attic"], "no recording is named 'attic': there are 'lobby', 'yard'"),
        (["forget", "--recording", "lobby", "--start", "5", "--end", "5"], "is empty"),
        (["forget", "--recording", "lobby", "--start", "dawn"], "time 'dawn' is not understood"),
        (["policy", "--set", "none.toml"], "cannot read the policy none.toml"),
    ],
)
def test_wrong_calls_are_one_line_and_change_nothing(path: Path, words: list[str], says: str) -> None:
    ran = command(words[0], "--store", str(path), *words[1:])
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert ran.err.count("\n") == 1
    with Store.open(path) as store:
        assert [row.tombstones for row in store.recordings()] == [(), ()]


def test_a_progress_line_on_a_terminal_and_none_in_a_pipe(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("forget", "--store", str(path), "--recording", "lobby", "--end", "2")
    terminal, own = pty.openpty()
    with os.fdopen(own, "w", encoding="utf-8") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        # command() gives this process a stderr of its own: the terminal stands in for it
        patch.setattr("contextlib.redirect_stderr", lambda _: _Nothing())
        ran = command("compact", "--store", str(path))
        screen.flush()
        text = ""
        while "MiB" not in text and select.select([terminal], [], [], 10)[0]:
            text += os.read(terminal, 1 << 20).decode()
    os.close(terminal)
    assert ran.code == 0
    assert "lobby: 0.0 of 0.0 MiB" in text


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_the_bar_tells_the_time_left_of_each_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    lines: list[str] = []
    bar = BytesBar()
    monkeypatch.setattr("memdb.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(bar._live, "update", lambda text: lines.append(str(text)))
    bar.update("lobby", 0, 4 << 20)
    clock[0] = 110.0
    bar.update("lobby", 1 << 20, 4 << 20)
    bar.update("yard", 1 << 20, 4 << 20)
    assert lines == [
        "lobby: 0.0 of 4.0 MiB",
        "lobby: 1.0 of 4.0 MiB, 00:00:30 left",
        "yard: 1.0 of 4.0 MiB",
    ]
