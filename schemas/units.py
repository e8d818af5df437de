"""The unit of commit and what stands in it: blocks, slices, representative keys, caption, key frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from memdb.schemas.keep import KeepSet


class BlockKind(IntEnum):
    """What a block's tokens are. The numbers are part of the format: never renumber."""

    FRAME = 1
    GROUP = 2
    PAGE = 3
    SUMMARY = 4
    PROTOTYPE = 5


# One row a block of a unit. `position` is the stream position of the block's first token: its write position.
BLOCK_DTYPE = np.dtype(
    [("kind", "<u2"), ("tokens", "<u4"), ("start_ns", "<i8"), ("end_ns", "<i8"), ("position", "<i8")]
)

# One row a slice (one layer of one block), in the order of the payload. A layer that does not hold a block
# has no row for it. `offset` counts from the start of the unit's payload; `raw_bytes` is the size before
# compression, a closed form of codec, scale width, H, T, D; `stored_bytes` is what lies on disk; `xxh3` is over
# the stored bytes. `scale_bytes` is 2 (fp16) or 4 (fp32): the width of the scales, 0 for codecs without.
SLICE_DTYPE = np.dtype(
    [
        ("layer", "<u2"),
        ("block", "<u2"),
        ("tokens", "<u4"),
        ("scale_bytes", "<u2"),
        ("offset", "<u8"),
        ("raw_bytes", "<u4"),
        ("stored_bytes", "<u4"),
        ("xxh3", "<u8"),
    ]
)

Bytes = npt.NDArray[np.uint8]
Table = npt.NDArray[np.void]


@dataclass(frozen=True, eq=False)
class PackedKV:
    """The slices of a unit as they go to disk: layer by layer, each slice 64-byte aligned, zero padding.

    Layer-major, because a question reads layer by layer: the blocks of one unit and layer are one run.
    """

    payload: Bytes
    slices: Table  # (slices,) SLICE_DTYPE
    raw_digest: bytes  # xxh3_128 over the slices before compression: the content, whatever the compressor


@dataclass(frozen=True)
class Caption:
    """What the Video-LLM said of a clip."""

    text: str
    token_ids: tuple[int, ...]  # in the vocabulary of the model that spoke
    vector: tuple[float, ...] | npt.NDArray[np.float32] = field(compare=False)  # (E,)


@dataclass(frozen=True, eq=False)
class Unit:
    """What one commit holds. `kv` and `keys` are None in a recording without KV, `caption` without captions."""

    number: int  # 0-based, without holes, in the recording
    start_ns: int
    end_ns: int
    epoch: int
    blocks: Table  # (blocks,) BLOCK_DTYPE; empty without KV
    kv: PackedKV | None
    keys: npt.NDArray[np.float16] | None  # (L, blocks, H*D) representative keys
    caption: Caption | None
    keyframe: bytes | None  # JPEG
    # What a bounded memory holds after this unit; or, of a frame on a grid that was reduced, its tokens, and as
    # positions at which of the frame's places they stand.
    keep: KeepSet | None = None
    held: KeepSet | None = (
        None  # which of their tokens its slices hold, where ageing gathered those; None: all
    )
    embeddings: npt.NDArray[np.float16] | None = None  # (blocks, E) of frames, in one space with questions

    @property
    def payload_bytes(self) -> int:
        """Bytes of the big parts, for back-pressure and for the pace of saved states."""
        kv = self.kv.payload.nbytes if self.kv else 0
        keys = sum(part.nbytes for part in (self.keys, self.embeddings) if part is not None)
        # More than tokens at random take, see memdb/keep_set.py.
        kept = 256 + 8 * sum(self.keep.tokens) if self.keep else 0
        return kv + keys + kept + len(self.keyframe or b"")


def no_blocks() -> Table:
    return np.zeros(0, BLOCK_DTYPE)
