"""What a question chose of a memory, turned back to where it stood (LiveVLM, version 2 of arXiv 2505.15269).

Keys are chosen without a position and then given theirs again. "Restored" is taken to mean the original positions, with
gaps where pages were not chosen. The alternative is a switch (ours, as the paper shows neither).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from memdb.models.places import LINE, Next, Places, Placing
from memdb.query.rebuild.original import Original
from memdb.schemas.keep import Ids


@dataclass(frozen=True)
class Restored(Original):
    """`consecutive`: no gaps, each layer as long as what it holds (P5), so that no position lies beyond those that the
    model was trained on. Where a token has three ids, frames are renumbered in time alone.
    """

    consecutive: bool = False

    def seat(self, placing: Placing, start: int, positions: Ids, frame_tokens: int, end: Next) -> Places:
        if not self.consecutive:
            return super().seat(placing, start, positions, frame_tokens, end)
        order = torch.arange(start, start + len(positions))
        if placing == LINE:
            return Places.line(order, start + len(positions))
        frame, within = np.divmod(positions - start, frame_tokens)
        nth = np.unique(frame, return_inverse=True)[1].reshape(-1)  # among the frames that are left
        ids = placing.at(start, torch.from_numpy(start + nth * frame_tokens + within), frame_tokens)
        behind = int(ids.max()) + 1 if ids.numel() else start
        return Places(order, ids, Next(start + len(positions), behind))
