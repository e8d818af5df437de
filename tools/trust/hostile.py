"""What a hostile writer makes of valid files: wrong lengths, numbers and tables under right checksums."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from memdb.contents import digests_from
from memdb.database import row_checksum
from memdb.records import canonical_ascii, encode_prologue, read_body, read_record
from memdb.schemas.errors import MemdbError
from memdb.schemas.rows import PART_DTYPE, PROLOGUE_BYTES, Part, UnitRow
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, Table
from memdb.tables import COLUMNS, KEYS

NUMBERS = (
    *(0, 1, -1, 2, 7, 63, 64, 255, 65535, 65536, 10**6),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 53) + 1),
    *((1 << 62), (1 << 63) - 1, -(1 << 63), 1 << 63, (1 << 64) - 1, 10**30),
)
_DEEP = '"@deep@"'  # stands for nesting that json.dumps could not write
_DEPTH = 100_000
_BOMB_BYTES = 1 << 30
Chance = random.Random


def mangled(data: bytes, chance: Chance) -> bytes:
    """Bytes with a few changes: flips, cuts, chunks that are doubled or swapped, numbers."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if not changed:
            break
        _mangle(changed, chance)
    return bytes(changed)


def _mangle(data: bytearray, chance: Chance) -> None:
    at = chance.randrange(len(data))
    size = min(chance.choice((1, 4, 8, 64, 512, 4096)), len(data) - at)
    other = chance.randrange(len(data))
    match chance.randrange(7):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[other:other] = data[at : at + size]
        case 3:
            data[at : at + size], data[other : other + size] = (
                data[other : other + size],
                data[at : at + size],
            )
        case 4:
            del data[at : at + size]
        case 5:
            width = chance.choice((2, 4, 8))
            at -= at % width
            data[at : at + width] = (chance.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        case _:
            data[at : at + size] = chance.randbytes(size)


def odd_value(chance: Chance) -> object:
    """A value where another is expected."""
    return chance.choice(
        (
            *(
                None,
                True,
                -0.5,
                float("inf"),
                float("nan"),
                "",
                "x" * 100_000,
                "\ud800",
                "a/../../b",
                "0" * 32,
            ),
            *([], {}, [None], {"": ""}, ["a", 1], [[[]]], "@deep@"),
            *NUMBERS,
        )
    )


def odd_json(value: Any, chance: Chance) -> Any:
    """A JSON document with one of its values, or one of its keys, replaced or gone."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        match chance.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[str(odd_value(chance))] = changed.pop(key)
            case _:
                changed[key] = odd_json(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        changed_list = list(value)
        if chance.random() < 0.2:
            return changed_list * chance.choice((0, 2, 1000))
        changed_list[at] = odd_json(value[at], chance)
        return changed_list
    if isinstance(value, str) and value and chance.random() < 0.3:
        return mangled(value.encode("utf-8", "surrogatepass"), chance).decode("latin-1")
    if isinstance(value, int | float) and chance.random() < 0.7:
        return chance.choice(NUMBERS)
    return odd_value(chance)


def deep(text: bytes) -> bytes:
    """JSON text with its mark replaced by nesting."""
    return text.replace(_DEEP.encode(), b"[" * _DEPTH + b"]" * _DEPTH)


def odd_field(table: Table, chance: Chance) -> Table:
    """A table with one number, or one column, replaced."""
    changed = table.copy()
    if not len(changed):
        return np.zeros(chance.choice((1, 3)), table.dtype)
    name = chance.choice(table.dtype.names or ("",))
    kind = table.dtype[name]
    value = np.array(chance.choice(NUMBERS) % (1 << 8 * kind.itemsize), f"<u{kind.itemsize}").view(kind)
    changed[name][chance.choice((slice(None), chance.randrange(len(changed))))] = value
    return changed


# Segments, and exported recordings, which have the same form


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
        with suppress(ValueError, TypeError):
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
    parts["offset"][later] += np.uint64(len(padded)) - np.uint64(end - start)
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


# Catalogs


def hostile_rows(path: Path, chance: Chance) -> None:
    """Rows of a catalog with odd values under right checksums, rows that are gone, and rows twice."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for _ in range(chance.choice((1, 1, 2, 4))):
            with suppress(sqlite3.Error, OverflowError):
                _hostile_row(database, chance)


def _hostile_row(database: sqlite3.Connection, chance: Chance) -> None:
    table = chance.choice(list(COLUMNS))
    names = COLUMNS[table]
    rows = database.execute(f"SELECT rowid, {', '.join(names)} FROM {table}").fetchall()
    if not rows:
        return
    rowid, *values = chance.choice(rows)
    if chance.random() < 0.15:
        database.execute(f"DELETE FROM {table} WHERE rowid = ?", (rowid,))
        return
    at = chance.randrange(len(values))
    values[at] = _odd_cell(values[at], chance)
    keys = len(KEYS[table])
    twice = chance.random() < 0.2 and at < keys
    checksum = row_checksum(table, values) if not isinstance(values[at], float) else 0
    if twice:
        marks = ", ".join("?" * (len(names) + 1))
        database.execute(
            f"INSERT INTO {table} ({', '.join(names)}, checksum) VALUES ({marks})",
            [*values, checksum],
        )
    else:
        sets = ", ".join(f"{name} = ?" for name in (*names, "checksum"))
        database.execute(f"UPDATE {table} SET {sets} WHERE rowid = ?", [*values, checksum, rowid])


def _odd_cell(value: object, chance: Chance) -> Any:
    if isinstance(value, bytes):
        return mangled(value, chance) if chance.random() < 0.8 else bytes(chance.choice((0, 1, 1 << 20)))
    if isinstance(value, int) and chance.random() < 0.8:
        number = chance.choice(NUMBERS)
        return number if -(1 << 63) <= number < 1 << 63 else -number % (1 << 63)
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError, TypeError):
            return deep(canonical_ascii(odd_json(json.loads(value), chance))).decode()
    if isinstance(value, str) and chance.random() < 0.5:
        return mangled(value.encode(), chance).decode("latin-1")
    return chance.choice((None, "", "x" * 1000, "../../etc/passwd", 0, -1, b"", b"x" * 40, 1.5))


# Small files with a checksum of their own


def hostile_json_file(data: bytes, chance: Chance, seal: Callable[[bytes], bytes]) -> bytes:
    """A JSON text changed and sealed anew."""
    try:
        return seal(deep(canonical_ascii(odd_json(json.loads(data), chance))))
    except (ValueError, TypeError):
        return seal(mangled(data, chance))
