"""Which rows of a key table are forgotten: by the recording's tombstones, and by the end of its KV."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memdb.schemas.recording import Tombstone
from memdb.schemas.units import Table

Mask = npt.NDArray[np.bool_]


def forgotten_rows(rows: Table, tombstones: Sequence[Tombstone]) -> Mask:
    """(n,): rows of units that a tombstone means, and that overlap its span: see `Tombstone.covers`.

    rows (n,): a table with unit, start_ns and end_ns, in the order of its units. Where times ascend as well, as
    those of frames do, a tombstone is one run of rows, so that thousands of them cost two searches each.
    """
    if not tombstones or not len(rows):
        return np.zeros(len(rows), bool)
    starts, ends = rows["start_ns"], rows["end_ns"]
    since = np.array([tombstone.start_ns for tombstone in tombstones], np.int64)
    until = np.array([tombstone.end_ns for tombstone in tombstones], np.int64)
    below = rows["unit"].astype(np.int64).searchsorted([tombstone.below_unit for tombstone in tombstones])
    if _ascend(starts) and _ascend(ends):
        first = ends.searchsorted(since, side="right")
        last = np.maximum(first, np.minimum(starts.searchsorted(until, side="left"), below))
        steps = np.zeros(len(rows) + 1, np.int64)
        np.add.at(steps, first, 1)
        np.add.at(steps, last, -1)
        within: Mask = steps.cumsum()[:-1] > 0
        return within
    mask = np.zeros(len(rows), bool)
    for start_ns, end_ns, stop in zip(since, until, below, strict=True):
        mask[:stop] |= (starts[:stop] < end_ns) & (ends[:stop] > start_ns)
    return mask


def _ascend(times: npt.NDArray[np.int64]) -> bool:
    return bool((times[1:] >= times[:-1]).all())
