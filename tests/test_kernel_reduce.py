"""The kernels that can be run alone are what plain loops give, on arrays of the kinds that they name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memdb.ingest.reduce.dpc import distances
from tests.test_ctr import loop_centres, loop_ctr, loop_static
from tests.test_units import loop_segments
from tools.kernel_reduce import KERNELS

KINDS = ("released", "textbook")


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("with_before", [True, False])
def test_ctr(released: bool, with_before: bool) -> None:
    random = np.random.default_rng(1)
    first = random.normal(size=(1, 60, 8))
    still = random.random((5, 60, 1)) < 0.7
    frames = np.where(still, first, random.normal(size=(5, 60, 8))).astype(np.float32)
    saliency, jitter = random.random((5, 60)).astype(np.float32), 1e-6 * random.random((5, 60))
    before = first[0].astype(np.float32) if with_before else None
    found = KERNELS["ctr"](frames, saliency, before, jitter, tokens=20, released=released)
    kind = KINDS[not released]
    shown = torch.from_numpy(frames)
    static = loop_static(shown, None if before is None else torch.from_numpy(before), 0.9)
    assert found["static"].tolist() == static
    distance = distances(shown, kind=kind)
    for i in range(5):
        truth, raster = loop_ctr(
            shown[i],
            static[i],
            torch.from_numpy(saliency[i]),
            distance[i],
            torch.from_numpy(jitter[i]),
            20,
            7,
            0.6,
            kind,
        )
        assert found["raster"][i].tolist() == raster
        assert np.allclose(found["tokens"][i], truth.numpy(), rtol=1e-5, atol=1e-5)
    half = KERNELS["ctr"](frames.astype(np.float16), saliency.astype(np.float16), tokens=20)
    assert half["tokens"].dtype == np.float16


@pytest.mark.parametrize("released", [True, False])
def test_dpc(released: bool) -> None:
    random, kind = np.random.default_rng(2), KINDS[not released]
    points, jitter = random.normal(size=(40, 6)).astype(np.float32), 1e-6 * random.random(40)
    found = KERNELS["dpc"](points, 9, jitter=jitter, released=released)["centres"]
    distance = distances(torch.from_numpy(points)[None], kind=kind)[0]
    truth = loop_centres(distance, list(range(40)), 9, 7, torch.from_numpy(jitter), kind)
    assert found.tolist() == truth
    assert KERNELS["dpc"](points[:1], 1)["centres"].tolist() == [0]


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("G", [50, 7, 1])
def test_oqm(bits: int, kind: type, G: int) -> None:
    x = np.random.default_rng(G).normal(size=(2, G, 3)).astype(kind)
    x[0, :, 1] = 0.5  # a constant channel
    packed = KERNELS["oqm_pack"](x, bits)
    per_byte, levels = 8 // bits, 2**bits - 1
    codes = np.zeros((2, -(-G // per_byte), 3), np.uint8)
    for h in range(2):
        for d in range(3):
            low = x[h, :, d].min()
            scale = max(kind((x[h, :, d].max() - low) / kind(levels)), kind(1e-8))
            assert packed["minimum"][h, d] == low
            assert packed["scale"][h, d] == scale
            for t in range(G if scale else 0):
                code = int(np.clip(np.rint(kind(x[h, t, d] - low) / scale), 0, levels))
                codes[h, t // per_byte, d] |= code << (t % per_byte * bits)
    assert np.array_equal(packed["packed"], codes)
    back = KERNELS["oqm_unpack"](packed["packed"], packed["scale"], packed["minimum"], G, bits)["x"]
    assert back.dtype == kind
    step = packed["scale"][:, None].astype(np.float64)
    ulp = 2.0**-9 if kind is np.float16 else 2.0**-21
    assert bool((np.abs(back.astype(np.float64) - x) <= step / 2 + ulp * (1 + np.abs(x))).all())
    assert (back[0, :, 1] == x[0, :, 1]).all()


def test_oqm_of_many_groups_at_once() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2, 6, 4)).astype(np.float32)
    whole, one = KERNELS["oqm_pack"](x), KERNELS["oqm_pack"](x[3])
    assert all(np.array_equal(whole[name][3], one[name]) for name in one)


def test_segment() -> None:
    random = np.random.default_rng(4)
    steps = np.where(random.random((90, 1, 1)) < 0.1, 3.0, 0.03) * random.normal(size=(90, 4, 6))
    features = steps.cumsum(0).astype(np.float32)
    found = KERNELS["segment"](features, theta=0.9, frames_min=3, frames_max=8)
    truth = loop_segments(list(torch.from_numpy(features)), 0.9, 3, 8, 0.0)
    assert [(a, b + 1) for a, b in zip(found["first"], found["last"], strict=True)] == [
        (one.start, one.end) for group in truth for one in group
    ]
    assert found["segment"].tolist() == [i for i, group in enumerate(truth) for _ in group]
    units = np.stack([one.feature for group in truth for one in group])
    assert np.allclose(found["units"], units, rtol=1e-5, atol=1e-5)
    assert len(truth) > 2
    assert any(one.end - one.start > 1 for group in truth for one in group)
    assert KERNELS["segment"](features[:0])["units"].shape == (0, 4, 6)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_says_its_arrays(name: str) -> None:
    text = KERNELS[name].__doc__ or ""
    assert "in: " in text
    assert "out: " in text
