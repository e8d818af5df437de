"""Running `memdb`: the command in this process or in one of its own, ingests small enough to be killed often."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from memdb import cli, recipes
from memdb.client import Client, connect
from memdb.models.load import load_model
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import StoreError
from memdb.schemas.recipe import Recipe
from memdb.schemas.rows import UnitRow
from memdb.store import Store
from tools.films import render_film

# 2 layers, 4 query and 2 KV heads of 8, 4 tokens a frame: a batch takes milliseconds.
SMALL = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    },
}
RECIPES = ("rekv", "rlivs", "hybrid", "bounded")
RANKED = ("rekv", "rlivs", "hybrid")  # of these, the ones that rank blocks or captions for a question
CHUNK = 4  # frames a batch
WINDOW_TOKENS = 24  # six frames: a film of 24 frames overflows the window three times
# Clips of three frames in batches of four: after most batches a clip is open.
SETTINGS = {
    "rekv": (f"encode.chunk_frames={CHUNK}", f"encode.window_tokens={WINDOW_TOKENS}"),
    "rlivs": (
        f"encode.chunk_frames={CHUNK}",
        "unit.frames=3",
        "reduce.clips=2",
        "reduce.share=0.25",
        "caption.tokens_max=8",
    ),
    "hybrid": (
        f"encode.chunk_frames={CHUNK}",
        f"encode.window_tokens={WINDOW_TOKENS}",
        "unit.frames=3",
        "caption.clips=2",
        "caption.share=0.25",
        "caption.tokens_max=4",
        "caption.encoder=input-embeddings",
    ),
    "bounded": (f"encode.chunk_frames={CHUNK}",),
    # Thinned from the second block on, which is the first of three frames.
    "infinipot-v": (
        f"encode.chunk_frames={CHUNK}",
        "unit.first_frames=6",
        "unit.frames=3",
        "retain.budget_frames=5",
    ),
    "streammem": (
        f"encode.chunk_frames={CHUNK}",
        "unit.frames=3",
        "reduce.delta=0.99",
        "retain.budget_tokens=20",
    ),
}
CODEC = {
    "rekv": "int4",
    "rlivs": None,
    "hybrid": "int4",
    "bounded": "int4",
    "infinipot-v": "int4",
    "streammem": "int4",
}
NAME = "lobby"
# A bounded memory whose reach is that of a window: the newest five frames, in clips of three.
BUDGET_TOKENS = 20
BOUNDED = f"""
base = "rekv"
name = "bounded"
unit = {{ method = "clip", frames = 3 }}
encode = {{ method = "chunk", init_prompt = "{recipes.INIT_PROMPT}" }}
retain = {{ method = "recent", budget_tokens = {BUDGET_TOKENS} }}
retrieve = {{ method = "all", blocks = 4 }}
rebuild = "original"
"""


def recipe_file(folder: Path, recipe: str) -> str:
    """What `--recipe` takes: the name itself, or a file of one that only tests have."""
    if recipe != "bounded":
        return recipe
    path = folder / "bounded.toml"
    path.write_text(BOUNDED)
    return str(path)


def found_recipe(recipe: str) -> Recipe:
    """A recipe as `ingested` has it, with codec and settings."""
    named = recipes.RECIPES.get(recipe)
    if named is None:
        data = tomllib.loads(BOUNDED)
        named = Recipe.from_json(data, base=recipes.RECIPES[data["base"]])
    return recipes.adjusted(named, codec=CODEC[recipe], settings=SETTINGS[recipe])


def small_spec(folder: Path, seed: int = 7) -> str:
    """The small model, its configuration in a file, as `--model` takes it."""
    path = folder / "small.json"
    path.write_text(json.dumps(SMALL))
    return f"random:{seed}:{path}"


def small_model(spec: str) -> VideoModel:
    return load_model(spec, device="cpu", dtype="float32")


def small_film(path: Path, seconds: float = 24, *, seed: int = 0) -> Path:
    """A film of 160 x 96 pixels, for a sampled frame a second."""
    render_film(path, seconds=seconds, fps=4, width=160, height=96, seed=seed, scene_s=3)
    return path


def opened(store: Path, model: VideoModel, *, create: bool = True) -> Client:
    """A connection that uses a model which is loaded already."""
    client = connect(store, model=model.identity.spec, create=create)
    client.loaded._model = model
    return client


def ingested(store: Path, model: VideoModel, film: Any, recipe: str, **changes: Any) -> Any:
    """One ingest of a film as `SETTINGS` has it; the report."""
    arguments = {
        "recording": NAME,
        "recipe": recipe if recipe != "bounded" else found_recipe(recipe),
        "codec": CODEC[recipe],
        "settings": SETTINGS[recipe],
        "sample_fps": 1,
    }
    with opened(store, model) as client:
        return client.ingest(film, **(arguments | changes))


def ingest_words(store: Path, spec: str, film: Path | str, recipe: str) -> list[str]:
    """The same ingest as words of a command."""
    named = recipe_file(Path(store).parent, recipe)
    words = ["ingest", str(film), "--store", str(store), "--recording", NAME, "--recipe", named]
    words += ["--sample-fps", "1", "--model", spec, "--device", "cpu"]
    if CODEC[recipe]:
        words += ["--codec", str(CODEC[recipe])]
    for setting in SETTINGS[recipe]:
        words += ["--set", setting]
    return words


def content(store: Path) -> str:
    """The digest of the recording, from the bytes on disk."""
    with connect(store, create=False) as client:
        return client.digest(NAME)[NAME]


def unit_rows(store: Path, name: str = NAME) -> list[UnitRow]:
    """Its acknowledged units, seen by a reader, which changes nothing."""
    with Store.open(store) as found:
        rows = [row for row in found.recordings() if row.name == name]
        return found.units(rows[0].id) if rows else []


def unit_digests(store: Path) -> list[bytes]:
    return [row.digest for row in unit_rows(store)]


# The command


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(*words: str) -> Ran:
    """`memdb WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["memdb", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return Ran(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """As here, with as many threads as here: sums over another number of threads may round otherwise."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """`memdb WORDS` in a process of its own; killed when the block ends, if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "memdb", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def run(*words: str) -> Ran:
    """`memdb WORDS` in a process of its own, to its end."""
    with started(*words) as process:
        out, err = process.communicate()
        return Ran(process.returncode, out, err)


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something that another thread or process brings about; fails where that process has ended."""
    deadline = time.monotonic() + 120
    while not condition():
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"it ended with {process.returncode} before: {out}{err}")
        assert time.monotonic() < deadline, "it did not happen within two minutes"
        time.sleep(0.002)


def end_at(store: Path, units: int, number: signal.Signals, *words: str) -> Ran:
    """Run a command and send it a signal as soon as its store has that many units; wait for its end."""

    def reached() -> bool:
        return count_units(store) >= units

    with started(*words) as process:
        until(reached, process)
        process.send_signal(number)
        out, err = process.communicate()
        return Ran(process.returncode, out, err)


def count_units(store: Path) -> int:
    """Units that are acknowledged at this moment; 0 while the store is being made."""
    try:
        with Store.open(store) as found:
            return sum(row.units for row in found.recordings())
    except StoreError:
        return 0
