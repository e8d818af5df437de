"""A small store to ask, made once a session: one short film in three recordings, one a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from memdb.client import Client, connect
from tools.films import render_film

MODEL = "random:0"  # its words mean nothing, and every path is gone
FILM_S = 24.0
FRAMES = 24  # at one a second
# Small enough for a test, many enough to choose from: 24 blocks of a frame, 6 clips of 4 frames.
SMALL: dict[str, tuple[str, ...]] = {
    "hybrid": (
        "unit.frames=4",
        "encode.chunk_frames=4",
        "caption.tokens_max=6",
        "retrieve.blocks=8",
        "retrieve.caption_tokens=150",
        "answer.tokens_max=8",
    ),
    "rekv": ("encode.chunk_frames=4", "retrieve.blocks=8", "answer.tokens_max=8"),
    "rlivs": (
        "unit.frames=4",
        "encode.chunk_frames=4",
        "caption.tokens_max=6",
        "retrieve.caption_tokens=20",
        "answer.tokens_max=8",
    ),
}


@dataclass(frozen=True)
class House:
    """The film, and a store with the recordings hall (hybrid), yard (rekv) and roof (rlivs). Nobody writes it."""

    film: Path
    store: Path

    @contextmanager
    def open(self, model: str | None = None) -> Iterator[Client]:
        with connect(self.store, model=model, create=False) as client:
            yield client


def ingest_small(client: Client, film: Path, name: str, recipe: str, **options: object) -> None:
    settings = (*SMALL[recipe], *options.pop("settings", ()))  # type: ignore[misc]
    client.ingest(film, recording=name, recipe=recipe, settings=settings, sample_fps=1.0, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    film, store = folder / "film.mp4", folder / "house.memdb"
    render_film(film, seconds=FILM_S, fps=8, width=160, height=96, scene_s=3.0)
    with connect(store, model=MODEL) as client:
        ingest_small(client, film, "hall", "hybrid", started_at="2026-11-20T08:00:00Z")
        ingest_small(client, film, "yard", "rekv")
        ingest_small(client, film, "roof", "rlivs")
    return House(film, store)
