"""Answers over what was found: [init | frames, times before their runs | captions as text, sometimes | question]."""

from __future__ import annotations

import torch
from torch import Tensor

from memdb.world.questions import KINDS
from tools.train.facts import IGNORED, NOTED_COLUMNS, shown, told_right
from tools.train.marks import Marks, Read, Stage
from tools.train.network import Look, Stored
from tools.train.search import ABSENT, COUNT, NOW, ORDER, WHEN
from tools.train.select import STAMP, Layout, Selection, lay_out, select, top
from tools.train.text import Text

Batch = dict[str, Tensor]
LOOK_WEIGHT, NOTE_WEIGHT = 0.3, 0.5
TIME = 5  # tokens of a time in an answer
_KEPT = (0.25, 0.75)  # of the tokens of a row's frames, where some are dropped: from this share to that
_HALVINGS = 2  # rows read all, a half or a quarter of the most frames; every second one reads all
# How often the evidence is put among the frames of a layer: of rows that read what they found, of rows by lot.
_FORCED = (0.5, 0.95)


def answers(
    text: Text,
    batch: Batch,
    stored: Stored,
    stage: Stage,
    scores: list[Tensor],
    marks: Marks,
    *,
    train: bool,
) -> list[Tensor]:
    """The losses of questions over few frames, over many, and beside captions as text."""
    near, seen = text.sizes.near, text.sizes.seen
    losses = []
    for rows, read in ((slice(0, near), stage.near), (slice(near, seen), stage.far)):
        ids, labels = batch["ask_ids"][rows], batch["ask_labels"][rows]
        alone, none = torch.zeros(len(ids), dtype=torch.bool, device=text.device), ids[:, :0]
        kinds = {name: batch["kind"][rows] == number for number, name in enumerate(KINDS)}
        losses += _answers(
            text,
            batch,
            stored,
            stage,
            read,
            scores,
            rows,
            (none, none > 0, none[..., None], ids, labels),
            alone,
            kinds,
            marks,
            train,
        )
    alone = batch["told_alone"]
    told = (
        batch["told_text"],
        batch["told_inside"],
        batch["told_noted"],
        batch["told_ids"],
        batch["told_labels"],
    )
    own = batch["kind"][seen:]
    kinds = {"told": ~alone, "captions": alone}
    kinds |= {f"told_{name}": ~alone & (own == number) for number, name in enumerate(KINDS)}
    losses += _answers(
        text, batch, stored, stage, stage.told, scores, slice(seen, None), told, alone, kinds, marks, train
    )
    return losses


def _answers(
    text: Text,
    batch: Batch,
    stored: Stored,
    stage: Stage,
    read: Read,
    scores: list[Tensor],
    rows: slice,
    words: tuple[Tensor, ...],
    alone: Tensor,
    groups: dict[str, Tensor],
    marks: Marks,
    train: bool,
) -> list[Tensor]:
    """One group of rows. alone: without KV.

    words: text before the question, which of it is evidence, what its tokens are to note, the question with its
    answer, labels.
    """
    network = text.network
    evidence, allowed, kind = batch["evidence"][rows], batch["allowed"][rows], batch["kind"][rows]
    picked = _picked([own[rows] for own in scores], evidence, allowed, kind, stage, read.most, train)
    picked = [own & ~alone[:, None] for own in picked]
    chosen = select(picked, evidence, read.union)
    layout = lay_out(chosen, batch["times"], len(text.init_ids), network.tokens, read.stamps)
    head, inside, said = words[:3]
    ids, labels = words[3].clone(), words[4].clone()
    _set_when(text, ids, labels, batch["times"], evidence, chosen, layout, (kind == WHEN) & ~alone)
    stamps = text.stamp_ids(batch["times"][chosen.frames.gather(1, layout.stamp_frame)])  # (R, S, 7)
    whole = torch.cat((stamps.flatten(1), head, ids), 1)
    real = torch.cat((layout.stamp_real.repeat_interleave(STAMP, 1), head > 0, ids > 0), 1)
    behind = torch.cat((head > 0, torch.ones_like(ids, dtype=torch.bool)), 1).long().cumsum(1) - 1
    keep = None
    R = len(ids)
    if train:
        thinned = torch.rand(R, 1, 1, device=text.device) < stage.disturbed / 2
        share = _KEPT[0] + (_KEPT[1] - _KEPT[0]) * torch.rand(R, 1, 1, device=text.device)
        lot = torch.rand(R, chosen.frames.shape[1], network.tokens, device=text.device)
        keep = ~thinned | (lot < share)
    look = _look(layout, labels, evidence, chosen, inside, kind, alone)
    x = network.embed(whole).to(stored.k[0].dtype)
    x = text.read(x, stored, chosen, layout, behind, real, keep, look, stamped=True)
    name = next(iter(groups))
    looked = torch.stack(look.losses).sum() / (torch.stack(look.losses) > 0).sum().clamp(min=1)
    marks.note(f"look_{name}", looked)
    numbers = text.numbers[whole].masked_fill(~real, IGNORED)
    noted = _noted(text, batch, look, chosen, layout, said, numbers, name, marks)
    said_loss = text.loss(x[:, -ids.shape[1] :], labels, marks, groups)
    return [said_loss, LOOK_WEIGHT * looked, NOTE_WEIGHT * noted]


