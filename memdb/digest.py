"""The content of a unit as a digest: what was kept, not how it lies on disk.

In it: number, span, epoch; blocks with kinds, tokens, spans and positions; slices before compression; scale
widths; representative keys; embeddings of frames; the keep set of a bounded memory; the caption's text, tokens and
vector; the key frame. Not in it: offsets, stored lengths, compressed bytes, times of creation, commit ids. So a resumed
ingest ends with the digest of an uninterrupted one, however its units were grouped into commits and whatever compressed
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from memdb import keep_set
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, Bytes, Unit

TIERS = ("all", "kv", "captions")
_DIGEST_BYTES = 16
_SLICE_CONTENT = ("layer", "block", "tokens", "scale_bytes", "raw_bytes")


@dataclass(frozen=True)
class TierDigests:
    """Digests of a unit's parts, one apart from the other."""

    kv: bytes
    captions: bytes
    keyframe: bytes

    @property
    def all(self) -> bytes:
        return _hash(b"unit", self.kv, self.captions, self.keyframe)

    def of(self, tier: str) -> bytes:
        return {"all": self.all, "kv": self.kv, "captions": self.captions}[tier]


def unit_digest(unit: Unit) -> bytes:
    """16 bytes over the content of a unit."""
    return digests_of(unit).all


def digests_of(unit: Unit) -> TierDigests:
    """The digests of a unit's tiers. `unit.kv.raw_digest` stands for its slices before compression."""
    head = np.array([unit.number, unit.start_ns, unit.end_ns, unit.epoch], "<i8").tobytes()
    slices = unit.kv.slices if unit.kv else np.zeros(0, SLICE_DTYPE)
    raw_digest = unit.kv.raw_digest if unit.kv else b""
    kv = [b"kv", head, np.ascontiguousarray(unit.blocks, BLOCK_DTYPE).tobytes(), raw_digest]
    kv += [np.ascontiguousarray(slices[name]).astype("<i8").tobytes() for name in _SLICE_CONTENT]
    if unit.keys is not None:
        kv += [np.array(unit.keys.shape, "<i8").tobytes(), np.ascontiguousarray(unit.keys, "<f2").tobytes()]
    if unit.keep is not None:
        kv += [b"keep", keep_set.content(unit.keep)]
    if unit.held is not None:
        kv += [b"held", keep_set.content(unit.held)]
    if unit.embeddings is not None:
        shape = np.array(unit.embeddings.shape, "<i8").tobytes()
        kv += [b"embeddings", shape, np.ascontiguousarray(unit.embeddings, "<f2").tobytes()]
    captions = [b"captions", head]
    if unit.caption is not None:
        captions += [
            json.dumps([unit.caption.text, list(unit.caption.token_ids)]).encode(),
            np.ascontiguousarray(unit.caption.vector, "<f4").tobytes(),
        ]
    frame = [b"keyframe", head] + ([unit.keyframe] if unit.keyframe is not None else [])
    return TierDigests(_hash(*kv), _hash(*captions), _hash(*frame))


def raw_digest_of(slices: Iterable[Bytes]) -> bytes:
    """xxh3_128 over slices before compression, one after another."""
    whole = xxhash.xxh3_128()
    for raw in slices:
        whole.update(np.ascontiguousarray(raw).data)
    digest: bytes = whole.digest()
    return digest


def check_digest(row: UnitRow, found: TierDigests) -> None:
    """Raises CorruptionError where a unit's bytes are not those with which its row was committed."""
    if found.all != row.digest:
        raise CorruptionError(
            f"segments/{row.segment}: unit {row.number} is not what was written",
            file=f"segments/{row.segment}",
        )


def recording_hash(units: Sequence[bytes]) -> str:
    """The digest of a recording from those of its units, in order: hex."""
    return _hash(b"recording", *units).hex()


def _hash(*parts: bytes) -> bytes:
    whole = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()
