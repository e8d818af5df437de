"""Rows of a store: what is known of a recording and of a unit without touching the units' bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from memdb.schemas.errors import CorruptionError, RecipeError, UsageError
from memdb.schemas.fingerprint import ModelIdentity, ModelShape
from memdb.schemas.frames import SourceIdentity
from memdb.schemas.recipe import Recipe
from memdb.schemas.recording import Epoch, Gap, Tombstone, check_name
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, Table


class Part(IntEnum):
    """The parts of a unit's body. The numbers are part of the format: never renumber."""

    CAPTION = 1  # JSON: text, token ids
    VECTOR = 2  # fp32 little-endian (E,)
    KEYFRAME = 3  # JPEG
    KEYS = 4  # fp16 little-endian (L, blocks, H*D)
    KV = 5  # the payload of slices
    KEEP = 6  # the keep set of a bounded memory, see memdb/keep_set.py
    HELD = 7  # which tokens the slices of a unit hold, in the same form
    EMBEDDINGS = 8  # fp16 little-endian (blocks, E), see memdb/index/frame_embedding.py


# One row a part of a unit. `offset` counts from the start of the unit's body, and is 64-byte aligned.
PART_DTYPE = np.dtype([("part", "<u2"), ("offset", "<u8"), ("length", "<u8"), ("xxh3", "<u8")])
_PARTS = frozenset(map(int, Part))


ALL_PPM = 1_000_000
DIGEST_BYTES = 16
GRID_MAX = 1 << 12  # rows or columns of a frame's tokens: beyond, a record is no such thing
LAYERS_MAX = 1 << 16  # and blocks of a unit: SLICE_DTYPE has room for no more
CAPTION_TOKENS_MAX = (1 << 32) - 1  # of a caption: key pages have room for no more
_FILE_BYTES_MAX = 1 << 62  # of a segment: places in one are added up in 64 bits
_CATALOG = "catalog.sqlite"
# What reading the JSON of a spec or a model raises, where it is no such thing.
NOT_WHAT_IT_SAYS = (ValueError, TypeError, KeyError, OverflowError, RecursionError, RecipeError, UsageError)


@dataclass(frozen=True)
class PartSpan:
    """Where a part lies in its segment file."""

    offset: int  # bytes from the start of the file
    length: int  # bytes
    xxh3: int


