"""The attention function that the language model calls, and the kernel under it.

transformers hands us unrotated queries, keys and values of the new tokens; the context (`memory=` in the call)
knows what else is remembered, where everything stands, and who may see what.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "memdb"


class Context(Protocol):
    """What a forward runs against: it holds keys and values layer by layer and answers for attention."""

    def begin(self, tokens: int) -> None: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (Hq, T, D), k and v (H, T, D) of the new tokens, unrotated -> attention output (Hq, T, D)."""
        ...

    def end(self, tokens: int) -> None: ...


def register() -> None:
    """Make `NAME` known to transformers, with no mask of its own: contexts mask by position."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, H, T, D)
    value: Tensor,  # (1, H, T, D)
    attention_mask: Tensor | None,
    *,
    scaling: float,
    memory: Context,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = memory.attend(layer, query[0], key[0], value[0], scaling)  # (Hq, T, D)
    return out.transpose(0, 1).unsqueeze(0), None  # (1, T, Hq, D)


class NoRotation(nn.Module):
    """Stands in for the model's rotary module: cosine 1 and sine 0, so that it rotates nothing."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*position_ids.shape[-2:], 1)
        return torch.ones(shape, dtype=x.dtype, device=x.device), torch.zeros(
            shape, dtype=x.dtype, device=x.device
        )


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """q (Hq, T, D), k and v (H, S, D), all rotated; mask (T, S) True where seen, None for all -> (Hq, T, D)."""
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=q.shape[0] != k.shape[0]
    )
    return out[0]


def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, sink_scores: Tensor, sink_v: Tensor
) -> Tensor:
    """Attention with one softmax over [sink | k], where the sink's scores are given.

    The init tokens stand at another distance from each query than their place says, so their scores come from
    another rotation. They enter as extra channels: each sink key is a unit vector there, each query carries its
    scores there. One fused kernel, one normaliser, no matrix of scores. In half precision a score takes two
    channels (its rounding and the rest), which keeps 16 bits of it.

    sink_scores (Hq, T, n) unscaled, fp32; sink_v (H, n, D); mask (T, S) for k; others as softmax_attention.
    """
    H, n, D = sink_v.shape
    T = q.shape[1]
    scores = [sink_scores.to(q.dtype)]
    if q.dtype != torch.float32:
        scores.append((sink_scores - scores[0].float()).to(q.dtype))
    extra = n * len(scores)
    width = -(-(D + extra) // 8) * 8  # fused kernels want multiples of 8
    units = torch.eye(n, dtype=q.dtype, device=q.device).repeat(1, len(scores))  # (n, extra)
    wide_q = F.pad(torch.cat((q, *scores), -1), (0, width - D - extra))  # (Hq, T, width)
    sink_k = F.pad(units, (D, width - D - extra)).expand(H, n, width)
    wide_k = torch.cat((sink_k, F.pad(k, (0, width - D))), 1)  # (H, n + S, width)
    wide_v = F.pad(torch.cat((sink_v, v), 1), (0, width - D))
    wide_mask = torch.cat((mask.new_ones(T, n), mask), 1)
    return softmax_attention(wide_q, wide_k, wide_v, scale, wide_mask)[..., :D]


def ceiling_scores(
    q_near: Tensor, near: Tensor | None, q_far: Tensor, sink_k: Tensor, sink_k_near: Tensor
) -> Tensor:
    """Unscaled scores (Hq, T, n) of queries against init tokens whose distance never exceeds W - 1.

    Where `near` (T, n; None: nowhere) the true distance is below W: q_near (Hq, T, D), rotated to its own place, meets
    sink_k_near (H, n, D), rotated to theirs. Elsewhere q_far, rotated to W - 1, meets sink_k at rest.
    LM-Infinite's ceiling as ReKV uses it (arXiv 2503.00540), decided per query, so that chunks do not matter.
    """
    group = q_far.shape[0] // sink_k.shape[0]
    far = torch.einsum("htd,hnd->htn", q_far.float(), sink_k.float().repeat_interleave(group, 0))
    if near is None:
        return far
    close = torch.einsum("htd,hnd->htn", q_near.float(), sink_k_near.float().repeat_interleave(group, 0))
    return torch.where(near, close, far)
