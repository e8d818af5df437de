"""The context of a guidance prompt: it reads one segment and nothing else, and leaves only its queries behind."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memdb.models.cache import CacheContext
from memdb.models.places import LINE, Placing, place_frames
from memdb.models.rotary import Rotary
from memdb.models.window import LayerKV


class GuidanceContext(CacheContext):
    """[segment | prompt] at places of their own from 0 on (StreamKV, arXiv 2511.07278, stage 3).

    No older window, no init tokens: what the prompt asks for is looked for in the segment alone. `window` bounds how
    far back it sees, as in encoding. `queries`, a layer each (Hq, T, D), are those of the last forward, unrotated.

    The released code runs prompt and segment in one forward; a forward of its own gives the same queries and cannot
    touch a bit of what the segment stores (R19).
    """

    def __init__(
        self,
        rotary: Rotary,
        segment: Sequence[LayerKV],
        *,
        window: int,
        frames: Sequence[int],
        placing: Placing = LINE,
    ) -> None:
        """segment: keys and values, unrotated, a layer each. frames: how many tokens each of its frames has."""
        places = [place_frames(placing, 0, frames, segment[0].k.device)] * len(segment)
        none = [kv.part(0, 0) for kv in segment]
        super().__init__(rotary, none, segment, window=window, places=places, placing=placing)
        self.queries: list[Tensor] = []

    def begin(self, tokens: int) -> None:
        self.queries = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.queries.append(q)
        return super().attend(layer, q, k, v, scale)
