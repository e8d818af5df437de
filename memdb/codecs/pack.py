"""From the keys and values of a unit to the payload of a commit, and from read slices back to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from memdb.codecs import planes
from memdb.codecs.base import Codec
from memdb.codecs.layout import aligned
from memdb.models.transfers import together
from memdb.models.window import LayerKV
from memdb.schemas.units import SLICE_DTYPE, Bytes, PackedKV, Table


def pack_unit(
    codec: Codec, layers: Sequence[Sequence[LayerKV | None]], widths: Mapping[int, int], dtype: torch.dtype
) -> PackedKV:
    """Quantise and lay out the blocks of one unit, layer by layer.

    layers: per layer, per block of the unit, its keys and values (H, T, D), or None where the layer does not
    hold the block. widths: per layer the scale width so far in this recording; a layer whose values overflow
    fp16 widens and stays wide.
    """
    held = [
        (layer, block, kv)
        for layer, row in enumerate(layers)
        for block, kv in enumerate(row)
        if kv is not None
    ]
    slices = np.zeros(len(held), SLICE_DTYPE)
    slices["layer"] = [layer for layer, _, _ in held]
    slices["block"] = [block for _, block, _ in held]
    slices["tokens"] = [kv.tokens for _, _, kv in held]
    assert slices["tokens"].all(), "a block without tokens is none"
    of_size: list[tuple[npt.NDArray[np.intp], Tensor, Tensor]] = []  # which, k and v (n, H, T, D)
    needed = np.zeros(len(layers), np.int64)
    for tokens in sorted(set(slices["tokens"].tolist())):
        chosen = np.flatnonzero(slices["tokens"] == tokens)
        k, v = (together([getattr(held[i][2], name) for i in chosen]) for name in ("k", "v"))
        of_size.append((chosen, k, v))
        np.maximum.at(needed, slices["layer"][chosen], codec.scale_bytes(k, v).cpu().numpy())
    for layer, own in enumerate(needed):
        slices["scale_bytes"][slices["layer"] == layer] = max(int(own), widths.get(layer, 0))
    raw: list[Bytes] = [np.zeros(0, np.uint8)] * len(held)
    for chosen, k, v in of_size:
        for width in sorted(set(slices["scale_bytes"][chosen].tolist())):
            mine = np.flatnonzero(slices["scale_bytes"][chosen] == width)
            some = slice(None) if len(mine) == len(chosen) else torch.from_numpy(mine).to(k.device)
            packed = codec.pack(k[some], v[some], width).cpu().numpy()
            for i, row in zip(chosen[mine], packed, strict=True):
                raw[i] = row
    return lay_out(raw, slices, planes.element_bytes(codec.name, str(dtype).removeprefix("torch.")))


def lay_out(raw: list[Bytes], slices: Table, element_bytes: int) -> PackedKV:
    """Slices before compression as one payload. `slices` says layer, block, tokens and scale width of each; the rest
    of its columns is filled in. `element_bytes`: see `planes.element_bytes`.
    """
    digest = xxhash.xxh3_128()
    stored: list[Bytes] = []
    at = 0
    for row, data in zip(slices, raw, strict=True):
        digest.update(data.data)
        kept = data
        if element_bytes:
            smaller = planes.pack(data, element_bytes)
            kept = smaller if len(smaller) < len(data) else data
        stored.append(kept)
        row["offset"], row["raw_bytes"], row["stored_bytes"] = at, len(data), len(kept)
        row["xxh3"] = xxhash.xxh3_64_intdigest(kept.data)
        at += aligned(len(kept))
    payload = np.zeros(at, np.uint8)
    for row, data in zip(slices, stored, strict=True):
        payload[int(row["offset"]) : int(row["offset"]) + len(data)] = data
    return PackedKV(payload, slices, digest.digest())


def unpack_slices(
    codec: Codec,
    raw: Bytes,
    *,
    dtype: torch.dtype,
    scale_bytes: int,
    H: int,
    T: int,
    D: int,
    device: torch.device,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(n, raw_bytes) uint8 of n slices of one kind -> k and v (n, H, T, D) on `device` in `out`."""
    packed = torch.from_numpy(raw).to(device, non_blocking=True)
    return codec.unpack(packed, dtype, scale_bytes, H, T, D, out)
