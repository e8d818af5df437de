"""Codecs: one contract that all of them keep, and what each loses."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb import codecs
from memdb.codecs import planes
from memdb.codecs.base import Codec
from memdb.codecs.layout import ALIGNMENT
from memdb.codecs.pack import pack_unit, unpack_slices
from memdb.models.window import LayerKV
from memdb.schemas.errors import CodecError, RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The contract is run by several classes on purpose; what failed in one is no example for another.
INHERITED = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.differing_executors])


def width_of(codec: Codec, k: Tensor, v: Tensor) -> int:
    """How wide scales all of these slices need."""
    return int(codec.scale_bytes(k, v).max())


@dataclass(frozen=True)
class Case:
    """Keys and values (n, H, T, D) as a model may give them: outlier channels, constant ones, odd sizes."""

    n: int
    H: int
    T: int
    D: int
    dtype: str
    magnitude: float
    seed: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.H, self.T, self.D

    def kv(self) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(self.seed)
        size = (self.n, self.H, self.T, self.D)
        k, v = random.normal(size=size), random.normal(size=size)
        k += random.normal(size=(1, self.H, 1, self.D)) * 20  # channels far from zero
        k *= 10.0 ** random.integers(-3, 2, (1, self.H, 1, self.D))
        k[..., 0] = 0.75  # a constant channel, exact in every dtype
        v[:, :, 0] = -2.5  # a constant token
        return self._as(k), self._as(v)

    def _as(self, values: np.ndarray) -> Tensor:  # type: ignore[type-arg]
        scaled = np.clip(values * self.magnitude, -3e4, 3e4)
        return torch.from_numpy(scaled).to(DTYPES[self.dtype])


cases = st.builds(
    Case,
    n=st.integers(1, 3),
    H=st.integers(1, 3),
    T=st.integers(1, 9),
    D=st.integers(1, 11),
    dtype=st.sampled_from(sorted(DTYPES)),
    magnitude=st.sampled_from([2.0**-7, 1.0, 8.0]),
    seed=st.integers(0, 999),
)


class CodecContract:
    """Inherit, name the codec, and say what it may lose."""

    name: str
    largest = 3.5e38  # absolute value that it can hold
    over = (2, 3)  # the dimension of K and of V (n, H, T, D) that shares a scale

    @property
    def codec(self) -> Codec:
        return codecs.codec(self.name)

    def sizes(self, element_bytes: int, scale_bytes: int, H: int, T: int, D: int) -> list[int]:
        """Bytes of K codes, K scale, K minimum, V codes, V scale, V minimum."""
        raise NotImplementedError

    def allowed(self, x: Tensor, over: int, scale_bytes: int) -> Tensor:
        """The largest error of each value (n, H, T, D), fp64; `over` is the dimension that shares a scale."""
        raise NotImplementedError

    def packed(self, case: Case) -> tuple[Tensor, Tensor, Tensor, int]:
        k, v = case.kv()
        width = width_of(self.codec, k, v)
        return k, v, self.codec.pack(k, v, width), width

    def unpacked(self, case: Case, packed: Tensor, width: int, out: str = "float32") -> tuple[Tensor, Tensor]:
        return self.codec.unpack(packed, DTYPES[case.dtype], width, *case.shape, DTYPES[out])

    @settings(INHERITED, max_examples=60)
    @given(cases)
    def test_what_comes_back_is_within_the_bound(self, case: Case) -> None:
        k, v, packed, width = self.packed(case)
        for x, back, over in zip((k, v), self.unpacked(case, packed, width), self.over, strict=True):
            error = (back.double() - x.double()).abs()
            assert back.shape == x.shape
            assert bool((error <= self.allowed(x.double(), over, width)).all())

    @settings(INHERITED, max_examples=30)
    @given(cases)
    def test_the_layout_is_the_closed_form(self, case: Case) -> None:
        _, _, packed, width = self.packed(case)
        layout = self.codec.layout(DTYPES[case.dtype], width, *case.shape)
        sizes = self.sizes(DTYPES[case.dtype].itemsize, width, *case.shape)
        assert list(layout.sizes) == sizes
        assert layout.slice_bytes == packed.shape[1] == sum(-(-size // 64) * 64 for size in sizes)
        assert ALIGNMENT == 64
        ends = [*layout.offsets, layout.slice_bytes]
        for (start, stop), size in zip(pairwise(ends), sizes, strict=True):
            assert start % 64 == 0
            assert not bool(packed[:, start + size : stop].any())  # zeros up to the next part

    @settings(INHERITED, max_examples=30)
    @given(cases)
    def test_slices_do_not_depend_on_their_neighbours_nor_on_the_time(self, case: Case) -> None:
        k, v, packed, width = self.packed(case)
        assert torch.equal(packed, self.codec.pack(k.clone(), v.clone(), width))
        together = self.unpacked(case, packed, width)
        for i in range(case.n):
            assert torch.equal(self.codec.pack(k[i : i + 1], v[i : i + 1], width), packed[i : i + 1])
            alone = self.unpacked(case, packed[i : i + 1], width)
            assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
        strided = self.codec.pack(k.transpose(1, 2).contiguous().transpose(1, 2), v, width)
        assert torch.equal(strided, packed)  # whatever the strides

    @settings(INHERITED, max_examples=20)
    @given(cases, st.sampled_from(["bfloat16", "float16"]))
    def test_another_dtype_is_the_rounded_value(self, case: Case, out: str) -> None:
        _, _, packed, width = self.packed(case)
        exact = self.unpacked(case, packed, width)
        rounded = self.unpacked(case, packed, width, out)
        assert all(torch.equal(a.to(DTYPES[out]), b) for a, b in zip(exact, rounded, strict=True))

    @settings(INHERITED, max_examples=30)
    @given(cases)
    def test_constant_channels_come_back_exactly(self, case: Case) -> None:
        """Of V what shares a scale is constant: a token, or a channel."""
        k, v = case.kv()
        if self.over[1] == 2:
            v = k.flip(1)
        width = width_of(self.codec, k, v)
        back_k, back_v = self.unpacked(case, self.codec.pack(k, v, width), width)
        first = (Ellipsis, 0) if self.over[1] == 2 else (slice(None), slice(None), 0)
        assert torch.equal(back_k[..., 0], k[..., 0].float())
        assert torch.equal(back_v[first], v[first].float())

    @pytest.mark.parametrize("where", [0, 1])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    def test_values_that_are_not_finite_are_refused(self, bad: float, where: int, dtype: str) -> None:
        pair = Case(2, 2, 5, 3, dtype, 1.0, 0).kv()
        pair[where][1, 1, 4, 2] = bad
        for width in {width_of(self.codec, *pair), *((2, 4) if width_of(self.codec, *pair) else ())}:
            with pytest.raises(CodecError, match="not finite"):
                self.codec.pack(*pair, width)

    def test_values_out_of_range_are_refused_or_kept(self) -> None:
        """Nothing that is written may come back as infinite or as no number."""
        for largest in (60_000.0, 70_000.0, 1e30, 3.4e38):
            case = Case(1, 1, 4, 3, "float32", 1.0, 0)
            k, v = case.kv()
            k[0, 0, 0, 1], k[0, 0, 1, 1], v[0, 0, 1, 2] = largest, -largest, largest
            width = width_of(self.codec, k, v)
            if largest > self.largest:
                with pytest.raises(CodecError, match="--codec"):
                    self.codec.pack(k, v, width)
                continue
            packed = self.codec.pack(k, v, width)
            for x, back, over in zip((k, v), self.unpacked(case, packed, width), self.over, strict=True):
                assert bool(back.isfinite().all())
                error = (back.double() - x.double()).abs()
                assert bool((error <= self.allowed(x.double(), over, width)).all())


class PlainContract(CodecContract):
    def sizes(self, element_bytes: int, scale_bytes: int, H: int, T: int, D: int) -> list[int]:
        size = H * T * D * (element_bytes if self.name == "raw" else 2)
        return [size, 0, 0, size, 0, 0]

    def test_it_needs_no_scales(self) -> None:
        k, v = Case(1, 1, 3, 3, "float32", 1e4, 0).kv()
        assert width_of(self.codec, k, v) == 0


class TestRaw(PlainContract):
    name = "raw"

    def allowed(self, x: Tensor, over: int, scale_bytes: int) -> Tensor:
        return torch.zeros_like(x)

    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    def test_it_keeps_every_bit(self, dtype: str) -> None:
        """Also the sign of zero, and numbers below the normal ones."""
        k, v = Case(1, 2, 4, 8, dtype, 1.0, 0).kv()
        k[0, 0, 0, :3] = torch.tensor([-0.0, 0.0, torch.finfo(DTYPES[dtype]).tiny / 4])
        packed = self.codec.pack(k, v, 0)
        for x, back in zip((k, v), self.codec.unpack(packed, k.dtype, 0, 2, 4, 8, k.dtype), strict=True):
            assert torch.equal(back.contiguous().view(torch.uint8), x.contiguous().view(torch.uint8))


class TestFp16(PlainContract):
    name = "fp16"
    largest = 65_504.0

    def allowed(self, x: Tensor, over: int, scale_bytes: int) -> Tensor:
        return (x.abs() * 2.0**-11).clamp(min=2.0**-25)  # half a unit in the last place

    def test_its_refusal_names_the_codecs_that_hold_more(self) -> None:
        k = torch.full((1, 1, 2, 2), 1e5)
        with pytest.raises(CodecError, match="bf16, raw or int4"):
            self.codec.pack(k, k, 0)


class TestBf16(PlainContract):
    name = "bf16"
    largest = 3.39e38

    def allowed(self, x: Tensor, over: int, scale_bytes: int) -> Tensor:
        return x.abs() * 2.0**-8


class AffineContract(CodecContract):
    bits: int
    largest = 1.7e38  # the range from least to largest must itself be a number

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    def sizes(self, element_bytes: int, scale_bytes: int, H: int, T: int, D: int) -> list[int]:
        per_byte = 8 // self.bits
        k_codes, v_codes = H * -(-T // per_byte) * D, H * T * -(-D // per_byte)
        channels, tokens = H * D * scale_bytes, H * T * scale_bytes
        return [k_codes, channels, channels, v_codes, tokens, tokens]

    def allowed(self, x: Tensor, over: int, scale_bytes: int) -> Tensor:
        """Half a step, or at the ends of a range what rounding its minimum and its step moves them by."""
        unit, least = (2.0**-11, 2.0**-25) if scale_bytes == 2 else (2.0**-24, 0.0)
        low, high = x.amin(over, keepdim=True), x.amax(over, keepdim=True)
        step = (high - low) / self.levels
        moved_low = (low.abs() * unit).clamp(min=least)
        moved_step = (step * unit).clamp(min=least)
        ends = moved_low * (1 + 1 / self.levels) + self.levels * moved_step
        inside = (step + moved_step + moved_low / self.levels) / 2
        return torch.maximum(inside, ends) + x.abs() * 2.0**-22

    def test_the_bound_is_about_half_a_step(self) -> None:
        """The bound above means something: on spread values it is half a step, and some value comes near it."""
        case = Case(1, 1, 64, 64, "float32", 1.0, 5)
        random = torch.Generator().manual_seed(0)
        k, v = (torch.rand(1, 1, 64, 64, generator=random) - 0.5 for _ in range(2))
        packed = self.codec.pack(k, v, 2)
        for x, back, over in zip((k, v), self.unpacked(case, packed, 2), self.over, strict=True):
            step = (x.amax(over, keepdim=True) - x.amin(over, keepdim=True)) / self.levels
            share = ((back - x).abs() / step).max()
            assert 0.45 < float(share) <= (0.63 if self.bits == 8 else 0.51)

    def test_scales_widen_where_fp16_overflows(self) -> None:
        small, large = torch.full((1, 1, 2, 4), 30_000.0), torch.full((1, 1, 2, 4), -40_000.0)
        assert width_of(self.codec, small, small) == 2
        assert width_of(self.codec, large, small) == width_of(self.codec, small, large) == 4
        case = Case(1, 1, 2, 4, "float32", 1.0, 0)
        for pair in ((large, small), (small, large)):
            packed = self.codec.pack(*pair, 4)
            assert all(torch.equal(a, b) for a, b in zip(self.unpacked(case, packed, 4), pair, strict=True))
            with pytest.raises(CodecError):
                self.codec.pack(*(2 * x for x in pair), 2)

    @settings(INHERITED, max_examples=30)
    @given(cases)
    def test_wide_scales_lose_no_more(self, case: Case) -> None:
        k, v = case.kv()
        packed = self.codec.pack(k, v, 4)
        assert packed.shape[1] == self.codec.layout(k.dtype, 4, *case.shape).slice_bytes
        for x, back, over in zip((k, v), self.unpacked(case, packed, 4), self.over, strict=True):
            assert bool(((back.double() - x.double()).abs() <= self.allowed(x.double(), over, 4)).all())

    def test_an_outlier_channel_costs_its_neighbours_nothing(self) -> None:
        """Keys share a scale a channel, values one a token, or a channel as well."""
        k, v = Case(1, 1, 8, 6, "float32", 1.0, 1).kv()
        spiked_k, spiked_v = k.clone(), v.clone()
        spiked_k[..., 3] *= 1000
        if self.over[1] == 2:
            spiked_v[..., 3] *= 1000
        else:
            spiked_v[:, :, 3] *= 1000
        case = Case(1, 1, 8, 6, "float32", 1.0, 1)
        before = self.unpacked(case, self.codec.pack(k, v, 2), 2)
        after = self.unpacked(case, self.codec.pack(spiked_k, spiked_v, 4), 4)
        kept = [0, 1, 2, 4, 5]
        wide = self.unpacked(case, self.codec.pack(k, v, 4), 4)
        assert torch.equal(after[0][..., kept], wide[0][..., kept])
        if self.over[1] == 2:
            assert torch.equal(after[1][..., kept], wide[1][..., kept])
        else:
            assert torch.equal(after[1][:, :, [*kept, 6, 7]], wide[1][:, :, [*kept, 6, 7]])
        assert float((before[0] - k).abs().max()) > 0


class TestInt8(AffineContract):
    name, bits = "int8", 8


class TestInt4(AffineContract):
    name, bits = "int4", 4

    @pytest.mark.parametrize("T", [1, 2, 3])
    @pytest.mark.parametrize("D", [1, 2, 3])
    def test_all_nibbles_at_even_and_odd_places(self, T: int, D: int) -> None:
        """Every code 0..15 returns from every place: whole numbers 0..15 with step 1 lose nothing."""
        for low in range(16):
            values = (torch.arange(T * D).view(1, 1, T, D) + low) % 16
            frame = torch.tensor([0, 15]).view(1, 1, 2, 1).expand(1, 1, 2, D)
            k = torch.cat((values, frame), 2).float()  # the range of every channel is 0..15
            ends = torch.tensor([0, 15]).view(1, 1, 1, 2).expand(1, 1, T, 2)
            v = torch.cat((values, ends), 3).float()
            for x, which in ((k, 0), (v, 1)):
                pair = (k, torch.zeros_like(k)) if which == 0 else (torch.zeros_like(v), v)
                packed = self.codec.pack(*pair, 2)
                back = self.codec.unpack(packed, x.dtype, 2, *x.shape[1:], torch.float32)[which]
                assert torch.equal(back, x)

    def test_its_bytes_of_a_published_frame(self) -> None:
        """LLaVA-OneVision 7B: 196 tokens, 4 KV heads of 128, one layer: 98 + 98 KiB of fp16 become 51,520 + 53,312."""
        layout = self.codec.layout(torch.bfloat16, 2, 4, 196, 128)
        assert layout.sizes == (50_176, 1024, 1024, 50_176, 1568, 1568)
        assert layout.slice_bytes == 50_176 + 2 * 1024 + 50_176 + 2 * 1600


class OqmContract(AffineContract):
    """StreamingTOM, methods.md 1.6: K and V alike, a scale and a minimum per channel of the group."""

    over = (2, 2)

    def sizes(self, element_bytes: int, scale_bytes: int, H: int, T: int, D: int) -> list[int]:
        codes, channels = H * -(-T // (8 // self.bits)) * D, H * D * scale_bytes
        return [codes, channels, channels, codes, channels, channels]

    @settings(INHERITED, max_examples=30)
    @given(cases)
    def test_it_is_the_plain_loop_over_channels(self, case: Case) -> None:
        """Codes, scales and minima as the formulas say, code by code, against what is stored of scale and minimum."""
        k, v, packed, width = self.packed(case)
        kind = np.float16 if width == 2 else np.float32
        layout, per_byte = self.codec.layout(k.dtype, width, *case.shape), 8 // self.bits
        for x, part in ((k, 0), (v, 3)):
            for i, h in np.ndindex(case.n, case.H):
                group = x[i, h].float().numpy()  # (T, D)
                codes = np.zeros((-(-case.T // per_byte), case.D), np.uint8)
                scales, lows = np.zeros(case.D, kind), np.zeros(case.D, kind)
                for d in range(case.D):
                    lows[d] = group[:, d].min()
                    spread = np.float32(max(np.float32(0), group[:, d].max() - np.float32(lows[d])))
                    scales[d] = spread / np.float32(self.levels)
                    for t in range(case.T if scales[d] else 0):
                        code = np.rint((group[t, d] - np.float32(lows[d])) / np.float32(scales[d]))
                        code = int(min(max(code, 0), self.levels))
                        codes[t // per_byte, d] |= code << (t % per_byte * self.bits)
                for found, number in ((codes, part), (scales, part + 1), (lows, part + 2)):
                    size = layout.sizes[number] // case.H
                    start = layout.offsets[number] + h * size
                    assert packed[i, start : start + size].numpy().tobytes() == found.tobytes()

    @settings(INHERITED, max_examples=30)
    @given(cases)
    def test_t5_an_entry_is_off_by_half_a_step_and_an_ulp(self, case: Case) -> None:
        k, v, packed, width = self.packed(case)
        for x, back in zip((k, v), self.unpacked(case, packed, width), strict=True):
            low, high = x.double().amin(2, keepdim=True), x.double().amax(2, keepdim=True)
            step = (high - low) / self.levels
            largest = torch.maximum(low.abs(), high.abs())
            ulp = largest * 2.0**-10 + 2.0**-24  # of fp16
            ulp = ulp + self.levels * 2.0**-25  # a scale below fp16's smallest number is 0
            ulp = ulp + largest * torch.finfo(x.dtype).eps  # what comes back is rounded as it was
            assert bool(((back.double() - x.double()).abs() <= step / 2 * (1 + 2.0**-9) + ulp).all())

    @pytest.mark.parametrize("T", range(1, 10))
    def test_every_code_returns_from_every_place(self, T: int) -> None:
        """Whole numbers with a step of 1 lose nothing, in groups that do and do not fill their last byte."""
        top = self.levels
        for first in range(top + 1):
            values = (torch.arange(T) + first) % (top + 1)
            x = torch.cat((values, torch.tensor([0, top]))).float()[None, None, :, None].expand(1, 2, -1, 3)
            packed = self.codec.pack(x, x.flip(3), 2)
            back = self.codec.unpack(packed, x.dtype, 2, 2, T + 2, 3, torch.float32)
            assert torch.equal(back[0], x)
            assert torch.equal(back[1], x)

    @settings(INHERITED, max_examples=20)
    @given(cases, st.data())
    def test_what_is_kept_of_a_group_comes_out_bit_for_bit(self, case: Case, data: st.DataObject) -> None:
        _, _, packed, width = self.packed(case)
        kept = sorted(data.draw(st.sets(st.integers(0, case.T - 1), min_size=1)))
        fewer = self.codec.select(packed, DTYPES[case.dtype], width, *case.shape, torch.tensor(kept))
        whole = self.unpacked(case, packed, width)
        part = self.codec.unpack(fewer, DTYPES[case.dtype], width, case.H, len(kept), case.D, torch.float32)
        assert all(torch.equal(a, b[:, :, kept]) for a, b in zip(part, whole, strict=True))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_a_gpu_gives_the_same_bytes(self) -> None:
        k, v = (torch.randn(3, 4, 50, 128, generator=torch.Generator().manual_seed(i)) for i in range(2))
        for dtype in DTYPES.values():
            here = self.codec.pack(k.to(dtype), v.to(dtype), 2)
            there = self.codec.pack(k.to(dtype).cuda(), v.to(dtype).cuda(), 2)
            assert torch.equal(here, there.cpu())
            back = self.codec.unpack(there, dtype, 2, 4, 50, 128, torch.float32)
            truth = self.codec.unpack(here, dtype, 2, 4, 50, 128, torch.float32)
            assert all(
                torch.allclose(a.cpu(), b, rtol=1e-6, atol=1e-6) for a, b in zip(back, truth, strict=True)
            )


class TestOqm(OqmContract):
    name, bits = "oqm", 4

    def test_a_group_of_50_is_25_bytes_a_channel(self) -> None:
        """methods.md 1.10: 25,600 bytes of codes and 4,096 of scales and minima a layer, for 4 KV heads of 128."""
        layout = self.codec.layout(torch.bfloat16, 2, 4, 50, 128)
        assert layout.sizes == (4 * 128 * 25, 1024, 1024, 4 * 128 * 25, 1024, 1024)
        assert layout.slice_bytes == 25_600 + 4_096
        rep_bytes, layers, full = 1_024, 28, 11_239_424
        assert round(full / (layers * (layout.slice_bytes + rep_bytes)), 2) == 13.07


class TestOqm2(OqmContract):
    name, bits = "oqm2", 2


def test_every_codec_keeps_the_contract() -> None:
    bases = (PlainContract, AffineContract, OqmContract)
    found = {kind.name for base in bases for kind in base.__subclasses__() if hasattr(kind, "name")}
    assert found == set(codecs.NAMES)


def test_unknown_codecs_are_refused() -> None:
    with pytest.raises(RecipeError, match="raw, fp16, bf16, int8, int4, oqm, oqm2"):
        codecs.codec("int2")


# Units


def unit_layers(seed: int, *, magnitude: float = 1.0) -> list[list[LayerKV | None]]:
    """Two layers of three blocks, of 4, 7 and 4 tokens; layer 1 does not hold the second."""
    random = torch.Generator().manual_seed(seed)

    def block(tokens: int) -> LayerKV:
        return LayerKV(*(magnitude * torch.randn(2, tokens, 6, generator=random) for _ in range(2)))

    return [[block(4), block(7), block(4)], [block(4), None, block(4)]]


@pytest.mark.parametrize("name", codecs.NAMES)
def test_a_unit_holds_its_slices_layer_by_layer(name: str) -> None:
    codec, layers = codecs.codec(name), unit_layers(0)
    packed = pack_unit(codec, layers, {}, torch.float32)
    assert [(int(row["layer"]), int(row["block"])) for row in packed.slices] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 2),
    ]
    size, covered = planes.element_bytes(name, "float32"), 0
    for row in packed.slices:
        kv = layers[row["layer"]][row["block"]]
        assert kv is not None
        width = int(row["scale_bytes"])
        assert int(row["offset"]) == covered
        stored = packed.payload[covered : covered + int(row["stored_bytes"])]
        raw_bytes = int(row["raw_bytes"])
        assert raw_bytes == codec.layout(torch.float32, width, 2, kv.tokens, 6).slice_bytes
        raw = stored if len(stored) == raw_bytes else planes.unpack(stored, raw_bytes, size)
        alone = codec.pack(kv.k[None], kv.v[None], width)[0].numpy()
        assert np.array_equal(raw, alone)
        k, v = unpack_slices(
            codec,
            np.array(raw)[None],
            dtype=torch.float32,
            scale_bytes=width,
            H=2,
            T=kv.tokens,
            D=6,
            device=torch.device("cpu"),
            out=torch.float32,
        )
        if name == "raw":
            assert torch.equal(k[0], kv.k)
            assert torch.equal(v[0], kv.v)
        covered += -(-len(stored) // 64) * 64
    assert covered == len(packed.payload)
    again = pack_unit(codec, unit_layers(0), {}, torch.float32)
    assert np.array_equal(again.payload, packed.payload)
    assert again.raw_digest == packed.raw_digest
    assert pack_unit(codec, unit_layers(1), {}, torch.float32).raw_digest != packed.raw_digest


@pytest.mark.parametrize("name", ["int8", "int4", "oqm", "oqm2"])
def test_a_layer_that_overflowed_fp16_stays_wide(name: str) -> None:
    codec, layers = codecs.codec(name), unit_layers(0)
    layers[1][2] = LayerKV(torch.full((2, 4, 6), 5e4), torch.zeros(2, 4, 6))
    first = pack_unit(codec, layers, {}, torch.float32)
    assert [int(row["scale_bytes"]) for row in first.slices] == [2, 2, 2, 4, 4]
    widths = {int(row["layer"]): int(row["scale_bytes"]) for row in first.slices}
    later = pack_unit(codec, unit_layers(1), widths, torch.float32)
    assert [int(row["scale_bytes"]) for row in later.slices] == [2, 2, 2, 4, 4]
    assert {int(row["raw_bytes"]) for row in later.slices[3:]} == {
        codec.layout(torch.float32, 4, 2, 4, 6).slice_bytes
    }
