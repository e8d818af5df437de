"""One uncut forward, written from the formulas, to hold everything else against: no cache, no window kept.

The whole sequence goes through the language model's own layers at once. Attention is a plain masked softmax
over rows in fp64, with the rotation that the checkpoint's own frequencies give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.rotary import Rotary

ROWS_AT_ONCE = 128  # queries whose rows of scores are in memory together


class UncutContext:
    """Answers for attention over the sequence that is being fed, and nothing before it.

    A query at x sees a token at j if 0 <= x - j < window, or if j is an init token; an init token's distance
    never exceeds window - 1 (ReKV, arXiv 2503.00540). The last `unwindowed_tail` tokens see everything at its
    true distance, as a question over a rebuilt context without a window does. `ids` (T,) or (3, T) are what the
    tokens are turned by, where that is not their index.
    """

    def __init__(
        self,
        rotary: Rotary,
        init_tokens: int,
        window: int,
        unwindowed_tail: int,
        ids: Tensor | None = None,
        placing: Placing = LINE,
    ) -> None:
        self._rotary = rotary
        self._init, self._window, self._tail = init_tokens, window, unwindowed_tail
        self._ids, self._ceiling = ids, placing.ceiling(window)

    def begin(self, tokens: int) -> None: ...

    def end(self, tokens: int) -> None: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        group = q.shape[0] // k.shape[0]
        k, v = k.double().repeat_interleave(group, 0), v.double().repeat_interleave(group, 0)  # (Hq, T, D)
        T = q.shape[1]
        outs = [
            self._rows(q[:, start : start + ROWS_AT_ONCE].double(), k, v, scale, start, T)
            for start in range(0, T, ROWS_AT_ONCE)
        ]
        return torch.cat(outs, 1).to(q.dtype)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, T: int) -> Tensor:
        x = torch.arange(start, start + q.shape[1], device=q.device)[:, None]  # (rows, 1)
        j = torch.arange(T, device=q.device)[None]  # (1, T)
        distance = x - j
        narrow = x < T - self._tail
        # The init prompt is fed before there is a window: among themselves its tokens keep their distances.
        near = (distance < self._window) | ~narrow | (x < self._init)
        seen = (distance >= 0) & (near | (j < self._init))
        ids = j[0] if self._ids is None else self._ids.to(q.device)
        own = ids[..., start : start + q.shape[1]]
        near_scores = _turn(self._rotary, q, own) @ _turn(self._rotary, k, ids).transpose(1, 2)
        # keys at 0, queries at the ceiling
        far = own.clamp(max=self._ceiling)
        far_scores = _turn(self._rotary, q, far) @ _turn(self._rotary, k, 0 * ids).transpose(1, 2)
        scores = torch.where(near, near_scores, far_scores) * scale
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def uncut_states(
    model: VideoModel,
    embeddings: Tensor,
    *,
    init_tokens: int,
    window: int,
    unwindowed_tail: int,
    ids: Tensor | None = None,
    placing: Placing = LINE,
) -> Tensor:
    """Final states (T, E) of one forward over embeddings (T, E)."""
    context = UncutContext(model.rotary, init_tokens, window, unwindowed_tail, ids, placing)
    return model.forward(embeddings, context)


def _turn(rotary: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    """x (Hq, T, D) rotated to positions (T,) or (3, T), all in fp64."""
    angles = rotary.angles(positions)
    size = angles.shape[-1]
    part = x[..., :size]
    left, right = part.chunk(2, -1)
    turned = (part * angles.cos() + torch.cat((-right, left), -1) * angles.sin()) * rotary.scaling
    return torch.cat((turned, x[..., size:]), -1)
