"""Frames as a source gives them and as a recipe takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]  # (height, width, 3) RGB


@dataclass(frozen=True)
class DecodedFrame:
    """One decoded frame: its media time, and its picture on demand (only picked frames are converted)."""

    pts_ns: int
    image: Callable[[], Image]


@dataclass(frozen=True, eq=False)
class Frame:
    """One sampled frame. It stands for the slot `[start_ns, end_ns)` of the sampling grid."""

    number: int  # 0-based among the sampled frames of the recording
    start_ns: int  # its true presentation time
    end_ns: int  # the end of its slot
    image: Image


@dataclass(frozen=True)
class SourceIdentity:
    """What makes a source the same source: never its path. `digest` is empty where it cannot be replayed."""

    kind: str  # file | folder | frames | stream
    size_bytes: int
    digest: str
    of_world: bool = False  # the film says that it was drawn of the world that the embedded model knows


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a source before its first frame is decoded."""

    identity: SourceIdentity
    name: str  # a suggestion for the recording's name
    live: bool
    started_at_ns: int | None  # wall clock, nanoseconds since the epoch, where the container says so
    duration_ns: int | None
    width: int
    height: int
