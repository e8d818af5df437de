"""The context of encoding against a compressed memory: [init | memory | chunk | probe], one forward.

InfiniPot-V (arXiv 2506.15745), StreamMem (arXiv 2508.15717) and LiveVLM (arXiv 2505.15269) encode a chunk of new
frames while all that the memory still holds is in view. Every token stands at its original stream position, which
grows; angles come from integers in fp64, so that hour ten is as exact as the first minute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memdb.models.attention import softmax_attention
from memdb.models.rotary import Rotary
from memdb.models.window import LayerKV
from memdb.retain.attention import importance


class ChunkContext:
    """New tokens at the positions from `start` on, causal among themselves, over everything that is remembered.

    `chunk_tokens` of them are the chunk; what follows is probe text, of which nothing stays (R19). `probe`: the rows
    of the forward whose attention over [init | memory | chunk] is wanted. Only those rows are computed, beside fused
    attention, in fp32.

    After the forward: `fresh`, the chunk's keys and values, unrotated; `heard`, a layer each (M + C,): what the rows
    paid to memory and chunk, see `importance`. The softmax saw the init tokens, too.
    """

    def __init__(
        self,
        rotary: Rotary,
        init: Sequence[LayerKV],
        memory: Sequence[LayerKV],
        positions: Sequence[Tensor],
        *,
        start: int,
        chunk_tokens: int,
        probe: range | None = None,
    ) -> None:
        self._rotary, self._init, self._memory, self._positions = rotary, init, memory, positions
        self._start, self._chunk, self._probe = start, chunk_tokens, probe
        self.fresh: list[LayerKV] = []
        self.heard: list[Tensor] = []

    def begin(self, tokens: int) -> None:
        self.fresh, self.heard = [], []

    def end(self, tokens: int) -> None:
        pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        T, C, top = q.shape[1], self._chunk, self._start + q.shape[1]
        init, memory = self._init[layer], self._memory[layer]
        own = torch.arange(self._start, top, device=q.device)
        q = self._rotary.rotate_at(q, own, top)
        new_k = self._rotary.rotate_at(k, own, top)
        old_k = self._rotary.rotate_at(memory.k, self._positions[layer], top) if memory.tokens else memory.k
        init_k = self._rotary.rotate(init.k, 0) if init.tokens else init.k
        keys = torch.cat((init_k, old_k, new_k), 1)  # (H, n + M + T, D)
        past = init.tokens + memory.tokens
        mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
        self.fresh.append(LayerKV(k[:, :C], v[:, :C]))
        if self._probe is not None:
            rows = slice(self._probe.start, self._probe.stop)
            paid = importance(q[:, rows], keys[:, : past + C], scale, mask[rows, : past + C])
            self.heard.append(paid[init.tokens :])
        return softmax_attention(q, keys, torch.cat((init.v, memory.v, v), 1), scale, mask)
