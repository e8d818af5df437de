"""What the random models of both families share: a configuration put together and checked, weights drawn, a folder
written as a published checkpoint is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from memdb.models.quiet import no_progress_bars
from memdb.models.random_weights import Fields, cuda_devices, draw_weights, mute
from memdb.models.tokenizer import END, PAD, START
from memdb.schemas.errors import UnsupportedModel

Config = TypeVar("Config")


def preset_of(
    given: dict[str, Any], size: str, sizes: Mapping[str, Fields], kind: str, family: str
) -> Fields:
    """The preset that a configuration names as "size", else `size`; takes out of `given` what says so.

    Raises UnsupportedModel for an unknown one, and for a configuration that is not of model_type `kind`.
    """
    size = str(given.pop("size", size))
    if size not in sizes:
        raise UnsupportedModel(f"unknown size {size!r}: choose one of {', '.join(sizes)}")
    if given.pop("model_type", kind) != kind:
        raise UnsupportedModel(f"{family} models are of model_type {kind!r} only")
    return sizes[size]


def part_of(name: str, kind: str, given: object) -> dict[str, Any]:
    """The fields of a part of a configuration. Raises UnsupportedModel where it is none of its kind."""
    if not isinstance(given, Mapping):
        raise UnsupportedModel(f"{name} must be an object of fields, not {given!r}")
    if given.get("model_type", kind) != kind:
        raise UnsupportedModel(f"{name}: model_type {given['model_type']!r} is not supported, only {kind!r}")
    return dict(given)


def composed_of(
    config: Callable[..., Config],
    vision: Fields,
    text: Fields,
    top: Fields,
    tokenizer: PreTrainedTokenizerFast,
) -> Config:
    """A configuration of transformers. Raises UnsupportedModel with the reason where it refuses the fields."""
    special = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(START),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
    }
    try:
        return config(vision_config=vision, text_config={**text, **special}, **top)
    except Exception as error:  # transformers checks fields with errors of several libraries
        reason = " ".join(str(error).split())
        raise UnsupportedModel(f"the model configuration is not valid: {reason}") from error


def drawn(
    network: Any,
    composed: Any,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    spoken: Iterable[int],
    *,
    tied: bool,
) -> Any:
    """A network of that class and configuration in eval mode, its weights drawn from the seed.

    spoken: ids that greedy decoding may say; where embeddings are tied, all are. The caller's random state stays.
    """
    with torch.inference_mode(False), torch.no_grad():  # the threads that draw are not in the caller's mode
        with torch.random.fork_rng(devices=cuda_devices(device)), torch.device(device):
            model = network._from_config(composed, attn_implementation="sdpa", dtype=dtype)
        draw_weights(model, seed)
        if not tied:
            mute(model.lm_head.weight, spoken)
    return model.eval()


def save_checkpoint(
    folder: Path | str, model: Any, tokenizer: PreTrainedTokenizerFast, preprocessing: Mapping[str, object]
) -> Path:
    """Write a folder as published checkpoints are: config, safetensors, tokenizer, preprocessing."""
    folder = Path(folder)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = json.dumps(preprocessing, indent=2, sort_keys=True)
    (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
    return folder