def _look(
    layout: Layout,
    labels: Tensor,
    evidence: Tensor,
    chosen: Selection,
    inside: Tensor,
    kind: Tensor,
    alone: Tensor,
) -> Look:
    """Where tokens of the answer look: the first one at frames and captions of the evidence, or where nothing is to
    be found, at the init tokens; of two things, at the one that came first. The tokens of a time look at theirs.
    """
    R, S = layout.stamp_real.shape
    first = (kind == ORDER)[:, None]
    wanted = (torch.where(first, _first_run(evidence), evidence) & (kind != COUNT)[:, None]).gather(
        1, chosen.frames
    ) & chosen.real
    stamped = _first(evidence.gather(1, chosen.frames) & chosen.real, layout) & (kind == WHEN)[:, None]
    timed = stamped.any(1) | ((kind == WHEN) & alone)
    start = (labels >= 0).float().argmax(1, keepdim=True)
    tokens = S * STAMP + inside.shape[1] + start + torch.arange(TIME, device=labels.device)
    lead = torch.arange(TIME, device=labels.device)[None] == 0  # the others only of a time
    which = (
        torch.arange(STAMP, device=labels.device)[None]
        == 1 + torch.arange(TIME, device=labels.device)[:, None]
    )
    stamps = (stamped[:, None, :, None] & which[None, :, None]).flatten(2)  # (R, TIME, S * STAMP)
    words = (
        inside[:, None] & ((lead & (kind != COUNT)[:, None]) | ((kind == WHEN) & alone)[:, None])[..., None]
    )
    rest = torch.zeros(R, TIME, labels.shape[1], dtype=torch.bool, device=labels.device)
    return Look(
        tokens,
        lead & (kind == ABSENT)[:, None],
        wanted[:, None] & (lead & ~timed[:, None])[..., None],
        torch.cat((stamps, words, rest), 2),
    )


def _first(inside: Tensor, layout: Layout) -> Tensor:
    """Of each row, the first stamp that stands behind a frame of the evidence: (R, S), none or one."""
    stamped = inside.gather(1, layout.stamp_frame) & layout.stamp_real
    return stamped & (stamped.long().cumsum(1) == 1)


def _first_run(evidence: Tensor) -> Tensor:
    """(R, N): the frames of the evidence that come before any gap in it."""
    begun = evidence.long().cumsum(1) > 0
    return evidence & ((begun & ~evidence).long().cumsum(1) == 0)


