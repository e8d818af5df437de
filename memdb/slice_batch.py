"""What a read gives: the slices that are whole, as views of one buffer, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from memdb.codecs.layout import aligned
from memdb.pieces import Kind, Pieces, split_key
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.schemas.units import Bytes


@dataclass(frozen=True)
class BadSlice:
    """A slice that could not be served."""

    index: int  # in the order asked for
    file: str  # relative to the store
    recording_id: str
    unit: int
    block: int
    layer: int
    reason: str


@dataclass(frozen=True, eq=False)
class SliceBatch:
    """The slices of one read, before compression, in the order asked for.

    All views end with the next read of the same reader: it reuses the buffer. Slices of one kind lie together, in
    the order asked for.
    """

    pieces: (
        Pieces  # as they were found: where a unit was rewritten since, another file or codec than asked for
    )
    buffer: Bytes
    starts: npt.NDArray[np.int64]  # (n,) bytes into the buffer, aligned to 64
    raw_bytes: npt.NDArray[np.int64]  # (n,)
    bad: list[BadSlice]
    bytes_read: int  # from files
    read_s: float
    renewed: list[UnitRow] = field(default_factory=list)  # by a fresh snapshot, where a file was gone

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        """(n,) which slices are what was written. The bytes of the others are zero."""
        mask = np.ones(len(self), bool)
        mask[[slice_.index for slice_ in self.bad]] = False
        return mask

    def raw(self, index: int) -> Bytes:
        """(raw_bytes,) of one slice. Raises CorruptionError for a bad one."""
        for slice_ in self.bad:
            if slice_.index == index:
                raise CorruptionError(f"{slice_.file}: {slice_.reason}", file=slice_.file)
        start = int(self.starts[index])
        return self.buffer[start : start + int(self.raw_bytes[index])]

    def stacked(self, first: int = 0, last: int | None = None) -> Bytes:
        """(n, raw_bytes) view of all slices, or of those from `first` to before `last`; no copy.

        They must be of one kind, and so of one size. Rows of bad slices are zero: leave them out by `whole`.
        """
        found = self.kinds(first, last)
        if len(found) > 1:
            raise ValueError("slices of different sizes cannot be stacked")
        return found[0][2] if found else np.zeros((0, 0), np.uint8)

    def kinds(
        self, first: int = 0, last: int | None = None
    ) -> list[tuple[Kind, npt.NDArray[np.intp], Bytes]]:
        """Each kind among the slices from `first` to before `last`, which of them are of it, and their bytes.

        The bytes (m, raw_bytes) are a view. Rows of bad slices are zero: leave them out by `whole`.
        """
        numbers = self.pieces.table["kind"][first:last]
        if not len(numbers):
            return []
        if int(numbers.min()) == int(numbers.max()):
            return [(self.pieces.kind(first), np.arange(len(numbers)), self._rows(first, len(numbers)))]
        found = []
        for number in np.unique(numbers).tolist():
            own = np.flatnonzero(numbers == number)
            found.append((self.pieces.names.kinds[number], own, self._rows(first + int(own[0]), len(own))))
        return found

    def _rows(self, index: int, count: int) -> Bytes:
        """So many slices of one kind from one on: they lie one after another."""
        start, size = int(self.starts[index]), int(self.raw_bytes[index])
        stride = aligned(size)
        return self.buffer[start : start + count * stride].reshape(count, stride)[:, :size]


def bad_slice(pieces: Pieces, index: int, reason: str) -> BadSlice:
    row = pieces.table[index]
    file = pieces.names.files[int(row["file"])]
    unit, layer, block = split_key(int(row["key"]))
    what = f"unit {unit}, block {block}, layer {layer}: {reason}"
    return BadSlice(index, file.name, file.recording_id, unit, block, layer, what)
