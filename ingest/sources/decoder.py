"""One pass over one video track through PyAV: packets in, pictures with media times out, damage survived."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import av
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition

from memdb.ingest.sources.base import PICTURE_PX_MAX, check_size, fitted
from memdb.schemas.errors import MemdbError, SourceError
from memdb.schemas.frames import Image
from memdb.schemas.times import NS_PER_S, parse_time, parse_wall_clock, to_ns

FFmpegError = av.error.FFmpegError

_US_PER_S = 1_000_000
_RATE_UNKNOWN_FPS = Fraction(25)
_TEXT_CODECS = {"ansi", "bintext", "idf", "xbin"}  # ffmpeg plays text files as terminal art
# These say in their header how long the film is; of the others ffmpeg estimates it from what is there.
_DECLARES_LENGTH = {"avi", "matroska", "mov"}
_YEAR_1990_NS = 631_152_000 * NS_PER_S
_DAY_NS = 86_400 * NS_PER_S


@dataclass(frozen=True)
class Picture:
    """A decoded frame of ffmpeg's with its media time; `duration_ns` is 0 where the film does not say."""

    pts_ns: int
    duration_ns: int
    frame: Any


class Decoder:
    """The first video track of `address`, decoded once from its beginning. Not for two threads at once.

    `first` is its first whole picture, decoded already, or None where there is not one. Raises PyAV's
    FFmpegError where nothing can be opened, SourceError where what was opened is no film.
    """

    def __init__(
        self, address: str, label: str, *, options: dict[str, str], timeout_s: tuple[float, float] | None
    ) -> None:
        self._container = av.open(address, options=options, timeout=timeout_s, metadata_errors="replace")
        try:
            self._stream = _first_track(self._container, label)
        except SourceError:
            self._container.close()
            raise
        # One thread: with several, the pictures that ffmpeg mends in a damaged film depend on timing, and an
        # ingest that is killed and run again must see the same frames. It overlaps the model all the same.
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.options = {"max_pixels": str(PICTURE_PX_MAX)}
        self._format: str = self._container.format.name.partition(",")[0]
        self._clock = _Clock(self._container, self._stream)
        self._aspect = _pixel_aspect(self._stream)  # read now: a stream of a closed container is freed memory
        self.damaged = 0  # packets and frames that could not be used
        self.stopped_by: str | None = None  # why reading ended before the film did
        self.ends_damaged = False  # nothing whole came after the last damage
        self._rest = self._whole()
        self.first = next(self._rest, None)

    def pictures(self) -> Iterator[Picture]:
        """Every whole frame in the order of presentation, once. Damage never raises: see the attributes."""
        if self.first is not None:
            yield self.first
        yield from self._rest

    def _whole(self) -> Iterator[Picture]:
        for frame in self._decoded():
            # What ffmpeg made up for what was missing is not memory. Pictures that it mended without a word
            # stay.
            if frame.is_corrupt:
                self._note_damage()
                continue
            self.ends_damaged = False
            yield self._clock.timed(frame)

    def _decoded(self) -> Iterator[Any]:
        try:
            for packet in self._container.demux(self._stream):
                yield from self._survived(packet.decode)
        except IndexError:
            pass  # PyAV trips, at the very end, over tracks that appeared on the way; ours was flushed before
        except FFmpegError as error:
            self.stopped_by = reason(error)
            # what the decoder's threads still hold was whole
            yield from self._survived(partial(self._stream.codec_context.decode, None))

    def _survived(self, decode: Callable[[], list[Any]]) -> list[Any]:
        try:
            return decode()
        except FFmpegError:
            self._note_damage()
            return []

    def _note_damage(self) -> None:
        self.damaged += 1
        self.ends_damaged = True

    @property
    def period_ns(self) -> int:
        """One frame at the average rate."""
        return round(self._clock.period_s * NS_PER_S)

    @property
    def duration_ns(self) -> int | None:
        """From the start of the recording to the end of the track, as the container gives it, or None."""
        stream, container, start_ns = self._stream, self._container, self._clock.start_ns
        if self._format == "avi" and stream.frames:  # its duration is shortened to what the file holds
            return round(int(stream.frames) * self._clock.period_s * NS_PER_S)
        if stream.duration is not None:
            first_ns = _scaled(stream.start_time or 0, stream.time_base)
            return max(0, first_ns - start_ns) + _scaled(stream.duration, stream.time_base)
        end_ns = _tagged_end_ns(stream.metadata.get("DURATION"))
        if end_ns is None and container.duration is not None:
            end_ns = int(container.duration) * NS_PER_S // _US_PER_S
        if end_ns is not None and self._format == "matroska":  # gives the end, not the length
            end_ns -= start_ns
        return end_ns

    def breaks_off(self, end_ns: int) -> bool:
        """Whether a film whose last frame ends at `end_ns` ended before its time."""
        if self.stopped_by is not None or self.ends_damaged:
            return True
        if self._format not in _DECLARES_LENGTH or self.duration_ns is None:
            return False
        return end_ns + NS_PER_S < self.duration_ns

    @property
    def started_at_ns(self) -> int | None:
        """The container's `creation_time` on the wall clock, unless the camera's clock was never set."""
        for metadata in (self._container.metadata, self._stream.metadata):
            try:
                moment_ns = parse_wall_clock(metadata["creation_time"])
            except (KeyError, MemdbError, OverflowError):
                continue
            if _YEAR_1990_NS <= moment_ns <= time.time_ns() + _DAY_NS:
                return moment_ns
        return None

    def size(self, picture: Picture) -> tuple[int, int]:
        """Width and height of what `rgb` gives."""
        width, height = self._fitted(picture.frame)
        return (height, width) if _is_transposed(_display_matrix(picture.frame)) else (width, height)

    def rgb(self, picture: Picture) -> Image:
        """The picture upright, with square pixels, at native size or shrunk. Raises FFmpegError."""
        width, height = self._fitted(picture.frame)
        pixels: Image = picture.frame.to_ndarray(format="rgb24", width=width, height=height)
        return np.ascontiguousarray(_oriented(pixels, _display_matrix(picture.frame)))

    def _fitted(self, frame: Any) -> tuple[int, int]:
        return fitted(max(1, round(frame.width * self._aspect)), frame.height)

    def close(self) -> None:
        self._container.close()


