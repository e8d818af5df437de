"""The model under training, in batches: transformers' own modules, attending over the memory that the store rebuilds.

Keys and values of frames are computed once a step, in streams under a sliding window, without rotation. Captions,
searches and answers then read any selection of them, a set of their own in each layer, at consecutive places with
times as text between them: what `memdb.query` does with one question, for many at once and with gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from memdb.models.random_llava import random_config
from memdb.models.world_words import world_tokenizer
from tools.train.facts import PLACED, SHOWN, TOLD, Noter, Teller

JOINT = 128  # size of the space of clips and questions
CONFIG: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 128,  # 8 x 8 patches, pooled to N = 16 tokens a frame
        "patch_size": 16,
    },
    "text_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.02,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,  # half of the channels still tell content at a thousand tokens
    },
}


@dataclass
class Stored:
    """Unrotated keys and values of all frames, a layer each: (N, tokens, H, D); of the init tokens: (n, H, D)."""

    k: list[Tensor]
    v: list[Tensor]
    init_k: list[Tensor]
    init_v: list[Tensor]
    last: Tensor  # (N, tokens, E): final states of the frames
    seen: Tensor  # (N, tokens, E): the visual tokens


@dataclass
class Memory:
    """What rows read in one layer: frames (R, U), where each begins (R, U), and which tokens count (R, U, tokens)."""

    frames: Tensor
    begin: Tensor
    held: Tensor


@dataclass
class Look:
    """How well tokens of each row attend to what they should, in the layers that are asked.

    tokens (R, K): their indices. wanted: of each token, in the order of the keys, the init tokens (R, K), frames
    (R, K, U) and words (R, K, T). Heads of the first KV head are to look there; the others look where they like.
    `state`: what the text is behind the layer that notes it.
    """

    tokens: Tensor
    init: Tensor
    frames: Tensor
    words: Tensor
    losses: list[Tensor] = field(default_factory=list)  # (R, K) each, 0 where nothing is wanted or held
    state: Tensor | None = None  # (R, T, E)

    def note(self, q: Tensor, k: Tensor, mask: Tensor, init: int, memory: Memory, scale: float) -> None:
        R, Hq, _, D = q.shape
        K = self.tokens.shape[1]
        at = self.tokens[:, None, :, None].expand(-1, Hq // k.shape[1], -1, D)
        own = q[:, : Hq // k.shape[1]].gather(2, at)  # (R, Hq / H, K, D)
        scores = torch.einsum("rhkd,rsd->rhks", own, k[:, 0]).float() * scale
        seen = mask[:, 0].gather(1, self.tokens[..., None].expand(-1, -1, mask.shape[-1]))  # (R, K, S)
        frames = (memory.held[:, None] & self.frames[..., None]).flatten(2)  # (R, K, U * t)
        wanted = torch.cat((self.init[..., None].expand(R, K, init), frames, self.words), 2) & seen
        inside = scores.masked_fill(~wanted[:, None], -1e4).logsumexp(-1)
        lost = (scores.masked_fill(~seen[:, None], -1e4).logsumexp(-1) - inside).clamp(0, 20).mean(1)
        self.losses.append(lost * wanted.any(-1))


class Gather(torch.autograd.Function):
    """Rows of a matrix by index; frames are read by many questions, so gradients are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        total = torch.zeros(ctx.count, grad.shape[1], device=grad.device)
        return total.index_add_(0, index, grad.float()).to(grad.dtype), None


