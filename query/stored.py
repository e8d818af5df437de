"""A recording opened for questions: its key table, its slices, and what was wrong with them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from memdb import codecs
from memdb.codecs.pack import unpack_slices
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.models.load import DTYPES
from memdb.models.window import LayerKV
from memdb.query.retrieve.topk import Rows
from memdb.reader import SliceReader
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.times import format_time, to_s
from memdb.store import Store

UNITS_REMEMBERED = 4096


@dataclass
class Readings:
    """What the reads of one question took, and which slices were not whole."""

    bytes_read: int = 0
    read_ms: float = 0.0
    calls: int = 0
    bad: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """One warning for everything that could not be read."""
        if not self.bad:
            return []
        first = "; ".join(self.bad[:3])
        more = f" and {len(self.bad) - 3} more" if len(self.bad) > 3 else ""
        return [f"damaged blocks were left out: {first}{more}; run memdb verify"]


class StoredKV:
    """The KV tier of one recording. Blocks go by their row in the key table, which is their order in time."""

    def __init__(
        self, store: Store, row: RecordingRow, reader: SliceReader, *, backend: str, sim: str
    ) -> None:
        from typing import cast

        from memdb.index.exact import Sim

        self.row = row
        self.table = KeyTable.open(store, row.id)
        self.search = KeySearch(self.table, backend=backend, sim=cast(Sim, sim))
        self._store, self._reader = store, reader
        self._codec = codecs.codec(row.spec.recipe.codec) if row.spec.recipe.keeps_kv else None
        self._encoded = DTYPES[row.spec.dtype]
        self._units: OrderedDict[int, UnitRow] = OrderedDict()

    def read(
        self, layer: int, rows: Rows, device: torch.device, dtype: torch.dtype, readings: Readings
    ) -> tuple[LayerKV | None, Rows]:
        """Keys and values of one layer's blocks, joined in time order (H, tokens, D), and the rows that were whole.

        Every slice is verified. What is damaged is left out and noted in `readings`.
        """
        if not len(rows):
            return None, rows
        wanted, kinds = self._wanted(layer, rows)
        batch = self._reader.read(wanted)
        readings.bytes_read += batch.bytes_read
        readings.read_ms += batch.read_s * 1e3
        readings.calls += 1
        for slice_ in batch.bad:
            start = format_time(to_s(int(self.table.blocks[rows[slice_.index]]["start_ns"])))
            readings.bad.append(f"{self.row.name} at {start}, layer {layer}: {slice_.reason} ({slice_.file})")
        whole = batch.whole
        H, D = self.row.spec.model.shape.kv_heads, self.row.spec.model.shape.head_size
        if whole.all() and len(set(kinds)) == 1:  # the ordinary case: one strided unpack
            T, width = kinds[0]
            k, v = self._unpack(batch.stacked(), width, H, T, D, device, dtype)
            return LayerKV(_join(k), _join(v)), rows
        parts: list[LayerKV] = []
        for index in np.flatnonzero(whole):
            T, width = kinds[index]
            k, v = self._unpack(batch.raw(int(index))[None], width, H, T, D, device, dtype)
            parts.append(LayerKV(k[0], v[0]))
        if not parts:
            return None, rows[whole]
        joined = LayerKV(torch.cat([part.k for part in parts], 1), torch.cat([part.v for part in parts], 1))
        return joined, rows[whole]

    def tokens(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Tokens of each block, (len(rows),)."""
        return self.table.blocks["tokens"][rows].astype(np.int64)

    def _unpack(
        self,
        raw: npt.NDArray[np.uint8],
        width: int,
        H: int,
        T: int,
        D: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._codec is not None, "a recording without KV has no blocks to read"
        return unpack_slices(
            self._codec, raw, dtype=self._encoded, scale_bytes=width, H=H, T=T, D=D, device=device, out=dtype
        )

    def _wanted(
        self, layer: int, rows: Rows
    ) -> tuple[list[tuple[UnitRow, npt.NDArray[np.intp]]], list[tuple[int, int]]]:
        """The slices of one layer of these blocks, by unit; with each slice's (tokens, scale width)."""
        blocks = self.table.blocks[rows]
        wanted: list[tuple[UnitRow, npt.NDArray[np.intp]]] = []
        kinds: list[tuple[int, int]] = []
        numbers, starts = np.unique(blocks["unit"], return_index=True)
        for number, own in zip(numbers, np.split(blocks["block"], starts[1:]), strict=True):
            unit = self._unit(int(number))
            key = unit.slices["layer"].astype(np.int64) << 32 | unit.slices["block"]
            pieces = np.searchsorted(key, np.int64(layer) << 32 | own.astype(np.int64))
            wanted.append((unit, pieces.astype(np.intp)))
            kinds += [(int(row["tokens"]), int(row["scale_bytes"])) for row in unit.slices[pieces]]
        return wanted, kinds

    def _unit(self, number: int) -> UnitRow:
        unit = self._units.get(number)
        if unit is None:
            unit = self._units[number] = self._store.unit(self.row.id, number)
            if len(self._units) > UNITS_REMEMBERED:
                self._units.popitem(last=False)
        return unit

    def close(self) -> None:
        self.table.close()


def _join(x: torch.Tensor) -> torch.Tensor:
    """(n, H, T, D) -> (H, n*T, D), time order kept."""
    n, H, T, D = x.shape
    return x.permute(1, 0, 2, 3).reshape(H, n * T, D)
