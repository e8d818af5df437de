"""What a hostile writer makes of valid segments: wrong lengths, numbers and tables under right checksums."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from memdb.contents import digests_from
from memdb.records import canonical_ascii, encode_prologue, read_body, read_record
from memdb.schemas.errors import MemdbError
from memdb.schemas.rows import PART_DTYPE, PROLOGUE_BYTES, Part, UnitRow
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, Table
from tools.trust.hostile_values import NUMBERS, Chance, deep, mangled, odd_field, odd_json

_BOMB_BYTES = 1 << 30


@dataclass(frozen=True)
class Raw:
    """One record taken apart."""

    kind: int
    number: int
    meta: dict[str, Any]
    body: bytes
    blocks: Table
    slices: Table
    parts: Table


def take_apart(path: Path) -> list[Raw]:
    found = []
    size = path.stat().st_size
    with open(path, "rb") as file:
        offset = 0
        while offset < size:
            record = read_record(file.fileno(), offset, size, file=path.name)
            body = read_body(file.fileno(), record, size, file=path.name)
            tables = [
                np.frombuffer(data, dtype).copy()
                for data, dtype in (
                    (record.blocks, BLOCK_DTYPE),
                    (record.slices, SLICE_DTYPE),
                    (record.parts, PART_DTYPE),
                )
            ]
            found.append(Raw(int(record.kind), record.number, dict(record.meta), body, *tables))
            offset = record.end
    return found


def put_together(records: list[Raw], chance: Chance) -> bytes:
    """The file, with every checksum right and every record after the one before."""
    out, previous = bytearray(), b""
    for record in records:
        meta: Any = record.meta
        if isinstance(meta, dict):
            hashes = {"previous": previous.hex(), "body_xxh3": xxhash.xxh3_64_intdigest(record.body)}
            meta = {**meta, **hashes}
        if isinstance(meta, dict) and chance.random() < 0.99:
            meta["counts"] = [len(record.blocks), len(record.slices), len(record.parts)]
        try:
            text = deep(canonical_ascii(meta))
        except (ValueError, TypeError):
            text = b"{}"
        tables = record.blocks.tobytes() + record.slices.tobytes() + record.parts.tobytes()
        content = len(text).to_bytes(4, "little") + text + tables
        content += bytes(-(len(content) + 16) % 64)
        prologue = encode_prologue(
            record.kind % (1 << 32), record.number % (1 << 64), len(record.body), len(content) + 16
        )
        previous = xxhash.xxh3_128_digest(prologue + content)
        out += prologue + record.body + content + previous
    return bytes(out)


def hostile_records(records: list[Raw], chance: Chance) -> bytes:
    """A segment of which some records are not what they should be."""
    changed = list(records)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(changed))
        match chance.randrange(12):
            case 0 if len(changed) > 1:
                del changed[at]
            case 1:
                changed.insert(at, changed[chance.randrange(len(changed))])
            case 2:
                other = chance.randrange(len(changed))
                changed[at], changed[other] = changed[other], changed[at]
            case _:
                changed[at] = _hostile(changed[at], chance)
    return put_together(changed, chance)


def _hostile(record: Raw, chance: Chance) -> Raw:
    match chance.randrange(9):
        case 0 | 1 | 2:
            found = replace(record, meta=odd_json(record.meta, chance))
        case 3:
            field: dict[str, Any] = {chance.choice(("kind", "number")): chance.choice(NUMBERS)}
            found = replace(record, **field)
        case 4:
            found = replace(record, blocks=odd_field(record.blocks, chance))
        case 5:
            found = replace(record, slices=odd_field(record.slices, chance))
        case 6:
            found = replace(record, parts=odd_field(record.parts, chance))
        case 7:
            found = _with_body(record, chance)
        case _:
            found = _bomb(record, chance)
    return _believable(found) if chance.random() < 0.7 else found


def _with_body(record: Raw, chance: Chance) -> Raw:
    """Other bytes in one part, of any length."""
    if not len(record.parts):
        return replace(record, body=bytes(chance.choice((64, 4096))))
    at = chance.randrange(len(record.parts))
    start, length = int(record.parts[at]["offset"]), int(record.parts[at]["length"])
    part = mangled(record.body[start : start + length], chance)
    if record.parts[at]["part"] == Part.CAPTION:
        with suppress(ValueError, TypeError, RecursionError):
            part = deep(canonical_ascii(odd_json(json.loads(record.body[start : start + length]), chance)))
    return _with_part(record, at, part)


def _with_part(record: Raw, at: int, part: bytes) -> Raw:
    """A part replaced; those behind it move."""
    start, length = int(record.parts[at]["offset"]), int(record.parts[at]["length"])
    padded = part + bytes(-len(part) % 64)
    end = start + length + -length % 64
    parts = record.parts.copy()
    parts["length"][at] = len(part)
    later = parts["offset"] > start
    parts["offset"][later] += np.uint64((len(padded) - (end - start)) % (1 << 64))
    return replace(record, body=record.body[:start] + padded + record.body[end:], parts=parts)


def _bomb(record: Raw, chance: Chance) -> Raw:
    """A slice that claims, or holds, a gibibyte in a few bytes."""
    places = [at for at, row in enumerate(record.parts) if row["part"] == Part.KV]
    if not places or not len(record.slices):
        return record
    if chance.random() < 0.3:
        frame = (
            b"\x28\xb5\x2f\xfd\xe0" + (chance.choice(NUMBERS) % (1 << 64)).to_bytes(8, "little") + bytes(60)
        )
    else:
        frame = _zeros_frame()
    at = chance.randrange(len(record.slices))
    payload_at, length = (int(record.parts[places[0]][name]) for name in ("offset", "length"))
    payload = record.body[payload_at : payload_at + length]
    slices = record.slices.copy()
    slices["offset"][at], slices["stored_bytes"][at] = len(payload), len(frame)
    if chance.random() < 0.6:
        slices["raw_bytes"][at] = _BOMB_BYTES
    return replace(_with_part(record, places[0], payload + frame + bytes(-len(frame) % 64)), slices=slices)


_frames: list[bytes] = []


def _zeros_frame() -> bytes:
    if not _frames:
        packer = zstandard.ZstdCompressor(level=1).compressobj(size=_BOMB_BYTES)
        piece = bytes(1 << 20)
        _frames.append(b"".join(packer.compress(piece) for _ in range(_BOMB_BYTES >> 20)) + packer.flush())
    return _frames[0]


def _believable(record: Raw) -> Raw:
    """Checksums of parts and slices, and the unit's digest, as if all of it had been meant."""
    parts, slices = record.parts.copy(), record.slices.copy()
    with suppress(ValueError, OverflowError, IndexError):
        for row in parts:
            at, length = int(row["offset"]), int(row["length"])
            row["xxh3"] = xxhash.xxh3_64_intdigest(record.body[at : at + length])
            if row["part"] == Part.KV:
                for piece in slices:
                    first = at + int(piece["offset"])
                    stored = record.body[first : first + int(piece["stored_bytes"])]
                    piece["xxh3"] = xxhash.xxh3_64_intdigest(stored)
    found = replace(record, parts=parts, slices=slices)
    meta = record.meta
    with suppress(MemdbError, ValueError, TypeError, KeyError, OverflowError, MemoryError, AttributeError):
        row = UnitRow(
            *("0" * 32, record.number, 1, "x", 0, PROLOGUE_BYTES + len(record.body)),
            *(meta["start_ns"], meta["end_ns"], meta["epoch"], b"", meta["layers"], len(record.blocks)),
            *(meta["caption_tokens"], parts.tobytes(), record.blocks.tobytes(), slices.tobytes()),
        )
        if int(slices["raw_bytes"].max(initial=0)) < 1 << 24:
            digest = digests_from(row, record.body, 4).all.hex()
            found = replace(found, meta={**meta, "digest": digest})
    return found
