"""A header of which one bit flipped: found by trying each bit until the checksum is right again.

A recording that has one file has one header, and without it nobody knows what the rest is. A header is small,
so that trying takes milliseconds, and a 128-bit checksum that fits by chance does not happen. (Tombstones, the
other records that must not be lost, are written twice.)
"""

from __future__ import annotations

import os

import xxhash

from memdb.records import Kind, Prologue, Record, decode_prologue, read_exactly, read_record
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import PROLOGUE_BYTES
from memdb.segments import OpenSegment

_HEADER_BYTES_MAX = 64 << 10
_HASH_BYTES = 16


def corrected_header(segment: OpenSegment) -> Record | None:
    """The header at the beginning of a segment with one bit put right, None where that is not what is wrong."""
    size = min(_HEADER_BYTES_MAX, segment.size_bytes)
    try:
        start = bytearray(read_exactly(segment.fd, 0, size, segment.size_bytes, file=segment.file))
        prologue = _prologue(start) if size > PROLOGUE_BYTES else None
        if prologue is None or prologue.kind != Kind.HEADER:
            return None
        if prologue.body_bytes or not _HASH_BYTES < prologue.footer_bytes <= len(start) - PROLOGUE_BYTES:
            return None
        _correct_footer(start, prologue.length)
        fd = os.memfd_create("memdb-header")
        try:
            os.write(fd, start[: prologue.length])
            return read_record(fd, 0, prologue.length, file=segment.file)
        finally:
            os.close(fd)
    except CorruptionError:
        return None


def _prologue(data: bytearray) -> Prologue | None:
    """The prologue at the beginning of `data`, in which a flipped bit is put right."""
    for bit in range(-1, 8 * PROLOGUE_BYTES):
        _flip(data, bit)
        found = decode_prologue(bytes(data[:PROLOGUE_BYTES]))
        if found is not None:
            return found
        _flip(data, bit)
    return None


def _correct_footer(data: bytearray, length: int) -> None:
    """Put a flipped bit in the footer right, or leave it as it is."""
    end = length - _HASH_BYTES
    stored = int.from_bytes(data[end:length])
    for bit in range(8 * PROLOGUE_BYTES - 1, 8 * end):
        first = bit < 8 * PROLOGUE_BYTES  # once as it is: the flipped bit may be one of the checksum
        _flip(data, -1 if first else bit)
        found = int.from_bytes(xxhash.xxh3_128_digest(data[:end]))
        if found == stored or (first and (found ^ stored).bit_count() == 1):
            data[end:length] = found.to_bytes(_HASH_BYTES)
            return
        _flip(data, -1 if first else bit)


def _flip(data: bytearray, bit: int) -> None:
    if bit >= 0:
        data[bit // 8] ^= 1 << bit % 8
