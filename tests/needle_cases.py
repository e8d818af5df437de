"""What must be gone: the bytes of units as they lie on a disk, searched for in every file of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memdb.records import canonical_ascii
from memdb.schemas.units import Unit

_SHORTEST_BYTES = 12  # shorter ones are found by chance


def needles(unit: Unit) -> dict[str, bytes]:
    """Parts of a unit by name, each in the bytes in which it is kept."""
    found: dict[str, bytes] = {}
    if unit.caption is not None:
        found["caption"] = canonical_ascii(unit.caption.text).strip(b'"')
        found["vector"] = np.ascontiguousarray(unit.caption.vector, "<f4").tobytes()
    if unit.keyframe is not None:
        found["picture"] = unit.keyframe
    if unit.keys is not None:
        for layer, block in np.ndindex(unit.keys.shape[:2]):
            found[f"key {layer} {block}"] = np.ascontiguousarray(unit.keys[layer, block], "<f2").tobytes()
    if unit.kv is not None:
        for piece in unit.kv.slices:
            start, size = int(piece["offset"]), int(piece["stored_bytes"])
            stored = unit.kv.payload[start : start + size].tobytes()
            found[f"slice {int(piece['layer'])} {int(piece['block'])}"] = stored
    return {name: data for name, data in found.items() if len(data) >= _SHORTEST_BYTES and any(data)}


def holders(store: Path, wanted: dict[str, bytes]) -> dict[str, list[str]]:
    """Name of each needle that is found to the files of a closed store that hold it."""
    found: dict[str, list[str]] = {}
    for path in sorted(store.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        for name, needle in wanted.items():
            if needle in data:
                found.setdefault(name, []).append(str(path.relative_to(store)))
    return found
