"""From a model's name to a model: embedded, random:SEED, random-qwen:SEED, a folder, or an id on the Hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memdb.models.joint import load_head, random_head
from memdb.models.protocol import VideoModel
from memdb.models.quiet import no_progress_bars
from memdb.models.sheet import NAME as SHEET_FILE
from memdb.models.sheet import PLAIN, ModelSheet, check_files, read_sheet
from memdb.models.weights import folder_digest
from memdb.schemas.errors import ModelError, ModelNotFound, UnsupportedModel
from memdb.schemas.fingerprint import digest_of

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED = Path(__file__).with_name("embedded")  # the folder of the model that comes with the package
_PIXEL_MAX = 255.0  # of a mean or deviation, whatever pixels are scaled to; NaN is not below it
_PREPROCESSING_FILES = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")


def resolve_device(name: str | None) -> torch.device:
    """The named device, else the first GPU, else the CPU. Raises ModelError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is not known to torch: use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is not carried: use cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device is visible to torch: use --device cpu, or run memdb doctor")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are visible"
        )
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype, else float32 on a CPU and bfloat16 on a GPU."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not supported: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(spec: str, *, device: str | None = None, dtype: str | None = None) -> VideoModel:
    """Load the Video-LLM that `spec` names.

    `embedded`, which comes with the package; `random:SEED` or `random:SEED:CONFIG.json` (see random_llava) and
    `random-qwen:SEED` or `random-qwen:SEED:CONFIG.json` (see random_qwen), built offline; a folder with
    config.json, safetensors and a tokenizer; else a Hub id. Raises ModelNotFound, UnsupportedModel, ModelError.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    if spec == "embedded":
        return _load_embedded(place, kind)
    if spec.startswith(("random:", "random-qwen:")):
        return _load_random(spec, place, kind, spec=spec)
    folder = Path(spec).expanduser()
    if spec and folder.is_dir():
        return _load_folder(folder.resolve(), place, kind, spec=str(folder.resolve()))
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ModelNotFound(
            f"no model {spec!r}: give embedded, random:SEED, random-qwen:SEED, a folder with config.json and "
            "safetensors, or a Hub id such as llava-hf/llava-onevision-qwen2-7b-ov-hf"
        )
    return _load_folder(_fetch(spec), place, kind, spec=spec)


def normal_spec(spec: str) -> str:
    """The form in which a store remembers a model: folders by absolute path."""
    is_folder = spec not in ("", "embedded") and Path(spec).expanduser().is_dir()
    return str(Path(spec).expanduser().resolve()) if is_folder else spec


def _load_random(name: str, device: torch.device, dtype: torch.dtype, *, spec: str) -> VideoModel:
    from memdb.models.llava_onevision import LlavaOnevision
    from memdb.models.qwen2_5_vl import Qwen25VL
    from memdb.models.random_llava import random_llava
    from memdb.models.random_qwen import random_qwen
    from memdb.models.random_weights import read_config

    kind, seed, *rest = name.split(":", 2)
    if not seed.isdecimal():
        raise ModelNotFound(f"{name!r} names no seed: write {kind}:0 or {kind}:0:CONFIG.json")
    config = read_config(rest[0]) if rest else {}
    if kind == "random-qwen":
        qwen, words, preprocessing = random_qwen(config, seed=int(seed), dtype=dtype, device=device)
        weights = digest_of({"random-qwen": 1, "seed": int(seed), "config": config})
        model: VideoModel = Qwen25VL(qwen, words, preprocessing, spec, weights)
        model.joint = random_head(model.shape.embedding_size, int(seed), device)
        return model
    network, tokenizer = random_llava(config, seed=int(seed), dtype=dtype, device=device)
    # Drawn from the seed alone, the same on every machine: seed and configuration say which weights they are.
    weights = digest_of({"random": 1, "seed": int(seed), "config": config})
    model = LlavaOnevision(network, tokenizer, _preprocessing(None), spec, weights)
    model.joint = random_head(model.shape.embedding_size, int(seed), device)
    return model


def sheet_of(spec: str) -> ModelSheet | None:
    """The sheet of the model that `spec` names, without loading it; None where only loading tells, or says why not."""
    if spec.startswith(("random:", "random-qwen:")):
        return PLAIN
    folder = EMBEDDED if spec == "embedded" else Path(spec).expanduser()
    try:
        if spec and folder.is_dir():
            return read_sheet(folder)
        return _hub_sheet(spec) if spec.count("/") == 1 else None
    except ModelError:
        return None


def _load_embedded(device: torch.device, dtype: torch.dtype) -> VideoModel:
    try:
        return _load_folder(EMBEDDED, device, dtype, spec="embedded")
    except ModelError as error:
        raise ModelError(
            f"the embedded model is not whole, reinstall memdb-video or name another with --model: {error}"
        ) from error


def _load_llava_onevision(
    folder: Path, device: torch.device, dtype: torch.dtype, spec: str, sheet: ModelSheet
) -> VideoModel:
    from transformers import LlavaOnevisionForConditionalGeneration

    from memdb.models.llava_onevision import LlavaOnevision

    network, tokenizer, weights = _read(LlavaOnevisionForConditionalGeneration, folder, dtype)
    return LlavaOnevision(network.to(device), tokenizer, _preprocessing(folder), spec, weights, sheet)


def _load_qwen2_5_vl(
    folder: Path, device: torch.device, dtype: torch.dtype, spec: str, sheet: ModelSheet
) -> VideoModel:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from memdb.models.qwen2_5_vl import Qwen25VL

    network, tokenizer, weights = _read(Qwen2_5_VLForConditionalGeneration, folder, dtype)
    preprocessing = {**_preprocessing(folder), **_frame_limits(folder)}
    return Qwen25VL(network.to(device), tokenizer, preprocessing, spec, weights, sheet)


def _read(kind: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """Network, tokenizer and the digest of the weights in a folder, all of it there. Raises ModelError."""
    from transformers import AutoTokenizer

    weights = folder_digest(folder)
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network, told = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except (
        Exception
    ) as error:  # transformers raises what its parts raise: OSError, ValueError, SafetensorError
        raise ModelError(f"the model in {folder} cannot be loaded: {_first_line(error)}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModel(f"{folder} has no fast tokenizer (tokenizer.json): save one there")
    if lost := sorted(map(str, told["missing_keys"])):  # transformers draws them at random
        raise ModelError(
            f"the weights in {folder} are not all there ({len(lost)} lack, {lost[0]} first): copy them again"
        )
    if len(tokenizer) > network.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, more than the model knows: it is another model's"
        )
    return network, tokenizer, weights


# model_type of config.json -> loader. A family is one file and one line here.
FAMILIES: dict[str, Callable[[Path, torch.device, torch.dtype, str, ModelSheet], VideoModel]] = {
    "llava_onevision": _load_llava_onevision,
    "qwen2_5_vl": _load_qwen2_5_vl,
}


def _load_folder(folder: Path, device: torch.device, dtype: torch.dtype, *, spec: str) -> VideoModel:
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelNotFound(
            f"{folder} holds no readable config.json: name a folder written by save_pretrained"
        )
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise UnsupportedModel(f"{folder} is a {family!r} model: memdb carries {', '.join(FAMILIES)}")
    sheet = read_sheet(folder)
    check_files(folder, sheet)
    model = FAMILIES[family](folder, device, dtype, spec, sheet)
    if sheet.joint:
        model.joint = load_head(folder / sheet.joint, model.shape.embedding_size, device)
    return model


def _fetch(hub_id: str) -> Path:
    """The local snapshot of a Hub repository, downloaded unless offline. Its folder name is the revision."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # the Hub's errors have no common base across versions
        raise ModelNotFound(
            f"model {hub_id!r} is neither a folder here nor to be had from the Hub ({_first_line(error)}): "
            "check the name and the network, or download it and name the folder"
        ) from error


