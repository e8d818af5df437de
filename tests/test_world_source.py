"""Painted recordings as a source: the pictures of the plan, at its times, a few at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from memdb.ingest.sampling import sample
from memdb.ingest.sources import open_source
from memdb.world.pictures import Painter, parameters
from memdb.world.scenes import plan, scene_at
from memdb.world.source import BATCH_FRAMES, painted

SIZE = {"height": 18, "width": 32}


@pytest.mark.parametrize("fps", [1.0, 2.0])
def test_every_picture_is_the_plan_at_its_time(fps: float) -> None:
    scenes = plan(3, 20)
    frames = list(painted(scenes, fps=fps, **SIZE))
    assert len(frames) == 20 * fps > BATCH_FRAMES  # so that batches meet
    assert [seconds for seconds, _ in frames] == [number / fps for number in range(len(frames))]
    for seconds, picture in frames:
        rows = torch.from_numpy(parameters([scene_at(scenes, seconds)], [seconds]))
        alone = (Painter(18, 32).paint(rows)[0] * 255).round().to(torch.uint8).permute(1, 2, 0)
        assert int(np.abs(picture.astype(int) - alone.numpy().astype(int)).max()) <= 1


def test_an_ingest_takes_them_as_they_come() -> None:
    with open_source(painted(plan(3, 20), **SIZE)) as source:
        taken = list(sample(source.frames(), 1.0))
    assert [frame.start_ns for frame in taken] == [number * 10**9 for number in range(20)]
    assert (source.info.height, source.info.width) == (18, 32)
    assert len({frame.image.tobytes() for frame in taken}) > 10  # they move


def test_a_long_recording_is_painted_as_it_is_taken() -> None:
    began = painted(plan(3, 36_000), **SIZE)
    assert len(list(itertools.islice(began, 3))) == 3


def test_nothing_planned_gives_nothing() -> None:
    assert list(painted([])) == []
