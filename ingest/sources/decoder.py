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

from memdb.ingest.sources.base import PICTURE_PX_MAX
from memdb.ingest.sources.pictures import pixel_aspect, shown_size, to_rgb
from memdb.ingest.sources.times import Picture
from memdb.ingest.sources.tracks import pick_track
from memdb.schemas.errors import MemdbError
from memdb.schemas.frames import Image
from memdb.schemas.times import NS_PER_S, parse_time, parse_wall_clock, to_ns

FFmpegError = av.error.FFmpegError

_US_PER_S = 1_000_000
_RATE_UNKNOWN_FPS = Fraction(25)
# These say in their header how long the film is; of the others ffmpeg estimates it from what is there.
_DECLARES_LENGTH = {"avi", "matroska", "mov"}
# How far a transport stream is searched for its next packet: by default what lies behind 64 KiB of zeros is lost.
_RESYNC_BYTES = 1 << 30
_YEAR_1990_NS = 631_152_000 * NS_PER_S
_DAY_NS = 86_400 * NS_PER_S


@dataclass(frozen=True)
class Opening:
    """How an address is opened. `has_grown` is asked at the end of what is there: whether more is being written.

    `silence_s`: for live sources, how long packets of other tracks (sound) stand for a picture that is missing.
    """

    options: dict[str, str]
    format: str | None = None  # where its first bytes are not to be asked
    timeout_s: tuple[float, float] | None = None
    track: int | None = None
    has_grown: Callable[[], bool] | None = None
    silence_s: float | None = None


class Decoder:
    """One video track of `address`, decoded once from its beginning. Not for two threads at once.

    `first` is its first whole picture, decoded already, or None where there is not one. Raises PyAV's
    FFmpegError where nothing can be opened, SourceError where what was opened is no film, UsageError for a track
    that is not there.
    """

    def __init__(self, address: str, label: str, opening: Opening) -> None:
        # Sizes in headers are bounded here, too: to know a film, ffmpeg decodes its first pictures on opening it.
        sizes = {"max_pixels": str(PICTURE_PX_MAX)}
        self._container = av.open(
            address,
            format=opening.format,
            options=opening.options | sizes | {"resync_size": str(_RESYNC_BYTES)},
            timeout=opening.timeout_s,
            metadata_errors="replace",
        )
        try:
            self.track = pick_track(self._container, label, opening.track)
        except MemdbError:
            self._container.close()
            raise
        self._opening = opening
        self._stream = self.track.stream
        # One thread: with several, the pictures that ffmpeg mends in a damaged film depend on timing, and an
        # ingest that is killed and run again must see the same frames. It overlaps the model all the same.
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.options = sizes
        self._format: str = self._container.format.name.partition(",")[0]
        self._clock = _Clock(self._container, self._stream)
        self._aspect = pixel_aspect(self._stream)  # read now: a stream of a closed container is freed memory
        self.damaged = 0  # packets and frames that could not be used
        self.stopped_by: str | None = None  # why reading ended before the film did
        self.ends_damaged = False  # nothing whole came after the last damage
        self.unread = False  # what stopped it was the disk or the network, not the film: there is more
        self.growing = False  # the file was longer at the end of the pass than at its beginning
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
            for packet in self._packets():
                yield from self._survived(packet.decode)
        except IndexError:
            pass  # PyAV trips, at the very end, over tracks that appeared on the way; ours was flushed before
        except FFmpegError as error:
            self.stopped_by = reason(error)
            self.unread = isinstance(error, OSError | av.error.ExitError | av.error.HTTPError)
        if self.stopped_by is not None and not self._ends_growing():
            # what the decoder's threads still hold was whole
            yield from self._survived(partial(self._stream.codec_context.decode, None))

    def _packets(self) -> Iterator[Any]:
        if self._opening.silence_s is not None:
            return self._while_pictures_come(self._opening.silence_s)
        packets = self._container.demux(self._stream)
        return packets if self._opening.has_grown is None else self._whole_packets(packets)

    def _whole_packets(self, packets: Iterator[Any]) -> Iterator[Any]:
        """All packets, or, of a file that is being written, all but the last: half of it may be missing.

        What the decoder would give for want of more is left to the next pass, too, which sees more.
        """
        before: Any = None
        for packet in packets:
            if _is_end(packet) and self._ends_growing():
                return
            if before is not None:
                yield before
            before = packet
        if before is not None and not self._ends_growing():
            yield before

    def _ends_growing(self) -> bool:
        self.growing = self.growing or (self._opening.has_grown is not None and self._opening.has_grown())
        return self.growing

    def _while_pictures_come(self, silence_s: float) -> Iterator[Any]:
        """Packets of the film, until there were none for so long while those of other tracks came."""
        index, came_s = self._stream.index, time.monotonic()
        for packet in self._container.demux():
            if packet.stream_index == index:
                yield packet
                came_s = time.monotonic()
            elif time.monotonic() - came_s > silence_s:
                self.stopped_by = "sound, but no picture"
                return

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

    @property
    def is_of_known_size(self) -> bool:
        """Whether a server said how many bytes come: then a connection that ends behind them was not lost."""
        return int(self._container.size) >= 0

    def breaks_off(self, end_ns: int) -> bool:
        """Whether a film whose last frame ends at `end_ns` ended before its time."""
        if self.stopped_by is not None or self.ends_damaged:
            return True
        if self._format not in _DECLARES_LENGTH or self.duration_ns is None:
            return False
        return end_ns + NS_PER_S < self.duration_ns

    @property
    def comment(self) -> str:
        """What the container says of itself, "" where it says nothing."""
        said = {name.lower(): text for name, text in self._container.metadata.items()}
        return str(said.get("comment", ""))

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
        return shown_size(picture.frame, self._aspect)

    def rgb(self, picture: Picture) -> Image:
        """The picture upright, with square pixels, at native size or shrunk. Raises FFmpegError."""
        return to_rgb(picture.frame, self._aspect)

    def close(self) -> None:
        self._container.close()


class _Clock:
    """A film's own time: presentation time less the container's start, exact to the nanosecond."""

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
        duration_ns = max(0, _scaled(frame.duration or 0, time_base)) if time_base else 0
        if frame.pts is None or not time_base:
            if self._since_anchor < 0 and self._start_ns is not None:
                # The first picture of a camera has no time yet, and the start is that of the second.
                self._start_ns -= round(self.period_s * NS_PER_S)
            self._since_anchor += 1
        else:
            pts_ns = _scaled(frame.pts, time_base)
            if self._start_ns is None:
                self._start_ns = pts_ns
            self._anchor_ns, self._since_anchor = pts_ns - self._start_ns, 0
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


def _is_end(packet: Any) -> bool:
    """Whether it is the empty packet with which PyAV flushes a decoder."""
    return packet.size == 0 and packet.dts is None and packet.pts is None


def reason(error: Exception) -> str:
    """ffmpeg's word for what went wrong, without the address (which may hold a password)."""
    if isinstance(error, av.error.ExitError):  # PyAV interrupts a read that takes longer than its timeout
        return "no answer in time"
    return str(getattr(error, "strerror", None) or type(error).__name__)
