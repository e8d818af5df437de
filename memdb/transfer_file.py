"""An exported recording as it is read: every byte verified, every number doubted, one unit in memory at a time.

A file comes from anywhere. That a checksum is right says that it arrived as it was sent, and not that it makes
sense: so sizes, numbers and orders are compared with what the recording's own spec allows, before anything is
allocated by them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from memdb import codecs
from memdb.applying import EVENTS, TOMBSTONES_MAX, meta_names, role_of, spec_of, unit_row
from memdb.codecs.layout import affine_layout, oqm_layout, plain_layout
from memdb.codecs.planes import element_bytes
from memdb.contents import check_unit, stored_element_bytes, unit_from
from memdb.digest import check_digest, digests_of
from memdb.records import Kind, Record, meta_int, meta_str, read_body, read_prologue, read_record
from memdb.roll_forward import check_format
from memdb.schemas.errors import CodecError, CorruptionError, StoreError, UsageError
from memdb.schemas.rows import ALL_PPM, Part, RecordingSpec, UnitRow
from memdb.schemas.units import Unit

EXPORT = "export"  # the role of the file: no store has a segment of it
FOOTER_BYTES_MAX = 1 << 28
BODY_BYTES_MAX = 1 << 34
TOKENS_MAX = 1 << 20  # of a block
_REVISIONS_MAX = 1 << 31
_DTYPES = ("float32", "bfloat16", "float16")
# codec to its layout and bits
_SCALED = {
    "int8": (affine_layout, 8),
    "int4": (affine_layout, 4),
    "oqm": (oqm_layout, 4),
    "oqm2": (oqm_layout, 2),
}
_SCALE_BYTES = (2, 4)


@dataclass(frozen=True)
class Event:
    """A gap, epoch, end or tombstone."""

    kind: Kind
    number: int
    meta: dict[str, object]


class TransferFile:
    """An exported recording, open for reading. Its header is verified; the rest is while `items` goes on."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError for what is no export, CorruptionError, FormatVersionError."""
        self.file = str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        try:
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{path} is no file: name one that memdb export --format memdb wrote")
            self.size_bytes = found.st_size
            self._open(path)
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self, path: Path) -> None:
        try:
            header = self._record(0)
        except CorruptionError as error:
            if b"memdbREC" in os.pread(self._fd, 64, 0):
                raise
            raise UsageError(f"{path} is not what memdb export --format memdb writes: {error}") from None
        if header.kind is not Kind.HEADER or role_of(header) != EXPORT:
            raise UsageError(f"{path} is a segment of a store: name what memdb export --format memdb wrote")
        check_format(header)
        self.spec = _sound(spec_of(header), self.file)
        self.created_ns = meta_int(header, "created_ns")
        self.read_bytes = header.end
        self._footer_hash = header.footer_hash
        self.units = self.kv_from_unit = 0

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def items(self) -> Iterator[Event | tuple[UnitRow, Unit]]:
        """Events and units in the order of the file, once. All was right if it ends.

        Raises CorruptionError. `units` and `kv_from_unit` are known at the end.
        """
        counts = dict.fromkeys(EVENTS, 0)
        bounds = [0]  # unit numbers that events speak of
        start_ns = end_ns = 0
        while True:
            if self.read_bytes >= self.size_bytes:
                raise self._wrong("it is cut off: export it again")
            record = self._record(self.read_bytes)
            if record.meta.get("previous") != self._footer_hash.hex():
                raise self._wrong(f"the record at byte {record.offset} does not follow the one before it")
            self.read_bytes, self._footer_hash = record.end, record.footer_hash
            if record.kind in EVENTS:
                first = record.number if record.kind is not Kind.TOMBSTONE else meta_int(record, "first")
                if first != counts[record.kind] or not first <= record.number < TOMBSTONES_MAX:
                    raise self._wrong(
                        f"the {record.kind.name.lower()} at byte {record.offset} is out of order"
                    )
                counts[record.kind] = record.number + 1
                bounds += _units_of(record)
                yield self._event(record)
            elif record.kind is Kind.UNIT:
                row, unit = self._unit(record)
                if row.start_ns < start_ns or row.end_ns < end_ns:
                    raise self._wrong(f"unit {row.number} goes back in time")
                start_ns, end_ns = row.start_ns, row.end_ns
                yield row, unit
            elif record.kind is Kind.SEAL:
                break
            else:
                raise self._wrong(f"a {record.kind.name.lower()} has no place in it")
        self.kv_from_unit = meta_int(record, "kv_from_unit")
        if meta_int(record, "units") != self.units or meta_names(record, "replaces"):
            raise self._wrong(f"it holds {self.units} units, and its end says otherwise")
        if self.read_bytes != self.size_bytes:
            raise self._wrong(f"{self.size_bytes - self.read_bytes} bytes stand behind its end")
        if not 0 <= self.kv_from_unit <= self.units or not -1 <= min(bounds) <= max(bounds) <= self.units:
            raise self._wrong("it speaks of units that it does not hold")

    def _record(self, offset: int) -> Record:
        """The record at a byte, its sizes bounded before they are allocated."""
        prologue = read_prologue(self._fd, offset, self.size_bytes, file=self.file)
        if prologue.footer_bytes > FOOTER_BYTES_MAX or prologue.body_bytes > BODY_BYTES_MAX:
            raise self._wrong(f"the record at byte {offset} is larger than any can be")
        return read_record(self._fd, offset, self.size_bytes, file=self.file)

    def _event(self, record: Record) -> Event:
        _, integers, texts = EVENTS[record.kind]
        meta: dict[str, object] = {name: meta_int(record, name) for name in integers}
        meta |= {name: meta_str(record, name) for name in texts}
        if record.kind in (Kind.GAP, Kind.TOMBSTONE) and meta_int(record, "end_ns") < meta_int(
            record, "start_ns"
        ):
            raise self._wrong(f"the {record.kind.name.lower()} {record.number} ends before it begins")
        return Event(record.kind, record.number, meta)

    def _unit(self, record: Record) -> tuple[UnitRow, Unit]:
        if record.number != self.units:
            raise self._wrong(f"unit {record.number} stands where {self.units} should")
        if meta_str(record, "encoding") != self.spec.encoding_fingerprint:
            raise self._wrong(f"unit {record.number} was encoded in another way than the recording")
        try:
            row = unit_row(record, recording_id="", segment=self.file, commit_id=0)
            _check_row(row, self.spec)
            body = read_body(self._fd, record, self.size_bytes, file=self.file)
            unit = unit_from(row, body, stored_element_bytes(self.spec, row))
            check_unit(unit)
            _check_keys(unit, self.spec)
            check_digest(row, digests_of(unit))
        except (StoreError, CodecError, ValueError) as error:
            what = error if isinstance(error, CorruptionError) else f"unit {record.number}: {error}"
            raise self._wrong(str(what).replace(f"segments/{self.file}: ", "")) from None
        self.units += 1
        return row, unit

    def _wrong(self, what: str) -> CorruptionError:
        what = what.removeprefix(f"{self.file}: ")
        return CorruptionError(f"{self.file}: {what}", file=self.file)