def _noted(
    text: Text,
    batch: Batch,
    look: Look,
    chosen: Selection,
    layout: Layout,
    said: Tensor,
    numbers: Tensor,
    name: str,
    marks: Marks,
) -> Tensor:
    """What the tokens of times have taken up of the frames and captions that they stand behind, and that each number
    is still itself.
    """
    assert look.state is not None
    S = layout.stamp_real.shape[1]
    every = torch.cat((shown(batch["frames"]), batch["told_facts"]), 1)
    facts = torch.stack([every[:, column] for column in NOTED_COLUMNS], 1)  # (N, facts)
    own = facts[chosen.frames.gather(1, layout.stamp_frame)].masked_fill(
        ~layout.stamp_real[..., None], IGNORED
    )
    stamps = (
        own[:, :, None].expand(-1, -1, STAMP - 1, -1).flatten(1, 2)
    )  # all tokens of a time but its bracket
    state = look.state[:, : S * STAMP].unflatten(1, (S, STAMP))[:, :, 1:].flatten(1, 2)
    if said.shape[1]:
        stamps = torch.cat((stamps, said), 1)
        state = torch.cat((state, look.state[:, S * STAMP : S * STAMP + said.shape[1]]), 1)
    own = numbers[:, : S * STAMP].unflatten(1, (S, STAMP))[:, :, 1:].flatten(1, 2)
    own = torch.cat((own, numbers[:, S * STAMP : S * STAMP + said.shape[1]]), 1)
    wanted, losses = torch.cat((stamps, own[..., None]), 2).flatten(0, 1), []
    for at, scores in enumerate(text.network.tell_text(state.flatten(0, 1))):
        loss, right, there = told_right(scores, wanted[:, at])
        losses.append(loss)
        marks.add(f"noted_{name}" if at < len(NOTED_COLUMNS) else f"number_{name}", right, there)
    return torch.stack(losses).mean()


def _picked(
    scores: list[Tensor],
    evidence: Tensor,
    allowed: Tensor,
    kind: Tensor,
    stage: Stage,
    most: int,
    train: bool,
) -> list[Tensor]:
    """What rows read, a layer each: what they found, or frames by lot; with the evidence in nearly all layers."""
    R, N = evidence.shape
    device = evidence.device
    if not train:
        counts = torch.full((R,), most, device=device)
        own = [_recent_or_all(score, allowed, kind) for score in scores]
        return [top(score, counts, most, 1) for score in own]
    halvings = (torch.randint(_HALVINGS + 2, (R,), device=device) - 1).clamp(min=0)
    counts = (most >> halvings).clamp(min=1)
    counts = torch.where(kind == COUNT, most, counts)
    by_lot = torch.rand(R, 1, device=device) >= stage.own
    shared = torch.rand(R, N, device=device)
    alike = torch.rand(R, 1, device=device) < 0.5
    grouped = torch.rand(R, 1, device=device) < 0.5
    span = evidence & (torch.rand(R, N, device=device) < 0.9)
    picked = []
    for score in scores:
        lot = torch.where(alike, shared, torch.rand(R, N, device=device))
        score = torch.where(by_lot, lot, score)
        often = _FORCED[0] + (_FORCED[1] - _FORCED[0]) * by_lot
        force = span & (torch.rand(R, 1, device=device) < often) & (kind != NOW)[:, None]
        score = torch.where(force, score + 1e4, score).masked_fill(~allowed, -torch.inf)
        score = _recent_or_all(score, allowed, kind)
        picked.append(torch.where(grouped, top(score, counts, most, 4), top(score, counts, most, 1)))
    return picked


def _recent_or_all(score: Tensor, allowed: Tensor, kind: Tensor) -> Tensor:
    """`now` reads the newest frames that are allowed."""
    late = torch.arange(score.shape[1], device=score.device).float().expand_as(score)
    late = late.masked_fill(~allowed, -torch.inf)
    return torch.where((kind == NOW)[:, None], late, score)


def _set_when(
    text: Text,
    ids: Tensor,
    labels: Tensor,
    times: Tensor,
    evidence: Tensor,
    chosen: Selection,
    layout: Layout,
    asked: Tensor,
) -> None:
    """A time is answered with the first one that stands behind a frame of the evidence."""
    stamped = _first(evidence.gather(1, chosen.frames) & chosen.real, layout)
    has = asked & stamped.any(1)
    first = stamped.float().argmax(1, keepdim=True)
    at_s = times[chosen.frames.gather(1, layout.stamp_frame.gather(1, first))[:, 0]]
    said = text.said_ids(at_s)
    start = (labels >= 0).float().argmax(1)  # the label of the token before the answer
    where = start[:, None] + torch.arange(TIME, device=ids.device)
    labels.scatter_(1, where, torch.where(has[:, None], said, labels.gather(1, where)))
    ids.scatter_(1, where + 1, torch.where(has[:, None], said, ids.gather(1, where + 1)))
