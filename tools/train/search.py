"""Searching: the question alone, layer by layer, each reading what it found; keys of the evidence are to score high."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.world.questions import KINDS
from tools.train.marks import Marks, Stage
from tools.train.network import Stored
from tools.train.select import Selection, lay_out, memory_of, top
from tools.train.text import Text

Batch = dict[str, Tensor]
NOW, COUNT, ABSENT, WHEN, ORDER = (KINDS.index(kind) for kind in ("now", "count", "absent", "when", "order"))
CONTRAST_WEIGHT, JOINT_WEIGHT = 1.0, 0.3
READ = 32  # frames that a layer reads before the next one searches


def search(
    text: Text, batch: Batch, stored: Stored, stage: Stage, marks: Marks
) -> tuple[list[Tensor], Tensor]:
    """Per layer the scores (R, N) of all frames, -inf where they may not be read; and the contrastive loss."""
    network, ids = text.network, batch["query"]
    real = ids > 0
    R, T = ids.shape
    evidence, allowed, kind = batch["evidence"], batch["allowed"], batch["kind"]
    asked = (kind != ABSENT) & (kind != COUNT) & (kind != NOW)
    x = network.embed(ids).to(stored.k[0].dtype)
    most = stage.far.most
    counts = torch.full((R,), most, device=text.device)
    n = len(text.init_ids)
    words = real.sum(1).clamp(min=1)
    joint = _joint(text, x, real, words, stored)
    losses, all_scores = [], []
    for at, layer in enumerate(network.layers):
        q, k, v = network.project(layer, x)
        mean = (q * real[:, None, :, None]).sum(2) / words[:, None, None]  # (R, Hq, D)
        folded = mean.view(R, network.kv_heads, -1, network.size).sum(2).flatten(1)
        keys = stored.k[at].mean(1).flatten(1)  # (N, H * D)
        scores = 10 * F.normalize(folded.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T
        losses.append(_contrast(scores * network.sharp[at].exp(), evidence, asked))
        scores = scores.detach().masked_fill(~allowed, -torch.inf)
        picked = top(scores, counts, most, 1)
        marks.add(f"found{at}", asked * (picked & evidence).sum(1) / evidence.sum(1).clamp(min=1), asked)
        all_scores.append(scores)
        read = top(scores, counts, READ, 1)
        frames = torch.where(read, torch.arange(read.shape[1], device=text.device), read.shape[1])
        frames = frames.sort(1).values[:, :READ]
        there = frames < picked.shape[1]
        chosen = Selection(frames.clamp(max=picked.shape[1] - 1), there, [there])
        layout = lay_out(chosen, batch["times"], n, network.tokens, 0)
        place = layout.end[0][:, None] + torch.arange(T, device=text.device)
        memory = memory_of(chosen, layout, 0, network.tokens, None)
        x = network.layer_over(at, x, q, k, v, stored, memory, place, real)
    losses.append(
        _contrast(joint * network.sharp[-1].exp(), evidence, asked) * (JOINT_WEIGHT / CONTRAST_WEIGHT)
    )
    best = top(joint.detach().masked_fill(~allowed, -torch.inf), counts, most, 1)
    marks.add("found_joint", asked * (best & evidence).sum(1) / evidence.sum(1).clamp(min=1), asked)
    contrast = torch.stack(losses).mean()
    marks.note("loss_contrast", contrast)
    return all_scores, CONTRAST_WEIGHT * contrast


def _joint(text: Text, x: Tensor, real: Tensor, words: Tensor, stored: Stored) -> Tensor:
    """Questions and frames in one space: (R, N), cosine times 10."""
    asked = text.network.joint_text((x * real[..., None]).sum(1) / words[:, None])
    clip = text.network.joint_clip(stored.last.mean(1))
    return 10 * F.normalize(asked.float(), dim=-1) @ F.normalize(clip.float(), dim=-1).T


def _contrast(scores: Tensor, evidence: Tensor, asked: Tensor) -> Tensor:
    """For every frame of the evidence, that it beats all frames that are none; (R, N) scores, rows that are asked."""
    others = torch.logsumexp(scores.masked_fill(evidence, -1e4), 1, keepdim=True)
    each = F.softplus(others - scores) * evidence
    per_row = each.sum(1) / evidence.sum(1).clamp(min=1)
    return (per_row * asked).sum() / asked.sum().clamp(min=1)
