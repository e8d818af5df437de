"""The byte form of a record: prologue, body, footer.

    prologue   64 bytes: magic, kind, number, body length, footer length, zeros, xxh3_64 of these
    body       parts at 64-byte-aligned offsets, zeros between and after them
    footer     length of the JSON | JSON | blocks | slices | parts | zeros | xxh3_128 of prologue + footer

Every length is a multiple of 64, so that records follow each other aligned, and every byte stands under a
hash: the prologue's under both, the body's (padding too) under `body_xxh3` in the JSON, the footer's under
its own. A scan forward needs prologues alone. Sizes that a file claims are compared with its own size before
anything is allocated.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash

from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import PART_DTYPE, PROLOGUE_BYTES, Part
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE

ALIGNMENT_BYTES = 64
Buffer = bytes | memoryview


class Kind(IntEnum):
    """What a record is. The numbers are part of the format: never renumber."""

    HEADER = 1
    UNIT = 2
    GAP = 3
    EPOCH = 4
    END = 5
    RENAME = 6
    TOMBSTONE = 7
    KEEP_SET = 8
    SEAL = 9  # ends a file that forgetting or rewriting made: without it the file does not count


MAGIC = b"memdbREC"
_PROLOGUE = struct.Struct("<8sIIQQQ16x")  # magic, kind, zero, number, body bytes, footer bytes
_HASH64 = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")
_FOOTER_HASH_BYTES = 16
_HASH_BYTES = 256 << 10
_SURROGATE = re.compile("[\ud800-\udfff]")
_ZEROS = bytes(ALIGNMENT_BYTES)
_NUMBER_MAX = (1 << 63) - 1  # a catalog holds no greater one


@dataclass(frozen=True, eq=False)
class Record:
    """One whole record: its place in the file and all that its footer says. Its body is not held."""

    kind: Kind
    number: int
    offset: int  # bytes from the start of the file
    body_bytes: int
    footer_bytes: int
    meta: Mapping[str, object]
    blocks: bytes  # packed BLOCK_DTYPE
    slices: bytes  # packed SLICE_DTYPE
    parts: bytes  # packed PART_DTYPE
    footer_hash: bytes  # closes the record; the next one repeats it as `previous`

    @property
    def length(self) -> int:
        return PROLOGUE_BYTES + self.body_bytes + self.footer_bytes

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def body_offset(self) -> int:
        return self.offset + PROLOGUE_BYTES


@dataclass(frozen=True)
class Prologue:
    kind: int
    number: int
    body_bytes: int
    footer_bytes: int

    @property
    def length(self) -> int:
        return PROLOGUE_BYTES + self.body_bytes + self.footer_bytes


def encode(
    kind: Kind,
    number: int,
    meta: Mapping[str, object],
    *,
    offset: int,
    previous: bytes,
    parts: Sequence[tuple[Part, Buffer]] = (),
    blocks: bytes = b"",
    slices: bytes = b"",
) -> tuple[list[Buffer], Record]:
    """The buffers of a record, in the order of the file, and the record as a reader will find it at `offset`.

    `previous` is the footer hash of the record before in the same file, empty for the first.
    """
    body, table, body_xxh3 = _lay_out(parts)
    body_bytes = sum(len(buffer) for buffer in body)
    full_meta = {
        **meta,
        "previous": previous.hex(),
        "body_xxh3": body_xxh3,
        "counts": [len(blocks) // BLOCK_DTYPE.itemsize, len(slices) // SLICE_DTYPE.itemsize, len(parts)],
    }
    text = canonical_ascii(full_meta)
    content = b"".join([_LENGTH.pack(len(text)), text, blocks, slices, table])
    content += bytes(-(len(content) + _FOOTER_HASH_BYTES) % ALIGNMENT_BYTES)
    footer_bytes = len(content) + _FOOTER_HASH_BYTES
    prologue = encode_prologue(kind, number, body_bytes, footer_bytes)
    footer_hash: bytes = xxhash.xxh3_128_digest(prologue + content)
    record = Record(
        kind, number, offset, body_bytes, footer_bytes, full_meta, blocks, slices, table, footer_hash
    )
    return [prologue, *body, content + footer_hash], record


def encode_prologue(kind: int, number: int, body_bytes: int, footer_bytes: int) -> bytes:
    head = _PROLOGUE.pack(MAGIC, kind, 0, number, body_bytes, footer_bytes)
    return head + _HASH64.pack(xxhash.xxh3_64_intdigest(head))


def decode_prologue(data: bytes) -> Prologue | None:
    """The prologue in 64 bytes, or None where these are none."""
    if len(data) != PROLOGUE_BYTES or data[:8] != MAGIC:
        return None
    if xxhash.xxh3_64_intdigest(data[:56]) != _HASH64.unpack(data[56:])[0]:
        return None
    _, kind, _, number, body_bytes, footer_bytes = _PROLOGUE.unpack(data[:56])
    return Prologue(kind, number, body_bytes, footer_bytes)


def read_record(fd: int, offset: int, file_bytes: int, *, file: str) -> Record:
    """The record at `offset`, its prologue and footer verified; its body is verified by `read_body`.

    `file_bytes` is the size of the file, `file` its name for messages. Raises CorruptionError.
    """
    prologue = read_prologue(fd, offset, file_bytes, file=file)
    footer_at = offset + PROLOGUE_BYTES + prologue.body_bytes
    footer = read_exactly(fd, footer_at, prologue.footer_bytes, file_bytes, file=file)
    content, footer_hash = footer[:-_FOOTER_HASH_BYTES], footer[-_FOOTER_HASH_BYTES:]
    head = encode_prologue(
        prologue.kind, prologue.number, prologue.body_bytes, prologue.footer_bytes
    )  # equal to what was read, since its hash was right
    if xxhash.xxh3_128_digest(head + content) != footer_hash:
        raise CorruptionError(f"{file}: the footer of the record at byte {offset} is damaged", file=file)
    try:
        kind = Kind(prologue.kind)
    except ValueError:
        raise CorruptionError(
            f"{file}: the record at byte {offset} is of the unknown kind {prologue.kind}", file=file
        ) from None
    meta, tables = _split_footer(content, offset, file)
    return Record(
        kind,
        prologue.number,
        offset,
        prologue.body_bytes,
        prologue.footer_bytes,
        meta,
        *tables,
        footer_hash,
    )


def read_prologue(fd: int, offset: int, file_bytes: int, *, file: str) -> Prologue:
    """The prologue at `offset`, its lengths checked against the file's. Raises CorruptionError."""
    prologue = decode_prologue(read_exactly(fd, offset, PROLOGUE_BYTES, file_bytes, file=file))
    if prologue is None:
        raise CorruptionError(f"{file}: no record begins at byte {offset}", file=file)
    if (
        prologue.body_bytes % ALIGNMENT_BYTES
        or prologue.footer_bytes % ALIGNMENT_BYTES
        or prologue.footer_bytes == 0
        or prologue.length > file_bytes - offset
        or prologue.number > _NUMBER_MAX
    ):
        raise CorruptionError(f"{file}: the record at byte {offset} is torn or misses its end", file=file)
    return prologue


