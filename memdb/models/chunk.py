"""The context of encoding against a compressed memory: [init | memory | chunk | probe], one forward.

InfiniPot-V (arXiv 2506.15745), StreamMem (arXiv 2508.15717) and LiveVLM (arXiv 2505.15269) encode a chunk of new
frames while all that the memory still holds is in view. Every token stands at its original stream position, which
grows; angles come from integers in fp64, so that hour ten is as exact as the first minute. Where a token has three ids
they follow from that position (see `Placing.at`), so that nothing needs to be kept beside it.

The alternative (ours) closes the gaps that dropped tokens left, so that no token stands further off than the memory is
large: for models that were trained on contexts much shorter than a stream. See `closed_up`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memdb.models.attention import softmax_attention
from memdb.models.places import LINE, Placing, closed_up
from memdb.models.rotary import Rotary, turn
from memdb.models.window import LayerKV
from memdb.retain.attention import importance


class ChunkContext:
    """New tokens at the positions from `start` on, causal among themselves, over everything that is remembered.

    `chunk_tokens` of them are the chunk; what follows is probe text, of which nothing stays (R19). `probe`: the rows
    of the forward whose attention over [init | memory | chunk] is wanted. Only those rows are computed, beside fused
    attention, in fp32. `frame_tokens`: of each frame of the stream, for a `placing` that counts them. `consecutive`:
    without the gaps in `positions`, each layer as long as what it holds.

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
        frame_tokens: int,
        probe: range | None = None,
        placing: Placing = LINE,
        consecutive: bool = False,
    ) -> None:
        self._rotary, self._init, self._memory, self._positions = rotary, init, memory, positions
        self._start, self._chunk, self._probe = start, chunk_tokens, probe
        self._frame_tokens, self._placing, self._consecutive = frame_tokens, placing, consecutive
        self.fresh: list[LayerKV] = []
        self.heard: list[Tensor] = []

    def begin(self, tokens: int) -> None:
        self.fresh, self.heard = [], []
        if not self._consecutive:
            own, top = self._chunk_ids(self._start, tokens)
            self._ids = [(own, self._at(positions), top) for positions in self._positions]
            return
        self._ids = []
        for positions in self._positions:
            closed, start = closed_up(self._placing, self._init[0].tokens, positions, self._frame_tokens)
            own, top = self._chunk_ids(start, tokens)
            self._ids.append((own, self._at(closed), top))

    def _chunk_ids(self, start: int, tokens: int) -> tuple[Tensor, int]:
        """Ids (T,) or (3, T) of the chunk from `start` on and of the text behind it, and one past the largest."""
        ids = self._at(torch.arange(start, start + self._chunk))
        above = int(ids.max()) + 1  # text has one id on all axes, behind everything so far
        top = above + tokens - self._chunk
        text = torch.arange(above, top)
        return torch.cat((ids, text.expand(*ids.shape[:-1], len(text))), -1).to(self._init[0].k.device), top

    def _at(self, positions: Tensor) -> Tensor:
        """Ids (T,) or (3, T) of tokens of the stream."""
        return self._placing.at(self._init[0].tokens, positions, self._frame_tokens)

    def end(self, tokens: int) -> None:
        pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        T, C = q.shape[1], self._chunk
        init, memory = self._init[layer], self._memory[layer]
        own, remembered, top = self._ids[layer]
        turns = self._rotary.rows(own, top)
        q, new_k, old_k = turn(q, *turns), turn(k, *turns), memory.k
        if memory.tokens:
            old_k = self._rotary.rotate_at(old_k, remembered, top)
        init_k = self._rotary.rotate(init.k, 0) if init.tokens else init.k
        keys = torch.cat((init_k, old_k, new_k), 1)  # (H, n + M + T, D)
        past = init.tokens + memory.tokens
        mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
        self.fresh.append(LayerKV(k[:, :C], v[:, :C]))
        if self._probe is not None:
            rows = slice(self._probe.start, self._probe.stop)
            paid = importance(q[:, rows], keys[:, : past + C], scale, mask[rows, past : past + C])
            self.heard.append(paid[init.tokens :])
        return softmax_attention(q, keys, torch.cat((init.v, memory.v, v), 1), scale, mask)