@dataclass(frozen=True)
class RecordingSpec:
    """How a recording is made: everything that a segment's header repeats."""

    name: str
    source: SourceIdentity
    source_name: str
    live: bool
    started_at_ns: int | None  # wall clock, nanoseconds since the epoch
    sample_fps: float
    seed: int
    dtype: str  # of the encoding: float32 | bfloat16 | float16
    recipe: Recipe
    model: ModelIdentity
    init_ids: tuple[int, ...]
    encoding_fingerprint: str
    caption_encoder: str  # name of the encoder of caption vectors, "" without captions
    grid: tuple[int, int] | None = (
        None  # rows and columns of a frame's tokens, where the model fits them to the film
    )
    frame_encoder: str = ""  # name of the encoder of frames, where an index of frame embeddings is kept

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "source": {
                "kind": self.source.kind,
                "size_bytes": self.source.size_bytes,
                "digest": self.source.digest,
                **({"of_world": True} if self.source.of_world else {}),
            },
            "source_name": self.source_name,
            "live": self.live,
            "started_at_ns": self.started_at_ns,
            "sample_fps": self.sample_fps,
            "seed": self.seed,
            "dtype": self.dtype,
            "recipe": self.recipe.as_json(),
            "model": model_as_json(self.model),
            "init_ids": list(self.init_ids),
            "encoding_fingerprint": self.encoding_fingerprint,
            "caption_encoder": self.caption_encoder,
            **({"grid": list(self.grid)} if self.grid is not None else {}),
            **({"frame_encoder": self.frame_encoder} if self.frame_encoder else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> RecordingSpec:
        """Inverse of `as_json`. Raises one of NOT_WHAT_IT_SAYS on anything else."""
        source, recipe, model, init_ids = (
            data["source"],
            data["recipe"],
            data["model"],
            data["init_ids"],
        )
        if not (isinstance(source, Mapping) and isinstance(recipe, Mapping) and isinstance(model, Mapping)):
            raise TypeError("source, recipe and model must be tables")
        if not isinstance(init_ids, list):
            raise TypeError("init_ids must be a list")
        started = data["started_at_ns"]
        return cls(
            name=check_name(str(data["name"])),
            source=SourceIdentity(
                str(source["kind"]),
                _integer(source["size_bytes"]),
                str(source["digest"]),
                source.get("of_world") is True,
            ),
            source_name=str(data["source_name"]),
            live=bool(data["live"]),
            started_at_ns=None if started is None else _integer(started),
            sample_fps=_number(data["sample_fps"]),
            seed=_integer(data["seed"]),
            dtype=str(data["dtype"]),
            recipe=Recipe.from_json(recipe),
            model=model_from_json(model),
            init_ids=tuple(_integer(token) for token in init_ids),
            encoding_fingerprint=str(data["encoding_fingerprint"]),
            caption_encoder=str(data["caption_encoder"]),
            grid=_grid(data.get("grid")),
            frame_encoder=str(data.get("frame_encoder", "")),
        )


@dataclass(frozen=True)
class TierBytes:
    """Bytes of the units' parts, padding and footers not counted."""

    kv: int = 0
    keys: int = 0
    captions: int = 0  # texts and vectors
    keyframes: int = 0
    keep_sets: int = 0  # of bounded memories


@dataclass(frozen=True)
class RecordingRow:
    """A recording as the catalog has it. Times are media time."""

    id: str  # 32 hex digits
    spec: RecordingSpec
    created_ns: int  # wall clock
    units: int  # committed; their numbers are 0 .. units - 1
    start_ns: int  # of the first unit, 0 without units
    watermark_ns: int  # end of the last unit, 0 without units
    last_commit: int  # commit id of the last unit, 0 without units
    epochs: tuple[Epoch, ...]
    gaps: tuple[Gap, ...]
    end_ns: int | None  # media end, once the source ended
    tier_bytes: TierBytes
    tombstones: tuple[Tombstone, ...] = ()
    generation: int = 0  # of the key pages: another one means that pages were made anew with other rows
    kv_from_unit: int = 0  # units below have no KV any more

    @classmethod
    def begun(cls, id: str, spec: RecordingSpec, created_ns: int) -> RecordingRow:
        """A recording that holds nothing yet."""
        return cls(id, spec, created_ns, 0, 0, 0, 0, (), (), None, TierBytes())

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def seen_until_ns(self) -> int:
        """Up to where the film was seen: the watermark, or the film's end where the last slot reaches beyond it."""
        return self.watermark_ns if self.end_ns is None else min(self.watermark_ns, self.end_ns)

    @property
    def finished(self) -> bool:
        """The source ended and nothing came after."""
        return self.end_ns is not None


@dataclass(frozen=True, eq=False)
class UnitRow:
    """A unit as the catalog has it: where its bytes lie, and its tables, parsed when first used.

    A table that makes no sense beside the row's own numbers raises CorruptionError then, or in `check`.
    """

    recording_id: str
    number: int
    commit_id: int  # global in the store, one a unit, without holes
    segment: str  # file name in segments/
    offset: int  # of the record, bytes from the start of the file
    length: int  # of the record: prologue, body and footer
    start_ns: int
    end_ns: int
    epoch: int
    digest: bytes  # of the content, as it is now
    layers: int  # L of the representative keys, 0 without
    block_count: int
    caption_tokens: int | None  # None without a caption
    parts_table: bytes
    blocks_table: bytes
    slices_table: bytes
    revision: int = 0  # how often it was written anew: by forgetting, compaction, ageing
    codec: str = ""  # of its slices, "" for the recording's
    first_digest: bytes = b""  # of the content as first written, which a replay must give again
    kept_ppm: int = ALL_PPM  # what ageing left of each block's tokens, in millionths

    @property
    def has_caption(self) -> bool:
        return self.caption_tokens is not None

    @cached_property
    def blocks(self) -> Table:
        """(blocks,) BLOCK_DTYPE."""
        table = self._table(self.blocks_table, BLOCK_DTYPE)
        if len(table) != self.block_count:
            raise self._absurd(f"{len(table)} of {self.block_count} blocks")
        return table

    @cached_property
    def slices(self) -> Table:
        """(slices,) SLICE_DTYPE, offsets from the start of the payload."""
        table = self._table(self.slices_table, SLICE_DTYPE)
        if len(table) and (
            int(table["block"].max()) >= self.block_count
            or (self.layers and int(table["layer"].max()) >= self.layers)
            or int(table["offset"].max()) > self.length
            or int(table["stored_bytes"].sum(dtype=np.int64)) > self.length  # they do not overlap
            or bool((table["stored_bytes"] > table["raw_bytes"]).any())
        ):
            raise self._absurd("slices of blocks or layers that it does not have, or that cannot be")
        return table

    @cached_property
    def parts(self) -> dict[Part, PartSpan]:
        found: dict[Part, PartSpan] = {}
        for number, offset, length, xxh3 in self._table(self.parts_table, PART_DTYPE).tolist():
            if number not in _PARTS or number in found or offset + length > self.length:
                raise self._absurd(f"a part {number} of {length} bytes at byte {offset}")
            found[Part(number)] = PartSpan(self.body_offset + offset, length, xxh3)
        return found

    def check(self) -> None:
        """Whether the row can be one of a unit. Raises CorruptionError."""
        numbers = [self.number, self.offset, self.length, self.start_ns, self.epoch, self.layers]
        numbers += [self.block_count, self.revision, self.kept_ppm]
        self.check_counts()
        if min(numbers) < 0 or self.end_ns <= self.start_ns or len(self.digest) != DIGEST_BYTES:
            raise self._absurd("numbers that no unit has")
        if len(self.first_digest) != DIGEST_BYTES or max(self.layers, self.block_count) > LAYERS_MAX:
            raise self._absurd("numbers that no unit has")
        _ = self.blocks
        said = Part.CAPTION in self.parts
        if (len(self.slices) and Part.KV not in self.parts) or said != self.has_caption:
            raise self._absurd("slices or a caption without their bytes")

    def check_counts(self) -> None:
        """Whether numbers that go into narrower tables fit them. Raises CorruptionError."""
        if min(self.offset, self.length) < 0 or self.offset + self.length > _FILE_BYTES_MAX:
            raise self._absurd(f"{self.length} bytes at byte {self.offset}")
        if not 0 <= (self.caption_tokens or 0) <= CAPTION_TOKENS_MAX:
            raise self._absurd(f"a caption of {self.caption_tokens} tokens")

    def _table(self, data: bytes, dtype: np.dtype[np.void]) -> Table:
        if len(data) % dtype.itemsize:
            raise self._absurd(f"a table of {len(data)} bytes")
        return np.frombuffer(data, dtype)

    def _absurd(self, what: str) -> CorruptionError:
        return CorruptionError(f"{_CATALOG}: the row of unit {self.number} tells of {what}", file=_CATALOG)

    @property
    def body_offset(self) -> int:
        """Where the unit's parts begin, bytes from the start of the file."""
        return self.offset + PROLOGUE_BYTES

    @property
    def payload_offset(self) -> int:
        """Where the slices' payload begins, bytes from the start of the file."""
        return self._kv.offset

    @property
    def payload_bytes(self) -> int:
        return self._kv.length

    @property
    def _kv(self) -> PartSpan:
        span = self.parts.get(Part.KV)
        if span is None:
            raise CorruptionError(
                f"unit {self.number} has slices but no payload", file=f"segments/{self.segment}"
            )
        return span


PROLOGUE_BYTES = 64  # every record begins with a prologue of this size


def model_as_json(model: ModelIdentity) -> dict[str, object]:
    return {"spec": model.spec, "fingerprint": model.fingerprint, "shape": model.shape.as_json()}


def model_from_json(data: Mapping[str, object]) -> ModelIdentity:
    """Inverse of `model_as_json`. Raises one of NOT_WHAT_IT_SAYS on anything else."""
    shape = data["shape"]
    if not isinstance(shape, Mapping):
        raise TypeError("a model's shape must be a table")
    sizes = {name: _integer(shape[name]) for name in ModelShape.__dataclass_fields__}
    return ModelIdentity(str(data["spec"]), str(data["fingerprint"]), ModelShape(**sizes))


def _grid(data: object) -> tuple[int, int] | None:
    if data is None:
        return None
    if not isinstance(data, list) or len(data) != 2:
        raise TypeError("grid must be rows and columns")
    rows, columns = map(_integer, data)
    if not (1 <= rows <= GRID_MAX and 1 <= columns <= GRID_MAX):
        raise ValueError(f"a grid of {rows} x {columns} tokens is none")
    return rows, columns


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > 63:
        raise TypeError(f"{value!r:.40} is not an integer")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is not a number")
    return float(value)
