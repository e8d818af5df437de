"""Fingerprints: which model a store belongs to, and in which way a recording was encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from memdb.schemas.recipe import Recipe, canonical, encoding_stages
from memdb.schemas.scaling import scaling_of


@dataclass(frozen=True)
class ModelShape:
    """Sizes that fix the form of what is stored."""

    layers: int  # L
    query_heads: int  # Hq
    kv_heads: int  # H
    head_size: int  # D
    embedding_size: int  # E
    frame_tokens: int  # N; the most that a frame has, where a recording has a grid of its own
    context_tokens_max: int  # positions the model was trained on

    def tokens_of(self, grid: tuple[int, int] | None) -> int:
        """Tokens of a frame of a recording whose grid this is, None where the model has but one."""
        return self.frame_tokens if grid is None else grid[0] * grid[1]

    def kv_bytes(self, tokens: int, element_bytes: int) -> int:
        """Bytes of the keys and values of `tokens` tokens over all layers."""
        return 2 * self.layers * tokens * self.kv_heads * self.head_size * element_bytes

    def as_json(self) -> dict[str, int]:
        return {name: int(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class ModelIdentity:
    """The model of a store: how to load it again, and the fingerprint that must then come out."""

    spec: str  # what the user named: embedded, a Hub id, a folder, random:SEED, random-qwen:SEED
    fingerprint: str  # hex; weights, tokenizer, processor, RoPE, frame preprocessing
    shape: ModelShape


def digest_of(data: Mapping[str, object]) -> str:
    return hashlib.blake2b(canonical(data), digest_size=16).hexdigest()


def encoding_fingerprint(
    recipe: Recipe,
    *,
    model: str,
    init_ids: tuple[int, ...],
    sample_fps: float,
    seed: int,
    dtype: str,
    grid: tuple[int, int] | None = None,
    frame_encoder: str = "",
) -> str:
    """What must be equal for two stretches of KV to stand in one context.

    The model, stages 1 to 5 with every parameter, the init prompt, the sample rate, the seed, the dtype of encoding
    the grid of a frame's tokens, where the model fits it to the film, the encoder of frames, where all of them are to
    be in one space with a question, and the scaling of the rotation, where there is one: the encoder rotates by it as
    the answer does. The storage codec is no part of it unless the encoder reads back what was stored.
    """
    stages = {name: _plain(recipe.stage(name).as_json()) for name in encoding_stages(recipe)}
    scaling = scaling_of(recipe)
    rope = [float(scaling.factor), scaling.trained_tokens]
    return digest_of(
        {
            "model": model,
            "profile": recipe.profile,
            "stages": stages,
            "init_ids": list(init_ids),
            "sample_fps": float(sample_fps),
            "seed": seed,
            "dtype": dtype,
            **({"grid": list(grid)} if grid is not None else {}),
            **({} if scaling.is_plain else {"rope_scaling": rope}),
            **({"frame_encoder": frame_encoder} if frame_encoder else {}),
        }
    )


def _plain(params: Mapping[str, object]) -> dict[str, object]:
    """A number is the same number whether it was written as 120 or as 120.0."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in params.items()
    }
