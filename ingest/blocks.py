"""The blocks of a unit: their rows, and a layer's keys and values cut into them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from memdb.ingest.frames import SeenFrame
from memdb.models.window import LayerKV
from memdb.retain.prototypes import Prototypes
from memdb.schemas.units import BLOCK_DTYPE, BlockKind, Table


def block_rows(frames: Sequence[SeenFrame], position: int) -> Table:
    """A block a frame, one after another from a stream position on."""
    blocks = np.zeros(len(frames), BLOCK_DTYPE)
    for row, frame in zip(blocks, frames, strict=True):
        row["kind"], row["tokens"] = frame.kind, len(frame.tokens)
        row["start_ns"], row["end_ns"] = frame.start_ns, frame.end_ns
        row["position"] = position
        position += len(frame.tokens)
    return blocks


def split(kv: LayerKV, sizes: Sequence[int]) -> list[LayerKV]:
    """A layer's keys and values, block by block."""
    ks, vs = torch.split(kv.k, list(sizes), 1), torch.split(kv.v, list(sizes), 1)
    return [LayerKV(k, v) for k, v in zip(ks, vs, strict=True)]


def add_prototypes(
    frames: Sequence[SeenFrame],
    blocks: Table,
    layers: Sequence[list[LayerKV | None]],
    made: Prototypes,
) -> Table:
    """Prototypes are blocks of one token behind those of the frames, one a frame; into `layers` they are put.

    Their rows say where the frame stands; where each layer's prototype does, its keep sets say.
    """
    rows = blocks.copy()
    rows["kind"], rows["tokens"] = BlockKind.PROTOTYPE, 1
    assert len(made.frame) == len(frames), "one a frame"
    if not made.frame.is_cuda:  # a GPU would have to be waited for
        assert made.frame.tolist() == [frame.number for frame in frames], "in their order"
    for held, k, v in zip(layers, made.k, made.v, strict=True):
        held += split(LayerKV(k, v), [1] * len(frames))
    return np.concatenate((blocks, rows))
