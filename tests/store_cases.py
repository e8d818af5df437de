"""Fake units for tests of the store: seeded, small, and built without the codecs under test elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from memdb.codecs import planes
from memdb.files import Step
from memdb.schemas.fingerprint import ModelIdentity, ModelShape
from memdb.schemas.frames import SourceIdentity
from memdb.schemas.recipe import STAGES, Recipe, Stage
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, Bytes, Caption, PackedKV, Unit
from memdb.store import Store
from memdb.writer import RecordingWriter

LAYERS, KEY_SIZE, UNIT_NS = 2, 6, 2_000_000_000
MODEL = ModelIdentity("random:0", "f" * 32, ModelShape(LAYERS, 2, 1, KEY_SIZE, 16, 4, 512))


def recipe(codec: str = "int4") -> Recipe:
    stages = {name: Stage("none") for name in STAGES} | {
        "write": Stage(codec),
        "unit": Stage("frame", {"frames": 2}),
    }
    return Recipe(name="fake", **stages)


def spec(
    name: str = "lobby", *, codec: str = "int4", fingerprint: str = "e" * 32, **changes: object
) -> RecordingSpec:
    values: dict[str, object] = {
        "name": name,
        "source": SourceIdentity("file", 1234, "abcd"),
        "source_name": "lobby.mp4",
        "live": False,
        "started_at_ns": 1_700_000_000_000_000_000,
        "sample_fps": 0.5,
        "seed": 0,
        "dtype": "float32",
        "recipe": recipe(codec),
        "model": MODEL,
        "init_ids": (1, 2, 3),
        "encoding_fingerprint": fingerprint,
        "caption_encoder": "fake",
    }
    return RecordingSpec(**(values | changes))  # type: ignore[arg-type]


def raw_slices(number: int, blocks: int, codec: str, *, raw_bytes: int = 192) -> list[Bytes]:
    """Layer by layer. Plain codecs get smooth values, which compress; quantised ones noise."""
    random = np.random.default_rng(number)
    count = LAYERS * blocks
    if codec == "int4":
        return list(random.integers(0, 256, (count, raw_bytes), np.uint8))
    return list(random.normal(1, 0.01, (count, raw_bytes // 4)).astype("<f4").view(np.uint8))


def pack(
    raw: list[Bytes], blocks: int, codec: str, *, level: int = planes.LEVEL, tokens: int = 4
) -> PackedKV:
    element_bytes = planes.element_bytes(codec, "float32")
    slices = np.zeros(len(raw), SLICE_DTYPE)
    payload = bytearray()
    for index, (row, data) in enumerate(zip(slices, raw, strict=True)):
        stored = data
        if element_bytes:
            packed = planes.pack(data, element_bytes, level=level)
            stored = packed if packed.size < data.size else data
        row["layer"], row["block"] = divmod(index, blocks)
        row["tokens"], row["scale_bytes"] = tokens, 2
        row["offset"], row["raw_bytes"], row["stored_bytes"] = len(payload), data.size, stored.size
        row["xxh3"] = xxhash.xxh3_64_intdigest(stored.tobytes())
        payload += stored.tobytes() + bytes(-stored.size % 64)
    digest = xxhash.xxh3_128(b"".join(data.tobytes() for data in raw)).digest()
    return PackedKV(np.frombuffer(bytes(payload), np.uint8), slices, digest)


def unit(
    number: int, *, codec: str = "int4", blocks: int = 2, caption: bool = True, level: int = planes.LEVEL
) -> Unit:
    """Unit `number` of a recording: its content follows from the number alone."""
    random = np.random.default_rng(number)
    table = np.zeros(blocks, BLOCK_DTYPE)
    table["kind"], table["tokens"], table["position"] = 1, 4, np.arange(blocks) * 4 + number * blocks * 4
    table["start_ns"] = number * UNIT_NS + np.arange(blocks) * (UNIT_NS // max(blocks, 1))
    table["end_ns"] = table["start_ns"] + UNIT_NS // max(blocks, 1)
    with_kv = codec != "none"
    said = Caption(
        f"unit {number}: a red star — \ud800 {'x' * number}",
        tuple(random.integers(0, 99, 5).tolist()),
        random.normal(size=8).astype(np.float32),
    )
    return Unit(
        number=number,
        start_ns=number * UNIT_NS,
        end_ns=(number + 1) * UNIT_NS,
        epoch=0,
        blocks=table if with_kv else table[:0],
        kv=pack(raw_slices(number, blocks, codec), blocks, codec, level=level) if with_kv else None,
        keys=random.normal(size=(LAYERS, blocks, KEY_SIZE)).astype(np.float16) if with_kv else None,
        caption=said if caption else None,
        keyframe=b"\xff\xd8" + random.bytes(50 + number) if number % 2 == 0 else None,
    )


def new_store(folder: Path) -> Store:
    return Store.open(folder / "lobby.memdb", create=True, write=True)


def fill(
    store: Store, units: int, name: str = "lobby", *, codec: str = "int4", batch: int = 2
) -> RecordingWriter:
    """Write units 0 to `units` - 1 and close the writer."""
    with store.writer(spec(name, codec=codec)) as writer:
        for first in range(0, units, batch):
            writer.append([unit(number, codec=codec) for number in range(first, min(first + batch, units))])
    return writer


def directory_digest(folder: Path) -> str:
    """Over names and contents, without what SQLite leaves lying: `-shm` and an empty `-wal`."""
    whole = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*")):
        if path.name.endswith("-shm") or (path.name.endswith("-wal") and path.stat().st_size == 0):
            continue
        whole.update(str(path.relative_to(folder)).encode() + b"\0")
        if path.is_file():
            whole.update(path.read_bytes())
    return whole.hexdigest()


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


class Steps:
    """A watch that writes down every step to the disk, and may refuse one: the first that `fails` says yes to."""

    def __init__(self, fails: Callable[[Step], bool] | None = None, error: OSError | None = None) -> None:
        self.seen: list[Step] = []
        self._fails, self._error = fails, error or OSError(28, "No space left on device")

    def before(self, step: Step) -> None:
        if self._fails is not None and self._fails(step):
            raise self._error

    def after(self, step: Step) -> None:
        self.seen.append(step)

    def names(self, *what: str) -> list[str]:
        """What was done, in order: only steps of these kinds."""
        return [step.what for step in self.seen if step.what in what]
