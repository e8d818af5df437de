"""Whether a page can be one of its recording: asked before anything is allocated by its sizes.

A checksum tells that a page is what was written, and not that it makes sense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memdb.schemas.errors import CorruptionError

if TYPE_CHECKING:
    from memdb.index.pages import Page, PageHeader
    from memdb.schemas.fingerprint import ModelShape
    from memdb.schemas.rows import UnitRow

_BLOCKS_MAX = 1 << 16  # of a unit
_VECTOR_SIZE_MAX = 1 << 16


@dataclass(frozen=True)
class KeySizes:
    """What the model gives the keys of a recording. Pages of other sizes are not this recording's."""

    layers: int  # L
    key_size: int  # H*D

    @classmethod
    def of(cls, shape: ModelShape) -> KeySizes:
        return cls(shape.layers, shape.kv_heads * shape.head_size)


def can_be(header: PageHeader, sizes: KeySizes | None) -> bool:
    """Whether the sizes of a header fit each other, and the keys those of the model."""
    units = header.last_unit - header.first_unit + 1
    keyed = (header.layers, header.key_size) if header.blocks else None
    return (
        units > 0
        and header.last_unit < 1 << 62
        and header.captions <= units
        and header.blocks <= units * _BLOCKS_MAX
        and header.vector_size <= _VECTOR_SIZE_MAX
        and (keyed is not None or (header.layers, header.key_size) == (0, 0))
        and (keyed is None or sizes is None or keyed == (sizes.layers, sizes.key_size))
    )


def are_its_own(page: Page) -> bool:
    """Whether the rows of a page are of its units, in order."""
    for table, once in ((page.blocks, False), (page.captions, True)):
        units = table["unit"]
        if len(units) and not (
            page.header.first_unit <= int(units[0])
            and int(units[-1]) <= page.header.last_unit
            and bool((units[1:] > units[:-1] if once else units[1:] >= units[:-1]).all())
        ):
            return False
    return bool((page.blocks["block"] < _BLOCKS_MAX).all())


def check_keys(row: UnitRow, keys: npt.NDArray[np.float16] | None, sizes: KeySizes) -> None:
    """Whether a unit's keys are of the model's sizes. Raises CorruptionError."""
    if keys is not None and keys.shape != (sizes.layers, len(row.blocks), sizes.key_size):
        file = f"segments/{row.segment}"
        raise CorruptionError(f"{file}: the keys of unit {row.number} are {keys.shape}", file=file)


def check_vector(row: UnitRow, vector: npt.NDArray[np.float32], size: int) -> None:
    """Whether a unit's caption vector is of the size of those before it. Raises CorruptionError."""
    if vector.shape != (size,):
        file = f"segments/{row.segment}"
        raise CorruptionError(f"{file}: the vector of unit {row.number} is {vector.shape}", file=file)
