"""Qwen2.5-VL with random weights, built offline from a configuration and a seed. See random_weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from memdb.models.random_checkpoint import composed_of, drawn, part_of, preset_of, save_checkpoint
from memdb.models.random_weights import (
    Fields,
    check_count,
    check_sizes,
    check_text,
    refuse_unknown,
    rope_of,
    words_of,
)
from memdb.models.tokenizer import IMAGE, VIDEO, build_tokenizer
from memdb.schemas.errors import UnsupportedModel

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
_MEAN = [0.48145466, 0.4578275, 0.40821073]  # what the published vision tower was trained on
_STD = [0.26862954, 0.26130258, 0.27577711]

_PUBLISHED_VISION: Fields = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# At most 18 tokens a pair of frames; 3 x 5 of a film of 16:9.
_TINY: Fields = {
    "max_pixels": 18 * 28 * 28,
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "window_size": 56,
        "fullatt_block_indexes": [1],
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
# The shapes of Qwen2.5-VL-3B-Instruct; 8 x 15 tokens a pair of frames of a film of 16:9.
_3B: Fields = {
    "vision_config": _PUBLISHED_VISION,
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 128_000,
        "initializer_range": 0.03,
    },
}
# The shapes of Qwen2.5-VL-7B-Instruct. 17 GB in bf16: for a GPU.
_7B: Fields = {
    "vision_config": _PUBLISHED_VISION,
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128_000,
        "initializer_range": 0.025,
    },
}
SIZES: Mapping[str, Fields] = {"tiny": _TINY, "3b": _3B, "7b": _7B}
_PREPROCESSING = ("max_pixels", "min_pixels")  # fields of a configuration that are no model's


def random_qwen(
    config: Fields | None = None,
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast, dict[str, Any]]:
    """A Qwen2.5-VL of random weights, in eval mode, its tokenizer and its preprocessing.

    `size` is a preset: "tiny" (4 layers, 4 query and 2 KV heads of size 64, at most 18 tokens a
    pair of frames), "3b" or
    "7b" (the shapes of the published ones). `config` has the form of a checkpoint's config.json, may name a preset
    as "size" and overrides it field by field; `max_pixels` and `min_pixels` go to the preprocessing,
    and the ids of special tokens are always the tokenizer's. Raises UnsupportedModel with the reason where that
    makes no model that memdb can run. The caller's random state stays as it was.
    """
    tokenizer = build_qwen_tokenizer()
    composed, preprocessing = random_config(config, size=size, tokenizer=tokenizer)
    spoken = words_of(tokenizer, tokenizer.convert_tokens_to_ids(VISION_START))
    network, tied = Qwen2_5_VLForConditionalGeneration, composed.tie_word_embeddings
    return drawn(network, composed, seed, dtype, device, spoken, tied=tied), tokenizer, preprocessing


def build_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """The small tokenizer with the two tokens that open and close a video, behind all others."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([VISION_START, VISION_END], special_tokens=True)
    return tokenizer


def save_random_qwen(
    folder: Path | str,
    config: Fields | None = None,
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder as published checkpoints are: config, safetensors, tokenizer, preprocessing."""
    model, tokenizer, preprocessing = random_qwen(config, size=size, seed=seed, dtype=dtype)
    preprocessing = {"image_processor_type": "Qwen2VLImageProcessor", **preprocessing}
    return save_checkpoint(folder, model, tokenizer, preprocessing)


def random_config(
    config: Fields | None = None, *, size: str = "tiny", tokenizer: PreTrainedTokenizerFast | None = None
) -> tuple[Qwen2_5_VLConfig, dict[str, Any]]:
    """The preset `size` with the fields of `config` put over it, checked, and the preprocessing."""
    given = dict(config or {})
    preset = preset_of(given, size, SIZES, "qwen2_5_vl", "random-qwen")
    tokenizer = tokenizer or build_qwen_tokenizer()
    text = _text(preset["text_config"], given.pop("text_config", {}), len(tokenizer))
    vision = _vision(preset["vision_config"], given.pop("vision_config", {}), text["hidden_size"])
    side = vision["hidden_size"]
    check_count(text, vision["depth"] * side * (4 * side + 3 * vision["intermediate_size"]))
    top = {name: value for name, value in preset.items() if not name.endswith("_config")}
    top |= given
    preprocessing = {name: top.pop(name) for name in _PREPROCESSING if name in top}
    refuse_unknown("the configuration", top, set(Qwen2_5_VLConfig().to_dict()) | {"torch_dtype"})
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    top |= {name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()}
    composed = composed_of(Qwen2_5_VLConfig, vision, text, top, tokenizer)
    return composed, {"image_mean": _MEAN, "image_std": _STD, **preprocessing}


def _text(preset: Fields, given: object, vocabulary: int) -> dict[str, Any]:
    given = part_of("text_config", "qwen2_5_vl_text", given)
    known = set(Qwen2_5_VLTextConfig().to_dict()) | {"rope_theta", "rope_scaling", "torch_dtype"}
    refuse_unknown("text_config", given, known)
    fields = {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": None,  # as many as the tokenizer has
        "max_position_embeddings": 32_768,
        "rope_parameters": rope_of(given),
        **preset,
        **given,
    }
    fields = {name: value for name, value in fields.items() if name not in ("rope_theta", "rope_scaling")}
    check_text(fields, vocabulary)
    pairs = fields["hidden_size"] // fields["num_attention_heads"] // 2
    rope = fields["rope_parameters"]
    if isinstance(rope, Mapping) and "mrope_section" not in rope:
        # In the published proportions, 16 : 24 : 24 of 64.
        time, row = max(1, pairs // 4), max(1, pairs * 3 // 8)
        fields["rope_parameters"] = {**rope, "mrope_section": [time, row, pairs - time - row]}
    return fields


def _vision(preset: Fields, given: object, out: int) -> dict[str, Any]:
    given = part_of("vision_config", "qwen2_5_vl_vision", given)
    refuse_unknown("vision_config", given, set(Qwen2_5_VLVisionConfig().to_dict()) | {"torch_dtype"})
    fields = {
        "model_type": "qwen2_5_vl_vision",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        **preset,
        **given,
        "out_hidden_size": out,
    }
    check_sizes("vision_config", fields)
    if fields["hidden_size"] % (4 * fields["num_heads"]):
        raise UnsupportedModel("vision_config: hidden_size must be a multiple of 4 times num_heads")
    return fields
