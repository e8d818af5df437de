"""What a step teaches: captions of clips, answers over retrieved frames or captions, keys that can be found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.world.pictures import Painter
from memdb.world.questions import KINDS
from tools.train.batches import CLIP, FACTS, INIT_PROMPT, ROW, Sizes
from tools.train.network import Gather, Network, Stored
from tools.train.select import STAMP, Layout, Selection, lay_out, memory_of, select, top

Batch = dict[str, Tensor]
NOW, COUNT, ABSENT, WHEN = (KINDS.index(kind) for kind in ("now", "count", "absent", "when"))
CONTRAST_WEIGHT, JOINT_WEIGHT, FACTS_WEIGHT = 0.3, 0.1, 1.0


@dataclass
class Stage:
    """How hard a step is: frames a row reads at most, how many the union of layers may have, and what is disturbed."""

    most: int = 64
    union: int = 128
    stamps: int = 32
    limit: int = 64  # frames that a question reads at most, but for counting
    own: float = 0.6  # share of rows that read what their own keys found
    asked: bool = True  # without, a step is captions and facts alone
    disturbed: float = 0.3  # about the share of streams and rows that are merged or thinned


@dataclass
class Marks:
    """Sums of what went right, by name; and the losses."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, right: Tensor, of: Tensor) -> None:
        """In place: a recorded graph of kernels goes on adding to the same memory."""
        pair = torch.stack((right.detach().sum().float(), of.detach().sum().float()))
        if name in self.sums:
            self.sums[name] += pair
        else:
            self.sums[name] = pair

    def clear(self) -> None:
        for pair in self.sums.values():
            pair.zero_()

    def shares(self) -> dict[str, float]:
        return {name: float(pair[0] / pair[1].clamp(min=1)) for name, pair in sorted(self.sums.items())}


