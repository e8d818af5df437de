"""The byte form of a keep set: gaps between neighbouring ids and positions, in byte planes, compressed.

Every commit holds a whole one. It is bounded by the budget, whatever the stream: a memory of 6,000 tokens of ten
hours takes 20 KB a layer where they lie at random and no two layers agree, 2.5 % of the int4 KV of eight frames of a
7B; 0.2 % where the last frames make most of it, 0.1 % where layers agree. A chain of differences would save most of
that, and each link would have to outlive forgetting, ageing and damage to its neighbours; so a unit tells what was
remembered after it without any other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from memdb.codecs import planes
from memdb.schemas.errors import CodecError
from memdb.schemas.keep import Ids, KeepSet
from memdb.schemas.rows import LAYERS_MAX
from memdb.schemas.units import Bytes

TOKENS_MAX = 1 << 24  # over all layers: what a damaged head can make us allocate
_FORM = 1
_HEAD = struct.Struct("<HHI")  # form, nothing, layers; then a count (u4) a layer, and the gaps
_WORD_BYTES = 8


def encode(keep: KeepSet) -> bytes:
    """The bytes of a keep set; the same set gives the same bytes with one version of zstd."""
    counts = np.array(keep.tokens, "<u4")
    gaps = _gaps((*keep.ids, *keep.positions))
    packed = planes.pack(gaps.view(np.uint8), _WORD_BYTES) if gaps.size else np.zeros(0, np.uint8)
    return _HEAD.pack(_FORM, 0, len(counts)) + counts.tobytes() + packed.tobytes()


def decode(data: bytes) -> KeepSet:
    """Inverse of `encode`. Raises CodecError on anything else."""
    if len(data) < _HEAD.size:
        raise CodecError("a keep set is too short")
    form, nothing, layers = _HEAD.unpack_from(data)
    start = _HEAD.size + 4 * layers
    if form != _FORM or nothing or layers > LAYERS_MAX or len(data) < start:
        raise CodecError(f"a keep set of form {form} and {layers} layers is unknown")
    counts = np.frombuffer(data, "<u4", layers, _HEAD.size).astype(np.int64)
    total = int(counts.sum())
    if total > TOKENS_MAX or (len(data) > start) != (total > 0):
        raise CodecError(f"a keep set of {total} tokens cannot be")
    packed: Bytes = np.frombuffer(data, np.uint8, offset=start)
    raw = planes.unpack(packed, 2 * _WORD_BYTES * total, _WORD_BYTES) if total else packed
    rows = np.split(raw.view("<i8").astype(np.int64), np.cumsum([*counts, *counts])[:-1]) if layers else []
    found = KeepSet(*(tuple(np.cumsum(row) for row in half) for half in (rows[:layers], rows[layers:])))
    if any(len(ids) and (int(ids[0]) < 0 or bool((np.diff(ids) <= 0).any())) for ids in found.ids):
        raise CodecError("the ids of a keep set do not ascend")
    return found


def content(keep: KeepSet) -> bytes:
    """What a digest covers: counts, ids and positions, whatever compresses them."""
    whole = (np.array(keep.tokens), *keep.ids, *keep.positions)
    return b"".join(np.ascontiguousarray(part).astype("<i8").tobytes() for part in whole)


def _gaps(rows: Sequence[Ids]) -> Ids:
    """Each row's first value, then the steps to the next one; all rows one after another."""
    found = [np.diff(row, prepend=0) for row in rows]
    return np.concatenate(found).astype("<i8") if found else np.zeros(0, "<i8")
