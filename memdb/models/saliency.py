"""How much each patch of a frame is looked at in one layer of a vision tower, beside fused attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memdb.models.rotary import turn

ROWS_AT_ONCE = 64  # queries whose rows of probabilities are in memory together


def column_means(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention probabilities on each key, averaged over heads and queries: q, k (F, heads, P, D) -> (F, P) fp32.

    In fp32 and in steps of a few query rows: the matrix (F, heads, P, P) never exists as a whole.
    """
    F, heads, P, _ = q.shape
    keys = k.float().transpose(2, 3)  # (F, heads, D, P)
    total = torch.zeros(F, P, dtype=torch.float32, device=q.device)
    for start in range(0, P, ROWS_AT_ONCE):
        rows = q[:, :, start : start + ROWS_AT_ONCE].float() @ keys  # (F, heads, rows, P)
        total += (rows * scale).softmax(-1).sum((1, 2))
    return total / (heads * P)


class Listener:
    """Takes down what one attention module makes of its input: queries and keys, (F, P, heads * D)."""

    def __init__(self) -> None:
        self._heard: dict[str, Tensor] = {}

    @contextmanager
    def on(self, module: Any) -> Iterator[None]:
        """Listens while the block runs; afterwards the module is as it was."""
        handles = [
            part.register_forward_hook(lambda _module, _inputs, output, name=name: self._hear(name, output))
            for name, part in (("q", module.q_proj), ("k", module.k_proj))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, name: str, output: Tensor) -> None:
        self._heard[name] = output

    def column_means(self, module: Any) -> Tensor:
        """(F, P): see above."""
        size = int(module.head_dim)
        F, P, _ = self._heard["q"].shape
        q, k = (self._heard[name].view(F, P, -1, size).transpose(1, 2) for name in ("q", "k"))
        return column_means(q, k, float(module.scale))


class PackedListener:
    """The same of an attention module that takes many frames as one sequence, each a run of its own or several
    windows, and turns queries and keys by their places (Qwen2.5-VL). One part gives queries, keys and values.
    """

    def __init__(self) -> None:
        self._packed = self._cos = self._sin = torch.empty(0)
        self._lengths: list[int] = []

    @contextmanager
    def on(self, module: Any) -> Iterator[None]:
        """Listens while the block runs; afterwards the module is as it was."""
        handles = [
            module.register_forward_pre_hook(self._place, with_kwargs=True),
            module.qkv.register_forward_hook(self._hear),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _place(self, _module: Any, _inputs: Any, given: dict[str, Any]) -> None:
        self._lengths = given["cu_seqlens"].diff().tolist()
        self._cos, self._sin = given["position_embeddings"]  # (T, D) each

    def _hear(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._packed = output  # (T, 3 * heads * D)

    def column_means(self, module: Any, patches: int) -> Tensor:
        """(T,) over the queries of a frame of so many patches; those of other windows pay a patch nothing."""
        T, heads = len(self._packed), int(module.num_heads)
        q, k, _ = self._packed.view(T, 3, heads, -1).permute(1, 2, 0, 3)  # (heads, T, D) each
        turned = (torch.split(turn(part, self._cos, self._sin), self._lengths, 1) for part in (q, k))
        means = [
            column_means(own_q[None], own_k[None], float(module.scaling))[0] * (own_q.shape[1] / patches)
            for own_q, own_k in zip(*turned, strict=True)
        ]
        return torch.cat(means)
