"""The README: its commands run, in order, and its tables are those of the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from memdb import demo as memdb_demo
from memdb.cli import cli
from memdb.cli import main as memdb
from memdb.index.faiss_index import _NO_GPU
from memdb.recipes import RECIPES
from memdb.schemas import errors
from memdb.schemas.question import Budget
from memdb.schemas.recipe import STAGES
from tools.films import render_film

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def tables() -> list[list[list[str]]]:
    """Every table as rows of cells, head first, the rule left out."""
    found: list[list[list[str]]] = [[]]
    for line in README.splitlines():
        if not line.startswith("|"):
            found.append([])
        elif not set(line) <= set("|-"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table for table in found if table]


def table(head: str) -> list[list[str]]:
    [found] = [rows for rows in tables() if rows[0][0] == head]
    return found[1:]


def test_every_block_says_what_it_is() -> None:
    assert {language for language, _ in BLOCKS} == {"text", "python", "bash"}


def test_the_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memdb commands in this process, each with exit code 0; the rest of the shell in a shell."""
    monkeypatch.chdir(tmp_path)
    render_film("lobby.mp4", seconds=20, fps=5, width=160, height=96)
    ran = set()
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})
            continue
        if language != "bash":
            continue
        if "<<" in text:
            head, end, tail = text.partition("\nEND\n")
            subprocess.run(["bash", "-ec", head + end], check=True)
            text = tail
        for line in text.splitlines():
            words = shlex.split(line)
            assert words[0] == "memdb", line
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as left:
                memdb()
            assert left.value.code == 0, (line, capsys.readouterr().err)
            ran.add(words[1])
    assert ran == set(cli.commands) - {"demo"}
    assert {path.name for path in tmp_path.iterdir()} >= {"lobby.srt", "frames", "mine.memdb", "lobby.memdb"}
    assert os.listdir("frames")


def test_the_map_of_recipes_is_that_of_the_code() -> None:
    [found] = [rows for rows in tables() if rows[0][0] == "recipe"]
    assert found[0] == ["recipe", *STAGES]
    rows = {re.sub(r"\[([\w-]+)\]\(.*\)", r"\1", row[0]): row[1:] for row in found[1:]}
    assert rows == {name: [row.stage(s).method for s in STAGES] for name, row in RECIPES.items()}


def test_the_exit_codes_are_those_of_the_errors() -> None:
    told = {int(row[0]) for row in table("exit code")}
    known = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.MemdbError)
    }
    assert told == known | {0}


def test_the_budgets_are_those_of_a_question() -> None:
    assert [row[0].strip("`") for row in table("option")] == list(Budget().as_json())


def form(line: str) -> str:
    """A line of the demo without its figures and without what the model says."""
    line = re.sub(r"^( +(?:right|WRONG)|search '.*'): .*", r"\1: ...", line)
    return re.sub(r"\d[\d,.:e-]*", "0", line)


def test_the_demo_prints_what_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same film and the same steps, its commands in this process: line for line, but for the figures."""

    def in_this_process(module: str, *words: str, given: str = "") -> dict[str, Any]:
        if module == "memdb.demo":
            replies: dict[str, Any] = json.loads(json.dumps(memdb_demo.reply(*words, json.loads(given))))
            return replies
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    monkeypatch.setattr(memdb_demo, "_process", in_this_process)
    said: list[str] = []
    memdb_demo.demo(0, tmp_path, said.append)
    command, *shown = BLOCKS[0][1].splitlines()
    assert command == "$ make demo"
    assert [form(line) for line in shown] == [form(line) for line in said]


def test_faiss_on_a_gpu_is_told_as_the_error_tells_it() -> None:
    for wheel in ("faiss-gpu-cu12", "faiss-gpu", "faiss-gpu-cuvs"):
        assert wheel in README
        assert re.search(rf"\b{wheel}`", _NO_GPU)
    assert "pip uninstall -y faiss-cpu" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://arxiv.org/abs/") and target != "tools/RESULTS.md":
            assert (ROOT / target).is_file(), target


def test_the_targets_of_make_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
