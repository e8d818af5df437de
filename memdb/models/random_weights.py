"""Random weights and checked configurations, for the models that memdb builds offline.

An honest little model: every part of a real one is there and moves (biases, norms, grouped heads, attention
that is not flat); its words merely mean nothing. A weight is a function of the seed, the parameter's name
and its place. It is drawn uniformly, so that no logarithm or cosine of one machine's library is in it: the
weights are the same on every machine and device, rounded in a lower dtype, and whatever stands beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from memdb.models.tokenizer import END, WORDS_FIRST
from memdb.schemas.errors import ModelNotFound, UnsupportedModel

CONFIG_BYTES_MAX = 1 << 20
PARAMETERS_MAX = 10_000_000_000
_CHUNK = 1 << 22  # numbers that are drawn at once: bounds the memory that building takes beside the model

Fields = Mapping[str, Any]

# Smallest and largest value of a size: what is larger is a slip of the pen, and would be allocated.
_LIMITS = {
    "hidden_size": (8, 32_768),
    "intermediate_size": (8, 131_072),
    "num_hidden_layers": (1, 128),
    "num_attention_heads": (1, 256),
    "num_key_value_heads": (1, 256),
    "head_dim": (2, 1024),
    "vocab_size": (1, 1_000_000),
    "max_position_embeddings": (16, 10_000_000),
    "image_size": (14, 2_048),
    "patch_size": (2, 64),
    "depth": (1, 128),
    "num_heads": (1, 256),
    "temporal_patch_size": (1, 8),
    "spatial_merge_size": (1, 8),
    "tokens_per_second": (1, 100),
}


def read_config(path: Path | str) -> dict[str, Any]:
    """The fields of a configuration file (JSON). Raises ModelNotFound or UnsupportedModel."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ModelNotFound(f"cannot read the model configuration {path}: {error.strerror}") from None
    if len(data) > CONFIG_BYTES_MAX:
        raise UnsupportedModel(f"{path} is no model configuration: more than {CONFIG_BYTES_MAX} bytes")
    try:
        fields = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UnsupportedModel(f"{path} must hold one JSON object with vision_config and text_config")
    return fields


def rope_of(given: Fields) -> dict[str, Any]:
    """`rope_parameters` from the two fields that older checkpoints have in its place."""
    scaling = given.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UnsupportedModel(f"text_config.rope_scaling must be an object of fields, not {scaling!r}")
    return {"rope_type": "default", "rope_theta": given.get("rope_theta", 1_000_000.0), **scaling}


def refuse_unknown(part: str, given: Fields, known: set[str]) -> None:
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise UnsupportedModel(f"{part} has no field {unknown[0]!r}: check its spelling")


def check_sizes(part: str, fields: Fields) -> None:
    for name, (low, high) in _LIMITS.items():
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UnsupportedModel(
                f"{part}.{name} is {value!r}: it must be a whole number from {low} to {high}"
            )


def check_text(fields: dict[str, Any], vocabulary: int) -> None:
    check_sizes("text_config", fields)
    fields["vocab_size"] = vocabulary if fields["vocab_size"] is None else fields["vocab_size"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if fields["vocab_size"] < vocabulary:
        raise UnsupportedModel(
            f"text_config: vocab_size must be at least {vocabulary}, the tokenizer's tokens"
        )
    if heads % kv_heads:
        raise UnsupportedModel("text_config: num_attention_heads must be a multiple of num_key_value_heads")
    if fields.get("head_dim") is None and fields["hidden_size"] % heads:
        raise UnsupportedModel("text_config: hidden_size must be a multiple of num_attention_heads")
    if (fields.get("head_dim") or fields["hidden_size"] // heads) % 2:
        raise UnsupportedModel("text_config: the head size (hidden_size / num_attention_heads) must be even")
    if fields.get("use_sliding_window") or "sliding_attention" in (fields.get("layer_types") or ()):
        raise UnsupportedModel("text_config: sliding layers do not keep every token's keys and values")
    scale = fields["initializer_range"]
    if not isinstance(scale, int | float) or not 0 < scale <= 1:
        raise UnsupportedModel(f"text_config.initializer_range is {scale!r}: it must lie between 0 and 1")


def check_count(text: Fields, other: int) -> None:
    """Refuse what could not be allocated, by the weights of the large matrices, which are nearly all.

    `other`: those that are not the language model's.
    """
    width, heads = text["hidden_size"], text["num_attention_heads"] + text["num_key_value_heads"]
    head_size = text.get("head_dim") or width // text["num_attention_heads"]
    layer = width * (2 * heads * head_size + 3 * text["intermediate_size"])
    count = other + text["num_hidden_layers"] * layer + 2 * text["vocab_size"] * width
    if count > PARAMETERS_MAX:
        raise UnsupportedModel(
            f"a random model of {count:.2g} parameters is too large: at most {PARAMETERS_MAX:.0e}"
        )


def cuda_devices(device: torch.device | str) -> list[torch.device]:
    device = torch.device(device)
    return [device] if device.type == "cuda" else []


def draw_weights(model: Any, seed: int) -> None:
    """Overwrite every parameter; the norms near 1, all else around 0."""
    scale = float(model.config.text_config.initializer_range)
    jobs = []
    for name, parameter in model.named_parameters():
        centre, std = _law(name, parameter, scale)
        flat = parameter.detach().view(-1)
        jobs += [(part, name, place, centre, std) for place, part in enumerate(flat.split(_CHUNK))]
    with ThreadPoolExecutor() as threads:  # numpy lets go of the interpreter while it draws
        for _ in threads.map(lambda job: _draw(*job, seed=seed), jobs):
            pass


def _law(name: str, parameter: Tensor, scale: float) -> tuple[float, float]:
    """Mean and standard deviation of a parameter."""
    if "norm" in name or ".ln_" in name:
        return (1.0, 0.1) if name.endswith("weight") else (0.0, 0.1)
    if name.endswith(("embed_tokens.weight", "image_newline")):
        return 0.0, 1.0
    if name.startswith(("model.language_model", "lm_head")):
        return 0.0, scale
    if parameter.ndim < 2:
        return 0.0, 0.1
    return 0.0, 1.5 / math.sqrt(parameter[0].numel())  # vision and projector: what comes in keeps its size


def _draw(part: Tensor, name: str, place: int, centre: float, std: float, *, seed: int) -> None:
    key = hashlib.blake2b(f"{seed}/{name}/{place}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    numbers = generator.random(part.numel(), dtype=np.float32)  # [0, 1)
    numbers -= np.float32(0.5)
    numbers *= np.float32(std * math.sqrt(12))
    numbers += np.float32(centre)
    part.copy_(torch.from_numpy(numbers))


def mute(head: Tensor, spoken: Iterable[int]) -> None:
    """Make the rows of the tokens that are not `spoken` faint: greedy decoding prints words."""
    quiet = torch.ones(head.shape[0], dtype=torch.bool, device=head.device)  # head: (vocabulary, E)
    quiet[torch.tensor(list(spoken), device=head.device)] = False
    head[quiet] *= 1 / 16  # a power of two: exact in every dtype


def words_of(tokenizer: PreTrainedTokenizerFast, stop: int) -> list[int]:
    """The ids below `stop` that are words, and the end of a turn."""
    return [int(tokenizer.convert_tokens_to_ids(END)), *range(WORDS_FIRST, stop)]
