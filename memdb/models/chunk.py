"""The context of encoding against a compressed memory: [init | memory | chunk | probe], one forward.

InfiniPot-V (arXiv 2506.15745), StreamMem (arXiv 2508.15717) and LiveVLM (arXiv 2505.15269) encode a chunk of new
frames while all that the memory still holds is in view. Every token stands at its original stream position, which
grows; angles come from integers in fp64, so that hour ten is as exact as the first minute. Where a token has three ids
they follow from that position (see `Placing.at`), so that nothing needs to be kept beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memdb.models.attention import softmax_attention
from memdb.models.places import LINE, Placing
from memdb.models.rotary import Rotary, turn
from memdb.models.window import LayerKV
from memdb.retain.attention import Listener


class ChunkContext:
    """New tokens at the positions from `start` on, causal among themselves, over everything that is remembered.

    `chunk_tokens` of them are the chunk; what follows is probe text, of which nothing stays (R19). `probe`: the rows
    of the forward whose attention over [init | memory | chunk] is wanted. Only those rows are computed, beside fused
    attention, in fp32. `frame_tokens`: of each frame of the stream, for a `placing` that counts them.

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
    ) -> None:
        self._rotary, self._init, self._memory, self._positions = rotary, init, memory, positions
        self._start, self._chunk, self._probe = start, chunk_tokens, probe
        self._frame_tokens, self._placing = frame_tokens, placing
        self.fresh: list[LayerKV] = []
        self.heard: list[Tensor] = []

    def begin(self, tokens: int) -> None:
        self.fresh, self._listener = [], Listener()
        ids = self._ids(torch.arange(self._start, self._start + self._chunk))
        above = int(ids.max()) + 1  # text has one id on all axes, behind everything so far
        self._top = above + tokens - self._chunk
        text = torch.arange(above, self._top)
        own = torch.cat((ids, text.expand(*ids.shape[:-1], len(text))), -1).to(self._init[0].k.device)
        self._turns = self._rotary.rows(own, self._top)  # the same in all layers
        self._past = -1  # of the masks at hand

    def _ids(self, positions: Tensor) -> Tensor:
        """Ids (T,) or (3, T) of tokens of the stream."""
        return self._placing.at(self._init[0].tokens, positions, self._frame_tokens)

    def end(self, tokens: int) -> None:
        text = tokens - self._chunk
        self.heard = [paid[self._init[0].tokens : len(paid) - text] for paid in self._listener.heard()]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        T, C, top = q.shape[1], self._chunk, self._top
        init, memory = self._init[layer], self._memory[layer]
        q, new_k, old_k = turn(q, *self._turns), turn(k, *self._turns), memory.k
        if memory.tokens:
            old_k = self._rotary.rotate_at(old_k, self._ids(self._positions[layer]), top)
        init_k = self._rotary.rotate(init.k, 0) if init.tokens else init.k
        keys = torch.cat((init_k, old_k, new_k), 1)  # (H, n + M + T, D)
        past = init.tokens + memory.tokens
        self._look_back(T, past, q.device)
        self.fresh.append(LayerKV(k[:, :C], v[:, :C]))
        if self._probe is not None:
            rows = slice(self._probe.start, self._probe.stop)
            self._listener.hear(q[:, rows], keys, scale, self._probed)
        return softmax_attention(q, keys, torch.cat((init.v, memory.v, v), 1), scale, self._mask)

    def _look_back(self, tokens: int, past: int, device: torch.device) -> None:
        """Make the masks for a layer with so many tokens past, unless the layer before held as many.

        `_mask` (T, past + T): True where seen, everything past and of the new ones those that are not later. `_probed`:
        of the last keys, which a probe's rows see; all see what stands before the first of them, none the probe's own
        text.
        """
        if past == self._past:
            return
        self._past = past
        self._mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
        if self._probe is not None:
            first = min(self._chunk, self._probe.start)
            self._probed = self._mask[self._probe.start : self._probe.stop, past + first :].clone()
            self._probed[:, self._chunk - first :] = False
