"""What a bounded memory's retainer sees of one layer, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerView:
    """One layer's tokens, the memory's and the new chunk's, in the order of the stream.

    k, v (H, T, D): unrotated, at compute precision. position (T,): stream position at which the encoder saw them.
    frame (T,): number of the sampled frame. patch (T,): raster index in the frame, -1 for merged tokens.
    kind (T,): BlockKind. attention (Hq, P, T): fp32 attention of the P probe queries over these tokens, the rest of
    each row lies on the init tokens; None where the recipe probes nothing. fresh: the last so many tokens are new.
    """

    layer: int
    layers: int
    k: Tensor
    v: Tensor
    position: Tensor
    frame: Tensor
    patch: Tensor
    kind: Tensor
    attention: Tensor | None
    fresh: int

    @property
    def tokens(self) -> int:
        return int(self.k.shape[1])


class BoundedRetainer(Protocol):
    """A frozen dataclass of parameters with one verb. It never sees a question."""

    uses_attention: ClassVar[bool]

    @property
    def budget_tokens(self) -> int:
        """Tokens a layer, prototypes included, init tokens apart."""
        ...

    def least_tokens(self, frame_tokens: int) -> int:
        """The smallest budget with which it can do what it promises, for frames of so many tokens."""
        ...

    def choose(self, view: LayerView) -> Tensor:
        """Which tokens stay: places in the view, ascending, at most `budget_tokens` of them."""
        ...


@dataclass(frozen=True, eq=False)
class Merged:
    """Prototypes of new frames: k, v (H, P, D) unrotated; position, frame (P,). At most one a frame and layer."""

    k: Tensor
    v: Tensor
    position: Tensor
    frame: Tensor


@runtime_checkable
class Merges(Protocol):
    """A retainer that also makes prototypes. They are candidates of the same `choose`, flagged by their kind (R7)."""

    def merge(self, view: LayerView) -> Merged:
        """Prototypes of the view's fresh tokens, before any of them is dropped."""
        ...
