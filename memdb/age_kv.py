"""Stored keys and values in another codec, or of fewer tokens. Positions and representative keys stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from memdb import codecs
from memdb.codecs import planes
from memdb.codecs.base import Codec
from memdb.codecs.pack import lay_out, pack_unit, unpack_slices
from memdb.models.window import LayerKV
from memdb.retain import THINNERS
from memdb.schemas.errors import CodecError
from memdb.schemas.keep import Ids, KeepSet, split_ids, token_ids
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.units import SLICE_DTYPE, Bytes, PackedKV, Table, Unit

_CPU = torch.device("cpu")
Places = npt.NDArray[np.intp]


def converted(unit: Unit, spec: RecordingSpec, codec: str, to: str) -> Unit:
    """A unit with its slices in a narrower codec: what an ingest in that codec would have stored of the same values.

    Raises CodecError for slices that are not of the codec that they are said to be.
    """
    assert unit.kv is not None
    shape = spec.model.shape
    own, dtype = codecs.codec(codec), _dtype(spec)
    slices = unit.kv.slices
    layers: list[list[LayerKV | None]] = [
        [None] * len(unit.blocks) for _ in range(int(slices["layer"].max()) + 1)
    ]
    for places, raw, tokens, width in _kinds(unit.kv, own, spec):
        k, v = unpack_slices(
            own,
            raw,
            dtype=dtype,
            scale_bytes=width,
            H=shape.kv_heads,
            T=tokens,
            D=shape.head_size,
            device=_CPU,
            out=torch.float32,
        )  # (n, H, T, D)
        for row, one_k, one_v in zip(slices[places], k, v, strict=True):
            layers[int(row["layer"])][int(row["block"])] = LayerKV(one_k, one_v)
    return replace(unit, kv=pack_unit(codecs.codec(to), layers, {}, dtype))


def thinned(unit: Unit, spec: RecordingSpec, codec: str, retainer: str, from_ppm: int, to_ppm: int) -> Unit:
    """A unit of which each block keeps `to_ppm` of the tokens of which it has `from_ppm` now, and at least one.

    What is stored of the tokens that are kept is gathered as it is. Raises CodecError.
    """
    assert unit.kv is not None
    shape, own, dtype = spec.model.shape, codecs.codec(codec), _dtype(spec)
    choose = THINNERS[retainer]().choose
    slices = unit.kv.slices.copy()
    raws: list[Bytes] = [np.zeros(0, np.uint8)] * len(slices)
    for places, raw, tokens, width in _kinds(unit.kv, own, spec):
        chosen = torch.from_numpy(choose(tokens, kept_tokens(tokens, from_ppm, to_ppm)))
        packed = own.select(
            torch.from_numpy(raw), dtype, width, shape.kv_heads, tokens, shape.head_size, chosen
        )
        slices["tokens"][places] = len(chosen)
        for place, data in zip(places, packed.numpy(), strict=True):
            raws[place] = data
    blocks = unit.blocks.copy()
    blocks["tokens"] = [kept_tokens(int(tokens), from_ppm, to_ppm) for tokens in blocks["tokens"]]
    kv = lay_out(raws, slices, planes.element_bytes(codec, spec.dtype))
    keep = unit.keep
    if keep is not None:  # no memory's, which nothing thins: it says where in their frame these tokens stand
        pairs = zip(unit.blocks["tokens"].tolist(), blocks["tokens"].tolist(), strict=True)
        none = np.zeros(0, np.int64)  # of a block that was forgotten
        keep = _renumbered(keep, unit.number, [choose(old, new) if old else none for old, new in pairs])
    return replace(unit, blocks=blocks, kv=kv, keep=keep)


def _renumbered(keep: KeepSet, unit: int, chosen: list[Ids]) -> KeepSet:
    """The tokens `chosen` of each block of a unit, counted anew; where they stand they keep.

    Tokens of earlier units are left out: those units are thinned too, by which their tokens are others.
    """
    ids, positions = [], []
    for own, at in zip(keep.ids, keep.positions, strict=True):
        units, blocks, tokens = split_ids(own)
        left = [
            np.flatnonzero((units == unit) & (blocks == block) & np.isin(tokens, kept))
            for block, kept in enumerate(chosen)
        ]
        ids.append(
            np.concatenate(
                [
                    token_ids(unit, block, np.searchsorted(chosen[block], tokens[rows]))
                    for block, rows in enumerate(left)
                ]
            )
        )
        positions.append(at[np.concatenate(left)])
    return KeepSet(tuple(ids), tuple(positions))


def gathered(unit: Unit, spec: RecordingSpec, codec: str, keep: KeepSet) -> Unit:
    """A unit of which each layer keeps the tokens that a keep set names. Blocks keep their rows, and tokens their ids.

    What is stored of the tokens is gathered as it is, and `held` says which those are. Of a block that no layer holds
    any more the row has 0 tokens. Raises CodecError.
    """
    assert unit.kv is not None
    shape, own, dtype = spec.model.shape, codecs.codec(codec), _dtype(spec)
    rows, raws = [], []
    held: dict[int, list[Ids]] = {layer: [] for layer in range(shape.layers)}
    for row in unit.kv.slices:
        layer, block, tokens = int(row["layer"]), int(row["block"]), int(row["tokens"])
        there = _held_of(unit, layer, block, tokens)
        left = np.flatnonzero(np.isin(there, keep.ids[layer]))
        if not len(left):
            continue
        raw = torch.from_numpy(_raw(unit.kv, row, own, spec)[None].copy())
        size = shape.kv_heads, tokens, shape.head_size
        packed = own.select(raw, dtype, int(row["scale_bytes"]), *size, torch.from_numpy(left))
        kept = row.copy()
        kept["tokens"] = len(left)
        rows.append(kept)
        raws.append(packed.numpy()[0])
        held[layer].append(there[left])
    ids = tuple(np.concatenate([np.zeros(0, np.int64), *own_ids]) for own_ids in held.values())
    blocks = unit.blocks.copy()
    blocks["tokens"][~np.isin(np.arange(len(blocks)), [int(row["block"]) for row in rows])] = 0
    if not rows:
        return replace(unit, blocks=blocks, kv=None, keys=None, held=None, embeddings=None)
    kv = lay_out(raws, np.array(rows, SLICE_DTYPE), planes.element_bytes(codec, spec.dtype))
    none = tuple(np.zeros(len(own_ids), np.int64) for own_ids in ids)  # where they stand, the keep sets say
    return replace(unit, blocks=blocks, kv=kv, held=KeepSet(ids, none))


def _held_of(unit: Unit, layer: int, block: int, tokens: int) -> Ids:
    """The ids of the tokens of one slice, in its order."""
    if unit.held is None:
        return token_ids(unit.number, block, np.arange(tokens))
    own = unit.held.ids[layer]
    found: Ids = own[split_ids(own)[1] == block]
    return found


def kept_tokens(tokens: int, from_ppm: int, to_ppm: int) -> int:
    """Of a block of so many; a block of none (it was forgotten) keeps none."""
    return min(tokens, max(1, tokens * to_ppm // from_ppm))


def _kinds(kv: PackedKV, codec: Codec, spec: RecordingSpec) -> Iterator[tuple[Places, Bytes, int, int]]:
    """The slices by kind: their places in the table, (n, raw_bytes) uncompressed, tokens and scale width."""
    shape, dtype = spec.model.shape, _dtype(spec)
    kinds = np.unique(kv.slices[["tokens", "scale_bytes"]])
    for kind in kinds:
        tokens, width = int(kind["tokens"]), int(kind["scale_bytes"])
        places = np.flatnonzero((kv.slices["tokens"] == tokens) & (kv.slices["scale_bytes"] == width))
        size = codec.layout(dtype, width, shape.kv_heads, tokens, shape.head_size).slice_bytes
        if (kv.slices["raw_bytes"][places] != size).any():
            raise CodecError(f"a slice of {tokens} tokens has not the {size} bytes of codec {codec.name}")
        raw = [_raw(kv, kv.slices[place], codec, spec) for place in places]
        yield places, np.stack(raw), tokens, width


def _raw(kv: PackedKV, row: Table, codec: Codec, spec: RecordingSpec) -> Bytes:
    offset, stored_bytes, raw_bytes = (int(row[name]) for name in ("offset", "stored_bytes", "raw_bytes"))
    stored = kv.payload[offset : offset + stored_bytes]
    if stored_bytes == raw_bytes:
        return stored
    return planes.unpack(stored, raw_bytes, planes.element_bytes(codec.name, spec.dtype))


def _dtype(spec: RecordingSpec) -> torch.dtype:
    found: torch.dtype = getattr(torch, spec.dtype)
    return found
