"""The byte form of an encoder's state, written here by hand: what was saved once is read by every later version."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.stages import compose
from memdb.models.caption_vectors import caption_vectors
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.recipes import recipe
from tests.run_cases import SETTINGS, small_model, small_spec

# The small model: 2 layers, 2 KV heads of 8, 4 tokens a frame of 32 numbers.
L, H, D, N, E = 2, 2, 8, 4, 32
S = 10**9
COUNTERS = {
    "unit": 3,
    "frame": 11,
    "taken_ns": 10 * S,
    "until_ns": 11 * S,
    "position": 47,
    "epoch": 1,
    "tombstones": 2,
    "widths": {"0": 2, "1": 4},
}
WINDOW = [[8 * S, 9 * S, 4], [9 * S, 10 * S, 4]]
MERGED = [10, 10 * S, 11 * S, 2, 0.25]  # of two frames, with their likeness to the one before
PICTURES = {"jpeg": b"one", "jpeg.last": b"another"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    return small_model(small_spec(tmp_path_factory.mktemp("model")))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def memory() -> dict[str, Tensor]:
    """Five tokens of the first two frames in every layer."""
    names = ("id", "position", "frame", "patch", "kind")
    found = {f"memory.{layer}.{name}": torch.arange(5) for layer in range(L) for name in names}
    return found | {f"memory.{layer}.{name}": draw(H, 5, D) for layer in range(L) for name in ("k", "v")}


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Tensor], dict[str, Any]]] = {
    "window": (
        "rekv",
        SETTINGS["rekv"],
        {"window.k": draw(L, H, 8, D), "window.v": draw(L, H, 8, D)},
        {"seen": 30, "window": WINDOW, "memory": [], "queue": [], "open": [], "before": []},
    ),
    "open clips and recurrent tokens": (
        "hybrid",
        SETTINGS["hybrid"],
        {
            "window.k": draw(L, H, 8, D),
            "window.v": draw(L, H, 8, D),
            "queue.0": draw(3, E),
            "queue.1": draw(2, E),
            "open.0": draw(N, E),
        },
        {
            "seen": 30,
            "window": WINDOW,
            "memory": [],
            "queue": [[0, 3 * S, 3], [3 * S, 6 * S, 2]],
            "open": [[9, 9 * S, 10 * S]],
            "before": [],
        },
    ),
    "nothing but captions": (
        "rlivs",
        SETTINGS["rlivs"],
        {"queue.0": draw(3, E)},
        {
            "seen": 0,
            "window": [],
            "memory": [],
            "queue": [[0, 3 * S, 3]],
            "open": [],
            "before": [],
        },
    ),
    "memory": (
        "uniform",
        ("retain.budget_tokens=20",),
        memory(),
        {
            "seen": 0,
            "window": [],
            "memory": [[0, 0, S, 4], [1, S, 2 * S, 4]],
            "queue": [],
            "open": [],
            "before": [],
        },
    ),
    "groups that were not begun": (
        "streamingtom",
        ("reduce.tokens=2",),
        {"before": draw(N, E)},
        {
            "seen": 0,
            "frames": 0,
            "window": [],
            "memory": [],
            "queue": [],
            "open": [],
            "before": [[9, 9 * S, 10 * S]],
        },
    ),
    "frames that merge": (
        "streammem",
        ("unit.frames=3", "retain.budget_tokens=20", "rebuild=original"),
        {**memory(), "open.0": draw(N, E), "open.1": draw(N, E), "open.1.latest": draw(E)},
        {
            "seen": 0,
            "window": [],
            "memory": [[0, 0, S, 4]],
            "queue": [],
            "open": [[9, 9 * S, 10 * S], MERGED],
            "before": [],
        },
    ),
    "frames with saliency and a vector": (
        "rekv",
        (*SETTINGS["rekv"], "unit=clip", "reduce=ctr", "reduce.tokens=2", "retrieve=external"),
        {
            "window.k": draw(L, H, 8, D),
            "window.v": draw(L, H, 8, D),
            "before": draw(N, E),
            "open.0": draw(N, E),
            "open.0.saliency": draw(N),
            "open.0.vector": draw(6),
        },
        {
            "seen": 30,
            "window": WINDOW,
            "memory": [],
            "queue": [],
            "open": [[9, 9 * S, 10 * S]],
            "before": [[8, 8 * S, 9 * S]],
        },
    ),
}


def written(tensors: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    """A state as it is on the disk: numbers in their order, and pictures where frames are open."""
    pictures = dict(list(PICTURES.items())[: len(meta["open"])])
    found = {"meta": json.dumps({"counters": COUNTERS, **meta}).encode(), **pictures}
    data: bytes = save(
        {
            **tensors,
            **{name: torch.frombuffer(bytearray(raw), dtype=torch.uint8) for name, raw in found.items()},
        }
    )
    return data


def encoder(model: VideoModel, name: str, settings: tuple[str, ...]) -> StreamEncoder:
    row = recipe(name, settings=settings)
    stages = compose(row)
    encoder = stages.captioner.encoder
    vectors = caption_vectors(encoder, lambda: model) if encoder else None
    return StreamEncoder(model, stages, model.init_ids("x"), vectors)


@pytest.mark.parametrize("case", CASES)
def test_a_state_written_by_hand_is_read_and_written_as_it_was(model: VideoModel, case: str) -> None:
    name, settings, tensors, meta = CASES[case]
    payload = written(tensors, meta)
    found = encoder(model, name, settings)
    found.restore(payload)
    assert found.state() == payload
    assert found.counters.widths == {0: 2, 1: 4}
    starts = [row[0] for row in (*meta["window"], *meta["queue"])]
    starts += [row[1] for row in (*meta["memory"], *meta["open"], *meta["before"])]
    assert found.reach_ns == min(starts)


def test_a_state_from_before_frames_were_reduced_beside_another_is_read(model: VideoModel) -> None:
    name, settings, tensors, meta = CASES["window"]
    older = {key: value for key, value in meta.items() if key != "before"}
    found = encoder(model, name, settings)
    found.restore(written(tensors, older))
    assert found.state() == written(tensors, meta)


def test_groups_are_read_back_and_not_saved(model: VideoModel) -> None:
    """The state says which units the window is: as many as it has frames, before the next one."""
    name, settings, tensors, meta = CASES["groups that were not begun"]
    payload = written(tensors, {**meta, "frames": 7, "window": [[8 * S, 9 * S, 2], [9 * S, 10 * S, 2]]})
    asked: list[range] = []

    class Stored:
        def read(self, units: range) -> tuple[list[LayerKV], Tensor, None]:
            asked.append(units)
            return [LayerKV(draw(H, 4, D), draw(H, 4, D))] * L, torch.arange(4), None

    row = recipe(name, settings=settings)
    found = StreamEncoder(model, compose(row), model.init_ids("x"), None, stored=Stored())  # type: ignore[arg-type]
    found.restore(payload)
    assert asked == [range(1, 3)]
    assert found.state() == payload
    assert {"meta", "before"} == set(load(payload))
