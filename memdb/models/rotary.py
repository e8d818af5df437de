"""Rotary position embedding, applied by us and by nobody else.

The model runs without rotation, so that what it caches is the key projection itself (position-free); we rotate
queries and keys when they meet, by positions inside the window or the rebuilt context, which stay small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memdb.schemas.scaling import RopeScaling

# Up to here angles come from a table (64 MiB at 64 channels); beyond, which only original positions reach, they are
# computed for the positions at hand. Both are the same numbers.
TABLE_POSITIONS_MAX = 1 << 17


class Rotary:
    """Half-split ("rotate half") RoPE with the checkpoint's own frequencies.

    Angles are computed in fp64 from integer positions and kept as an fp32 table that grows by doubling.
    `scaling` multiplies cosine and sine (YaRN's attention factor; 1 for the default rotation).

    A position is one number a token (T,), or three (3, T) where the model has `sections`: so many frequency pairs
    turn by the first number, so many by the second, the rest by the third (M-RoPE of Qwen2.5-VL: time, row,
    column). One number is the same as three equal ones.
    """

    def __init__(self, inv_freq: Tensor, scaling: float = 1.0, sections: Sequence[int] = ()) -> None:
        self.inv_freq = inv_freq.detach().to(torch.float64)  # (R/2,)
        self.scaling, self.sections = scaling, tuple(sections)
        self.scaled: dict[RopeScaling, Rotary] = {}  # made of this one, see yarn.py
        self._cos = torch.empty(0, 2 * len(inv_freq), device=inv_freq.device)  # (positions, R)
        self._sin = self._cos
        pairs = [axis for axis, size in enumerate(sections) for _ in range(size)]
        self._axis = torch.tensor(pairs * 2, dtype=torch.long, device=inv_freq.device)  # (R,) or (0,)
        assert not sections or 2 * len(inv_freq) == len(self._axis), "sections share out all pairs"

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine (>= length, R) in fp32 for the positions from 0 on."""
        if len(self._cos) < length:
            size = max(length, 2 * len(self._cos), 1024)
            self._cos, self._sin = self.at(torch.arange(size, device=self.inv_freq.device))
        return self._cos, self._sin

    def angles(self, positions: Tensor) -> Tensor:
        """Angles (T, R) in fp64 of any integer positions (T,) or (3, T)."""
        numbers = positions.to(torch.float64)
        if positions.ndim == 2:
            numbers = numbers[self._axis[: len(self.inv_freq)]].T  # (T, R/2): the number of each pair
        else:
            numbers = numbers[:, None]
        angles = numbers * self.inv_freq  # (T, R/2)
        return torch.cat((angles, angles), -1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (T, R) in fp32 at any integer positions (T,) or (3, T)."""
        angles = self.angles(positions)
        return (angles.cos() * self.scaling).float(), (angles.sin() * self.scaling).float()

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """x (H, T, D) rotated to the positions start, start + 1, ...; in fp32, rounded once to x's dtype."""
        stop = start + x.shape[1]
        cos, sin = self.tables(stop)
        return turn(x, cos[start:stop], sin[start:stop])

    def rotate_at(self, x: Tensor, positions: Tensor, length: int) -> Tensor:
        """x (H, T, D) rotated to `positions` (T,) or (3, T), all of them below `length`."""
        return turn(x, *self.rows(positions, length))

    def rows(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine (T, R) at `positions` (T,) or (3, T), for `turn`, as often as wanted."""
        if length > TABLE_POSITIONS_MAX:
            return self.at(positions)
        cos, sin = self.tables(length)
        if positions.ndim == 1:
            return cos[positions], sin[positions]
        index = positions[self._axis].T  # (T, R): the number by which each channel turns
        return cos.gather(0, index), sin.gather(0, index)

    def rest(self, x: Tensor) -> Tensor:
        """x (H, T, D) at position 0: turned by nothing, but with the factor of a scaled rotation."""
        return self.rotate_at(x, torch.zeros(x.shape[1], dtype=torch.long, device=x.device), 1)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of a rotation, for keys of foreign caches: x (H, T, D) at `positions` -> unrotated."""
        cos, sin = self.at(positions)
        return turn(x, cos / self.scaling**2, -sin / self.scaling**2)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of x (H, T, D) by cos, sin (T, R); the rest passes through."""
    size = cos.shape[-1]
    part = x[..., :size].float()
    left, right = part.chunk(2, -1)
    turned = part * cos + torch.cat((-right, left), -1) * sin
    if size == x.shape[-1]:
        return turned.to(x.dtype)
    return torch.cat((turned.to(x.dtype), x[..., size:]), -1)
