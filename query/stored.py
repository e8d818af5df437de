"""A recording opened for questions: its key table, its slices, and what was wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from memdb.index.frame_table import FrameTable
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.models.window import LayerKV
from memdb.pieces import MISSING, Pieces, PieceTable, piece_keys
from memdb.query.retrieve.topk import Rows
from memdb.query.unpack import Unpacker
from memdb.reader import SliceReader
from memdb.schemas.errors import CorruptionError
from memdb.schemas.keep import KeepSet
from memdb.schemas.rows import RecordingRow
from memdb.schemas.times import format_time, to_s
from memdb.schemas.units import Table
from memdb.slice_batch import SliceBatch, bad_slice
from memdb.store import Store

TOGETHER_BYTES = 16 << 20  # of one read: less starts threads too often, more leaves the cache


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

        self.row, self.reader = row, reader
        self.table = KeyTable.open(store, row.id)
        self.frames = FrameTable(store, row.id)
        self.search = KeySearch(self.table, backend=backend, sim=cast(Sim, sim))
        self._pieces = PieceTable(store, row.id)
        self._unpacker = Unpacker(row.spec)
        self._known: Sequence[Rows] = ()  # see `knowing`
        self._groups: Iterator[tuple[range, SliceBatch]] = iter(())
        self._group: tuple[range, SliceBatch] | None = None
        self._keyed: Table | None = None  # the table of blocks whose keys these are
        self._keys = np.zeros(0, np.int64)
        self._store = store
        self._positions: dict[int, npt.NDArray[np.int64]] = {}  # of the blocks of a unit, which never change
        self._rasters: dict[int, npt.NDArray[np.int64] | None] = {}
        self._held: dict[int, tuple[int, KeepSet]] = {}  # by unit, of a revision of it

    def read(
        self,
        layer: int,
        rows: Rows,
        device: torch.device,
        dtype: torch.dtype,
        readings: Readings,
        sizes: npt.NDArray[np.int64] | None = None,
    ) -> tuple[LayerKV | None, Rows]:
        """Keys and values of one layer's blocks, joined in time order (H, tokens, D), and the rows that were whole.

        Every slice is verified. What is damaged is left out and noted in `readings`; so is, where `sizes` (rows,) are
        given, a block of which another number of tokens is stored: a compaction gathered it since it was looked up.
        """
        if not len(rows):
            return None, rows
        batch, first = self._batch(layer, rows, readings)
        whole = batch.whole[first : first + len(rows)]
        if sizes is not None:
            known = np.array([kind.tokens for kind in batch.pieces.names.kinds] or [0])
            stored = known[batch.pieces.table["kind"][first : first + len(rows)]]
            other = whole & (stored != sizes)
            if other.any():
                readings.bad.append(
                    f"{self.row.name}, layer {layer}: {int(other.sum())} blocks were gathered just now"
                )
                whole = whole & ~other
        found = self._unpacker.join(batch, whole, device, dtype, first)
        return found, rows if whole.all() else rows[whole]

    def fetch(self, layers: Sequence[int], rows: Sequence[Rows], readings: Readings) -> SliceBatch:
        """One verified read of each layer's blocks, layer after layer, not yet unpacked."""
        batch = self.reader.read_pieces(self.pieces(layers, rows))
        self._pieces.replace(batch.renewed)
        self._leave_out_misfits(batch)
        self._see_tokens(batch, np.concatenate(rows))
        readings.bytes_read += batch.bytes_read
        readings.read_ms += batch.read_s * 1e3
        readings.calls += 1
        for bad in batch.bad:
            at = np.concatenate(rows)[bad.index]
            start = format_time(to_s(int(self.table.blocks["start_ns"][at])))
            readings.bad.append(f"{self.row.name} at {start}, layer {bad.layer}: {bad.reason} ({bad.file})")
        return batch

    def _see_tokens(self, batch: SliceBatch, rows: Rows) -> None:
        """Ageing may have thinned blocks since their key pages were written: what was read says what they hold."""
        table, kinds = batch.pieces.table, batch.pieces.names.kinds
        if self.row.spec.recipe.has_memory:  # nothing thins its blocks; what is gathered of them, `held` says
            return
        there = (table["file"] != MISSING) & batch.whole
        tokens = np.array([kind.tokens for kind in kinds], np.uint32)
        self.table.blocks["tokens"][rows[there]] = tokens[table["kind"][there]]

    def _leave_out_misfits(self, batch: SliceBatch) -> None:
        """Slices that are what was written, and cannot be what their codec makes of so many tokens, are bad."""
        misfits = [n for n, kind in enumerate(batch.pieces.names.kinds) if not self._unpacker.fits(kind)]
        if misfits:
            wrong = np.isin(batch.pieces.table["kind"], misfits) & batch.whole
            reason = "its size is not that of its tokens"
            batch.bad.extend(
                bad_slice(batch.pieces, index, reason) for index in np.flatnonzero(wrong).tolist()
            )

    @contextmanager
    def knowing(self, rows: Sequence[Rows], readings: Readings) -> Iterator[None]:
        """The blocks of every layer are known beforehand: inside, `read` takes them several layers at a time."""
        self._known, self._groups = rows, self.fetch_together(rows, readings)
        try:
            yield
        finally:
            self._known, self._groups, self._group = (), iter(()), None

    def fetch_together(self, rows: Sequence[Rows], readings: Readings) -> Iterator[tuple[range, SliceBatch]]:
        """`fetch` of every layer, of so many at a time as stay in the processor's cache."""
        layer = 0
        while layer < len(rows):
            own_bytes = int(self.pieces([layer], [rows[layer]]).table["raw_bytes"].sum())
            layers = range(layer, min(len(rows), layer + max(1, TOGETHER_BYTES // max(1, own_bytes))))
            yield layers, self.fetch(layers, rows[layers.start : layers.stop], readings)
            layer = layers.stop

    def _batch(self, layer: int, rows: Rows, readings: Readings) -> tuple[SliceBatch, int]:
        """A batch with these blocks of a layer, and from which slice on they lie in it."""
        if layer < len(self._known) and self._known[layer] is rows:
            while self._group is None or layer not in self._group[0]:
                if (group := next(self._groups, None)) is None:
                    break
                self._group = group
            else:
                layers, batch = self._group
                return batch, sum(len(self._known[before]) for before in range(layers.start, layer))
        return self.fetch([layer], [rows], readings), 0

    def pieces(self, layers: Sequence[int], rows: Sequence[Rows]) -> Pieces:
        """Where the slices of each layer's blocks lie."""
        if self._keyed is not self.table.blocks:  # a refresh made a new table
            self._keyed = self.table.blocks
            units, blocks = (self._keyed[name].astype(np.int64) for name in ("unit", "block"))
            self._keys = piece_keys(units, 0, blocks)
        if len(rows) == 1:
            return self._pieces.find(layers[0], self._keys[rows[0]])
        layer = np.repeat(np.asarray(layers, np.int64), [len(own) for own in rows])
        return self._pieces.find(layer, self._keys[np.concatenate(rows)])

    def held(self) -> dict[int, KeepSet]:
        """Of the units of which ageing left some tokens only, which. A damaged part is of no token."""
        found: dict[int, tuple[int, KeepSet]] = {}
        for number, revision in self._store.gathered_units(self.row).items():
            known = self._held.get(number)
            if known is None or known[0] != revision:
                with suppress(CorruptionError):
                    kept = self._store.read_held(self._store.unit(self.row.id, number))
                    known = None if kept is None else (revision, kept)
            if known is not None:
                found[number] = known
        self._held = found
        return {number: kept for number, (_, kept) in found.items()}

    def stands(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Where the tokens of these blocks were written in the stream, (tokens,)."""
        named = self.table.blocks[rows]
        for unit in set(named["unit"].tolist()) - self._positions.keys():
            self._positions[unit] = self._store.unit(self.row.id, unit).blocks["position"]
        starts = np.array([self._positions[int(row["unit"])][int(row["block"])] for row in named], np.int64)
        sizes = named["tokens"].astype(np.int64)
        return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))

    def raster(self, rows: Rows, frame_tokens: int) -> npt.NDArray[np.int64]:
        """At which place of its frame each token of these blocks stands, (tokens,), one block a unit.

        Of a block of which that is not known, or not any more, its tokens are taken to lie as `Uniform` chooses.
        """
        found = [np.zeros(0, np.int64)]
        for row in self.table.blocks[rows]:
            unit, size = int(row["unit"]), int(row["tokens"])
            if unit not in self._rasters:
                with suppress(CorruptionError):
                    kept = self._store.read_keep(self._store.unit(self.row.id, unit))
                    self._rasters[unit] = None if kept is None else kept.positions[0]
            known = self._rasters.get(unit)
            even = (2 * np.arange(size) + 1) * frame_tokens // (2 * max(size, 1))
            found.append(even if known is None or len(known) != size else known)
        return np.concatenate(found)

    def tokens(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Tokens of each block, (len(rows),)."""
        return self.table.blocks["tokens"][rows].astype(np.int64)

    def close(self) -> None:
        self.table.close()
