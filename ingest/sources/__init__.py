"""Sources of frames: video files, image folders, addresses and iterators, opened by what they are given."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from memdb.ingest.sources.address import SCHEMES, VideoAddress
from memdb.ingest.sources.base import Source as Source
from memdb.ingest.sources.folder import ImageFolder
from memdb.ingest.sources.iterator import FrameIterator
from memdb.ingest.sources.live import RECONNECT_S, Reconnecting, checked_patience
from memdb.ingest.sources.video import VideoFile
from memdb.schemas.errors import SourceError, UsageError

SOURCES: dict[str, Callable[..., Source]] = {
    "file": VideoFile,
    "folder": ImageFolder,
    "stream": VideoAddress,
    "frames": FrameIterator,
}


def open_source(
    what: str | os.PathLike[str] | Iterable[Any],
    *,
    fps: float | None = None,
    track: int | None = None,
    reconnect_s: float = RECONNECT_S,
) -> Source:
    """The source that `what` names: a path of a film or of a folder of pictures, an address, or frames.

    `fps` is the rate of a folder (1.0 where it is not given) and of arrays that come without times. `track` is
    the number of a video track, from 0 on, where the best is not meant. `reconnect_s`: how long a live source
    that was lost is tried again; 0 for not at all, so that it ends with its connection.
    Raises SourceError where there is nothing to see, UsageError where `fps` or `track` has no place or is missing,
    BudgetError for an absurd rate or time.
    """
    kind = _kind(what)
    checked_patience(reconnect_s)
    if kind in ("folder", "frames"):
        if track is not None:
            raise UsageError("only films have video tracks: leave track out")
        return SOURCES[kind](what, fps=fps)
    if fps is not None:
        raise UsageError("a film carries its own times: give fps for image folders and arrays only")
    source = SOURCES[kind](what, track=track)
    if isinstance(source, VideoAddress) and source.info.live and reconnect_s:
        return Reconnecting(source, reconnect_s)
    return source


def _kind(what: str | os.PathLike[str] | Iterable[Any]) -> str:
    if not isinstance(what, str | os.PathLike):
        if isinstance(what, bytes) or not isinstance(what, Iterable):
            raise SourceError(f"{type(what).__name__} is no source: give a path, an address or frames")
        return "frames"
    if isinstance(what, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", what)):
        if scheme[1].lower() in SCHEMES:
            return "stream"
        raise SourceError(f"addresses of {scheme[1]}:// are not read: give {', '.join(SCHEMES)} or a path")
    if not os.fspath(what):
        raise SourceError("an empty path: give a film, a folder of pictures or an address")
    try:
        return "folder" if Path(what).is_dir() else "file"
    except (OSError, ValueError):  # too long a name, a zero byte in it: VideoFile says so
        return "file"
