"""Recipes with a bounded memory on the tiny model, what their encoders held, and asking of it directly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memdb.ingest.layer_tokens import LayerTokens
from memdb.ingest.memory import EncoderMemory
from memdb.models.cache import CacheContext
from memdb.models.decode import prefill
from memdb.models.places import Places
from memdb.models.window import LayerKV
from memdb.recipes import REKV
from memdb.schemas.frames import Image
from memdb.schemas.keep import KeepSet
from memdb.schemas.recipe import Recipe, Stage
from tests.model_cases import INIT_PROMPT, QUESTION, ingest, wrapped

FRAME_TOKENS = 16  # of the tiny model
BUDGET = 56  # three and a half frames
CLIP = 3
PROBE = {"template": {"probe": "template"}, "vision_sink": {"probe": "recent", "probe_tokens": 8}}
METHODS = ("uniform", "recent", "tar_van", "template", "vision_sink")


def memory_recipe(
    retain: str = "uniform", budget: int = BUDGET, *, frames: int = CLIP, codec: str = "raw", **encode: Any
) -> Recipe:
    """Stages 1 to 8 of a bounded memory. Batches of four frames, so that clips stay open between them."""
    probe = encode or PROBE.get(retain, {})
    return replace(
        REKV,
        name=f"memory-{retain}",
        unit=Stage("clip", {"frames": frames}),
        encode=Stage("chunk", {"chunk_frames": 4, "init_prompt": INIT_PROMPT, **probe}),
        write=Stage(codec),
        retain=Stage(retain, {"budget_tokens": budget}),
        retrieve=Stage("all"),
        rebuild=Stage("original"),
        answer=Stage("greedy", {"tokens_max": 2}),
    )


@dataclass
class Moment:
    """What the encoder held after a unit, copied when the next one had not come yet."""

    unit: int
    init: list[LayerKV]
    layers: list[LayerTokens]
    keep: KeepSet


@contextmanager
def watched_memory() -> Iterator[list[Moment]]:
    """From now on, every memory after its chunk."""
    moments: list[Moment] = []
    take = EncoderMemory.take

    def taking(self: EncoderMemory, unit: int, *rest: Any) -> None:
        take(self, unit, *rest)
        copies = [layer.at(torch.arange(len(layer.id))) for layer in self.layers]
        moments.append(Moment(unit, list(self.init), copies, self.keep_set()))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EncoderMemory, "take", taking)
        yield moments


def remembered_film(
    store: Path, shown: Sequence[Image], recipe: Recipe | None = None, **more: Any
) -> list[Moment]:
    """Ingest a film a frame a second; what the encoder held after each unit."""
    with watched_memory() as moments:
        ingest(store, shown, recipe=recipe or memory_recipe(), **more)
    return moments


def live_scores(moment: Moment, text: str = QUESTION, *, dtype: str = "float32") -> Tensor:
    """Scores (V,) of the first token of an answer from the encoder's own memory, past every store."""
    model = wrapped(dtype=dtype)
    return prefill(model, model.embed(model.prompt_ids(text)), live_context(moment))


def live_context(moment: Moment) -> CacheContext:
    """[init | the encoder's own memory at its positions]; what comes next stands behind the largest."""
    behind = max(int(layer.position.max()) for layer in moment.layers) + 1
    return CacheContext(
        wrapped().rotary,
        moment.init,
        [layer.kv for layer in moment.layers],
        places=[Places.line(layer.position, behind) for layer in moment.layers],
    )


def same_keep(one: KeepSet, two: KeepSet) -> bool:
    pairs = zip((*one.ids, *one.positions), (*two.ids, *two.positions), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)