def _sound(spec: RecordingSpec, file: str) -> RecordingSpec:
    """A spec with which questions and ingests can do something. Raises CorruptionError."""
    sizes = spec.model.shape.as_json()
    rate = spec.sample_fps
    if (
        spec.dtype not in _DTYPES
        or not 0 < rate < 1e6
        or not all(0 < size < 1 << 31 for size in sizes.values())
        or not _is_hex(spec.encoding_fingerprint)
        or not _is_hex(spec.model.fingerprint)
        or not all(0 <= token < 1 << 31 for token in spec.init_ids)
    ):
        raise CorruptionError(f"{file}: its header describes no recording that can be", file=file)
    return spec


def _is_hex(text: str) -> bool:
    return 0 < len(text) <= 128 and set(text) <= set("0123456789abcdef")


def _units_of(record: Record) -> list[int]:
    """The unit numbers that an event speaks of."""
    fields: Mapping[Kind, str] = {Kind.END: "units", Kind.EPOCH: "first_unit", Kind.TOMBSTONE: "below_unit"}
    return [meta_int(record, fields[record.kind])] if record.kind in fields else []


def _check_row(row: UnitRow, spec: RecordingSpec) -> None:
    """Whether a unit's tables can be those of a recording of this spec. Raises StoreError, ValueError."""
    shape, codec = spec.model.shape, row.codec or spec.recipe.codec
    if (
        not 0 <= row.revision < _REVISIONS_MAX
        or not 0 <= row.epoch < 1 << 31
        or not 0 <= row.kept_ppm <= ALL_PPM
    ):
        raise StoreError("its numbers make no sense")
    if row.codec and row.codec not in codecs.NAMES:
        raise StoreError(f"its codec {row.codec!r} is unknown: install a newer memdb-video")
    if any((part in row.parts) != row.has_caption for part in (Part.CAPTION, Part.VECTOR)):
        raise StoreError("its caption does not fit its parts")
    slices = row.slices
    if (Part.KV in row.parts) != bool(len(slices)) or row.layers not in (0, shape.layers):
        raise StoreError("its slices do not fit its parts")
    if len(row.blocks) and int(row.blocks["tokens"].max()) > TOKENS_MAX:
        raise StoreError("a block of it is larger than any can be")
    if not len(slices):
        return
    if int(slices["layer"].max()) >= shape.layers or int(slices["block"].max()) >= len(row.blocks):
        raise StoreError("its slices are of layers or blocks that it does not have")
    kinds = np.unique(slices[["tokens", "scale_bytes", "raw_bytes"]])
    for tokens, scale_bytes, raw_bytes in kinds.tolist():
        if not 0 < tokens <= TOKENS_MAX or raw_bytes != _slice_bytes(spec, codec, tokens, scale_bytes):
            raise StoreError(f"a slice of {tokens} tokens and {raw_bytes} bytes cannot be")


def _slice_bytes(spec: RecordingSpec, codec: str, tokens: int, scale_bytes: int) -> int:
    """What a slice takes before compression: see memdb/codecs/layout.py. -1 for what no codec makes."""
    H, D = spec.model.shape.kv_heads, spec.model.shape.head_size
    if codec in _SCALED:
        layout, bits = _SCALED[codec]
        return layout(bits, scale_bytes, H, tokens, D).slice_bytes if scale_bytes in _SCALE_BYTES else -1
    size = element_bytes(codec, spec.dtype)
    return plain_layout(size, H, tokens, D).slice_bytes if size and scale_bytes == 0 else -1


def _check_keys(unit: Unit, spec: RecordingSpec) -> None:
    shape = spec.model.shape
    if any(kept is not None and len(kept.ids) != shape.layers for kept in (unit.keep, unit.held)):
        raise StoreError(f"its keep set is not of the {shape.layers} layers of the model")
    expected = (shape.layers, len(unit.blocks), shape.kv_heads * shape.head_size)
    if unit.keys is not None and unit.keys.shape != expected:
        raise StoreError(f"its keys are {unit.keys.shape}, not {expected}")