def _hub_sheet(hub_id: str) -> ModelSheet | None:
    """The sheet of a Hub repository, that one file alone; None where nobody can say whether there is one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return read_sheet(Path(hf_hub_download(hub_id, SHEET_FILE)).parent)
    except LocalEntryNotFoundError:
        return None
    except EntryNotFoundError:
        return PLAIN
    except Exception:  # as in _fetch: loading says what is wrong
        return None


def _preprocessing(folder: Path | None) -> dict[str, Any]:
    """Mean and deviation of the checkpoint's processor; SigLIP's own, 0.5, where it says nothing."""
    found = _processor(folder) if folder is not None else {}
    return {name: _three(folder, name, found.get(name, [0.5] * 3)) for name in ("image_mean", "image_std")}


def _frame_limits(folder: Path) -> dict[str, Any]:
    """Limits of a frame's pixels, where the processor names them.

    Newer processors call the limits `size.shortest_edge` and `size.longest_edge`, though they are areas.
    """
    found = _processor(folder)
    named = found.get("size")
    size: dict[str, Any] = named if isinstance(named, dict) else {}
    limits = {
        "min_pixels": found.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": found.get("max_pixels") or size.get("longest_edge"),
    }
    return {name: value for name, value in limits.items() if value is not None}


def _processor(folder: Path) -> dict[str, Any]:
    """What the checkpoint's processor files say, the first file's word before the others'."""
    found: dict[str, Any] = {}
    for name in _PREPROCESSING_FILES:
        data = _read_json(folder / name) or {}
        for part in (data.get("video_processor"), data.get("image_processor"), data):
            if isinstance(part, dict):
                found = {**part, **found}
    return found


def _three(folder: Path | None, name: str, value: object) -> list[float]:
    """One number a colour. Raises ModelError."""
    numbers = [x for x in value if type(x) in (int, float)] if isinstance(value, list) else []
    if len(numbers) != 3 or numbers != value or not all(abs(x) <= _PIXEL_MAX for x in numbers):
        raise ModelError(
            f"{name} in {folder} is {value!r:.80}: write three numbers, as the processor has them"
        )
    return [float(x) for x in numbers]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
