"""Units whose KV is real for its codec, so that ageing can convert it; their content follows from the number alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from memdb import codecs
from memdb.codecs.pack import pack_unit, unpack_slices
from memdb.models.window import LayerKV
from memdb.schemas.fingerprint import ModelIdentity, ModelShape
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.units import BLOCK_DTYPE, Caption, Unit
from memdb.sealed import read_unit
from memdb.store import Store
from tests.store_cases import spec

L, H, D, T, BLOCKS = 2, 2, 8, 6, 2
DAY_NS = 86_400 * 10**9
STARTED_NS = 1_780_000_000_000_000_000  # of every recording here, wall clock
MODEL = ModelIdentity("random:0", "f" * 32, ModelShape(L, 4, H, D, 16, T, 512))


def values(number: int, block: int, layer: int) -> LayerKV:
    """Keys and values (H, T, D) of one block and layer, fp32."""
    made = torch.Generator().manual_seed(number * 1009 + block * 31 + layer)
    return LayerKV(torch.randn(H, T, D, generator=made), torch.randn(H, T, D, generator=made))


def kv_unit(number: int, unit_ns: int, codec: str = "raw", *, tokens: int = T) -> Unit:
    random = np.random.default_rng(number)
    layers: list[list[LayerKV | None]] = [
        [values(number, block, layer).part(0, tokens) for block in range(BLOCKS)] for layer in range(L)
    ]
    blocks = np.zeros(BLOCKS, BLOCK_DTYPE)
    places = np.arange(BLOCKS)
    blocks["kind"], blocks["tokens"] = 1, tokens
    blocks["position"] = (number * BLOCKS + places) * tokens
    blocks["start_ns"] = number * unit_ns + places * unit_ns // BLOCKS
    blocks["end_ns"] = number * unit_ns + (places + 1) * unit_ns // BLOCKS
    return Unit(
        number,
        number * unit_ns,
        (number + 1) * unit_ns,
        0,
        blocks,
        pack_unit(codecs.codec(codec), layers, {}, torch.float32),
        random.normal(size=(L, BLOCKS, H * D)).astype(np.float16),
        Caption(f"unit {number} of a long film", (1, 2, 3), random.normal(size=8).astype(np.float32)),
        b"\xff\xd8" + random.bytes(40),
    )


def fill_kv(
    store: Store,
    units: int,
    unit_ns: int,
    codec: str = "raw",
    *,
    name: str = "lobby",
    segment_units: int = 4,
    first: int = 0,
) -> None:
    """Append units `first` to before `units`, a segment for every so many."""
    own = spec(name, codec=codec, model=MODEL, started_at_ns=STARTED_NS)
    for at in range(first, units, segment_units):
        with store.writer(own, now_ns=STARTED_NS) as writer:
            writer.append([kv_unit(n, unit_ns, codec) for n in range(at, min(units, at + segment_units))])


def stored(store: Store, row: UnitRow) -> Unit:
    recording = store.recording_by_id(row.recording_id)
    return read_unit(store.segments_path, recording, row)


def restored(store: Store, recording: RecordingRow, row: UnitRow) -> dict[tuple[int, int], LayerKV]:
    """(layer, block) to the keys and values (H, T, D) that a question would get."""
    kv = stored(store, row).kv
    assert kv is not None
    name = row.codec or recording.spec.recipe.codec
    found = {}
    for piece in kv.slices:
        raw = kv.payload[int(piece["offset"]) : int(piece["offset"]) + int(piece["stored_bytes"])]
        if piece["stored_bytes"] < piece["raw_bytes"]:
            from memdb.codecs import planes

            raw = planes.unpack(raw, int(piece["raw_bytes"]), planes.element_bytes(name, "float32"))
        k, v = unpack_slices(
            codecs.codec(name),
            raw[None].copy(),
            dtype=torch.float32,
            scale_bytes=int(piece["scale_bytes"]),
            H=H,
            T=int(piece["tokens"]),
            D=D,
            device=torch.device("cpu"),
            out=torch.float32,
        )
        found[int(piece["layer"]), int(piece["block"])] = LayerKV(k[0], v[0])
    return found


def new_kv_store(folder: Path, units: int, unit_ns: int, codec: str = "raw", **changes: int) -> Path:
    """A closed store with one recording."""
    path = folder / "lobby.memdb"
    with Store.open(path, create=True, write=True) as store:
        fill_kv(store, units, unit_ns, codec, **changes)  # type: ignore[arg-type]
    return path
