"""Text over memory: rows of tokens run through the layers above frames, and the loss of what they say."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train.batches import INIT_PROMPT, Sizes
from tools.train.facts import IGNORED, NUMBERS
from tools.train.marks import Marks
from tools.train.network import Look, Network, Stored
from tools.train.select import Layout, Selection, memory_of

NOTE_LAYER = 3  # behind it, times have taken up what they date
LOOK_LAYERS = (4, 5)  # where tokens of the answer look at their evidence


class Text:
    """What captions, searches and answers share: the network, the sizes of a step, and ids of numbers and marks."""

    def __init__(self, network: Network, sizes: Sizes, device: torch.device) -> None:
        self.network, self.sizes, self.device = network, sizes, device
        opening = f"<|im_start|>system\n{INIT_PROMPT}<|im_end|>\n<|im_start|>user\n"
        self.init_ids = torch.tensor(
            network.tokenizer.encode(opening, add_special_tokens=False), device=device
        )
        self._two = self._table("{:02d}", NUMBERS)
        self._two_spaced = self._table(" {:02d}", NUMBERS)
        self._marks = {text: self._table(text, 1)[0] for text in ("[", ":", "]")}
        count = torch.arange(NUMBERS, device=device)
        none = torch.full((len(network.tokenizer),), IGNORED, device=device)
        self.numbers = none.scatter(0, self._two, count).scatter(0, self._two_spaced, count)  # of every id

    def _table(self, form: str, count: int) -> Tensor:
        encode = self.network.tokenizer.encode
        ids = [encode(form.format(number), add_special_tokens=False) for number in range(count)]
        assert all(len(own) == 1 for own in ids)
        return torch.tensor([own[0] for own in ids], device=self.device)

    def stamp_ids(self, at_s: Tensor) -> Tensor:
        """`[HH:MM:SS]` of seconds (R, S) -> (R, S, 7)."""
        h, m, s = at_s // 3600, at_s // 60 % 60, at_s % 60
        a, colon, z = (self._marks[text].expand_as(at_s) for text in ("[", ":", "]"))
        return torch.stack((a, self._two[h.clamp(max=99)], colon, self._two[m], colon, self._two[s], z), -1)

    def said_ids(self, at_s: Tensor) -> Tensor:
        """` HH:MM:SS` of seconds (R,), as an answer says it -> (R, 5)."""
        h, m, s = at_s // 3600, at_s // 60 % 60, at_s % 60
        colon = self._marks[":"].expand_as(at_s)
        return torch.stack((self._two_spaced[h.clamp(max=99)], colon, self._two[m], colon, self._two[s]), 1)

    def read(
        self,
        x: Tensor,
        stored: Stored,
        chosen: Selection,
        layout: Layout,
        behind: Tensor,
        real: Tensor,
        keep: Tensor | None = None,
        look: Look | None = None,
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
            own = look if at in LOOK_LAYERS else None
            x = network.layer_over(at, x, q, k, v, stored, memory, place, real, own)
            if look is not None and at == NOTE_LAYER:
                look.state = x
        return x

    def loss(self, x: Tensor, labels: Tensor, marks: Marks, groups: dict[str, Tensor]) -> Tensor:
        """Cross entropy of what is said, each row counting the same; which rows are right to the last token."""
        where = labels >= 0
        scores = self.network.logits(x).float()
        each = F.cross_entropy(scores.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(
            labels
        )
        exact = ((scores.argmax(-1) == labels) | ~where).all(1).float()
        for name, mask in groups.items():
            marks.add(name, exact * mask, mask)
        loss = ((each * where).sum(1) / where.sum(1).clamp(min=1)).mean()
        marks.note("loss_" + next(iter(groups)), loss)
        return loss