class Network(nn.Module):
    """A LLaVA-OneVision and the joint head. `hf` is what is saved as the model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        tokenizer = world_tokenizer()
        self.hf = _with_tokenizer(CONFIG, tokenizer, seed)
        self.tokenizer = tokenizer
        text = self.hf.config.text_config
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.size = text.hidden_size // self.heads
        self.scale = self.size**-0.5
        side = self.hf.config.vision_config.image_size // self.hf.config.vision_config.patch_size
        self.side, self.tokens = side, ((side + 1) // 2) ** 2
        self.language = self.hf.model.language_model
        self.layers = self.language.layers
        width = text.hidden_size
        self.joint_clip = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, JOINT))
        self.joint_text = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, JOINT))
        self.tell_seen = Teller(width, [*SHOWN.values(), PLACED])
        self.tell_last = Teller(width, [*SHOWN.values(), *map(len, TOLD.values())])
        self.tell_text = Noter(width)
        self.sharp = nn.Parameter(torch.zeros(len(self.layers) + 1))  # log of the contrastive scales
        half = torch.arange(0, self.size, 2, dtype=torch.float64) / self.size
        self.inv_freq = (text.rope_parameters["rope_theta"] ** -half).float()  # no buffer: it stays fp32

    def tower_layers(self) -> list[Any]:
        """The vision tower's layers, wherever a version of transformers keeps them."""
        return [m for m in self.hf.model.vision_tower.modules() if hasattr(m, "layer_norm2")]

    def see(self, pictures: Tensor) -> Tensor:
        """(F, 3, S, S), 0 to 1 -> visual tokens (F, N, E), as the adapter makes them."""
        model = self.hf.model
        states = model.vision_tower((pictures - 0.5) / 0.5, output_hidden_states=True).hidden_states
        features = model.multi_modal_projector(states[self.hf.config.vision_feature_layer])
        count, _, E = features.shape
        half = (self.side + 1) // 2
        if self.side % 2 == 0:  # bilinear to half the size is the mean over 2 x 2
            grid = features.view(count, half, 2, half, 2, E)
            return grid.mean((2, 4)).reshape(count, half * half, E)
        grid = features.view(count, self.side, self.side, E).permute(0, 3, 1, 2)
        pooled = F.interpolate(grid, size=(half, half), mode="bilinear")
        return pooled.permute(0, 2, 3, 1).reshape(count, half * half, E)

    def embed(self, ids: Tensor) -> Tensor:
        table = self.language.embed_tokens.weight
        rows: Tensor = Gather.apply(table, ids.flatten())
        return rows.view(*ids.shape, table.shape[1])

    def turn(self, x: Tensor, place: Tensor) -> Tensor:
        """x (R, h, T, D) rotated to places (R, T) or (T,)."""
        angles = place[..., None].float() * self.inv_freq  # (R, T, D/2)
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        if cos.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    def project(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R, T, E) -> unrotated q (R, Hq, T, D), k and v (R, H, T, D)."""
        R, T, _ = x.shape
        own, h = layer.self_attn, layer.input_layernorm(x)
        q = own.q_proj(h).view(R, T, self.heads, self.size).transpose(1, 2)
        k = own.k_proj(h).view(R, T, self.kv_heads, self.size).transpose(1, 2)
        v = own.v_proj(h).view(R, T, self.kv_heads, self.size).transpose(1, 2)
        return q, k, v

    def close(self, layer: Any, x: Tensor, heard: Tensor) -> Tensor:
        """Attention output (R, Hq, T, D) back into the stream, and the layer's second half."""
        R, T, _ = x.shape
        x = x + layer.self_attn.o_proj(heard.transpose(1, 2).reshape(R, T, -1))
        out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q (R, Hq, T, D), k and v (R, H, S, D), rotated; mask (R or 1, 1, T, S), True where seen."""
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        spare = -k.shape[2] % 8  # the fused kernel wants masks of a multiple of 8
        if spare:
            k, v, mask = F.pad(k, (0, 0, 0, spare)), F.pad(v, (0, 0, 0, spare)), F.pad(mask, (0, spare))
        mask = mask.expand(q.shape[0], 1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)

    def stream(self, seen: Tensor, init_ids: Tensor, row: int, window: Tensor) -> Stored:
        """Encode frames (N, tokens, E) in streams of `row` frames, each behind the init tokens.

        window (N / row,): tokens that a query sees before it, init tokens always among them.
        """
        N, t, E = seen.shape
        R, n = N // row, len(init_ids)
        x = torch.cat(
            (self.embed(init_ids)[None].expand(R, -1, -1).to(seen.dtype), seen.view(R, row * t, E)), 1
        )
        place = torch.arange(x.shape[1], device=x.device)
        gap = place[:, None] - place[None]
        near = (gap[None] < window[:, None, None]) | (place < n)[None, None]
        mask = ((gap >= 0)[None] & near)[:, None]
        ks, vs, init_k, init_v = [], [], [], []
        for layer in self.layers:
            q, k, v = self.project(layer, x)
            init_k.append(k[0, :, :n].transpose(0, 1))
            init_v.append(v[0, :, :n].transpose(0, 1))
            ks.append(k[:, :, n:].transpose(1, 2).reshape(N, t, self.kv_heads, self.size))
            vs.append(v[:, :, n:].transpose(1, 2).reshape(N, t, self.kv_heads, self.size))
            x = self.close(layer, x, self.attend(self.turn(q, place), self.turn(k, place), v, mask))
        last = self.language.norm(x)[:, n:].reshape(N, t, E)
        return Stored(ks, vs, init_k, init_v, last, seen)

    def layer_over(
        self,
        at: int,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stored: Stored,
        memory: Memory | None,
        place: Tensor,
        real: Tensor,
        look: Look | None = None,
    ) -> Tensor:
        """One layer of text rows x (R, T, E) at `place` (R, T), over [init | memory | the text itself].

        `look` notes how much of one token's attention falls on the frames that it should fall on.
        """
        R, T = place.shape
        n = len(stored.init_k[at])
        head = torch.arange(n, device=x.device)
        keys = [self.turn(stored.init_k[at].transpose(0, 1)[None], head).expand(R, -1, -1, -1)]
        values = [stored.init_v[at].transpose(0, 1)[None].expand(R, -1, -1, -1)]
        masks = [torch.ones(R, T, n, dtype=torch.bool, device=x.device)]
        if memory is not None:
            U, t = memory.frames.shape[1], self.tokens
            where = (memory.begin[..., None] + torch.arange(t, device=x.device)).flatten(1)  # (R, U * t)
            block_k, block_v = (
                Gather.apply(part.flatten(1), memory.frames.flatten())
                .view(R, U * t, self.kv_heads, self.size)
                .transpose(1, 2)  # (R, H, U * t, D)
                for part in (stored.k[at], stored.v[at])
            )
            keys.append(self.turn(block_k, where))
            values.append(block_v)
            masks.append(memory.held.flatten(1)[:, None] & (where[:, None] <= place[:, :, None]))
        keys.append(self.turn(k, place))
        values.append(v)
        masks.append(real[:, None] & (place[:, None] <= place[:, :, None]))
        mask = torch.cat(masks, 2)[:, None]
        kk = torch.cat([key.to(q.dtype) for key in keys], 2)
        vv = torch.cat([value.to(q.dtype) for value in values], 2)
        qq = self.turn(q, place)
        if look is not None and memory is not None:
            look.note(qq, kk, mask, n, memory, self.scale)
        return self.close(self.layers[at], x, self.attend(qq, kk, vv, mask))

    def logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.hf.lm_head(self.language.norm(x))
        return out


def _with_tokenizer(config: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    composed = random_config(config, tokenizer=tokenizer)
    torch.manual_seed(seed)
    network = LlavaOnevisionForConditionalGeneration._from_config(
        composed, attn_implementation="sdpa", dtype=torch.float32
    )
    _calm(network.model.vision_tower)
    return network


def _calm(tower: nn.Module) -> None:
    """Small weights in the vision tower's layers, so that a patch is itself at first.

    As transformers draws them, each layer adds the mean of the picture to every patch: behind six layers the patches
    of a frame differ by a tenth of what frames differ, and a model learned the places and nothing else (RESULTS.md).
    """
    depth = sum(name.endswith("out_proj.weight") for name, _ in tower.named_parameters())
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.normal_(0, 0.02 / (2 * depth) ** 0.5)
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")):
                parameter.normal_(0, 0.02)
            elif "position_embedding" in name:
                parameter.normal_(0, 0.2)
