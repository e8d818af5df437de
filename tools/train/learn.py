"""What a step teaches: facts of frames, captions of clips, keys that can be found, answers over what was found."""

from __future__ import annotations

import torch
from torch import Tensor

from memdb.world.pictures import Painter
from tools.train.answers import answers
from tools.train.batches import ROW, Sizes
from tools.train.captions import captions
from tools.train.facts import SHOWN, TOLD, placed, shown, told_right
from tools.train.marks import Marks, Stage
from tools.train.network import Network, Stored
from tools.train.search import search
from tools.train.text import Text

Batch = dict[str, Tensor]
FACTS_WEIGHT = 1.0
# How far a question in a stream sees, in tokens: the recipes' window among others.
_WINDOWS = (128, 256, 512, 512, 512, 1024, 2048)
WINDOW = 512


class Learner:
    """Computes the loss of a batch; what is random in it is drawn on the device."""

    def __init__(self, network: Network, sizes: Sizes, device: torch.device) -> None:
        self.network, self.sizes, self.device = network, sizes, device
        self.dtype = next(network.parameters()).dtype
        side = network.hf.config.vision_config.image_size
        self.paint = Painter(side, side, 2).paint
        self.text = Text(network, sizes, device)
        self._windows = torch.tensor(_WINDOWS, device=device)

    def loss(self, batch: Batch, stage: Stage, marks: Marks, *, train: bool = True) -> Tensor:
        """All of a recording: its frames as streams, then what is said, searched and asked of it."""
        stored = self._store(batch, stage, train)
        parts = [captions(self.text, batch, stored, marks), self._kept(batch, stored, marks)]
        if not stage.frozen:
            parts.append(self._seen(batch["frames"], stored.seen, marks))
        scores, contrast = search(self.text, batch, stored, stage, marks)
        parts.append(contrast)
        parts += answers(self.text, batch, stored, stage, scores, marks, train=train)
        return torch.stack(parts).sum()

    def seeing(self, batch: Batch, stage: Stage, marks: Marks) -> Tensor:
        """Single frames alone: what the vision tower is to see."""
        return self._seen(batch["frames"], self.network.see(batch["pictures"]), marks)

    @torch.no_grad()
    def pictures(self, frames: Tensor, *, train: bool, together: int = ROW) -> Tensor:
        """Parameters of frames -> what a film shows of them, (F, 3, S, S) in whole bytes; for training, disturbed.

        `together`: as many frames in a row are tinted alike.
        """
        pictures = self.paint(frames.float())
        if train:
            gain = 1 + 0.06 * torch.randn(len(pictures) // together, 1, 3, 1, 1, device=self.device)
            pictures = (pictures.view(-1, together, *pictures.shape[1:]) * gain).flatten(0, 1)
            pictures = pictures + 0.015 * torch.randn_like(pictures)
        return ((pictures.clamp(0, 1) * 255).round() / 255).to(self.dtype)

    def _store(self, batch: Batch, stage: Stage, train: bool) -> Stored:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stage.frozen):
            seen = self.network.see(batch["pictures"])
        R = len(seen) // ROW
        window = torch.full((R,), WINDOW, device=self.device)
        if train:
            window = self._windows[torch.randint(len(self._windows), (R,), device=self.device)]
            seen = self._merged(seen, stage)
        return self.network.stream(seen, self.text.init_ids, ROW, window)

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

    def _seen(self, frames: Tensor, tokens: Tensor, marks: Marks) -> Tensor:
        """What single frames show, from the visual tokens."""
        *scores, at = self.network.tell_seen(tokens)
        losses = self._told("seen", dict(zip(SHOWN, scores, strict=True)), shown(frames), marks)
        wanted, there = placed(frames)
        off = (at - wanted).abs().mean(1)
        losses.append(2 * (off * there).sum() / there.sum().clamp(min=1))
        marks.add("seen_off", off * there, there)
        return FACTS_WEIGHT * torch.stack(losses).mean()

    def _kept(self, batch: Batch, stored: Stored, marks: Marks) -> Tensor:
        """What frames show and what happens in them, from the final states of the stream."""
        wanted = torch.cat((shown(batch["frames"]), batch["told_facts"]), 1)
        scores = dict(zip((*SHOWN, *TOLD), self.network.tell_last(stored.last), strict=True))
        return FACTS_WEIGHT * torch.stack(self._told("kept", scores, wanted, marks)).mean()

    @staticmethod
    def _told(own: str, scores: dict[str, Tensor], wanted: Tensor, marks: Marks) -> list[Tensor]:
        losses = []
        for at, (name, mine) in enumerate(scores.items()):
            loss, right, there = told_right(mine, wanted[:, at])
            losses.append(loss)
            marks.add(f"{own}_{name.split('_')[0]}", right, there)
        return losses
