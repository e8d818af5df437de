"""The commands: one JSON document on stdout and nothing else, exit codes, help, light starts, progress."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memdb import __version__
from memdb.cli import cli, main
from memdb.progress import IngestBar
from memdb.recipes import RECIPES
from memdb.schemas.recipe import STAGES
from tests.question_cases import FILM_S, MODEL, SMALL, House
from tests.store_cases import flip

DETAIL = "What colour was the star?"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document that is all of stdout."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`memdb ...` in this process, through main: what reaches the two file descriptors, and the exit code."""

    def _run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["memdb", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        sys.stdout.flush()
        out, err = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return Ran(left.value.code, out, err)

    return _run


# JSON


def test_ask_as_json(run: Run, house: House) -> None:
    ran = run("ask", DETAIL, "--store", house.store, "--recording", "hall", "--mode", "both", "--json")
    assert (ran.code, ran.err) == (0, "")
    row = ran.document
    assert {"text", "evidence", "plan", "timings_ms", "watermark_s", "warnings"} <= row.keys()
    assert {"mode", "predicted_ms", "reasons", "rejected"} <= row["plan"].keys()
    assert row["plan"]["mode"] == "both"
    assert row["watermark_s"] == FILM_S
    assert row["warnings"] == []
    assert row["timings_ms"]["total"] > 0
    for item in row["evidence"]:
        assert item.keys() == {"recording", "start_s", "end_s", "tier", "score", "caption"}
        assert 0 <= item["start_s"] < item["end_s"] <= FILM_S
    with house.open() as client:
        answer = client.ask(DETAIL, recording="hall", mode="both")
    assert row["text"] == answer.text
    assert row["evidence"] == [item.as_json() for item in answer.evidence]


@pytest.mark.parametrize("mode", ["auto", "captions", "kv", "both", "recent"])
def test_every_mode_answers_as_json(run: Run, house: House, mode: str) -> None:
    row = run("ask", DETAIL, "--store", house.store, "--mode", mode, "--json").document
    assert row["plan"]["mode"] == (mode if mode != "auto" else "kv")
    assert row["evidence"]


def test_verify_stats_digest_recordings_as_json(run: Run, house: House) -> None:
    whole = run("verify", "--store", house.store, "--json")
    assert whole.code == 0
    assert whole.document.keys() >= {"ok", "checked_bytes", "problems"}
    assert (whole.document["ok"], whole.document["problems"]) == (True, [])
    assert whole.document["checked_bytes"] > 100_000

    stats = run("stats", "--store", house.store, "--json").document
    assert {row["name"]: row["recipe"] for row in stats["recordings"]} == {
        "hall": "hybrid",
        "yard": "rekv",
        "roof": "rlivs",
    }
    for row in stats["recordings"]:
        assert row.keys() >= {"name", "units", "duration_s", "watermark_s", "recipe", "bytes"}
        assert row["duration_s"] == row["watermark_s"] == FILM_S
        assert (row["bytes"]["kv"] > 0) == (row["name"] != "roof")
        assert (row["bytes"]["captions"] > 0) == (row["name"] != "yard")
    assert stats["model"]["spec"] == "random:0"

    digest = run("digest", "--store", house.store, "--json").document
    with house.open() as client:
        assert digest == {"recordings": client.digest()}
    one = run("digest", "--store", house.store, "--recording", "hall", "--tier", "kv", "--json").document
    assert one["recordings"].keys() == {"hall"}
    assert one["recordings"]["hall"] != digest["recordings"]["hall"]

    rows = run("recordings", "--store", house.store, "--json").document["recordings"]
    assert [(row["name"], row["units"], row["finished"]) for row in rows] == [
        ("hall", 6, True),
        ("roof", 6, True),
        ("yard", 24, True),
    ]
    assert rows[0]["started_at"] == "2026-11-20T08:00:00.000Z"


def test_search_export_recipes_doctor_as_json(run: Run, house: House, tmp_path: Path) -> None:
    hits = run("search", "star", "--store", house.store, "--limit", 3, "--json").document["hits"]
    assert len(hits) == 3
    assert all(hit.keys() == {"recording", "start_s", "end_s", "score", "caption", "how"} for hit in hits)
    out = tmp_path / "hall.jsonl"
    done = run("export", "--store", house.store, "--recording", "hall", "--out", out, "--json")
    assert done.document == {"captions": 6, "out": str(out)}
    assert len(out.read_text().splitlines()) == 6
    told = run("recipes", "--json").document
    assert told["recipes"] == {name: row.as_json() for name, row in RECIPES.items()}
    assert told["controls"].keys() == {"uniform", "recent"}
    assert told["stages"] == list(STAGES)
    assert told["profiles"].keys() == RECIPES.keys()
    assert all(told["profiles"][name][-1] == "fixed" for name in RECIPES)
    checks = run("doctor", "--json").document["checks"]
    assert {"torch", "faiss", "lancedb"} <= {check["name"] for check in checks}


def test_ingest_as_json_and_again(run: Run, house: House, tmp_path: Path) -> None:
    words = [
        "ingest",
        house.film,
        "--store",
        tmp_path / "new.memdb",
        "--recording",
        "hall",
        "--sample-fps",
        1,
    ]
    words += [word for setting in SMALL["hybrid"] for word in ("--set", setting)]
    words += ["--started-at", "2026-11-20T08:00:00Z", "--model", MODEL, "--json"]
    first = run(*words)
    assert (first.code, first.err) == (0, "")
    assert first.document["recording"] == "hall"
    assert (first.document["units"], first.document["watermark_s"]) == (6, FILM_S)
    again = run(*words)
    assert again.code == 0
    assert (again.document["units"], again.document["resumed_from_unit"]) == (0, 6)
    # The same film by the same settings is the same content, in another store, by the client.
    mine = run("digest", "--store", tmp_path / "new.memdb", "--json").document["recordings"]["hall"]
    with house.open() as client:
        assert mine == client.digest("hall")["hall"]


# For people


def test_an_answer_for_people_is_streamed_and_followed_by_its_evidence(run: Run, house: House) -> None:
    ran = run("ask", DETAIL, "--store", house.store, "--recording", "hall", "--mode", "kv", "--explain")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    with house.open() as client:
        answer = client.ask(DETAIL, recording="hall", mode="kv")
    assert lines[0] == answer.text
    assert lines[1].startswith("  hall 00:00:")
    assert any(line.startswith("  mode kv, ") for line in lines)
    assert any("predicted" in line and "took" in line for line in lines)


def test_the_map_of_recipes_is_printed(run: Run) -> None:
    lines = [line.split() for line in run("recipes").out.splitlines()]
    assert [row[0] for row in lines] == ["recipe", *RECIPES]
    assert len({len(row) for row in lines}) == 1


def test_search_prints_a_line_a_hit(run: Run, house: House) -> None:
    lines = run("search", "star", "--store", house.store, "--end", "00:00:08").out.splitlines()
    assert lines
    assert all(line.split()[0] in ("hall", "roof") and line.split()[1] < "00:00:08" for line in lines)


# Exit codes


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["ask", DETAIL, "--store", "{none}"], 1, "there is no store at"),
        (["stats", "--store", "{film}"], 1, "is a file, not a store"),
        (["ingest", "{none}.mp4", "--store", "{new}"], 1, ""),
        (["ask", DETAIL, "--store", "{store}", "--recording", "cellar"], 2, "there are 'hall'"),
        (["ask", "  ", "--store", "{store}"], 2, "the question is empty"),
        (["ask", DETAIL, "--store", "{store}", "--mode", "dream"], 2, "'dream' is not one of"),
        (["ask", DETAIL, "--store", "{store}", "--at", "soon"], 2, "HH:MM:SS"),
        (["ask", DETAIL, "--store", "{store}", "--latency-ms-max", "-1"], 2, "no budget"),
        (["ask", DETAIL, "--store", "{store}", "--read-bytes-max", "many"], 2, "not a valid integer"),
        (["ask", DETAIL], 2, "Missing option '--store' (see memdb ask --help)"),
        (["search", " ", "--store", "{store}"], 2, "nothing to search for"),
        (["search", "x", "--store", "{store}", "--start", "9", "--end", "3"], 2, "is empty"),
        (["search", "x", "--store", "{store}", "--limit", "0"], 2, "at least 1"),
        (["ingest", "{film}", "--store", "{new}", "--recipe", "soup"], 2, "unknown recipe 'soup'"),
        (["ingest", "{film}", "--store", "{new}", "--set", "unit.frames=0"], 2, "too small"),
        (["ingest", "{film}", "--store", "{new}", "--recording", "../out"], 2, "not allowed"),
        (["ingest", "{film}", "--store", "{new}", "--sample-fps", "0"], 2, "not a rate"),
        (["export", "--store", "{store}", "--recording", "yard", "--out", "{new}"], 2, "has no captions"),
        (["dream"], 2, "No such command 'dream'"),
        (["ask", DETAIL, "--store", "{store}", "--latency-ms-max", "0.0001"], 4, "nearest budget"),
        (["ask", DETAIL, "--store", "{store}", "--context-tokens-max", "3"], 4, "context_tokens_max"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    run: Run, house: House, tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    places = {"none": tmp_path / "none", "new": tmp_path / "new", "film": house.film, "store": house.store}
    ran = run(*(word.format(**places) for word in words))
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.startswith("memdb: ")
    assert ran.err.count("\n") == 1
    assert says in ran.err


def test_damage_that_verify_finds_is_exit_code_3(run: Run, house: House, tmp_path: Path) -> None:
    copy = shutil.copytree(house.store, tmp_path / "copy.memdb")
    segment = max((copy / "segments").iterdir(), key=lambda path: path.stat().st_size)
    flip(segment, segment.stat().st_size // 2)
    ran = run("verify", "--store", copy, "--json")
    assert ran.code == 3
    assert ran.document["ok"] is False
    [problem] = ran.document["problems"]
    assert problem.keys() == {"file", "what", "recording", "start_s", "end_s"}
    assert problem["file"] == f"segments/{segment.name}"
    assert problem["recording"] in ("hall", "yard", "roof")
    people = run("verify", "--store", copy)
    assert people.code == 3
    assert f"segments/{segment.name}" in people.out
    assert "1 problems" in people.out
    # A question about the same recording is answered, with a warning, and its exit code is 0.
    asked = run("ask", DETAIL, "--store", copy, "--recording", problem["recording"], "--json")
    assert asked.code == 0


def test_a_version_and_no_command(run: Run) -> None:
    assert run("--version") == Ran(0, f"memdb {__version__}\n", "")
    bare = run()
    assert bare.code == 2
    assert "Usage: memdb" in bare.out + bare.err


# Help


def test_help_names_every_command_and_option(run: Run) -> None:
    text = run("--help").out
    assert sorted(cli.commands) == sorted(
        [
            "ask",
            "backup",
            "compact",
            "demo",
            "digest",
            "doctor",
            "export",
            "forget",
            "import",
            "ingest",
            "policy",
            "recipes",
            "recordings",
            "repair",
            "search",
            "stats",
            "verify",
        ]
    )
    for name, command in cli.commands.items():
        assert f"\n  {name} " in text
        own = run(name, "-h")
        assert own.code == 0
        assert command.help is not None
        assert command.help.splitlines()[0] in " ".join(own.out.split())
        for parameter in command.params:
            assert all(option in own.out for option in parameter.opts if option.startswith("--")), name


def test_the_options_of_the_surface_are_there() -> None:
    def options(name: str) -> set[str]:
        return {option for parameter in cli.commands[name].params for option in parameter.opts}

    model = {"--model", "--device", "--dtype", "--json", "--store"}
    budgets = {"--latency-ms-max", "--gpu-bytes-max", "--read-bytes-max", "--context-tokens-max"}
    assert options("ask") >= model | budgets | {"--recording", "--mode", "--at", "--explain", "--save-frames"}
    assert options("ingest") >= model | {"--recording", "--recipe", "--profile", "--codec", "--set"}
    assert options("ingest") >= {"--sample-fps", "--started-at"}
    assert options("search") >= {"--store", "--recording", "--start", "--end", "--limit", "--json"}
    assert options("export") >= {"--store", "--recording", "--format", "--out"}
    for name in ("recordings", "stats", "verify", "digest"):
        assert options(name) >= {"--store", "--json"}


# A light start


def test_commands_that_need_no_model_load_none(house: House) -> None:
    """One fresh process: each command in turn through main, then what has been loaded."""
    script = f"""
import contextlib, io, sys
import memdb.cli
for words in (["--help"], ["stats", "--store", {str(house.store)!r}], ["verify", "--store", {str(house.store)!r}],
              ["recordings", "--store", {str(house.store)!r}], ["recipes"], ["ask", "--help"], ["ingest", "-h"],
              ["digest", "--store", {str(house.store)!r}, "--json"]):
    sys.argv = ["memdb", *words]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            memdb.cli.main()
        except SystemExit as left:
            assert left.code == 0, words
    heavy = [name for name in ("torch", "transformers", "lancedb", "faiss", "av", "pyarrow") if name in sys.modules]
    assert not heavy, (words, heavy)
print("light")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("light\n", "")


def test_nobody_reads_on_and_nothing_is_said(house: House) -> None:
    """The reading end of the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "memdb", "stats", "--store", str(house.store)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


# Progress


def test_no_progress_in_a_pipe_and_a_line_on_a_terminal(
    run: Run, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["ingest", house.film, "--recipe", "rekv", "--sample-fps", 1, "--set", "encode.chunk_frames=4"]
    quiet = run(*words, "--store", tmp_path / "pipe.memdb")
    assert quiet.err == ""
    assert quiet.out.startswith("film: 24 units written")

    terminal, own = pty.openpty()
    with os.fdopen(own, "w", encoding="utf-8") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        loud = run(*words, "--store", tmp_path / "pty.memdb")
        screen.flush()
        text = os.read(terminal, 1 << 20).decode()
    os.close(terminal)
    assert loud.out == quiet.out
    assert "x real time" in text
    assert "of 00:00:24" in text
    assert "MiB" in text


def test_the_bar_counts_from_where_an_ingest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class At:
        media_s: float
        duration_s: float | None
        units: int = 3
        written_bytes: int = 3 << 20

    clock = [100.0]
    lines: list[str] = []
    bar = IngestBar()
    monkeypatch.setattr("memdb.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(bar._live, "update", lambda text: lines.append(str(text)))
    bar.update(At(600.0, 1200.0))
    clock[0] = 110.0
    bar.update(At(700.0, 1200.0))
    bar.update(At(700.0, None))
    assert lines[0] == "00:10:00 of 00:20:00 (50%), 0.0 x real time, 3 units, 3.0 MiB"
    assert lines[1] == "00:11:40 of 00:20:00 (58%), 00:00:50 left, 10.0 x real time, 3 units, 3.0 MiB"
    assert lines[2] == "00:11:40, 10.0 x real time, 3 units, 3.0 MiB"
