"""Units whose content follows from a seed and a number alone, made without torch in a fraction of a millisecond.

Every unit carries marks that no other has: a word in its caption, bytes in its key frame, keys and slices. So
a search for the word finds one unit or none, and a search for the bytes in a folder says whether it was
forgotten indeed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from memdb.codecs import planes
from memdb.codecs.layout import affine_layout, plain_layout
from memdb.digest import raw_digest_of, unit_digest
from memdb.schemas.fingerprint import ModelIdentity, ModelShape
from memdb.schemas.frames import SourceIdentity
from memdb.schemas.keep import KeepSet
from memdb.schemas.recipe import STAGES, Recipe, Stage
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, Bytes, Caption, PackedKV, Table, Unit

LAYERS, HEADS, TOKENS, HEAD_SIZE, VECTOR_SIZE = 2, 1, 4, 6, 8
KEY_SIZE = HEADS * HEAD_SIZE
UNIT_NS = 2_000_000_000
STARTED_NS = 1_700_000_000_000_000_000  # wall clock of the first unit
ENCODER = "stub"
CODECS = ("int4", "raw")
_BITS = {"int4": 4, "int8": 8}
MODEL = ModelIdentity("random:0", "f" * 32, ModelShape(LAYERS, 2, HEADS, HEAD_SIZE, VECTOR_SIZE, TOKENS, 512))
_COLOURS = ("red", "green", "blue", "white", "black")
_ALIGNMENT = 64


@dataclass(frozen=True)
class Stream:
    """What a recording is made of: its seed, its name, how often it was begun anew, and its codec."""

    seed: int
    name: str
    life: int = 0
    codec: str = "int4"

    def random(self, number: int) -> np.random.Generator:
        key = f"{self.seed}/{self.name}/{self.life}/{number}".encode()
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))

    def word(self, number: int) -> str:
        """The word that the caption of this unit has and no other."""
        key = f"word/{self.seed}/{self.name}/{self.life}/{number}".encode()
        return "q" + hashlib.blake2b(key, digest_size=8).hexdigest()


def spec(stream: Stream) -> RecordingSpec:
    stages = {name: Stage("none") for name in STAGES}
    stages |= {"write": Stage(stream.codec), "unit": Stage("frame", {"frames": 2})}
    return RecordingSpec(
        name=stream.name,
        source=SourceIdentity("file", 1234, f"{stream.seed:08x}{stream.life}"),
        source_name=f"{stream.name}.mp4",
        live=False,
        started_at_ns=STARTED_NS,
        sample_fps=0.5,
        seed=stream.seed,
        dtype="float32",
        recipe=Recipe(name="stub", **stages),
        model=MODEL,
        init_ids=(1, 2, 3),
        encoding_fingerprint=hashlib.blake2b(f"stub {stream.codec}".encode(), digest_size=16).hexdigest(),
        caption_encoder=ENCODER,
    )


def make_unit(stream: Stream, number: int) -> Unit:
    """Unit `number` as its encoder first gives it."""
    random = stream.random(number)
    blocks = int(random.integers(2, 5))
    table = np.zeros(blocks, BLOCK_DTYPE)
    table["kind"], table["tokens"] = 1, TOKENS
    table["position"] = (number * 8 + np.arange(blocks)) * TOKENS
    edges = number * UNIT_NS + np.arange(blocks + 1) * UNIT_NS // blocks
    table["start_ns"], table["end_ns"] = edges[:-1], edges[1:]
    keep = _keep_set(stream, number, random)
    colour = _COLOURS[int(random.integers(len(_COLOURS)))]
    text = f"a {colour} star, {stream.word(number)} \N{EM DASH} \ud800 {'x' * int(random.integers(30))}"
    vector = random.normal(size=VECTOR_SIZE).astype(np.float32)
    caption = Caption(text, tuple(random.integers(0, 99, 5).tolist()), vector)
    return Unit(
        number=number,
        start_ns=number * UNIT_NS,
        end_ns=(number + 1) * UNIT_NS,
        epoch=0,
        blocks=table,
        kv=_packed(_raw_slices(random, blocks, stream.codec), stream.codec, blocks),
        keys=random.normal(size=(LAYERS, blocks, KEY_SIZE)).astype(np.float16),
        caption=caption if random.random() < 0.85 else None,
        keyframe=b"\xff\xd8" + random.bytes(60 + number % 40) if random.random() < 0.7 else None,
        keep=keep,
    )


def _keep_set(stream: Stream, number: int, random: np.random.Generator) -> KeepSet:
    """What a bounded memory holds after a unit: some tokens of the last three units, other ones in each layer."""
    ids = [
        (unit << 32) | (block << 16) | token
        for unit in range(max(0, number - 2), number + 1)
        for block in range(int(stream.random(unit).integers(2, 5)))
        for token in range(TOKENS // 2)  # those that a thinning to half leaves places for
    ]
    kept = [np.flatnonzero(random.random(len(ids)) < 0.4) for _ in range(LAYERS)]
    return KeepSet(tuple(np.array(ids, np.int64)[own] for own in kept), tuple(own + number for own in kept))


def _raw_slices(random: np.random.Generator, blocks: int, codec: str) -> list[Bytes]:
    """Layer by layer. Plain values are smooth, so that they compress; codes of quantised ones are noise."""
    count = LAYERS * blocks
    if codec != "raw":
        return list(_quantised(random, count, _BITS[codec]))
    layout = plain_layout(4, HEADS, TOKENS, HEAD_SIZE)
    raw = np.zeros((count, layout.slice_bytes), np.uint8)
    for part in (0, 3):
        at, size = layout.offsets[part], layout.sizes[part]
        raw[:, at : at + size] = random.normal(1, 0.01, (count, size // 4)).astype("<f4").view(np.uint8)
    return list(raw)


def _quantised(random: np.random.Generator, count: int, bits: int) -> Bytes:
    """(count, slice_bytes) as the codec lays them out, so that ageing can read them."""
    layout = affine_layout(bits, 2, HEADS, TOKENS, HEAD_SIZE)
    raw = np.zeros((count, layout.slice_bytes), np.uint8)
    for part, (at, size) in enumerate(zip(layout.offsets, layout.sizes, strict=True)):
        if part in (0, 3):
            raw[:, at : at + size] = random.integers(0, 256, (count, size), np.uint8)
        else:
            raw[:, at : at + size] = random.uniform(0.1, 1, (count, size // 2)).astype("<f2").view(np.uint8)
    return raw


def _packed(raw: list[Bytes], codec: str, blocks: int) -> PackedKV:
    size = planes.element_bytes(codec, "float32")
    slices = np.zeros(len(raw), SLICE_DTYPE)
    payload = bytearray()
    for index, (row, data) in enumerate(zip(slices, raw, strict=True)):
        stored = planes.pack(data, size) if size else data
        stored = stored if stored.size < data.size else data
        row["layer"], row["block"] = divmod(index, blocks)
        row["tokens"], row["scale_bytes"] = TOKENS, 0 if codec == "raw" else 2
        row["offset"], row["raw_bytes"], row["stored_bytes"] = len(payload), data.size, stored.size
        row["xxh3"] = xxhash.xxh3_64_intdigest(stored.tobytes())
        payload += stored.tobytes() + bytes(-stored.size % _ALIGNMENT)
    return PackedKV(np.frombuffer(bytes(payload), np.uint8), slices, raw_digest_of(raw))


def raw_slices(stream: Stream, unit: Unit) -> list[Bytes]:
    """The slices of a unit before compression, in the order of its table."""
    assert unit.kv is not None
    size = planes.element_bytes(stream.codec, "float32")
    found = []
    for row in unit.kv.slices:
        start, stored_bytes, raw_bytes = (int(row[name]) for name in ("offset", "stored_bytes", "raw_bytes"))
        stored = unit.kv.payload[start : start + stored_bytes]
        found.append(stored if stored_bytes == raw_bytes else planes.unpack(stored, raw_bytes, size))
    return found


def forgotten_from(stream: Stream, unit: Unit, start_ns: int, end_ns: int) -> Unit:
    """What must be left of a unit once `[start_ns, end_ns)` was forgotten: written apart from memdb's own way.

    Caption and key frame go with whatever touches them; blocks that overlap keep their rows, of 0 tokens,
    without slices, with zeros for keys; a unit without tokens has neither slices nor keys.
    """
    if unit.start_ns >= end_ns or unit.end_ns <= start_ns:
        return unit
    gone = [row["start_ns"] < end_ns and row["end_ns"] > start_ns for row in unit.blocks]
    blocks = np.array(unit.blocks, copy=True)
    for index, is_gone in enumerate(gone):
        if is_gone:
            blocks[index]["tokens"] = 0
    bare = replace(unit, blocks=blocks, caption=None, keyframe=None)
    if not blocks["tokens"].any() or unit.kv is None:
        return replace(bare, kv=None, keys=None, keep=None)
    kept = [index for index, row in enumerate(unit.kv.slices) if not gone[int(row["block"])]]
    raw = [data for index, data in enumerate(raw_slices(stream, unit)) if index in kept]
    keys: npt.NDArray[np.float16] = np.array(unit.keys, copy=True)
    for index, is_gone in enumerate(gone):
        if is_gone:
            keys[:, index, :] = 0
    keep = unit.keep and _without(
        unit.keep, unit.number, [index for index, is_gone in enumerate(gone) if is_gone]
    )
    return replace(bare, kv=_repacked(unit.kv, kept, raw), keys=keys, keep=keep)


def _without(keep: KeepSet, unit: int, blocks: list[int]) -> KeepSet:
    """A keep set without the tokens of some blocks of its own unit, token by token."""
    layers = [
        [
            (i, p)
            for i, p in zip(ids.tolist(), at.tolist(), strict=True)
            if not (i >> 32 == unit and (i >> 16) % 65536 in blocks)
        ]
        for ids, at in zip(keep.ids, keep.positions, strict=True)
    ]
    return KeepSet(
        tuple(np.array([i for i, _ in layer], np.int64) for layer in layers),
        tuple(np.array([p for _, p in layer], np.int64) for layer in layers),
    )


def without_kv(unit: Unit) -> Unit:
    """What ageing leaves at last: caption and key frame, and the rows of blocks without tokens."""
    blocks = np.array(unit.blocks, copy=True)
    blocks["tokens"] = 0
    return replace(unit, blocks=blocks, kv=None, keys=None, keep=None)


def _repacked(kv: PackedKV, kept: list[int], raw: list[Bytes]) -> PackedKV:
    rows: Table = kv.slices[kept].copy()
    payload = bytearray()
    for row in rows:
        start, size = int(row["offset"]), int(row["stored_bytes"])
        row["offset"] = len(payload)
        payload += kv.payload[start : start + size].tobytes() + bytes(-size % _ALIGNMENT)
    return PackedKV(np.frombuffer(bytes(payload), np.uint8), rows, raw_digest_of(raw))


def first_digest(stream: Stream, number: int) -> bytes:
    return unit_digest(make_unit(stream, number))


def marks(unit: Unit, stream: Stream) -> dict[str, bytes]:
    """Bytes that only this unit has, by what they are of."""
    found: dict[str, bytes] = {}
    if unit.caption is not None:
        found["caption"] = stream.word(unit.number).encode()
        found["vector"] = np.ascontiguousarray(unit.caption.vector, "<f4").tobytes()
    if unit.keyframe is not None:
        found["key frame"] = unit.keyframe[2:42]
    for index, row in enumerate(unit.blocks):
        if not row["tokens"] or unit.kv is None or unit.keys is None:
            continue
        found[f"keys of block {index}"] = unit.keys[0, index].tobytes()
        piece = next(row for row in unit.kv.slices if row["block"] == index)
        at = int(piece["offset"])
        found[f"slices of block {index}"] = unit.kv.payload[
            at : at + min(48, int(piece["stored_bytes"]))
        ].tobytes()
    return found
