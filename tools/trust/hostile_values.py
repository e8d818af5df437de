"""What a hostile writer puts in the place of values: odd numbers, texts, tables and JSON, and bytes with changes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from memdb.records import canonical_ascii
from memdb.schemas.units import Table

NUMBERS = (
    *(0, 1, -1, 2, 7, 63, 64, 255, 65535, 65536, 10**6),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 53) + 1),
    *((1 << 62), (1 << 63) - 1, -(1 << 63), 1 << 63, (1 << 64) - 1, 10**30),
)
_DEEP = '"@deep@"'  # stands for nesting that json.dumps could not write
_DEPTH = 100_000
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


def hostile_json_file(data: bytes, chance: Chance, seal: Callable[[bytes], bytes]) -> bytes:
    """A JSON text changed and sealed anew."""
    try:
        return seal(deep(canonical_ascii(odd_json(json.loads(data), chance))))
    except (ValueError, TypeError):
        return seal(mangled(data, chance))