class _Clock:
    """Media time: presentation time less the container's start, exact to the nanosecond, never negative."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._time_base: Fraction | None = stream.time_base
        rate = stream.average_rate or stream.guessed_rate or _RATE_UNKNOWN_FPS
        self.period_s = 1 / Fraction(rate)
        self._start_ns = _start_ns(container, stream)
        self._anchor_ns = 0  # the last time that was given, and the frames without one since
        self._since_anchor = -1

    @property
    def start_ns(self) -> int:
        return self._start_ns or 0

    def timed(self, frame: Any) -> Picture:
        time_base = frame.time_base or self._time_base
        duration_ns = _scaled(frame.duration, time_base) if frame.duration and time_base else 0
        if frame.pts is None or not time_base:
            self._since_anchor += 1
        else:
            pts_ns = _scaled(frame.pts, time_base)
            if self._start_ns is None:
                self._start_ns = pts_ns
            self._anchor_ns, self._since_anchor = max(0, pts_ns - self._start_ns), 0
        pts_ns = self._anchor_ns + round(self._since_anchor * self.period_s * NS_PER_S)
        return Picture(pts_ns, duration_ns, frame)


def _start_ns(container: Any, stream: Any) -> int | None:
    if container.start_time is None:
        return None
    start_ns: int = container.start_time * NS_PER_S // _US_PER_S
    if stream.start_time is not None and stream.time_base:
        track_ns = _scaled(stream.start_time, stream.time_base)
        if abs(track_ns - start_ns) <= NS_PER_S // _US_PER_S:
            return track_ns  # the same start, not rounded to microseconds
    return start_ns


def _scaled(ticks: int, time_base: Fraction) -> int:
    """Ticks to nanoseconds, rounded to nearest, in integers."""
    return (2 * ticks * time_base.numerator * NS_PER_S + time_base.denominator) // (2 * time_base.denominator)


def _tagged_end_ns(text: str | None) -> int | None:
    try:
        return to_ns(parse_time(text)) if text else None
    except MemdbError:
        return None


def _first_track(container: Any, label: str) -> Any:
    """The first video track that is a film: no cover picture, no text played as terminal art."""
    tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not tracks:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise SourceError(
            f"{label} has no video track, only {' and '.join(kinds)}: give a film with pictures"
        )
    track = tracks[0]
    if track.codec_context is None:
        raise SourceError(f"{label}: its video codec is not known here: convert it to H.264")
    if track.codec_context.name in _TEXT_CODECS:
        raise SourceError(f"{label} is a text file, not a film: give a video file")
    check_size(track.codec_context.width, track.codec_context.height, label)
    return track


def _pixel_aspect(stream: Any) -> Fraction:
    """Width over height of a pixel; 1 where it is unknown, or nonsense in a header."""
    aspect: Fraction | None = stream.sample_aspect_ratio
    return aspect if aspect is not None and 0.1 <= aspect <= 10 else Fraction(1)


_Matrix = tuple[int, int, int, int]  # a, b, c, d: the pixel (x, y) is shown at (a x + c y, b x + d y)
_UPRIGHT: _Matrix = (1, 0, 0, 1)


def _display_matrix(frame: Any) -> _Matrix:
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return _UPRIGHT
    a, b, _, c, d = (int(v) for v in np.frombuffer(data, np.int32, 5))
    return a, b, c, d


def _is_transposed(matrix: _Matrix) -> bool:
    a, b, _, _ = matrix
    return abs(b) > abs(a)


def _oriented(pixels: Image, matrix: _Matrix) -> Image:
    """The picture as it is meant to be shown: turned by quarters and mirrored, (h, w, 3) or (w, h, 3)."""
    a, b, c, d = matrix
    if _is_transposed(matrix):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    if d < 0:
        pixels = pixels[::-1]
    return pixels


def reason(error: Exception) -> str:
    """ffmpeg's word for what went wrong, without the address (which may hold a password)."""
    if isinstance(error, av.error.ExitError):  # PyAV interrupts a read that takes longer than its timeout
        return "no answer in time"
    return str(getattr(error, "strerror", None) or type(error).__name__)
