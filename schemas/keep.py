"""The keep set of a bounded memory: which stored tokens it holds after a commit, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

_BLOCK_BITS = _TOKEN_BITS = 16
BLOCK_TOKENS_MAX = 1 << _TOKEN_BITS  # tokens of a block that an id can tell apart
_UNIT_SHIFT = _BLOCK_BITS + _TOKEN_BITS


def token_ids(unit: int | Ids, block: int | Ids, token: int | Ids) -> Ids:
    """Unit, block of the unit and token of the block as one number, which sorts by them in this order."""
    shifted = (np.asarray(unit, np.int64) << _UNIT_SHIFT) | (np.asarray(block, np.int64) << _TOKEN_BITS)
    return np.asarray(shifted | np.asarray(token, np.int64), np.int64)


def split_ids(ids: Ids) -> tuple[Ids, Ids, Ids]:
    """Inverse of `token_ids`: unit, block, token."""
    low = (1 << _TOKEN_BITS) - 1
    return ids >> _UNIT_SHIFT, (ids >> _TOKEN_BITS) & low, ids & low


def block_ids(ids: Ids) -> Ids:
    """The block that each token is of, as one number: unit and block."""
    return ids >> _TOKEN_BITS


def first_ids(ids: Ids) -> tuple[Ids, Ids]:
    """The lowest id that a token of the same block can have, and that of the block behind it."""
    first = block_ids(ids) << _TOKEN_BITS
    return first, first + (1 << _TOKEN_BITS)


@dataclass(frozen=True, eq=False)
class KeepSet:
    """What the memory holds after the unit in which this stands, of blocks of that unit and of earlier ones.

    Layers may hold different tokens and counts. `positions` are those at which the encoder saw the tokens: of a
    prototype they differ from layer to layer and from where its block stands, so they are kept with each token.
    """

    ids: tuple[Ids, ...]  # a layer each: (tokens,) ascending, see token_ids
    positions: tuple[Ids, ...]  # a layer each: (tokens,)

    @property
    def tokens(self) -> list[int]:
        """Tokens held, layer by layer."""
        return [len(own) for own in self.ids]

    def kept(self, masks: list[npt.NDArray[np.bool_]]) -> KeepSet:
        """The tokens under a mask, a layer each."""
        return KeepSet(
            tuple(ids[mask] for ids, mask in zip(self.ids, masks, strict=True)),
            tuple(at[mask] for at, mask in zip(self.positions, masks, strict=True)),
        )

    def without_blocks(self, unit: int, blocks: Ids) -> KeepSet:
        """The same without the tokens of these blocks of one unit."""
        gone = block_ids(token_ids(unit, blocks, 0))
        return self.kept([~np.isin(block_ids(ids), gone) for ids in self.ids])

    def followed_by(self, later: KeepSet) -> KeepSet:
        """With the tokens of a later unit behind them."""
        return KeepSet(
            tuple(map(np.concatenate, zip(self.ids, later.ids, strict=True))),
            tuple(map(np.concatenate, zip(self.positions, later.positions, strict=True))),
        )

    def same(self, other: KeepSet) -> bool:
        """Whether two hold the same tokens at the same positions in every layer."""
        pairs = zip((*self.ids, *self.positions), (*other.ids, *other.positions), strict=True)
        return len(self.ids) == len(other.ids) and all(np.array_equal(a, b) for a, b in pairs)
