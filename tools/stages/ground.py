"""What is timed: a model of random weights, recipes as they are timed, frames of noise."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from memdb.codecs import planes
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.stages import written_out
from memdb.models import random_checkpoint, random_weights
from memdb.models.load import load_model
from memdb.models.protocol import VideoModel
from memdb.recipes import RECIPES, recipe
from memdb.schemas.recipe import Recipe

SECOND_NS = 1_000_000_000
PICTURES = 64  # that differ; they come again and again
CAPTION_TOKENS = 64
SEGMENT_FRAMES = 16
# Budgets of the recipes are for frames of 196 tokens; tiny ones have 16, and a test has little time.
SHARES = {"7b": 1.0, "tiny": 1 / 49}
BUDGETS = {"encode": ("window_tokens", "probe_tokens"), "retain": ("budget_tokens",)}
CODEC = "int4"  # packing is not timed, but somebody waits for it
OWN_CODEC = ("streamingtom", "livevlm")  # rules R10 and R12
# Batches as ingests on a GPU have them where the recipe's are larger than what is timed.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "rekv": ("encode.chunk_frames=16",),
    "streamkv": ("encode.chunk_frames=16", "unit.theta=1", f"unit.frames_min={SEGMENT_FRAMES}"),
    "streammem": ("reduce.delta=2",),
    "rlivs": (f"caption.tokens_max={CAPTION_TOKENS}",),
    "hybrid": ("caption.encoder=input-embeddings",),
}


def build(size: str, device: str | None) -> VideoModel:
    """A model of random weights, drawn where they stand: a GPU takes a second for what a CPU draws in a minute."""
    with tempfile.TemporaryDirectory(prefix="memdb-bench-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"size": size}))
        with mock.patch.object(random_checkpoint, "draw_weights", draw):
            return load_model(f"random:0:{config}", device=device)


def draw(network: Any, seed: int) -> None:
    """The same law as `random_weights.draw_weights`, of other numbers."""
    scale = float(network.config.text_config.initializer_range)
    generator = torch.Generator(network.device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        centre, std = random_weights._law(name, parameter, scale)
        reach = std * math.sqrt(3)
        parameter.uniform_(centre - reach, centre + reach, generator=generator)


def settled(name: str, model: VideoModel, share: float) -> Recipe:
    """The recipe as it is timed, with a share of its budgets."""
    settings = list(SETTINGS.get(name, ()))
    plain = RECIPES[name]
    for stage, params in BUDGETS.items():
        given = getattr(plain, stage).params
        settings += [
            f"{stage}.{param}={max(1, round(given[param] * share))}" for param in params if given.get(param)
        ]
    codec = CODEC if plain.keeps_kv and name not in OWN_CODEC else None
    return written_out(recipe(name, codec=codec, settings=tuple(settings)), model, model.shape.frame_tokens)


def frames_of(model: VideoModel) -> Iterator[ReadyFrame]:
    """Noise, one frame a second, without end."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (384, 384, 3), np.uint8) for _ in range(PICTURES)]
    pixels = [model.prepare(picture) for picture in pictures]
    number = 0
    while True:
        at, start_ns = number % PICTURES, number * SECOND_NS
        yield ReadyFrame(number, start_ns, start_ns + SECOND_NS, pixels[at], pictures[at])
        number += 1


@contextmanager
def uncompressed() -> Iterator[None]:
    """Whatever is packed stays as it is; what is no smaller is stored so anyway."""
    with mock.patch.object(planes, "pack", lambda raw, element_bytes, **_: raw):
        yield
