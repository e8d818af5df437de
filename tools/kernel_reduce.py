"""Kernels of stages 1 and 2 and of the group codec, from arrays to arrays, as the released code computes them.

KERNELS names them. Each takes its arrays by name and gives a dict of arrays; its docstring says kinds and shapes. What
they run is what an ingest runs, with the values of profile `code`; `oqm_pack` and `oqm_unpack` alone are functions of
their own, because the store keeps scales otherwise (memdb/codecs/affine.py says how).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memdb.ingest.frames import SeenFrame
from memdb.ingest.reduce import dpc as peaks
from memdb.ingest.reduce.ctr import CausalTemporal, reduce_frames, static_tokens
from memdb.ingest.units.segment import SemanticSegment
from memdb.schemas.errors import UsageError
from memdb.schemas.params import at_least

Array = npt.NDArray[Any]
SCALE_MIN = 1e-8  # the released code's floor of a scale; in fp16 it is 0


def ctr(
    frames: Array,
    saliency: Array,
    before: Array | None = None,
    jitter: Array | None = None,
    tokens: int = 50,
    tau: float = 0.9,
    neighbours: int = 7,
    beta: float = 0.6,
    released: bool = True,
) -> dict[str, Array]:
    """CTR (StreamingTOM): frames to G tokens each.

    in: frames float16/32 (F, N, E); saliency float16/32 (F, N); before float16/32 (N, E), the raw frame before them,
    left out where there is none; jitter float32/64 (F, N), what is added to the density of each place, 0 where left
    out; tokens int, G; tau, beta float; neighbours int; released bool, else the textbook's delta.
    out: tokens as frames (F, G, E), by place; raster int64 (F, G), ascending; static bool (F, N).
    """
    at_least("tokens", int(tokens), 1)
    method = CausalTemporal(int(tokens), float(tau), int(neighbours), float(beta), _kind(released))
    shown = torch.from_numpy(np.ascontiguousarray(frames))
    last = None if before is None else torch.from_numpy(np.ascontiguousarray(before))
    static = static_tokens(shown, last, method.tau)
    noise = torch.zeros(shown.shape[:2]) if jitter is None else torch.from_numpy(np.ascontiguousarray(jitter))
    kept, raster = reduce_frames(
        shown,
        torch.from_numpy(np.ascontiguousarray(saliency)),
        static,
        method.kept(shown.shape[1]),
        noise,
        neighbours=method.neighbours,
        beta=method.beta,
        kind=method.dpc,
    )
    return {"tokens": kept.numpy(), "raster": raster.numpy(), "static": static.numpy()}


def dpc(
    points: Array, clusters: int, neighbours: int = 7, jitter: Array | None = None, released: bool = True
) -> dict[str, Array]:
    """Density peaks (StreamingTOM): which points are centres.

    in: points float16/32 (n, E); clusters int, more than n are n; neighbours int; jitter float32/64 (n,), 0 where left
    out; released bool, else the textbook's delta.
    out: centres int64 (clusters,), ascending.
    """
    frame = torch.from_numpy(np.ascontiguousarray(points))[None]  # (1, n, E)
    n, kind = frame.shape[1], _kind(released)
    at_least("clusters", int(clusters), 0)
    at_least("neighbours", int(neighbours), 1)
    noise = torch.zeros(n) if jitter is None else torch.from_numpy(np.ascontiguousarray(jitter))
    found = peaks.centres(
        peaks.distances(frame, kind=kind),
        torch.ones(1, n, dtype=torch.bool),
        torch.tensor([min(int(clusters), n)]),
        int(neighbours),
        noise[None],
        kind=kind,
    )
    return {"centres": found[0].nonzero()[:, 0].numpy()}


def oqm_pack(x: Array, bits: int = 4) -> dict[str, Array]:
    """OQM (StreamingTOM): keys or values of a group to codes, a scale and a minimum per channel.

    in: x float16/32 (..., G, D); bits int, 4 or 2.
    out: packed uint8 (..., ceil(G / (8 / bits)), D), the first token in the lowest bits, the end padded with 0; scale
    and minimum as x (..., D). All is computed in the kind of x. Where a scale is 0, the codes are 0.
    """
    _check_bits(bits)
    values, per_byte, levels = torch.from_numpy(np.ascontiguousarray(x)), 8 // int(bits), 2 ** int(bits) - 1
    low = values.amin(-2, keepdim=True)
    scale = ((values.amax(-2, keepdim=True) - low) / levels).clamp(min=SCALE_MIN)
    codes = ((values - low) / scale).clamp(0, levels).round()
    codes = torch.where(scale > 0, codes, 0).to(torch.uint8)  # (..., G, D)
    missing = -codes.shape[-2] % per_byte
    codes = torch.cat((codes, codes.new_zeros(*codes.shape[:-2], missing, codes.shape[-1])), -2)
    packed = torch.zeros_like(codes[..., ::per_byte, :])
    for place in range(per_byte):
        packed |= codes[..., place::per_byte, :] << (place * int(bits))
    return {"packed": packed.numpy(), "scale": scale[..., 0, :].numpy(), "minimum": low[..., 0, :].numpy()}


def oqm_unpack(packed: Array, scale: Array, minimum: Array, tokens: int, bits: int = 4) -> dict[str, Array]:
    """Inverse of oqm_pack.

    in: packed uint8 (..., ceil(G / (8 / bits)), D); scale, minimum float16/32 (..., D); tokens int, G; bits int.
    out: x as scale (..., G, D).
    """
    _check_bits(bits)
    if not 0 <= int(tokens) <= packed.shape[-2] * 8 // int(bits):
        raise UsageError(
            f"tokens = {int(tokens)}: {packed.shape[-2]} bytes hold {packed.shape[-2] * 8 // int(bits)}"
        )
    stored, bits = torch.from_numpy(np.ascontiguousarray(packed)), int(bits)
    places = [(stored >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    codes = torch.stack(places, -2).flatten(-3, -2)[..., : int(tokens), :]
    step, low = (torch.from_numpy(np.ascontiguousarray(part))[..., None, :] for part in (scale, minimum))
    return {"x": (codes.to(step.dtype) * step + low).numpy()}


def segment(
    features: Array, theta: float = 0.99, frames_min: int = 4, frames_max: int = 64
) -> dict[str, Array]:
    """Semantic segments with in-segment merge (StreamKV).

    in: features float16/32 (T, N, E), raw, in time order; theta float; frames_min, frames_max int, m and M.
    out: units as features (U, N, E); first and last int64 (U,), the frames that each stands for, both included;
    segment int64 (U,), the number of its segment.
    """
    unit = SemanticSegment(float(theta), int(frames_min), int(frames_max), unit_s_max=0.0)
    closed: list[list[SeenFrame]] = []
    opened: list[SeenFrame] = []
    for t, feature in enumerate(torch.from_numpy(np.ascontiguousarray(features))):
        done, opened = unit.extend(opened, SeenFrame(t, t, t + 1, feature, b""))
        closed += done
    closed += [opened] if opened else []
    units = [frame for group in closed for frame in group]
    return {
        "units": torch.stack([frame.tokens for frame in units]).numpy() if units else features[:0],
        "first": np.array([frame.start_ns for frame in units], np.int64),
        "last": np.array([frame.end_ns - 1 for frame in units], np.int64),
        "segment": np.array([number for number, group in enumerate(closed) for _ in group], np.int64),
    }


def _check_bits(bits: int) -> None:
    if int(bits) not in (2, 4):
        raise UsageError(f"bits = {int(bits)}: give 4 or 2")


def _kind(released: bool) -> str:
    return "released" if released else "textbook"


KERNELS: dict[str, Callable[..., dict[str, Array]]] = {
    "ctr": ctr,
    "dpc": dpc,
    "oqm_pack": oqm_pack,
    "oqm_unpack": oqm_unpack,
    "segment": segment,
}
