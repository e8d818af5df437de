"""What a retainer sees of one layer of a bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from memdb.schemas.units import BlockKind


@dataclass(frozen=True, eq=False)
class LayerView:
    """The tokens that one layer holds, in order of their positions, all on one device.

    Keys are unrotated, so that equal content has equal keys at any time. Every token knows where it came from, also
    after many rounds: a retainer never has to infer it from the order of the survivors.

    `importance` is what the rows of a probe (a chat template, an observation window) paid to each token in one
    softmax over everything the layer holds; see `memdb.retain.attention`. None where a method looks at none.
    """

    k: Tensor  # (H, T, D) unrotated
    v: Tensor  # (H, T, D)
    position: Tensor  # (T,) int64, write positions in the stream, ascending
    frame: Tensor  # (T,) int64, >= 0; a prototype has the number of its frame
    patch: Tensor  # (T, 2) int64, row and column; -1, -1 for what was merged of several patches
    kind: Tensor  # (T,) int64, a BlockKind
    grid: tuple[int, int]  # rows and columns of a whole frame
    importance: Tensor | None = None  # (T,) fp32

    def __post_init__(self) -> None:
        T = self.tokens
        assert self.v.shape == self.k.shape, (self.k.shape, self.v.shape)
        assert self.position.shape == self.frame.shape == self.kind.shape == (T,)
        assert self.patch.shape == (T, 2)
        assert self.importance is None or self.importance.shape == (T,)

    @property
    def tokens(self) -> int:
        return int(self.k.shape[1])

    @property
    def merged(self) -> Tensor:
        """(T,) True for tokens that stand for no single patch: prototypes, summaries, merged frames and centres."""
        return (self.patch < 0).any(1)

    @property
    def prototype(self) -> Tensor:
        """(T,) True for the prototypes of frames."""
        return self.kind == int(BlockKind.PROTOTYPE)

    def part(self, kept: Tensor) -> LayerView:
        """The tokens `kept` (kept,). Their importance goes: it was shared out over another set of tokens."""
        return LayerView(
            self.k[:, kept],
            self.v[:, kept],
            self.position[kept],
            self.frame[kept],
            self.patch[kept],
            self.kind[kept],
            self.grid,
        )
