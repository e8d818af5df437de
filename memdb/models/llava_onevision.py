"""LLaVA-OneVision (SigLIP + Qwen2) behind the protocol, from a Hub id, a folder or a random model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.models.chat_model import ChatModel, check_layers, text_shape, tokenizer_digest
from memdb.models.places import LINE, Placing
from memdb.models.protocol import Pixels
from memdb.models.saliency import Listener
from memdb.models.sheet import PLAIN, ModelSheet
from memdb.schemas.errors import UnsupportedModel
from memdb.schemas.fingerprint import ModelIdentity, digest_of
from memdb.schemas.frames import Image

# Frames that pass the vision tower at once: it keeps every layer's states, 27 of them at 384 pixels.
VISION_BATCH = 16
# Language models whose attention is plain softmax over half-split RoPE, each held against transformers' own forward.
_LANGUAGE_MODELS = ("qwen2", "qwen3", "llama")


class LlavaOnevision(ChatModel):
    """A transformers LlavaOnevisionForConditionalGeneration, its tokenizer and its frame preprocessing."""

    YARN_FACTOR: ClassVar[float] = 8.0

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        preprocessing: dict[str, Any],
        spec: str,
        weights: str,
        sheet: ModelSheet = PLAIN,
    ) -> None:
        """`preprocessing` is the checkpoint's own (size, mean, std); `weights` the digest of its weights."""
        text = network.config.text_config
        check_layers(text, _LANGUAGE_MODELS)
        super().__init__(network, tokenizer, sheet)
        vision = network.config.vision_config
        self._side = vision.image_size // vision.patch_size
        self._size = int(vision.image_size)
        self._mean = torch.tensor(preprocessing["image_mean"], device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing["image_std"], device=self.device).view(1, 3, 1, 1)
        fingerprint = digest_of(
            {
                "family": "llava_onevision",
                "weights": weights,
                "tokenizer": tokenizer_digest(tokenizer),
                "preprocessing": {**preprocessing, "size": self._size, "resize": "pillow-bicubic"},
                "rope": {str(key): value for key, value in text.rope_parameters.items()},
            }
        )
        self.identity = ModelIdentity(spec, fingerprint, text_shape(text, (-(-self._side // 2)) ** 2))

    @property
    def frames_together(self) -> int:
        return 1

    def frame_grid(self, height: int, width: int) -> None:
        """Every frame is a square of the same size."""

    def placing(self, sample_fps: float, grid: tuple[int, int] | None) -> Placing:
        return LINE

    def prepare(self, image: Image, grid: tuple[int, int] | None = None) -> Pixels:
        from PIL import Image as Pictures

        picture = Pictures.fromarray(image)
        if picture.size != (self._size, self._size):
            picture = picture.resize((self._size, self._size), Pictures.Resampling.BICUBIC)
        return np.asarray(picture)

    @torch.inference_mode()
    def visual_tokens(self, pixels: Sequence[Pixels]) -> Tensor:
        parts = [
            self._see(np.stack(pixels[start : start + VISION_BATCH]))
            for start in range(0, len(pixels), VISION_BATCH)
        ]
        return torch.cat(parts)  # (F, N, E)

    @torch.inference_mode()
    def salient_tokens(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        tokens, saliency = [], []
        looking = self._last_kept_attention()
        for start in range(0, len(pixels), VISION_BATCH):
            listener = Listener()
            with listener.on(looking):
                tokens.append(self._see(np.stack(pixels[start : start + VISION_BATCH])))
            means = listener.column_means(looking)  # (F, P)
            if self._network.config.vision_feature_select_strategy == "default":
                means = means[:, 1:]
            saliency.append(self._pool(means[..., None])[..., 0])
        return torch.cat(tokens), torch.cat(saliency)  # (F, N, E), (F, N)

    def _last_kept_attention(self) -> Any:
        """The attention of the last vision layer whose output is used; of the first where the embeddings are."""
        tower = self._network.model.vision_tower
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        if layers is None or not hasattr(layers[0].self_attn, "q_proj"):
            raise UnsupportedModel(
                f"memdb cannot look into a vision tower of type {type(tower).__name__}: set reduce = 'identity'"
            )
        chosen = self._network.config.vision_feature_layer
        states = [chosen] if isinstance(chosen, int) else chosen
        # hidden state 0 is the embeddings, and state i what layer i - 1 gives
        last = max(index if index >= 0 else index + len(layers) + 1 for index in states)
        return layers[max(0, last - 1)].self_attn

    def _see(self, pixels: Pixels) -> Tensor:
        model, config = self._network.model, self._network.config
        frames = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float()  # (F, 3, S, S)
        frames = ((frames / 255.0 - self._mean) / self._std).to(self.dtype)
        states = model.vision_tower(frames, output_hidden_states=True).hidden_states
        chosen = config.vision_feature_layer
        if isinstance(chosen, int):
            features = states[chosen]
        else:
            features = torch.cat([states[index] for index in chosen], -1)
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        return self._pool(model.multi_modal_projector(features))

    def _pool(self, features: Tensor) -> Tensor:
        """Bilinear pooling (F, side * side, E) -> (F, N, E) on channels-last memory: no transposed copy."""
        count, _, E = features.shape
        half = -(-self._side // 2)
        grid = features.view(count, self._side, self._side, E).permute(0, 3, 1, 2)  # channels-last, no copy
        pooled = F.interpolate(grid, size=(half, half), mode="bilinear")
        return pooled.permute(0, 2, 3, 1).reshape(count, half * half, E)

    def frame_separator(self) -> Tensor:
        newline: Tensor = self._network.model.image_newline
        return newline[None].to(self.dtype)

    def init_ids(self, prompt: str) -> list[int]:
        ids = self.encode_text(f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n")
        return ids or [min(self._stop_ids, default=0)]  # the window needs a token to rest on

    def prompt_ids(self, text: str) -> list[int]:
        return self.encode_text(f"\n{text}<|im_end|>\n<|im_start|>assistant\n")
