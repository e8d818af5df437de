"""LLaVA-OneVision with random weights, built offline from a configuration and a seed.

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
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig

from memdb.models.quiet import no_progress_bars
from memdb.models.tokenizer import END, IMAGE, PAD, START, VIDEO, WORDS_FIRST, build_tokenizer
from memdb.schemas.errors import ModelNotFound, UnsupportedModel

CONFIG_BYTES_MAX = 1 << 20
PARAMETERS_MAX = 10_000_000_000
_CHUNK = 1 << 22  # numbers that are drawn at once: bounds the memory that building takes beside the model
_FRAME_MEAN, _FRAME_STD = 0.5, 0.5  # what SigLIP was trained on

Fields = Mapping[str, Any]
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
}
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
        with torch.random.fork_rng(devices=_cuda_devices(device)), torch.device(device):
            model = LlavaOnevisionForConditionalGeneration._from_config(
                composed, attn_implementation="sdpa", dtype=dtype
            )
        _draw_weights(model, seed)
        if not composed.text_config.tie_word_embeddings:
            _mute(model.lm_head.weight, tokenizer)
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
    _refuse_unknown("the configuration", given, set(LlavaOnevisionConfig().to_dict()) | {"torch_dtype"})
    if given.pop("model_type", "llava_onevision") != "llava_onevision":
        raise UnsupportedModel("random models are of model_type 'llava_onevision' only")
    _check_vision(vision)
    _check_text(text, len(tokenizer))
    _check_count(vision, text)
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
            "rope_parameters": _rope(given),
            "tie_word_embeddings": False,
        }
        known = set(Qwen2Config().to_dict()) | _PUBLISHED_FIELDS
    else:
        base = {"vision_use_head": False}
        known = set(SiglipVisionConfig().to_dict()) | {"torch_dtype", "vision_use_head"}
    _refuse_unknown(part, given, known)
    fields = {"model_type": kind, **base, **preset[part], **given}
    return {name: value for name, value in fields.items() if name not in ("rope_theta", "rope_scaling")}


def _rope(given: Fields) -> dict[str, Any]:
    """`rope_parameters` from the two fields that older checkpoints have in its place."""
    scaling = given.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UnsupportedModel(f"text_config.rope_scaling must be an object of fields, not {scaling!r}")
    return {"rope_type": "default", "rope_theta": given.get("rope_theta", 1_000_000.0), **scaling}


def _refuse_unknown(part: str, given: Fields, known: set[str]) -> None:
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise UnsupportedModel(f"{part} has no field {unknown[0]!r}: check its spelling")


def _check_sizes(part: str, fields: Fields) -> None:
    for name, (low, high) in _LIMITS.items():
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UnsupportedModel(
                f"{part}.{name} is {value!r}: it must be a whole number from {low} to {high}"
            )


def _check_vision(fields: Fields) -> None:
    _check_sizes("vision_config", fields)
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise UnsupportedModel("vision_config: hidden_size must be a multiple of num_attention_heads")
    if fields["image_size"] < 2 * fields["patch_size"]:
        raise UnsupportedModel(
            "vision_config: image_size must be at least two patches, for they are pooled 2 x 2"
        )


def _check_text(fields: dict[str, Any], vocabulary: int) -> None:
    _check_sizes("text_config", fields)
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


def _check_count(vision: Fields, text: Fields) -> None:
    """Refuse what could not be allocated, by the weights of the large matrices, which are nearly all."""
    width, heads = text["hidden_size"], text["num_attention_heads"] + text["num_key_value_heads"]
    head_size = text.get("head_dim") or width // text["num_attention_heads"]
    layer = width * (2 * heads * head_size + 3 * text["intermediate_size"])
    count = text["num_hidden_layers"] * layer + 2 * text["vocab_size"] * width
    side = vision["hidden_size"]
    count += vision["num_hidden_layers"] * side * (4 * side + 2 * vision["intermediate_size"])
    if count > PARAMETERS_MAX:
        raise UnsupportedModel(
            f"a random model of {count:.2g} parameters is too large: at most {PARAMETERS_MAX:.0e}"
        )


def _cuda_devices(device: torch.device | str) -> list[torch.device]:
    device = torch.device(device)
    return [device] if device.type == "cuda" else []


def _draw_weights(model: LlavaOnevisionForConditionalGeneration, seed: int) -> None:
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
    if "norm" in name:
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


def _mute(head: Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make the rows of bytes and special tokens faint, `<|im_end|>` apart: greedy decoding prints words."""
    end = tokenizer.convert_tokens_to_ids(END)
    spoken = [end, *range(WORDS_FIRST, len(tokenizer))]  # head: (vocabulary, E)
    quiet = torch.ones(head.shape[0], dtype=torch.bool, device=head.device)
    quiet[torch.tensor(spoken, device=head.device)] = False
    head[quiet] *= 1 / 16  # a power of two: exact in every dtype
