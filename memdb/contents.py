"""A unit as the parts of a record, and back. Everything that is read is verified first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xxhash

from memdb import keep_set
from memdb.codecs.layout import aligned
from memdb.codecs.planes import element_bytes, unpack
from memdb.digest import TierDigests, digests_of, raw_digest_of, unit_digest
from memdb.records import ALIGNMENT_BYTES, Buffer, Kind, Record, canonical_ascii, encode
from memdb.schemas.errors import CodecError, CorruptionError, StoreError
from memdb.schemas.keep import KeepSet, split_ids
from memdb.schemas.rows import PROLOGUE_BYTES, Part, PartSpan, RecordingSpec, UnitRow
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, Bytes, Caption, PackedKV, Table, Unit

SLICE_BYTES_MAX = 1 << 28  # before compression, of whatever model
_SLICE_BYTES_MIN = 1 << 20


def encode_unit(
    unit: Unit,
    *,
    offset: int,
    previous: bytes,
    encoding_fingerprint: str,
    written: dict[str, object] | None = None,
    ahead: Callable[[int, Buffer], None] | None = None,
) -> tuple[list[Buffer], Record]:
    """The buffers of a unit's record at `offset`, and the record, once `check_unit` passed.

    Big parts are not copied. `written`: of a unit that is written anew, its revision, codec and first digest.
    `ahead` gets the payload of slices and its place in the file as soon as that is known, before all the hashing.
    Raises StoreError where a slice is not what its checksum says.
    """
    parts = _parts_of(unit)
    if unit.kv is not None:
        if ahead is not None:
            before = sum(aligned(len(buffer)) for _, buffer in parts[:-1])
            ahead(offset + PROLOGUE_BYTES + before, parts[-1][1])
        _check_slices(unit.number, unit.kv)
    meta: dict[str, object] = {
        "unit": unit.number,
        "start_ns": unit.start_ns,
        "end_ns": unit.end_ns,
        "epoch": unit.epoch,
        "encoding": encoding_fingerprint,
        "digest": unit_digest(unit).hex(),
        **(written or {}),
        "layers": unit.keys.shape[0] if unit.keys is not None else 0,
        "caption_tokens": len(unit.caption.token_ids) if unit.caption else None,
    }
    return encode(
        Kind.UNIT,
        unit.number,
        meta,
        offset=offset,
        previous=previous,
        parts=parts,
        blocks=np.ascontiguousarray(unit.blocks).tobytes(),
        slices=np.ascontiguousarray(unit.kv.slices).tobytes() if unit.kv else b"",
    )


def husk(unit: Unit, start_ns: int, end_ns: int, element_bytes: int) -> Unit:
    """A unit without what overlaps `[start_ns, end_ns)`: caption, key frame, and whole blocks with their keys.

    Its blocks keep their rows, of 0 tokens, so that the numbers of the others stay. `element_bytes`: of its
    codec, see `planes.element_bytes`.
    """
    gone = overlapping(unit.blocks, start_ns, end_ns)
    return without_blocks(replace(unit, caption=None, keyframe=None), gone, element_bytes)


def overlapping(blocks: Table, start_ns: int, end_ns: int) -> npt.NDArray[np.bool_]:
    """(blocks,): which blocks overlap `[start_ns, end_ns)`."""
    mask: npt.NDArray[np.bool_] = (blocks["start_ns"] < end_ns) & (blocks["end_ns"] > start_ns)
    return mask


def without_blocks(unit: Unit, gone: npt.NDArray[np.bool_], element_bytes: int) -> Unit:
    """A unit without these blocks (a mask): their slices and keys are left out, their rows hold 0 tokens."""
    blocks = unit.blocks.copy()
    blocks["tokens"][gone] = 0
    if not gone.any() or unit.kv is None:
        return replace(unit, blocks=blocks)
    if not blocks["tokens"].any():  # what was remembered then is told by the unit before
        return replace(unit, blocks=blocks, kv=None, keys=None, keep=None, held=None, embeddings=None)
    keep, held = (
        kept.without_blocks(unit.number, np.flatnonzero(gone)) if kept is not None else None
        for kept in (unit.keep, unit.held)
    )
    keys = embeddings = None
    if unit.keys is not None:
        keys = unit.keys.copy()
        keys[:, gone] = 0
    if unit.embeddings is not None:
        embeddings = unit.embeddings.copy()
        embeddings[gone] = 0
    kv = _kept_slices(unit.kv, ~gone, element_bytes)
    return replace(unit, blocks=blocks, kv=kv, keys=keys, keep=keep, held=held, embeddings=embeddings)


def _kept_slices(kv: PackedKV, kept: npt.NDArray[np.bool_], element_bytes: int) -> PackedKV:
    """The slices of the blocks that are kept, as they are stored, packed together."""
    slices = kv.slices[kept[kv.slices["block"]]].copy()
    room = -(-slices["stored_bytes"].astype(np.int64) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    starts = np.cumsum(room) - room
    payload = np.zeros(int(room.sum()), np.uint8)
    for row, start in zip(slices, starts.tolist(), strict=True):
        offset, size = int(row["offset"]), int(row["stored_bytes"])
        payload[start : start + size] = kv.payload[offset : offset + size]
        row["offset"] = start
    return PackedKV(payload, slices, raw_digest_of(_raw_slices(slices, payload, element_bytes)))


def check_unit(unit: Unit) -> None:
    """What a unit must be to be readable again. Raises StoreError."""
    if unit.end_ns <= unit.start_ns or unit.start_ns < 0:
        raise StoreError(f"unit {unit.number} spans nothing: {unit.start_ns} to {unit.end_ns} ns")
    if unit.blocks.dtype != BLOCK_DTYPE or unit.blocks.ndim != 1:
        raise StoreError(f"unit {unit.number}: blocks must be a table of BLOCK_DTYPE")
    if unit.keys is not None and (
        unit.keys.ndim != 3 or unit.keys.dtype != np.float16 or unit.keys.shape[1] != len(unit.blocks)
    ):
        raise StoreError(
            f"unit {unit.number}: keys must be float16 (L, {len(unit.blocks)}, H*D), "
            f"not {unit.keys.dtype} {unit.keys.shape}"
        )
    if unit.embeddings is not None and (
        unit.embeddings.ndim != 2
        or unit.embeddings.dtype != np.float16
        or len(unit.embeddings) != len(unit.blocks)
    ):
        raise StoreError(
            f"unit {unit.number}: embeddings must be float16 ({len(unit.blocks)}, E), "
            f"not {unit.embeddings.dtype} {unit.embeddings.shape}"
        )
    if unit.kv is not None:
        _check_packed(unit.number, unit.kv, len(unit.blocks))
    for kept in (unit.keep, unit.held):
        if kept is not None:
            _check_keep(unit, kept)


def _check_keep(unit: Unit, keep: KeepSet) -> None:
    """A keep set tells of blocks of its own unit and of earlier ones, and of its own no token that is not there."""
    for ids, positions in zip(keep.ids, keep.positions, strict=True):
        numbers, blocks, tokens = split_ids(ids)
        own = numbers == unit.number
        wrong = len(ids) != len(positions) or bool((np.diff(ids) <= 0).any()) or bool((ids < 0).any())
        if wrong or bool((numbers > unit.number).any()) or (own & (blocks >= len(unit.blocks))).any():
            raise StoreError(f"unit {unit.number}: its keep set tells of tokens that cannot be")
        if (tokens[own] >= unit.blocks["tokens"][blocks[own]]).any():
            raise StoreError(f"unit {unit.number}: its keep set tells of tokens that its blocks do not have")


def _check_packed(number: int, kv: PackedKV, block_count: int) -> None:
    if kv.payload.dtype != np.uint8 or kv.slices.dtype != SLICE_DTYPE:
        raise StoreError(f"unit {number}: the payload must be uint8 and the slices a table of SLICE_DTYPE")
    offset, stored = kv.slices["offset"].astype(np.int64), kv.slices["stored_bytes"].astype(np.int64)
    ends = offset + stored
    if len(ends) and (
        int(ends.max()) > kv.payload.size
        or bool((offset[1:] < ends[:-1]).any())
        or bool((kv.slices["stored_bytes"] > kv.slices["raw_bytes"]).any())
        or int(kv.slices["block"].max()) >= block_count
    ):
        raise StoreError(f"unit {number}: its slices do not fit its payload and blocks")


def _check_slices(number: int, kv: PackedKV) -> None:
    """Checked before writing as after reading: a slice that was packed wrong is never acknowledged."""
    offset, stored = kv.slices["offset"].astype(np.int64), kv.slices["stored_bytes"].astype(np.int64)
    payload, ends = np.ascontiguousarray(kv.payload).data, (offset + stored).tolist()
    for start, end, xxh3 in zip(offset.tolist(), ends, kv.slices["xxh3"].tolist(), strict=True):
        if xxhash.xxh3_64_intdigest(payload[start:end]) != xxh3:
            raise StoreError(f"unit {number}: a slice differs from its checksum before it was written")


def _parts_of(unit: Unit) -> list[tuple[Part, Buffer]]:
    parts: list[tuple[Part, Buffer]] = []
    if unit.caption is not None:
        said = {"text": unit.caption.text, "token_ids": list(unit.caption.token_ids)}
        vector = np.ascontiguousarray(unit.caption.vector, "<f4")
        parts += [(Part.CAPTION, canonical_ascii(said)), (Part.VECTOR, vector.tobytes())]
    if unit.keyframe is not None:
        parts.append((Part.KEYFRAME, unit.keyframe))
    if unit.keys is not None:
        parts.append((Part.KEYS, np.ascontiguousarray(unit.keys, "<f2").tobytes()))
    if unit.keep is not None:
        parts.append((Part.KEEP, keep_set.encode(unit.keep)))
    if unit.held is not None:
        parts.append((Part.HELD, keep_set.encode(unit.held)))
    if unit.embeddings is not None:
        parts.append((Part.EMBEDDINGS, np.ascontiguousarray(unit.embeddings, "<f2").tobytes()))
    if unit.kv is not None:
        parts.append((Part.KV, np.ascontiguousarray(unit.kv.payload).data))
    return parts


def caption_from(row: UnitRow, said: bytes, vector: bytes) -> Caption:
    try:
        data = json.loads(said)
        ids = tuple(int(token) for token in data["token_ids"])
        return Caption(str(data["text"]), ids, np.frombuffer(vector, "<f4").astype(np.float32))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise _damaged(row, f"its caption has no known form: {error!s:.200}") from None


def keys_from(row: UnitRow, data: bytes) -> npt.NDArray[np.float16]:
    """(L, blocks, H*D) float16."""
    rows_bytes = np.dtype("<f2").itemsize * row.layers * row.block_count
    if min(row.layers, row.block_count) < 0 or (len(data) % rows_bytes if rows_bytes else data):
        raise _damaged(row, "its representative keys have no known form")
    shape = (row.layers, row.block_count, len(data) // rows_bytes if rows_bytes else 0)
    return np.frombuffer(data, "<f2").reshape(shape).astype(np.float16, copy=False)


def embeddings_from(row: UnitRow, data: bytes) -> npt.NDArray[np.float16]:
    """(blocks, E) float16."""
    row_bytes = np.dtype("<f2").itemsize * row.block_count
    if not row_bytes or not data or len(data) % row_bytes:
        raise _damaged(row, "its embeddings have no known form")
    return np.frombuffer(data, "<f2").reshape(row.block_count, -1).astype(np.float16, copy=False)


def keep_from(row: UnitRow, data: bytes) -> KeepSet:
    """The keep set of a unit from the bytes of its part. Raises CorruptionError."""
    try:
        return keep_set.decode(data)
    except CodecError as error:
        raise _damaged(row, f"its keep set has no known form: {error}") from None


def stored_element_bytes(spec: RecordingSpec, row: UnitRow) -> int:
    """Of a unit's slices before compression: see `planes.element_bytes`. Ageing changes the codec unit by unit.

    Raises CorruptionError for slices larger than any of the recording's model can be: nothing is allocated by them.
    """
    largest = int(row.slices["raw_bytes"].max(initial=0))
    if largest > slice_bytes_max(spec):
        raise _damaged(row, f"a slice of {largest} bytes cannot be")
    try:
        return element_bytes(row.codec or spec.recipe.codec, spec.dtype)
    except CodecError as error:
        raise _damaged(row, str(error)) from None


def slice_bytes_max(spec: RecordingSpec) -> int:
    """Bytes of the largest slice before compression: of as many tokens as the model takes, at eight bytes a number."""
    shape = spec.model.shape
    plain_bytes = 2 * 8 * shape.context_tokens_max * shape.kv_heads * shape.head_size
    return max(_SLICE_BYTES_MIN, min(plain_bytes, SLICE_BYTES_MAX))


def unit_from(row: UnitRow, body: bytes, element_bytes: int) -> Unit:
    """The unit itself from the bytes of its body on disk, every part and slice verified.

    Raises CorruptionError.
    """
    parts = {part: _part(row, body, part, span) for part, span in row.parts.items()}
    caption = kv = None
    if Part.CAPTION in parts:
        caption = caption_from(row, parts[Part.CAPTION], parts.get(Part.VECTOR, b""))
    if Part.KV in parts:
        payload = np.frombuffer(parts[Part.KV], np.uint8)
        try:
            kv = PackedKV(payload, row.slices, raw_digest_of(_raw_slices(row.slices, payload, element_bytes)))
        except CodecError as error:
            raise _damaged(row, str(error)) from None
    return Unit(
        row.number,
        row.start_ns,
        row.end_ns,
        row.epoch,
        row.blocks,
        kv,
        keys_from(row, parts[Part.KEYS]) if Part.KEYS in parts else None,
        caption,
        parts.get(Part.KEYFRAME),
        keep_from(row, parts[Part.KEEP]) if Part.KEEP in parts else None,
        keep_from(row, parts[Part.HELD]) if Part.HELD in parts else None,
        embeddings_from(row, parts[Part.EMBEDDINGS]) if Part.EMBEDDINGS in parts else None,
    )


def digests_from(row: UnitRow, body: bytes, element_bytes: int) -> TierDigests:
    """The digests of a unit from the bytes of its body on disk, every part and slice verified."""
    return digests_of(unit_from(row, body, element_bytes))


def _raw_slices(slices: Table, payload: Bytes, element_bytes: int) -> Iterator[Bytes]:
    """Slices before compression, each verified, in the order of the table. Raises CodecError."""
    for number, piece in enumerate(slices):
        offset, stored_bytes, raw_bytes = (
            int(piece[name]) for name in ("offset", "stored_bytes", "raw_bytes")
        )
        stored = payload[offset : offset + stored_bytes]
        if stored.size != stored_bytes or xxhash.xxh3_64_intdigest(stored.data) != int(piece["xxh3"]):
            raise CodecError(f"its slice {number} is damaged")
        try:
            yield stored if stored_bytes == raw_bytes else unpack(stored, raw_bytes, element_bytes)
        except CodecError as error:
            raise CodecError(f"its slice {number} is damaged: {error}") from None


def _part(row: UnitRow, body: bytes, part: Part, span: PartSpan) -> bytes:
    at = span.offset - row.body_offset
    data = body[at : at + span.length]
    if len(data) != span.length or xxhash.xxh3_64_intdigest(data) != span.xxh3:
        raise _damaged(row, f"its {part.name.lower()} is damaged")
    return data


def _damaged(row: UnitRow, what: str) -> CorruptionError:
    file = f"segments/{row.segment}"
    return CorruptionError(f"{file}: unit {row.number}: {what}", file=file)
