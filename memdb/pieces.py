"""Where slices lie, as columns: what a read needs to know of each, looked up once a unit and then by NumPy alone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb.codecs.planes import element_bytes
from memdb.contents import slice_bytes_max
from memdb.database import CATALOG
from memdb.schemas.errors import CodecError, CorruptionError, UsageError
from memdb.schemas.rows import RecordingSpec, UnitRow
from memdb.schemas.units import Table
from memdb.store import Store

# One row a slice. `offset` counts from the start of the file; `file` and `kind` are numbers of a `Names`; `key` is
# unit, layer and block as one number, see `piece_keys`.
PIECE_DTYPE = np.dtype(
    [
        ("offset", "<i8"),
        ("xxh3", "<u8"),
        ("key", "<i8"),
        ("stored_bytes", "<i8"),
        ("raw_bytes", "<i8"),
        ("file", "<i4"),
        ("kind", "<i4"),
        ("element_bytes", "<i8"),
    ]
)
MISSING = 0  # the file of a slice that its unit does not hold
ROWS_REMEMBERED = 1 << 20  # of one recording: 56 MiB
_BLOCK_BITS = _LAYER_BITS = 16  # as SLICE_DTYPE has room for
_UNIT_SHIFT = _LAYER_BITS + _BLOCK_BITS

logger = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PieceFile:
    recording_id: str
    segment: str  # file name in segments/

    @property
    def name(self) -> str:
        """Relative to the store."""
        return f"segments/{self.segment}" if self.segment else CATALOG


@dataclass(frozen=True)
class Kind:
    """Slices of one kind unpack in one strided call."""

    codec: str
    tokens: int
    scale_bytes: int
    raw_bytes: int


class Names:
    """Files and kinds by number. It only grows: a number keeps its meaning."""

    def __init__(self) -> None:
        self.files: list[PieceFile] = [PieceFile("", "")]
        self.kinds: list[Kind] = []
        self._file_numbers: dict[PieceFile, int] = {}
        self._kind_numbers: dict[Kind, int] = {}

    def file(self, file: PieceFile) -> int:
        number = self._file_numbers.setdefault(file, len(self.files))
        if number == len(self.files):
            self.files.append(file)
        return number

    def kind(self, kind: Kind) -> int:
        number = self._kind_numbers.setdefault(kind, len(self.kinds))
        if number == len(self.kinds):
            self.kinds.append(kind)
        return number


@dataclass(frozen=True, eq=False)
class Pieces:
    """The slices of one read, in the order asked for."""

    table: Table  # (n,) PIECE_DTYPE
    names: Names

    def __len__(self) -> int:
        return len(self.table)

    def kind(self, index: int) -> Kind:
        return self.names.kinds[int(self.table["kind"][index])]


def piece_keys(unit: int | Integers, layer: int | Integers, block: Integers) -> Integers:
    """Unit, layer and block as one number, which sorts by them in this order."""
    return (unit << _UNIT_SHIFT) | (layer << _BLOCK_BITS) | block


def split_key(key: int) -> tuple[int, int, int]:
    """Unit, layer, block."""
    layer, block = (key >> _BLOCK_BITS) & ((1 << _LAYER_BITS) - 1), key & ((1 << _BLOCK_BITS) - 1)
    return key >> _UNIT_SHIFT, layer, block


def unit_pieces(row: UnitRow, spec: RecordingSpec, names: Names) -> Table:
    """(slices,) PIECE_DTYPE, one for one with `row.slices`. Raises CorruptionError where the row makes no sense."""
    slices = row.slices
    table = np.zeros(len(slices), PIECE_DTYPE)
    if not len(slices):
        return table
    codec = row.codec or spec.recipe.codec
    try:
        table["element_bytes"] = element_bytes(codec, spec.dtype)
    except CodecError as error:
        raise CorruptionError(f"unit {row.number} of {spec.name!r}: {error}", file=CATALOG) from None
    table["offset"] = slices["offset"].astype(np.int64) + row.payload_offset
    table["file"] = names.file(PieceFile(row.recording_id, row.segment))
    table["key"] = piece_keys(row.number, slices["layer"].astype(np.int64), slices["block"].astype(np.int64))
    for name in ("xxh3", "stored_bytes", "raw_bytes"):
        table[name] = slices[name]
    if (table["stored_bytes"] > table["raw_bytes"]).any() or int(table["raw_bytes"].max()) > slice_bytes_max(
        spec
    ):
        raise CorruptionError(f"unit {row.number} of {spec.name!r} has slices that cannot be", file=CATALOG)
    sizes = np.stack([slices[name].astype(np.int64) for name in ("tokens", "scale_bytes", "raw_bytes")])
    distinct, which = (
        (sizes[:, :1], 0) if (sizes == sizes[:, :1]).all() else np.unique(sizes, axis=1, return_inverse=True)
    )
    numbers = [names.kind(Kind(codec, *map(int, column))) for column in distinct.T]
    table["kind"] = np.asarray(numbers)[which]
    return table


def wanted_pieces(
    store: Store, wanted: Sequence[tuple[UnitRow, npt.NDArray[np.intp]]], names: Names
) -> Pieces:
    """Of each unit the slices whose numbers in `row.slices` are given, in that order."""
    specs: dict[str, RecordingSpec] = {}
    parts = [np.zeros(0, PIECE_DTYPE)]
    for row, indices in wanted:
        if row.recording_id not in specs:
            specs[row.recording_id] = store.recording_by_id(row.recording_id).spec
        parts.append(unit_pieces(row, specs[row.recording_id], names)[indices])
    return Pieces(np.concatenate(parts), names)


def renewed(store: Store, pieces: Pieces, files: Collection[int]) -> tuple[Pieces, list[UnitRow]]:
    """The same slices where the catalog has their units by now, for those of files that are gone.

    Also the rows that were looked up. A slice whose unit is forgotten or lost, or lies in the same file still, stays
    as it is; one that its unit does not hold any more becomes one of no file.
    """
    table, names = pieces.table.copy(), pieces.names
    rows: list[UnitRow] = []
    for number in files:
        file = names.files[number]
        for unit in np.unique(table["key"][table["file"] == number] >> _UNIT_SHIFT).tolist():
            try:
                spec = store.recording_by_id(file.recording_id).spec
                row = store.unit(file.recording_id, unit)
                if row.segment == file.segment:
                    continue
                found = unit_pieces(row, spec, names)
            except (UsageError, CorruptionError):
                continue
            rows.append(row)
            own = (table["file"] == number) & (table["key"] >> _UNIT_SHIFT == unit)
            table[own] = _matched(_by_key(found), table["key"][own], names)
    return Pieces(table, names), rows


def _matched(known: Table, keys: Integers, names: Names) -> Table:
    """The rows with these keys of a table that is sorted by them. One that is not there comes as a row of no file."""
    found = np.zeros(len(keys), PIECE_DTYPE)
    found["key"], found["kind"] = keys, names.kind(Kind("", 0, 0, 0))
    there = np.isin(keys, known["key"])
    found[there] = known[np.searchsorted(known["key"], keys[there])]
    return found


def _by_key(table: Table) -> Table:
    """Sorted by unit, layer and block, as whoever wrote it has it already."""
    keys = table["key"]
    return table if (keys[1:] > keys[:-1]).all() else table[np.argsort(keys, kind="stable")]


def _blank(rows: int) -> Table:
    """Rows of no slice: no key is negative."""
    table = np.zeros(rows, PIECE_DTYPE)
    table["key"] = -1
    return table


class PieceTable:
    """The slices of one recording's units, as far as they were looked up.

    A unit is looked up when a slice of it is first asked for; `replace` takes the row that a fresh snapshot of
    the catalog has. Starts over once it holds more than `ROWS_REMEMBERED`.
    """

    def __init__(self, store: Store, recording_id: str) -> None:
        self._store, self._recording_id = store, recording_id
        self._spec = store.recording_by_id(recording_id).spec
        self.names = Names()
        self._firsts = np.zeros(0, np.int64)  # of each unit its first row, -1 where it was not looked up
        self._counts = np.zeros(0, np.int64)  # of each unit its rows
        self._blocks = np.zeros(0, np.int64)  # of each unit its blocks
        self.clear()

    def clear(self) -> None:
        """Forget every unit: their rows are looked up again."""
        self._firsts[:] = -1
        self._counts[:] = 0
        self._count = 0
        self._rows = _blank(1)  # (capacity,), sorted by key within a unit

    def find(self, layers: Integers | int, blocks: Integers) -> Pieces:
        """The slices of these layers of these blocks, given as the keys of their slices in layer 0.

        A slice that its unit does not hold, or whose unit's row is damaged, comes as one of no file.
        """
        if not len(blocks):
            return Pieces(np.zeros(0, PIECE_DTYPE), self.names)
        keys, units = blocks + (layers << _BLOCK_BITS), blocks >> _UNIT_SHIFT
        try:
            table = self._guess(layers, blocks, units)
        except IndexError:
            self._make_room(int(units.max()) + 1)
            table = self._guess(layers, blocks, units)
        if not (table["key"] == keys).all():
            self._look_up(units)
            table = self._guess(layers, blocks, units)
            if not (table["key"] == keys).all():
                table = self._search(units, keys)
        return Pieces(table, self.names)

    def _guess(self, layers: Integers | int, blocks: Integers, units: Integers) -> Table:
        """The rows as they lie where every layer of a unit holds every block; their keys tell whether it is so."""
        at = self._firsts[units] + (blocks & ((1 << _BLOCK_BITS) - 1))
        if not isinstance(layers, int) or layers:
            at += layers * self._blocks[units]
        return self._rows.take(at, mode="clip")

    def replace(self, rows: Sequence[UnitRow]) -> None:
        """Units as a fresh snapshot has them."""
        for row in rows:
            self._add(row)

    def _look_up(self, units: Integers) -> None:
        missing = np.unique(units[self._firsts[units] < 0])
        if len(missing) and self._count > ROWS_REMEMBERED:
            self.clear()
            missing = np.unique(units)
        catalog = self._store.catalog
        with catalog.database.reading():
            for number in missing.tolist():
                try:
                    self._add(catalog.unit(self._recording_id, number))
                except CorruptionError as error:
                    logger.warning("a unit cannot be read: %s", error)

    def _add(self, row: UnitRow) -> None:
        table = _by_key(unit_pieces(row, self._spec, self.names))
        end = self._count + len(table)
        if end > len(self._rows):
            room = max(end, 2 * len(self._rows), 4096) - len(self._rows)
            self._rows = np.concatenate([self._rows, _blank(room)])
        self._rows[self._count : end] = table
        if row.number >= len(self._firsts):
            self._make_room(row.number + 1)
        self._firsts[row.number] = self._count
        self._counts[row.number], self._blocks[row.number] = len(table), row.block_count
        self._count = end

    def _make_room(self, units: int) -> None:
        room = max(units, 2 * len(self._firsts)) - len(self._firsts)
        self._firsts = np.concatenate([self._firsts, np.full(room, -1, np.int64)])
        self._counts, self._blocks = (
            np.concatenate([column, np.zeros(room, np.int64)]) for column in (self._counts, self._blocks)
        )

    def _search(self, units: Integers, keys: Integers) -> Table:
        """The same where some layers of a unit hold only some of its blocks, or none any more."""
        table = np.zeros(len(keys), PIECE_DTYPE)
        for unit in np.unique(units).tolist():
            own, first = units == unit, max(0, int(self._firsts[unit]))
            end = first + int(self._counts[unit])
            table[own] = _matched(self._rows[first:end], keys[own], self.names)
        return table
