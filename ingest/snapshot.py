"""What a bounded memory holds, as the host knows it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from memdb.models.transfers import Received
from memdb.schemas.keep import Ids


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What the memory holds, on the host: a layer each, in the order of ids."""

    ids: tuple[Ids, ...]
    positions: tuple[Ids, ...]
    gone: tuple[int, ...] = ()  # of the frames that were asked about, those of which it holds nothing

    def tokens_from(self, layers: slice, position: int) -> int:
        """How many stand at this position or behind it, as many in each of these layers."""
        counts = {int(np.count_nonzero(own >= position)) for own in self.positions[layers]}
        assert len(counts) == 1, "the newest frames are whole in all layers"
        return counts.pop()


@dataclass(frozen=True, eq=False)
class Asked:
    """A snapshot on its way. `sizes`: tokens of each layer. `numbers`: of the frames that may be held, ascending."""

    flat: Received  # ids, positions, for each frame whether it is held, one place for none, whether all fits
    sizes: tuple[int, ...]
    numbers: tuple[int, ...]

    def answer(self) -> Snapshot:
        flat = self.flat.read()
        assert flat[-1], "the places of a layer do not ascend, or lie outside"
        ends = list(accumulate(self.sizes))
        cuts, M = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)], ends[-1]
        ids, positions, frames = flat[:M], flat[M : 2 * M], flat[2 * M : 2 * M + len(self.numbers)]
        gone = tuple(self.numbers[at] for at in np.flatnonzero(frames == 0))
        return Snapshot(tuple(ids[cut] for cut in cuts), tuple(positions[cut] for cut in cuts), gone)
