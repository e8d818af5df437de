"""Which of several video tracks is the film: always the same one, and said."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from av.stream import Disposition

from memdb.ingest.sources.base import check_size
from memdb.schemas.errors import SourceError, UsageError

_TEXT_CODECS = {"ansi", "bintext", "idf", "xbin"}  # ffmpeg plays text files as terminal art
# Pictures that go with a film and are none: covers, thumbnails on a time bar, what only another track can show.
_NO_FILM = (
    Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent
)


@dataclass(frozen=True)
class Track:
    """The track that is read. `number` counts the films of a container, from 0 on."""

    stream: Any
    number: int
    is_best: bool  # the one that is read where nobody names one
    others: str  # what is told of the tracks that are not read, "" for none


def pick_track(container: Any, label: str, wanted: int | None = None) -> Track:
    """The track `wanted`, or the best: marked as the default, the largest, the fastest, the first.

    Raises SourceError where there is no film that can be read, UsageError where there is none of that number.
    """
    tracks = [s for s in container.streams.video if not s.disposition & _NO_FILM]
    if not tracks:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise SourceError(
            f"{label} has no video track, only {' and '.join(kinds)}: give a film with pictures"
        )
    best = max(range(len(tracks)), key=lambda number: (*_rank(tracks[number]), -number))
    number = best if wanted is None else wanted
    if not 0 <= number < len(tracks):
        raise UsageError(f"{label} has no video track {number}: they are numbered 0 to {len(tracks) - 1}")
    _check(tracks[number], label)
    return Track(tracks[number], number, number == best, _told(tracks, number))


def _rank(stream: Any) -> tuple[bool, bool, int, Fraction]:
    """The same for the same bytes: what ffmpeg merely guesses (bit rates) takes no part."""
    context = stream.codec_context
    if context is None:
        return False, False, 0, Fraction(0)
    is_default = bool(stream.disposition & Disposition.default)
    return True, is_default, context.width * context.height, Fraction(stream.average_rate or 0)


def _told(tracks: list[Any], number: int) -> str:
    if len(tracks) < 2:
        return ""
    others = ", ".join(f"{n} ({_size(s)})" for n, s in enumerate(tracks) if n != number)
    return f"of {len(tracks)} video tracks number {number} ({_size(tracks[number])}) is read and not {others}"


def _size(stream: Any) -> str:
    context = stream.codec_context
    return "unknown codec" if context is None else f"{context.width} x {context.height}"


def _check(stream: Any, label: str) -> None:
    if stream.codec_context is None:
        raise SourceError(f"{label}: its video codec is not known here: convert it to H.264")
    if stream.codec_context.name in _TEXT_CODECS:
        raise SourceError(f"{label} is a text file, not a film: give a video file")
    check_size(stream.codec_context.width, stream.codec_context.height, label)
