"""The content of a unit as a digest: what was kept, not how it lies on disk.

In it: number, span, epoch; blocks with kinds, tokens, spans and positions; slices before compression; scale
widths; representative keys; the caption's text, tokens and vector; the key frame. Not in it: offsets, stored
lengths, compressed bytes, times of creation, commit ids. So a resumed ingest ends with the digest of an
uninterrupted one, however its units were grouped into commits and whatever compressed them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, Bytes, Caption, Table, Unit

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
    """16 bytes over the content of a unit that is to be written."""
    return tier_digests(
        unit.number,
        unit.start_ns,
        unit.end_ns,
        unit.epoch,
        unit.blocks,
        unit.kv.slices if unit.kv else np.zeros(0, SLICE_DTYPE),
        unit.kv.raw_digest if unit.kv else b"",
        unit.keys,
        unit.caption,
        unit.keyframe,
    ).all


def tier_digests(
    number: int,
    start_ns: int,
    end_ns: int,
    epoch: int,
    blocks: Table,
    slices: Table,
    raw_digest: bytes,
    keys: npt.NDArray[np.float16] | None,
    caption: Caption | None,
    keyframe: bytes | None,
) -> TierDigests:
    """`raw_digest` is xxh3_128 over the slices before compression, in the order of the table."""
    unit = np.array([number, start_ns, end_ns, epoch], "<i8").tobytes()
    kv = [b"kv", unit, np.ascontiguousarray(blocks, BLOCK_DTYPE).tobytes(), raw_digest]
    kv += [np.ascontiguousarray(slices[name]).astype("<i8").tobytes() for name in _SLICE_CONTENT]
    if keys is not None:
        kv += [np.array(keys.shape, "<i8").tobytes(), np.ascontiguousarray(keys, "<f2").tobytes()]
    captions = [b"captions", unit]
    if caption is not None:
        captions += [
            json.dumps([caption.text, list(caption.token_ids)]).encode(),
            np.ascontiguousarray(caption.vector, "<f4").tobytes(),
        ]
    frame = [b"keyframe", unit] + ([keyframe] if keyframe is not None else [])
    return TierDigests(_hash(*kv), _hash(*captions), _hash(*frame))


def raw_digest_of(slices: Iterable[Bytes]) -> bytes:
    """xxh3_128 over slices before compression, one after another."""
    whole = xxhash.xxh3_128()
    for raw in slices:
        whole.update(np.ascontiguousarray(raw).data)
    digest: bytes = whole.digest()
    return digest


def check_digest(row: UnitRow, found: TierDigests) -> None:
    """Raises CorruptionError where a unit's bytes are not those with which it was first written."""
    if found.all != row.digest:
        raise CorruptionError(
            f"segments/{row.segment}: unit {row.number} is not what was first written",
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
