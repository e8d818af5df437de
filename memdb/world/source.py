"""A planned recording as pictures that an ingest takes directly: no film, no decoder, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from memdb.schemas.frames import Image
from memdb.world.pictures import Painter, parameters
from memdb.world.scenes import Scene, scene_at

BATCH_FRAMES = 16


def painted(
    scenes: Sequence[Scene],
    *,
    fps: float = 1.0,
    height: int = 224,
    width: int = 398,
    fine: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[float, Image]]:
    """Seconds and picture (height, width, 3), `fps` a second, as `Client.ingest` takes them from an iterator.

    Sampled at `fps` these are the frames that a film of the same scenes shows at those times, without what a codec
    does to them. Pictures are painted a few at a time: what is held does not grow with the recording.
    """
    planned, painter = list(scenes), Painter(height, width, fine)
    count = round(planned[-1].end_s * fps) if planned else 0
    for first in range(0, count, BATCH_FRAMES):
        times_s = [number / fps for number in range(first, min(first + BATCH_FRAMES, count))]
        rows = parameters([scene_at(planned, time_s) for time_s in times_s], times_s)
        with torch.inference_mode():
            pictures = painter.paint(torch.from_numpy(rows).to(device))  # (F, 3, height, width)
        arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        yield from zip(times_s, arrays, strict=True)
