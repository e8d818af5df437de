"""LLaVA-OneVision with random weights, built offline from a configuration and a seed.

See random_weights for how they are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig

from memdb.models.quiet import no_progress_bars
from memdb.models.random_weights import (
    Fields,
    check_count,
    check_sizes,
    check_text,
    cuda_devices,
    draw_weights,
    mute,
    refuse_unknown,
    rope_of,
    words_of,
)
from memdb.models.tokenizer import END, IMAGE, PAD, START, VIDEO, build_tokenizer
from memdb.schemas.errors import UnsupportedModel

_FRAME_MEAN, _FRAME_STD = 0.5, 0.5  # what SigLIP was trained on

_TINY: Fields = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 112,  # 8 x 8 patches, pooled to N = 16 tokens a frame
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    },
}
_20M: Fields = {
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 224,  # 16 x 16 patches, N = 64
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "initializer_range": 0.08,
    },
}
# The shapes of llava-onevision-qwen2-7b: 27 x 27 patches, N = 196. 16 GB in bf16: for a GPU.
_7B: Fields = {
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152000,
        "initializer_range": 0.025,
    },
}
SIZES: Mapping[str, Fields] = {"tiny": _TINY, "20m": _20M, "7b": _7B}

_PUBLISHED_FIELDS = {"head_dim", "rope_theta", "rope_scaling", "torch_dtype"}  # beside those of the class


def random_llava(
    config: Fields | None = None,
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    words: Iterable[str] | None = None,
) -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast]:
    """A LLaVA-OneVision of random weights, in eval mode, and its tokenizer.

    `size` is a preset: "tiny" (3 million parameters, 4 layers, 4 query and 2 KV heads of size 64, 16 tokens a
    frame), "20m" (64 tokens a frame) or "7b" (the shapes of llava-onevision-qwen2-7b, 16 GB in bf16).
    `config` has the form of a checkpoint's config.json, may name a preset as "size" and overrides it field
    by field; the ids of special tokens are always the tokenizer's. Raises UnsupportedModel with the reason
    where that makes no model that memdb can run. The caller's random state stays as it was.
    """
    tokenizer = build_tokenizer() if words is None else build_tokenizer(words)
    composed = random_config(config, size=size, tokenizer=tokenizer)
    with torch.inference_mode(False), torch.no_grad():  # the threads that draw are not in the caller's mode
        with torch.random.fork_rng(devices=cuda_devices(device)), torch.device(device):
            model = LlavaOnevisionForConditionalGeneration._from_config(
                composed, attn_implementation="sdpa", dtype=dtype
            )
        draw_weights(model, seed)
        if not composed.text_config.tie_word_embeddings:
            mute(model.lm_head.weight, words_of(tokenizer, len(tokenizer)))
    return model.eval(), tokenizer


def save_random_llava(
    folder: Path | str,
    config: Fields | None = None,
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder as published checkpoints are: config, safetensors, tokenizer, preprocessing."""
    folder = Path(folder)
    model, tokenizer = random_llava(config, size=size, seed=seed, dtype=dtype)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = model.config.vision_config.image_size
    text = json.dumps(preprocessor_config(side), indent=2, sort_keys=True)
    (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
    return folder


def preprocessor_config(side: int) -> dict[str, object]:
    """How frames become pixels, in a checkpoint's words; images are `side` pixels high and wide."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": [[side, side]],
        "image_mean": [_FRAME_MEAN] * 3,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [_FRAME_STD] * 3,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }


def random_config(
    config: Fields | None = None, *, size: str = "tiny", tokenizer: PreTrainedTokenizerFast | None = None
) -> LlavaOnevisionConfig:
    """The preset `size` with the fields of `config` put over it, checked. See `random_llava`."""
    given = dict(config or {})
    size = str(given.pop("size", size))
    if size not in SIZES:
        raise UnsupportedModel(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    tokenizer = tokenizer or build_tokenizer()
    vision = _merged("vision_config", "siglip_vision_model", SIZES[size], given.pop("vision_config", {}))
    text = _merged("text_config", "qwen2", SIZES[size], given.pop("text_config", {}))
    refuse_unknown("the configuration", given, set(LlavaOnevisionConfig().to_dict()) | {"torch_dtype"})
    if given.pop("model_type", "llava_onevision") != "llava_onevision":
        raise UnsupportedModel("random models are of model_type 'llava_onevision' only")
    _check_vision(vision)
    check_text(text, len(tokenizer))
    side = vision["hidden_size"]
    check_count(text, vision["num_hidden_layers"] * side * (4 * side + 2 * vision["intermediate_size"]))
    special = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(START),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
    }
    top = {
        "image_grid_pinpoints": [[vision["image_size"]] * 2],
        **given,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "video_token_index": tokenizer.convert_tokens_to_ids(VIDEO),
    }
    try:
        composed = LlavaOnevisionConfig(vision_config=vision, text_config={**text, **special}, **top)
    except Exception as error:  # transformers checks fields with errors of several libraries
        reason = " ".join(str(error).split())
        raise UnsupportedModel(f"the model configuration is not valid: {reason}") from error
    return composed


def _merged(part: str, kind: str, preset: Fields, given: object) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UnsupportedModel(f"{part} must be an object of fields, not {given!r}")
    if given.get("model_type", kind) != kind:
        raise UnsupportedModel(f"{part}: model_type {given['model_type']!r} is not supported, only {kind!r}")
    if kind == "qwen2":
        base: dict[str, Any] = {
            "vocab_size": None,  # as many as the tokenizer has
            "max_position_embeddings": 32_768,
            "rope_parameters": rope_of(given),
            "tie_word_embeddings": False,
        }
        known = set(Qwen2Config().to_dict()) | _PUBLISHED_FIELDS
    else:
        base = {"vision_use_head": False}
        known = set(SiglipVisionConfig().to_dict()) | {"torch_dtype", "vision_use_head"}
    refuse_unknown(part, given, known)
    fields = {"model_type": kind, **base, **preset[part], **given}
    return {name: value for name, value in fields.items() if name not in ("rope_theta", "rope_scaling")}


def _check_vision(fields: Fields) -> None:
    check_sizes("vision_config", fields)
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise UnsupportedModel("vision_config: hidden_size must be a multiple of num_attention_heads")
    if fields["image_size"] < 2 * fields["patch_size"]:
        raise UnsupportedModel(
            "vision_config: image_size must be at least two patches, for they are pooled 2 x 2"
        )
