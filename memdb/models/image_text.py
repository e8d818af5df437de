"""A CLIP or SigLIP of transformers: pictures and texts in one space.

Pictures are prepared here, from what the checkpoint's own file says of size, crop, mean and deviation: the published
processors need torchvision, which memdb does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdb.models.quiet import no_progress_bars
from memdb.models.weights import module_digest
from memdb.schemas.errors import ModelNotFound, UnsupportedModel
from memdb.schemas.frames import Image

CARRIED = ("clip", "siglip", "siglip2")
_BATCH = 16  # pictures


class ImageText:
    """`name` says model and weights: vectors of two names are never compared."""

    reads_states = False  # a frame's vector comes of its picture

    def __init__(self, network: Any, tokenizer: Any, preprocessing: Mapping[str, Any], name: str) -> None:
        self._network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        kind = str(network.config.model_type)
        if kind not in CARRIED:
            raise UnsupportedModel(f"{name} is a {kind!r} model: index.encoder carries {', '.join(CARRIED)}")
        self._device: torch.device = network.device
        self._side = int(network.config.vision_config.image_size)
        self._crops = bool(preprocessing.get("do_center_crop", kind == "clip"))
        mean, std = (
            torch.tensor(preprocessing.get(which, [0.5] * 3), device=self._device).view(1, 3, 1, 1)
            for which in ("image_mean", "image_std")
        )
        self._mean, self._std = mean, std
        # SigLIP was trained on texts that are filled up to their full length, and looks at all of it.
        self._filled = kind != "clip"
        self._text_tokens = int(network.config.text_config.max_position_embeddings)
        self.name = f"{name}@{module_digest(self._network)}"

    @classmethod
    def load(cls, name: str, *, device: torch.device) -> ImageText:
        """By name or folder. Raises ModelNotFound, UnsupportedModel."""
        from transformers import AutoModel, AutoTokenizer

        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        folder = Path(name).expanduser()
        local = folder.is_dir()
        place = folder if local else _fetched(name, offline)
        try:
            with no_progress_bars():
                tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
                network = AutoModel.from_pretrained(
                    place, dtype=torch.float32, local_files_only=True, use_safetensors=True
                )
        except Exception as error:  # transformers raises what its parts raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ModelNotFound(
                f"index.encoder {name!r} cannot be loaded ({reason}): copy it again"
            ) from error
        stem = folder.name if local else name
        return cls(network.to(device), tokenizer, _preprocessing(place), stem)

    def of_seen(self, pictures: Sequence[Image]) -> Sequence[Tensor | None]:
        """What is known of frames before they are encoded: all of it, (E,) each."""
        return list(self.of_pictures(pictures))

    def of_encoded(self, seen: Sequence[Tensor | None], states: Sequence[Tensor]) -> list[Tensor]:
        """The vectors of frames, of which several may have become one since they were seen."""
        return [vector for vector in seen if vector is not None]

    @torch.inference_mode()
    def of_pictures(self, pictures: Sequence[Image]) -> Tensor:
        """(F, E) fp32."""
        found = []
        for start in range(0, len(pictures), _BATCH):
            stack = np.stack([self._prepared(one) for one in pictures[start : start + _BATCH]])
            pixels = torch.from_numpy(stack).to(self._device).permute(0, 3, 1, 2).float() / 255
            found.append(
                _vectors(self._network.get_image_features(pixel_values=(pixels - self._mean) / self._std))
            )
        return torch.cat(found)

    @torch.inference_mode()
    def of_text(self, text: str) -> Tensor:
        """(E,) fp32; what is longer than the model takes is cut at its end."""
        given = self._tokenizer(
            [text],
            padding="max_length" if self._filled else False,
            truncation=True,
            max_length=self._text_tokens,
            return_tensors="pt",
        )
        ids = {"input_ids": given["input_ids"].to(self._device)}
        if not self._filled:
            ids["attention_mask"] = given["attention_mask"].to(self._device)
        return _vectors(self._network.get_text_features(**ids))[0]

    def _prepared(self, image: Image) -> Image:
        from PIL import Image as Pictures

        picture, side = Pictures.fromarray(image), self._side
        if self._crops:
            width, height = picture.size
            scale = side / min(width, height)
            size = max(side, round(width * scale)), max(side, round(height * scale))
            left, top = (size[0] - side) // 2, (size[1] - side) // 2
            picture = picture.resize(size, Pictures.Resampling.BICUBIC)
            return np.asarray(picture.crop((left, top, left + side, top + side)))
        return np.asarray(picture.resize((side, side), Pictures.Resampling.BICUBIC))


def _vectors(found: Any) -> Tensor:
    """Of transformers 5, the projected vectors are an output's `pooler_output`; before, the result itself."""
    vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return vectors.float()


def _fetched(name: str, offline: bool) -> Path:
    """The local snapshot of a Hub repository. Raises ModelNotFound."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"], local_files_only=offline
        )
    except Exception as error:  # the Hub's errors have no common base across versions
        raise ModelNotFound(
            f"index.encoder {name!r} is neither a folder here nor to be had from the Hub: check the name and the "
            "network, name a folder that holds it, or use joint"
        ) from error
    return Path(found)


def _preprocessing(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
