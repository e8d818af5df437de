"""LLaVA-OneVision with random weights, built offline from a configuration and a seed.

See random_weights for how they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig

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
from memdb.models.tokenizer import IMAGE, VIDEO, WORDS, build_tokenizer
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
ROLES = ("system", "user", "assistant")
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
    frame), "20m" (64 tokens a frame) or "7b" (the shapes of llava-onevision-qwen2-7b, 16 GB in bf16, and the roles of
    its chat template as whole tokens, so that a template has as many).
    `config` has the form of a checkpoint's config.json, may name a preset as "size" and overrides it field
    by field; the ids of special tokens are always the tokenizer's. Raises UnsupportedModel with the reason
    where that makes no model that memdb can run. The caller's random state stays as it was.
    """
    roles = ROLES if (config or {}).get("size", size) == "7b" else ()
    tokenizer = build_tokenizer(WORDS if words is None else words, bare=roles)
    composed = random_config(config, size=size, tokenizer=tokenizer)
    spoken, tied = words_of(tokenizer, len(tokenizer)), composed.text_config.tie_word_embeddings
    network = LlavaOnevisionForConditionalGeneration
    return drawn(network, composed, seed, dtype, device, spoken, tied=tied), tokenizer


def save_random_llava(
    folder: Path | str,
    config: Fields | None = None,
    *,
    size: str = "tiny",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder as published checkpoints are: config, safetensors, tokenizer, preprocessing."""
    model, tokenizer = random_llava(config, size=size, seed=seed, dtype=dtype)
    side = model.config.vision_config.image_size
    return save_checkpoint(folder, model, tokenizer, preprocessor_config(side))


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
    preset = preset_of(given, size, SIZES, "llava_onevision", "random")
    tokenizer = tokenizer or build_tokenizer()
    vision = _merged("vision_config", "siglip_vision_model", preset, given.pop("vision_config", {}))
    text = _merged("text_config", "qwen2", preset, given.pop("text_config", {}))
    refuse_unknown("the configuration", given, set(LlavaOnevisionConfig().to_dict()) | {"torch_dtype"})
    _check_vision(vision)
    check_text(text, len(tokenizer))
    side = vision["hidden_size"]
    check_count(text, vision["num_hidden_layers"] * side * (4 * side + 2 * vision["intermediate_size"]))
    top = {
        "image_grid_pinpoints": [[vision["image_size"]] * 2],
        **given,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "video_token_index": tokenizer.convert_tokens_to_ids(VIDEO),
    }
    return composed_of(LlavaOnevisionConfig, vision, text, top, tokenizer)


def _merged(part: str, kind: str, preset: Fields, given: object) -> dict[str, Any]:
    given = part_of(part, kind, given)
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
