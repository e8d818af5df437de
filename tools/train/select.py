"""Which frames a row reads in each layer, and where they and the times between them stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.train.network import Memory

STAMP = 7  # tokens of `[HH:MM:SS]`
EVERY_S = 4  # within a run, a time is written this often


@dataclass
class Selection:
    """Frames that at least one layer holds, (R, U) ascending; `real` ones count; `held` says which layers hold them."""

    frames: Tensor
    real: Tensor
    held: list[Tensor]  # a layer each: (R, U)


def top(scores: Tensor, counts: Tensor, most: int, group: int) -> Tensor:
    """(R, N) scores -> (R, N) bool: the best counts[r] frames, in groups of `group` neighbours; never those of -inf."""
    R, N = scores.shape
    if group > 1:
        joined = scores.view(R, N // group, group)
        able = joined > -torch.inf
        mean = joined.masked_fill(~able, 0).sum(-1) / able.sum(-1).clamp(min=1)
        scores = (
            mean.masked_fill(~able.any(-1), -torch.inf)
            .repeat_interleave(group, 1)
            .masked_fill(scores == -torch.inf, -torch.inf)
        )
    best, where = scores.topk(min(most, N), 1)
    rank = torch.arange(best.shape[1], device=scores.device)
    good = (rank[None] < counts[:, None]) & (best > -torch.inf)
    return torch.zeros(R, N, dtype=torch.bool, device=scores.device).scatter(1, where, good)


def select(picked: list[Tensor], evidence: Tensor, most: int) -> Selection:
    """Per layer (R, N) bool -> the union's frames, at most `most`: evidence first, others by lot, ascending."""
    union = torch.stack(picked).any(0)
    N = union.shape[1]
    lot = torch.rand(union.shape, device=union.device) + 2.0 * evidence
    chosen = lot.masked_fill(~union, -1.0).topk(min(most, N), 1)
    frames = torch.where(chosen.values >= 0, chosen.indices, N).sort(1).values
    real = frames < N
    frames = frames.clamp(max=N - 1)
    return Selection(frames, real, [layer.gather(1, frames) & real for layer in picked])


@dataclass
class Layout:
    """Where everything stands: per layer the frames' first places, the stamps' places and the text's first place."""

    begin: list[Tensor]  # (R, U)
    stamps: list[Tensor]  # (R, S, STAMP)
    end: list[Tensor]  # (R,)
    stamp_frame: Tensor  # (R, S): index into U of the frame that a stamp stands behind
    stamp_real: Tensor  # (R, S)


def lay_out(chosen: Selection, times: Tensor, n: int, tokens: int, stamps: int) -> Layout:
    """Consecutive places behind `n` init tokens, a stamp behind each run of frames and every EVERY_S within.

    times (N,): of all frames, seconds. At most `stamps` stamps a row; 0 for none.
    """
    R, U = chosen.frames.shape
    device = chosen.frames.device
    at_s = times[chosen.frames]
    flags = torch.zeros(R, U, dtype=torch.bool, device=device)
    if stamps:
        before = torch.cat((chosen.frames.new_full((R, 1), -2), chosen.frames[:, :-1]), 1)
        begins = chosen.real & (chosen.frames != before + 1)
        index = torch.arange(U, device=device).expand(R, U)
        run = torch.where(begins, index, 0).cummax(1).values  # where this frame's run begins
        passed = (at_s - at_s.gather(1, run)) // EVERY_S
        fresh = begins | (
            passed != torch.cat((passed[:, :1], passed[:, :-1]), 1)
        )  # frames are 1, 2 or 4 s apart
        last = torch.cat((fresh[:, 1:] | ~chosen.real[:, 1:], fresh.new_ones(R, 1)), 1)
        flags = chosen.real & last
        flags &= flags.cumsum(1) <= stamps
    order = torch.where(flags, U - torch.arange(U, device=device), 0)
    top_flags = order.topk(min(stamps, U), 1).values if stamps else order[:, :0]
    stamp_real = top_flags > 0
    stamp_frame = (U - top_flags).clamp(max=U - 1)
    written = (flags.long().cumsum(1) - flags.long()) * STAMP  # of those behind earlier frames
    begin, places, end = [], [], []
    for held in chosen.held:
        size = held.long() * tokens
        ahead = size.cumsum(1) - size
        first = n + ahead + written
        begin.append(first)
        start = (first + size).gather(1, stamp_frame)
        places.append(start[..., None] + torch.arange(STAMP, device=device))
        end.append(n + size.sum(1) + flags.sum(1) * STAMP)
    return Layout(begin, places, end, stamp_frame, stamp_real)


def memory_of(chosen: Selection, layout: Layout, layer: int, tokens: int, keep: Tensor | None) -> Memory:
    """One layer's memory; keep (R, U, tokens) drops single tokens."""
    held = chosen.held[layer][..., None].expand(-1, -1, tokens)
    return Memory(chosen.frames, layout.begin[layer], held if keep is None else held & keep)
