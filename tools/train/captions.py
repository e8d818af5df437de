"""What is said of clips: [init | the clip's frames | tokens of earlier clips, sometimes | prompt, caption]."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.train.batches import CLIP, ROW
from tools.train.marks import Marks
from tools.train.network import Gather, Stored
from tools.train.select import Selection, lay_out
from tools.train.text import Text

Batch = dict[str, Tensor]


def captions(text: Text, batch: Batch, stored: Stored, marks: Marks) -> Tensor:
    first, length = batch["clip_first"], batch["clip_length"]
    at = torch.arange(2 * CLIP, device=text.device)
    real = at[None] < length[:, None]
    frames = (first[:, None] + at).clamp(max=text.sizes.frames - 1)
    chosen = Selection(frames, real, [real] * len(stored.k))
    layout = lay_out(chosen, batch["times"], len(text.init_ids), text.network.tokens, 0)
    extra, there = _earlier(text, first, stored)
    ids = batch["clip_ids"]
    x = torch.cat((extra, text.network.embed(ids).to(extra.dtype)), 1)
    count = torch.arange(ids.shape[1], device=text.device)
    place = torch.cat((there.long().cumsum(1) - 1, there.long().sum(1)[:, None] + count), 1).clamp(min=0)
    x = text.read(x, stored, chosen, layout, place, torch.cat((there, ids > 0), 1))
    return text.loss(x[:, extra.shape[1] :], batch["clip_labels"], marks, {"caption": length == CLIP})


def _earlier(text: Text, first: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
    """Visual tokens of the four clips before, eight of each, for half of the clips: (C, 32, E), which are there."""
    C, t = len(first), text.network.tokens
    within = first % ROW
    back = (torch.arange(32, device=text.device) // 8 - 4) * CLIP  # -32 .. -8 frames
    frame = first[:, None] + back + torch.randint(CLIP, (C, 32), device=text.device)
    there = (within[:, None] + back >= 0) & (torch.rand(C, 1, device=text.device) < 0.5)
    token = torch.randint(t, (C, 32), device=text.device)
    found: Tensor = Gather.apply(stored.seen.flatten(0, 1), (frame.clamp(min=0) * t + token).flatten())
    return found.view(C, 32, -1), there