def read_body(fd: int, record: Record, file_bytes: int, *, file: str) -> bytes:
    """The body of a record, verified as a whole. Raises CorruptionError."""
    body = read_exactly(fd, record.body_offset, record.body_bytes, file_bytes, file=file)
    if xxhash.xxh3_64_intdigest(body) != record.meta.get("body_xxh3"):
        raise CorruptionError(f"{file}: the body of the record at byte {record.offset} is damaged", file=file)
    return body


def read_exactly(fd: int, offset: int, length: int, file_bytes: int, *, file: str) -> bytes:
    """`length` bytes at `offset`. Raises CorruptionError where the file does not give them."""
    if offset < 0 or length < 0 or offset + length > file_bytes:
        raise CorruptionError(f"{file}: ends before byte {offset + length}", file=file)
    pieces: list[bytes] = []
    done = 0
    while done < length:
        try:
            piece = os.pread(fd, length - done, offset + done)
        except OSError as error:
            raise CorruptionError(
                f"{file}: cannot be read at byte {offset + done}: {error}", file=file
            ) from None
        if not piece:
            raise CorruptionError(f"{file}: ends before byte {offset + length}", file=file)
        pieces.append(piece)
        done += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def meta_int(record: Record, key: str) -> int:
    """A number of a record's meta. Raises CorruptionError where there is none."""
    value = record.meta.get(key)
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise CorruptionError(f"the record at byte {record.offset} has no number {key!r}")
    return value


def meta_str(record: Record, key: str) -> str:
    """A text of a record's meta. Raises CorruptionError where there is none, or one that a catalog cannot hold."""
    value = record.meta.get(key)
    if not isinstance(value, str) or (not value.isascii() and _SURROGATE.search(value)):
        raise CorruptionError(f"the record at byte {record.offset} has no text {key!r}")
    return value


def canonical_ascii(data: object) -> bytes:
    """JSON in one byte form. ASCII, so that captions with unpaired surrogates survive."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _lay_out(parts: Sequence[tuple[Part, Buffer]]) -> tuple[list[Buffer], bytes, int]:
    """The body's buffers with zeros between, the table of its parts, and the hash of the whole."""
    body: list[Buffer] = []
    table = np.zeros(len(parts), PART_DTYPE)
    whole = xxhash.xxh3_64()
    offset = 0
    for row, (part, buffer) in zip(table, parts, strict=True):
        own, view = xxhash.xxh3_64(), memoryview(buffer)
        for start in range(0, len(view), _HASH_BYTES):  # both hashes of a piece while it is in the cache
            piece = view[start : start + _HASH_BYTES]
            own.update(piece)
            whole.update(piece)
        row["part"], row["offset"], row["length"], row["xxh3"] = part, offset, len(buffer), own.intdigest()
        padding = _ZEROS[: -len(buffer) % ALIGNMENT_BYTES]
        whole.update(padding)
        body += [piece for piece in (buffer, padding) if len(piece)]
        offset += len(buffer) + len(padding)
    return body, table.tobytes(), whole.intdigest()


def _split_footer(
    content: bytes, offset: int, file: str
) -> tuple[dict[str, object], tuple[bytes, bytes, bytes]]:
    """The meta and the three tables of a footer whose hash was right: a misfit is a foreign writer's."""
    foreign = CorruptionError(
        f"{file}: the footer of the record at byte {offset} has no known form", file=file
    )
    if len(content) < _LENGTH.size:
        raise foreign
    (text_bytes,) = _LENGTH.unpack_from(content)
    at = _LENGTH.size + text_bytes
    if at > len(content):
        raise foreign
    try:
        meta = json.loads(content[_LENGTH.size : at])
        counts = [int(count) for count in meta["counts"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise foreign from None
    if len(counts) != 3 or min(counts) < 0:
        raise foreign
    tables: list[bytes] = []
    for count, dtype in zip(counts, (BLOCK_DTYPE, SLICE_DTYPE, PART_DTYPE), strict=True):
        tables.append(content[at : at + count * dtype.itemsize])
        at += count * dtype.itemsize
    if not 0 <= len(content) - at < ALIGNMENT_BYTES or any(content[at:]):
        raise foreign
    return meta, (tables[0], tables[1], tables[2])
