"""How a saved encoder state holds a frame that is not encoded yet, exactly: tensors, and a row of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from memdb.ingest.frames import SeenFrame

Row = Sequence[int | float]


def frame_tensors(name: str, frame: SeenFrame) -> dict[str, Tensor]:
    """What a frame holds, by name. Its raster is not among it: nothing is reduced before its unit closes."""
    found = {name: frame.tokens}
    if frame.saliency is not None:
        found[f"{name}.saliency"] = frame.saliency
    if frame.latest is not None:
        found[f"{name}.latest"] = frame.latest
    if frame.vector is not None:
        found[f"{name}.vector"] = frame.vector
    return found


def frame_row(frame: SeenFrame) -> Row:
    """Its numbers. The last two only where they say something, so that most states are as they always were."""
    row: list[int | float] = [frame.number, frame.start_ns, frame.end_ns]
    return [*row, frame.count, frame.likeness] if frame.count > 1 or frame.likeness else row


def frame_from(name: str, row: Row, tensors: Mapping[str, Tensor], jpeg: bytes) -> SeenFrame:
    """Inverse of the two above."""
    number, start_ns, end_ns, *more = row
    frame = SeenFrame(
        int(number),
        int(start_ns),
        int(end_ns),
        tensors[name],
        jpeg,
        saliency=tensors.get(f"{name}.saliency"),
        latest=tensors.get(f"{name}.latest"),
        vector=tensors.get(f"{name}.vector"),
    )
    return replace(frame, count=int(more[0]), likeness=float(more[1])) if more else frame