class Learner:
    """Computes the loss of a batch; what is random in it is drawn on the device."""

    def __init__(self, network: Network, sizes: Sizes, device: torch.device) -> None:
        self.network, self.sizes, self.device = network, sizes, device
        self.dtype = next(network.parameters()).dtype
        side = network.hf.config.vision_config.image_size
        self.paint = Painter(side, side, 2).paint
        encode = network.tokenizer.encode
        opening = f"<|im_start|>system\n{INIT_PROMPT}<|im_end|>\n<|im_start|>user\n"
        self.init_ids = torch.tensor(encode(opening, add_special_tokens=False), device=device)
        self._windows = torch.tensor([128, 256, 512, 512, 512, 1024, 2048], device=device)
        self._steps = torch.tensor([0.125, 0.25, 0.5, 1.0, 1.0], device=device)
        self._two = self._table("{:02d}", 100)
        self._two_spaced = self._table(" {:02d}", 100)
        self._marks = {text: self._table(text, 1)[0] for text in ("[", ":", "]")}

    def _table(self, form: str, count: int) -> Tensor:
        encode = self.network.tokenizer.encode
        ids = [encode(form.format(number), add_special_tokens=False) for number in range(count)]
        assert all(len(own) == 1 for own in ids)
        return torch.tensor([own[0] for own in ids], device=self.device)

    def loss(self, batch: Batch, stage: Stage, marks: Marks, *, train: bool = True) -> Tensor:
        stored = self._store(batch, stage, train)
        parts = [self._captions(batch, stored, marks), self._facts(batch, stored, marks)]
        if not stage.asked:
            return torch.stack(parts).sum()
        scores, contrast = self._search(batch, stored, stage, marks)
        parts.append(contrast)
        seen = self.sizes.seen
        parts.append(self._answers(batch, stored, stage, scores, slice(0, seen), None, marks, train))
        parts.append(
            self._answers(batch, stored, stage, scores, slice(seen, None), batch["told_text"], marks, train)
        )
        return torch.stack(parts).sum()

    @torch.no_grad()
    def pictures(self, frames: Tensor, *, train: bool) -> Tensor:
        """Parameters of frames -> what a film shows of them, (N, 3, S, S) in whole bytes; for training, disturbed."""
        pictures = self.paint(frames.float())
        if train:
            gain = 1 + 0.06 * torch.randn(len(pictures) // ROW, 1, 3, 1, 1, device=self.device)
            pictures = (pictures.view(-1, ROW, *pictures.shape[1:]) * gain).flatten(0, 1)
            pictures = pictures + 0.015 * torch.randn_like(pictures)
        return ((pictures.clamp(0, 1) * 255).round() / 255).to(self.dtype)

    def _store(self, batch: Batch, stage: Stage, train: bool) -> Stored:
        seen = self.network.see(batch["pictures"])
        R = len(seen) // ROW
        window = torch.full((R,), 512, device=self.device)
        if train:
            window = self._windows[torch.randint(len(self._windows), (R,), device=self.device)]
            seen = self._merged(seen, stage)
        return self.network.stream(seen, self.init_ids, ROW, window)

    def _merged(self, seen: Tensor, stage: Stage) -> Tensor:
        """Some streams hold frames averaged with their neighbour, or a summary of four in every fourth place."""
        R = len(seen) // ROW
        rows = seen.view(R, ROW, *seen.shape[1:])
        pairs = rows.view(R, ROW // 2, 2, *seen.shape[1:]).mean(2, keepdim=True).expand(-1, -1, 2, -1, -1)
        fours = rows.view(R, ROW // 4, 4, *seen.shape[1:])
        summed = torch.cat((fours[:, :, :3], fours.mean(2, keepdim=True)), 2)
        lot = torch.rand(R, 1, 1, 1, device=seen.device)
        share = stage.disturbed / 4
        rows = torch.where(lot < share, pairs.reshape_as(rows), rows)
        rows = torch.where((lot >= share) & (lot < 2 * share), summed.reshape_as(rows), rows)
        return rows.reshape_as(seen)

    def _facts(self, batch: Batch, stored: Stored, marks: Marks) -> Tensor:
        """What is true in each frame, from what the vision tower made of it and from what the stream did."""
        losses = []
        for tell, tokens, own in (
            (self.network.tell_seen, stored.seen, "seen"),
            (self.network.tell_last, stored.last, "kept"),
        ):
            for at, (name, scores) in enumerate(zip(FACTS, tell(tokens), strict=True)):
                if own == "seen" and name == "motion":
                    continue  # no single frame shows it
                wanted = batch["facts"][:, at]
                there = wanted >= 0
                each = F.cross_entropy(scores.float(), wanted.clamp(min=0), reduction="none")
                losses.append((each * there).sum() / there.sum().clamp(min=1))
                marks.add(f"{own}_{name}", (scores.argmax(1) == wanted) & there, there)
        return FACTS_WEIGHT * torch.stack(losses).mean()

    # -- captions

    def _captions(self, batch: Batch, stored: Stored, marks: Marks) -> Tensor:
        """[init | the clip's frames | tokens of earlier clips, sometimes | prompt, caption]."""
        first, length = batch["clip_first"], batch["clip_length"]
        C, most = len(first), 2 * CLIP
        at = torch.arange(most, device=self.device)
        real = at[None] < length[:, None]
        frames = (first[:, None] + at).clamp(max=self.sizes.frames - 1)
        layers = len(stored.k)
        chosen = Selection(frames, real, [real] * layers)
        layout = lay_out(chosen, batch["times"], len(self.init_ids), self.network.tokens, 0)
        extra, there = self._earlier(first, stored)
        ids = batch["clip_ids"]
        x = torch.cat((extra, self.network.embed(ids).to(extra.dtype)), 1)
        real_text = torch.cat((there, ids > 0), 1)
        gap = there.long().sum(1)
        place = torch.cat(
            (there.long().cumsum(1) - 1, gap[:, None] + torch.arange(ids.shape[1], device=self.device)), 1
        ).clamp(min=0)
        x = self._read(x, stored, chosen, layout, place, real_text, None)
        return self._told(x[:, extra.shape[1] :], batch["clip_labels"], marks, {"caption": length == CLIP}, C)

    def _earlier(self, first: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
        """Visual tokens of the four clips before, eight of each, for half of the clips: (C, 32, E), which are there."""
        C, t = len(first), self.network.tokens
        within = first % ROW
        back = (torch.arange(32, device=self.device) // 8 - 4) * CLIP  # -32 .. -8 frames
        frame = first[:, None] + back + torch.randint(CLIP, (C, 32), device=self.device)
        there = (within[:, None] + back >= 0) & (torch.rand(C, 1, device=self.device) < 0.5)
        token = torch.randint(t, (C, 32), device=self.device)
        found: Tensor = Gather.apply(stored.seen.flatten(0, 1), (frame.clamp(min=0) * t + token).flatten())
        return found.view(C, 32, -1), there

    # -- searching

    def _search(
        self, batch: Batch, stored: Stored, stage: Stage, marks: Marks
    ) -> tuple[list[Tensor], Tensor]:
        """The question alone, layer by layer, each reading what it found; keys of the evidence are to score high."""
        network, ids = self.network, batch["query"]
        real = ids > 0
        R, T = ids.shape
        evidence, allowed, kind = batch["evidence"], batch["allowed"], batch["kind"]
        asked = (kind != ABSENT) & (kind != COUNT) & (kind != NOW)
        x = network.embed(ids).to(stored.k[0].dtype)
        counts = torch.full((R,), stage.most, device=self.device)
        n = len(self.init_ids)
        words = real.sum(1).clamp(min=1)
        losses, all_scores = [], []
        joint = self._joint(x, real, words, stored)
        for at, layer in enumerate(network.layers):
            q, k, v = network.project(layer, x)
            mean = (q * real[:, None, :, None]).sum(2) / words[:, None, None]  # (R, Hq, D)
            folded = mean.view(R, network.kv_heads, -1, network.size).sum(2).flatten(1)
            keys = stored.k[at].mean(1).flatten(1)  # (N, H * D)
            scores = (folded.float() @ keys.float().T) * network.scale
            losses.append(_contrast(scores * network.sharp[at].exp(), evidence, asked))
            scores = scores.detach().masked_fill(~allowed, -torch.inf)
            picked = top(scores, counts, stage.most, 1)
            marks.add(f"found{at}", asked * (picked & evidence).sum(1) / evidence.sum(1).clamp(min=1), asked)
            all_scores.append(scores)
            frames = torch.where(picked, torch.arange(picked.shape[1], device=self.device), picked.shape[1])
            frames = frames.sort(1).values[:, : stage.most]
            there = frames < picked.shape[1]
            chosen = Selection(frames.clamp(max=picked.shape[1] - 1), there, [there])
            layout = lay_out(chosen, batch["times"], n, network.tokens, 0)
            place = layout.end[0][:, None] + torch.arange(T, device=self.device)
            memory = memory_of(chosen, layout, 0, network.tokens, None)
            x = network.layer_over(at, x, q, k, v, stored, memory, place, real)
        losses.append(
            _contrast(joint * network.sharp[-1].exp(), evidence, asked) * (JOINT_WEIGHT / CONTRAST_WEIGHT)
        )
        best = top(joint.detach().masked_fill(~allowed, -torch.inf), counts, stage.most, 1)
        marks.add("found_joint", asked * (best & evidence).sum(1) / evidence.sum(1).clamp(min=1), asked)
        contrast = torch.stack(losses).mean()
        marks.add("loss_contrast", contrast, torch.ones_like(contrast))
        return all_scores, CONTRAST_WEIGHT * contrast

    def _joint(self, x: Tensor, real: Tensor, words: Tensor, stored: Stored) -> Tensor:
        """Questions and frames in one space: (R, N), cosine times 10."""
        text = self.network.joint_text((x * real[..., None]).sum(1) / words[:, None])
        clip = self.network.joint_clip(stored.last.mean(1))
        return 10 * F.normalize(text.float(), dim=-1) @ F.normalize(clip.float(), dim=-1).T

    # -- answers

    def _answers(
        self,
        batch: Batch,
        stored: Stored,
        stage: Stage,
        scores: list[Tensor],
        rows: slice,
        text: Tensor | None,
        marks: Marks,
        train: bool,
    ) -> Tensor:
        network = self.network
        evidence, allowed, kind = batch["evidence"][rows], batch["allowed"][rows], batch["kind"][rows]
        told = text is not None
        most = min(stage.most, 24) if told else stage.most
        union = min(stage.union, 48) if told else stage.union
        picked = self._picked([own[rows] for own in scores], evidence, allowed, kind, stage, most, train)
        if told:
            picked = [own & ~batch["told_alone"][:, None] for own in picked]
        chosen = select(picked, evidence, union)
        layout = lay_out(chosen, batch["times"], len(self.init_ids), network.tokens, stage.stamps)
        ids = (batch["told_ids"] if told else batch["ask_ids"][rows]).clone()
        labels = (batch["told_labels"] if told else batch["ask_labels"][rows]).clone()
        self._set_when(ids, labels, batch, rows, chosen, layout, kind, told)
        stamps = self._stamp_ids(batch["times"][chosen.frames.gather(1, layout.stamp_frame)])  # (R, S, 7)
        R = len(layout.stamp_real)
        head = text if text is not None else ids[:, :0]
        whole = torch.cat((stamps.flatten(1), head, ids), 1)
        real = torch.cat((layout.stamp_real.repeat_interleave(STAMP, 1), head > 0, ids > 0), 1)
        behind = torch.cat((head > 0, torch.ones_like(ids, dtype=torch.bool)), 1).long()
        behind = behind.cumsum(1) - 1
        keep = None
        if train:
            half = torch.rand(R, 1, 1, device=self.device) < stage.disturbed / 3
            lot = torch.rand(R, chosen.frames.shape[1], network.tokens, device=self.device)
            keep = ~half | (lot < 0.5)
        x = network.embed(whole).to(stored.k[0].dtype)
        x = self._read(x, stored, chosen, layout, behind, real, keep, stamped=True)
        groups = (
            {"told": ~batch["told_alone"], "captions": batch["told_alone"]}
            if told
            else {name: kind == number for number, name in enumerate(KINDS)}
        )
        return self._told(x[:, -ids.shape[1] :], labels, marks, groups, R)

    def _picked(
        self,
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
        if not train:
            counts = torch.full((R,), most, device=self.device)
            own = [self._recent_or_all(score, allowed, kind) for score in scores]
            return [top(score, counts, most, 1) for score in own]
        limit = min(most, stage.limit)
        counts = (
            (limit * self._steps[torch.randint(len(self._steps), (R,), device=self.device)])
            .long()
            .clamp(min=1)
        )
        counts = torch.where(kind == COUNT, most, counts)
        by_lot = torch.rand(R, 1, device=self.device) >= stage.own
        shared = torch.rand(R, N, device=self.device)
        alike = torch.rand(R, 1, device=self.device) < 0.5
        grouped = torch.rand(R, 1, device=self.device) < 0.5
        span = evidence & (torch.rand(R, N, device=self.device) < 0.9)
        picked = []
        for score in scores:
            lot = torch.where(alike, shared, torch.rand(R, N, device=self.device))
            score = torch.where(by_lot, lot, score)
            force = span & (torch.rand(R, 1, device=self.device) < 0.9) & (kind != NOW)[:, None]
            score = torch.where(force, score + 1e4, score).masked_fill(~allowed, -torch.inf)
            score = self._recent_or_all(score, allowed, kind)
            picked.append(torch.where(grouped, top(score, counts, most, 4), top(score, counts, most, 1)))
        return picked

    def _recent_or_all(self, score: Tensor, allowed: Tensor, kind: Tensor) -> Tensor:
        """`now` reads the newest frames that are allowed."""
        late = torch.arange(score.shape[1], device=self.device).float().expand_as(score)
        late = late.masked_fill(~allowed, -torch.inf)
        return torch.where((kind == NOW)[:, None], late, score)

    def _set_when(
        self,
        ids: Tensor,
        labels: Tensor,
        batch: Batch,
        rows: slice,
        chosen: Selection,
        layout: Layout,
        kind: Tensor,
        told: bool,
    ) -> None:
        """A time is answered with the first one that stands before a frame of the evidence, inside its span."""
        evidence = batch["evidence"][rows].gather(1, chosen.frames) & chosen.real
        stamped = evidence.gather(1, layout.stamp_frame) & layout.stamp_real
        has = (kind == WHEN) & stamped.any(1)
        if told:
            has &= ~batch["told_alone"]
        first = stamped.float().argmax(1, keepdim=True)
        at_s = batch["times"][chosen.frames.gather(1, layout.stamp_frame.gather(1, first))[:, 0]]
        h, m, s = at_s // 3600, at_s // 60 % 60, at_s % 60
        colon = self._marks[":"].expand_as(at_s)
        said = torch.stack((self._two_spaced[h.clamp(max=99)], colon, self._two[m], colon, self._two[s]), 1)
        start = (labels >= 0).float().argmax(1)  # the label of the token before the answer
        where = start[:, None] + torch.arange(5, device=self.device)
        old = labels.gather(1, where)
        labels.scatter_(1, where, torch.where(has[:, None], said, old))
        old = ids.gather(1, where + 1)
        ids.scatter_(1, where + 1, torch.where(has[:, None], said, old))

    def _stamp_ids(self, at_s: Tensor) -> Tensor:
        """`[HH:MM:SS]` of seconds (R, S) -> (R, S, 7)."""
        h, m, s = at_s // 3600, at_s // 60 % 60, at_s % 60
        a, colon, z = (self._marks[text].expand_as(at_s) for text in ("[", ":", "]"))
        return torch.stack((a, self._two[h.clamp(max=99)], colon, self._two[m], colon, self._two[s], z), -1)

    # -- shared

    def _read(
        self,
        x: Tensor,
        stored: Stored,
        chosen: Selection,
        layout: Layout,
        behind: Tensor,
        real: Tensor,
        keep: Tensor | None,
        *,
        stamped: bool = False,
    ) -> Tensor:
        """Run text (R, T, E) over a selection; `behind` counts the text's places after the frames, stamps excluded."""
        network = self.network
        for at, layer in enumerate(network.layers):
            place = layout.end[at][:, None] + behind
            if stamped:
                place = torch.cat((layout.stamps[at].flatten(1), place), 1)
            memory = memory_of(chosen, layout, at, network.tokens, keep)
            q, k, v = network.project(layer, x)
            x = network.layer_over(at, x, q, k, v, stored, memory, place, real)
        return x

    def _told(self, x: Tensor, labels: Tensor, marks: Marks, groups: dict[str, Tensor], rows: int) -> Tensor:
        """Cross entropy of the answers, each row counting the same; which rows are right to the last token."""
        where = labels >= 0
        scores = self.network.logits(x).float()
        each = F.cross_entropy(scores.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(
            labels
        )
        exact = ((scores.argmax(-1) == labels) | ~where).all(1).float()
        for name, mask in groups.items():
            marks.add(name, exact * mask, mask)
        loss = ((each * where).sum(1) / where.sum(1).clamp(min=1)).sum() / rows
        marks.add("loss_" + next(iter(groups)), loss, torch.ones_like(loss))
        return loss


def _contrast(scores: Tensor, evidence: Tensor, asked: Tensor) -> Tensor:
    """For every frame of the evidence, that it beats all frames that are none; (R, N) scores, rows that are asked."""
    others = torch.logsumexp(scores.masked_fill(evidence, -torch.inf), 1, keepdim=True)
    each = F.softplus(others - scores) * evidence
    per_row = each.sum(1) / evidence.sum(1).clamp(min=1)
    return (per_row * asked).sum() / asked.sum().clamp(min=1)
