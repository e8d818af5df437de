"""What Video-LLMs of transformers share: the language model against a context of ours, and ChatML text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from memdb.models import attention
from memdb.models.attention import Context, NoRotation
from memdb.models.joint import JointHead
from memdb.models.rotary import Rotary
from memdb.models.sheet import PLAIN, ModelSheet
from memdb.models.yarn import is_default
from memdb.schemas.errors import UnsupportedModel
from memdb.schemas.fingerprint import ModelIdentity, ModelShape, digest_of

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length seen so far


class ChatModel:
    """The half of a family's class that does not see: a family adds how frames become tokens.

    Position ids are 0 for every token and on every axis, so that what a model keeps of earlier sequences
    (Qwen2.5-VL's `rope_deltas`) is never looked at.
    """

    identity: ModelIdentity
    # StreamMem's figure for the family (2508.15717), where a checkpoint brings no scaling of its own.
    YARN_FACTOR: ClassVar[float] = 1.0
    joint: JointHead | None = None

    def __init__(
        self, network: Any, tokenizer: Any, sheet: ModelSheet = PLAIN, sections: Sequence[int] = ()
    ) -> None:
        self.sheet = sheet
        self._network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._language = network.model.language_model
        self.device: torch.device = network.device
        self.dtype: torch.dtype = network.dtype
        own = self._language.rotary_emb
        self.rotary = Rotary(own.inv_freq.float(), float(own.attention_scaling), sections)
        attention.register()
        self._language.set_attn_implementation(attention.NAME)
        self._language.rotary_emb = NoRotation()
        self._stop_ids = _stop_ids(network, tokenizer)

    @property
    def shape(self) -> ModelShape:
        return self.identity.shape

    @property
    def yarn_factor(self) -> float:
        return self.YARN_FACTOR if is_default(self.rotary) else 1.0

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._stop_ids

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


def text_shape(text: Any, frame_tokens: int) -> ModelShape:
    """The sizes of a language model's configuration, and the visual tokens of a frame."""
    return ModelShape(
        layers=int(text.num_hidden_layers),
        query_heads=int(text.num_attention_heads),
        kv_heads=int(text.num_key_value_heads),
        head_size=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        embedding_size=int(text.hidden_size),
        frame_tokens=frame_tokens,
        context_tokens_max=int(text.max_position_embeddings),
    )


def check_layers(text: Any, carried: Sequence[str]) -> None:
    """Refuse language models whose layers do not all keep a key and value per token."""
    if text.model_type not in carried:
        raise UnsupportedModel(
            f"this checkpoint's language model is {text.model_type!r}; memdb carries {', '.join(carried)}"
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


def tokenizer_digest(tokenizer: Any) -> str:
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
