"""Hostile policies and recipes, and odd questions, through the public calls."""

from __future__ import annotations

import json

import numpy as np
import xxhash

from memdb import policy, recipes
from memdb.captions import CaptionIndex
from memdb.client import Client
from memdb.folder import POLICY
from memdb.records import canonical_ascii
from memdb.store import Store
from tools.trust.fuzz_input import Input
from tools.trust.hostile_values import NUMBERS, hostile_json_file, mangled
from tools.trust.look import verify_any
from tools.trust.units import ENCODER, VECTOR_SIZE


def policies(given: Input) -> None:
    given.copy()
    file = given.path / POLICY

    def seal(data: bytes) -> bytes:
        try:
            table = json.loads(data)
            table["xxh3"] = xxhash.xxh3_128_hexdigest(canonical_ascii([table["policy"], table["serial"]]))
            return canonical_ascii(table)
        except (ValueError, TypeError, KeyError, RecursionError):
            return data

    file.write_bytes(hostile_json_file(file.read_bytes(), given.chance, seal))
    with given.typed("policy"):
        policy.read_policy(given.path)
    with given.typed("verify"):
        verify_any(given.path)
    with given.typed("compact"), Store.open(given.path, write=True) as store:
        from memdb.compact import compact

        compact(store)


_POLICY_TOML = b"""store_bytes_max = "40 GB"
when_full = "forget-oldest"
[[age]]
after = "7 d"
codec = "int4"
[[age]]
after = "30 d"
retainer = "uniform"
keep = 0.5
[[age]]
after = "365 d"
keep = "captions"
"""
_RECIPE_TOML = b"""base = "hybrid"
name = "mine"
[unit]
method = "clip"
frames = 8
unit_s_max = 60.0
[write]
method = "int8"
[retrieve]
method = "topk"
blocks = 32
group = 1
sim = "dot"
"""
_BOMBS = (
    b"x = " + b"[" * 100_000,
    b"x = " + b"[" * 5000 + b"]" * 5000,
    b"x = " + b"{a=" * 2000 + b"1" + b"}" * 2000,
    b"[" + b"a." * 20_000 + b"b]\nc=1",
    b"blocks = " + b"9" * 5000,
    b"frames = 1e999999",
    b"unit_s_max = nan",
    b"x = 0x" + b"f" * 200_000,
    b"x = 9999-99-99T99:99:99Z",
    b"\xff\xfe\x00\x00",
    b"x = '''" + b"a" * 200_000,
    b"[[age]]\n" * 5000,
)


def toml(given: Input) -> None:
    """Recipes and policies that a user names."""
    chance = given.chance
    for text, read in (
        (_RECIPE_TOML, lambda file: recipes.recipe(file)),
        (_POLICY_TOML, lambda file: policy.read_toml(file)),
    ):
        lines = text.splitlines(keepends=True)
        match chance.randrange(4):
            case 0:
                data = mangled(text, chance)
            case 1:
                chance.shuffle(lines)
                data = b"".join(lines)
            case 2:
                at = chance.randrange(len(lines) + 1)
                data = b"".join([*lines[:at], chance.choice(_BOMBS), b"\n", *lines[at:]])
            case _:
                key = chance.choice([line.split(b"=")[0] for line in lines if b"=" in line])
                value = chance.choice(
                    (*(str(number).encode() for number in NUMBERS), b"nan", b"[]", b'""', b"{}")
                )
                data = b"".join(
                    key + b"=" + value + b"\n" if line.startswith(key) else line for line in lines
                )
        file = given.folder / "fuzzed.toml"
        file.write_bytes(data)
        with given.typed(f"{data[:60]!r}"):
            read(file)


def query(given: Input) -> None:
    """Odd questions to a whole store."""
    chance, path = given.chance, given.folder / "ground.memdb"
    number = chance.choice(NUMBERS)
    other = chance.choice((number, float(number), float("nan"), float("inf"), -0.0))
    text = chance.choice(("star", "\ud800", "x" * 100_000, '"', "a OR b", "star " * 5000, "\x00", "'; DROP"))
    vector = chance.choice((np.full(VECTOR_SIZE, other), np.zeros(3), np.zeros((2, 2)), np.zeros(0)))
    with given.typed("open"), Store.open(path) as store:
        index = CaptionIndex(path)
        with given.typed(f"search limit {number}"):
            index.search(store, ENCODER, text=text, limit=min(number, 1 << 62))
        with given.typed("search by vector"):
            index.search(store, ENCODER, text=text, vector=vector.astype(np.float32))
        with given.typed(f"search from {number}"):
            index.search(store, ENCODER, text="star", start_ns=number, end_ns=chance.choice(NUMBERS))
        with given.typed("recording"):
            store.recording(text)
        with given.typed("unit"):
            store.unit(store.recordings()[0].id, number)
        with given.typed("digest"):
            Client(store).digest(text, tier=text)
