"""LLaVA-OneVision (SigLIP + Qwen2) behind the protocol, from a Hub id, a folder or a random model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.models import attention
from memdb.models.attention import Context, NoRotation
from memdb.models.protocol import Pixels
from memdb.models.rotary import Rotary
from memdb.models.saliency import Listener
from memdb.models.sheet import PLAIN, ModelSheet
from memdb.schemas.errors import UnsupportedModel
from memdb.schemas.fingerprint import ModelIdentity, ModelShape, digest_of
from memdb.schemas.frames import Image

# Frames that pass the vision tower at once: it keeps every layer's states, 27 of them at 384 pixels.
VISION_BATCH = 16
# Language models whose attention is plain softmax over half-split RoPE, each held against transformers' own forward.
_LANGUAGE_MODELS = ("qwen2", "qwen3", "llama")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length seen so far


class LlavaOnevision:
    """A transformers LlavaOnevisionForConditionalGeneration, its tokenizer and its frame preprocessing."""

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
        self.sheet = sheet
        self._network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._language = network.model.language_model
        self.device: torch.device = network.device
        self.dtype: torch.dtype = network.dtype
        text = network.config.text_config
        _check_layers(text)
        rope = text.rope_parameters
        own = self._language.rotary_emb
        self.rotary = Rotary(own.inv_freq.float(), float(own.attention_scaling))
        self._side = network.config.vision_config.image_size // network.config.vision_config.patch_size
        self._size = int(network.config.vision_config.image_size)
        self._mean = torch.tensor(preprocessing["image_mean"], device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing["image_std"], device=self.device).view(1, 3, 1, 1)
        shape = ModelShape(
            layers=int(text.num_hidden_layers),
            query_heads=int(text.num_attention_heads),
            kv_heads=int(text.num_key_value_heads),
            head_size=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
            embedding_size=int(text.hidden_size),
            frame_tokens=(-(-self._side // 2)) ** 2,
            context_tokens_max=int(text.max_position_embeddings),
        )
        fingerprint = digest_of(
            {
                "family": "llava_onevision",
                "weights": weights,
                "tokenizer": _tokenizer_digest(tokenizer),
                "preprocessing": {**preprocessing, "size": self._size, "resize": "pillow-bicubic"},
                "rope": {str(key): value for key, value in rope.items()},
            }
        )
        self.identity = ModelIdentity(spec, fingerprint, shape)
        attention.register()
        self._language.set_attn_implementation(attention.NAME)
        self._language.rotary_emb = NoRotation()
        self._stop_ids = _stop_ids(network, tokenizer)

    @property
    def shape(self) -> ModelShape:
        return self.identity.shape

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._stop_ids

    def prepare(self, image: Image) -> Pixels:
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

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        table = self._network.get_input_embeddings()
        out: Tensor = table(torch.tensor(list(ids), dtype=torch.long, device=self.device))
        return out

    @torch.inference_mode()
    def forward(self, embeddings: Tensor, context: Context) -> Tensor:
        T = embeddings.shape[0]
        context.begin(T)
        states: Tensor = self._language(
            inputs_embeds=embeddings[None].to(self.dtype),
            position_ids=torch.zeros(1, T, dtype=torch.long, device=self.device),
            use_cache=False,
            memory=context,
        ).last_hidden_state[0]
        context.end(T)
        return states

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        scores: Tensor = self._network.lm_head(states)
        return scores.float()

    def encode_text(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode_text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def init_ids(self, prompt: str) -> list[int]:
        ids = self.encode_text(f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n")
        return ids or [min(self._stop_ids, default=0)]  # the window needs a token to rest on

    def prompt_ids(self, text: str) -> list[int]:
        return self.encode_text(f"\n{text}<|im_end|>\n<|im_start|>assistant\n")


def _check_layers(text: Any) -> None:
    """Refuse language models whose layers do not all keep a key and value per token."""
    if text.model_type not in _LANGUAGE_MODELS:
        raise UnsupportedModel(
            f"this checkpoint's language model is {text.model_type!r}; memdb carries {', '.join(_LANGUAGE_MODELS)}"
        )
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModel(
            f"this checkpoint's language model has {', '.join(sorted(kinds))} layers; memdb needs full attention "
            "with keys and values for every token in every layer"
        )
    kind = text.rope_parameters.get("rope_type", "default")
    if kind not in _FIXED_ROPE:
        raise UnsupportedModel(
            f"this checkpoint's rotary embedding is {kind!r}, whose angles change with the length; memdb keeps "
            f"keys without positions and carries {', '.join(_FIXED_ROPE)}"
        )


def _tokenizer_digest(tokenizer: Any) -> str:
    return digest_of({"tokenizer": tokenizer.backend_tokenizer.to_str()})


def _stop_ids(network: Any, tokenizer: Any) -> frozenset[int]:
    """End of sequence as generation config and tokenizer name it, and the end of a chat turn."""
    eos = getattr(network.generation_config, "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [eos])
    ids.add(tokenizer.eos_token_id)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if turn != tokenizer.unk_token_id:
        ids.add(turn)
    return frozenset(int(token) for token in ids if token is not None)
