"""The last groups of a recording as they are stored: the window of an encoder that sees them so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memdb import codecs
from memdb.codecs.pack import unpack_slices
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.reader import SliceReader
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.store import Store


@dataclass(frozen=True, eq=False)
class StoredGroups:
    """Reads a recording's groups back for the model that encoded them."""

    store: Store
    recording_id: str
    model: VideoModel

    def read(self, units: range) -> tuple[list[LayerKV], Tensor, Tensor | None]:
        """Keys and values of these units, one group each, a layer each (H, tokens, D); where each token was written,
        (tokens,); and where in its frame it stood, (tokens,), where that is kept.

        Raises CorruptionError where they are not what was first written: damaged, thinned by ageing, or forgotten.
        """
        rows = [self.store.unit(self.recording_id, number) for number in units]
        shape = self.model.shape
        for row in rows:
            if row.digest != row.first_digest or len(row.slices) != shape.layers:
                raise _changed(f"unit {row.number} is not what was first written")
        with SliceReader(self.store) as reader:
            batch = reader.read([(row, np.arange(shape.layers)) for row in rows])
            if batch.bad:
                raise _changed(batch.bad[0].reason)
            kinds = batch.kinds()
            sizes = {kind.tokens for kind, _, _ in kinds}
            if len(sizes) != 1:
                raise _changed("its groups are not of one size")
            G = sizes.pop()
            many = (len(rows) * shape.layers, shape.kv_heads, G, shape.head_size)
            ks, vs = (torch.empty(many, dtype=self.model.dtype, device=self.model.device) for _ in range(2))
            for kind, own, raw in kinds:
                k, v = unpack_slices(
                    codecs.codec(kind.codec),
                    raw,
                    dtype=self.model.dtype,
                    scale_bytes=kind.scale_bytes,
                    H=shape.kv_heads,
                    T=G,
                    D=shape.head_size,
                    device=self.model.device,
                    out=self.model.dtype,
                )
                at = torch.from_numpy(own).to(self.model.device)
                ks[at], vs[at] = k, v
        layers = [
            LayerKV(_joined(ks[at :: shape.layers]), _joined(vs[at :: shape.layers]))
            for at in range(shape.layers)
        ]
        kept = [found for row in rows if (found := self.store.read_keep(row)) is not None]
        raster = np.concatenate([found.positions[0] for found in kept]) if kept else None
        if raster is not None and len(raster) != len(rows) * G:
            raise _changed("it is not kept of every token where it stood")
        return layers, _stands(rows, G), None if raster is None else torch.from_numpy(raster)


def _joined(groups: Tensor) -> Tensor:
    """(F, H, G, D) -> (H, F*G, D)."""
    return groups.transpose(0, 1).flatten(1, 2)


def _stands(rows: list[UnitRow], group: int) -> Tensor:
    starts = torch.tensor([int(row.blocks["position"][0]) for row in rows])
    return (starts[:, None] + torch.arange(group)).flatten()


def _changed(why: str) -> CorruptionError:
    return CorruptionError(f"the encoder's window cannot be read back: {why}", file="segments")
