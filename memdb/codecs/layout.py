"""The layout of a slice: where codes, scales and minima lie, as a closed form. No torch."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 64


def aligned(size_bytes: int) -> int:
    """`size_bytes` rounded up to the alignment."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class SliceLayout:
    """`[K codes | K scale | K min | V codes | V scale | V min]`, each part aligned to 64 bytes.

    The sizes follow from the codec, the scale width, H, T and D alone, so that n slices of one kind land in one
    buffer and one strided view reads them all.
    """

    sizes: tuple[int, int, int, int, int, int]

    @property
    def offsets(self) -> tuple[int, ...]:
        starts, at = [], 0
        for size in self.sizes:
            starts.append(at)
            at += aligned(size)
        return tuple(starts)

    @property
    def slice_bytes(self) -> int:
        return sum(aligned(size) for size in self.sizes)


def plain_layout(element_bytes: int, H: int, T: int, D: int) -> SliceLayout:
    size = H * T * D * element_bytes
    return SliceLayout((size, 0, 0, size, 0, 0))


def affine_layout(bits: int, scale_bytes: int, H: int, T: int, D: int) -> SliceLayout:
    """K: codes packed along T, a scale and a minimum per channel. V: packed along D, one pair per token."""
    per_byte = 8 // bits
    k_codes = H * -(-T // per_byte) * D
    v_codes = H * T * -(-D // per_byte)
    channels, tokens = H * D * scale_bytes, H * T * scale_bytes
    return SliceLayout((k_codes, channels, channels, v_codes, tokens, tokens))


def oqm_layout(bits: int, scale_bytes: int, H: int, T: int, D: int) -> SliceLayout:
    """K and V: codes packed along T, a scale and a minimum per channel."""
    codes, channels = H * -(-T // (8 // bits)) * D, H * D * scale_bytes
    return SliceLayout((codes, channels, channels, codes, channels, channels))
