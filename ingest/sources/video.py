"""Films through PyAV: what a file and an address have in common, and the file."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memdb.ingest.sources.base import Source, suggested_name
from memdb.ingest.sources.identity import file_identity
from memdb.ingest.sources.times import GapsSeen, MediaTimes, Picture, told_time
from memdb.schemas.errors import SourceError
from memdb.schemas.frames import DecodedFrame, Image, SourceIdentity, SourceInfo
from memdb.schemas.recording import Gap
from memdb.schemas.times import NS_PER_S
from memdb.world import MARK

if TYPE_CHECKING:
    from memdb.ingest.sources.decoder import Decoder, Opening

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 10.0  # a camera that is silent for longer has gone
_DAMAGED = "the source is damaged there"
_TRANSPORT = {".ts", ".m2ts", ".mts", ".m2t", ".trp"}
# Behind damage pictures are drawn over others than were meant, without a word, until one stands for itself. Films
# that never have one (intra refresh) are whole again after so long.
_REFRESH_NS = 10 * NS_PER_S


class Video(Source):
    """What a file and an address have in common: a decoder, opened up to its first picture.

    A decoder serves one pass. The one that was opened to look at the first picture serves the first
    `frames()`; another call opens the film again.
    """

    _advice = "it is damaged, give another copy"

    def __init__(self, address: str, label: str, name: str, *, track: int | None = None) -> None:
        self._address, self._label, self._track = address, label, track
        self._closed = False
        self._unshown = 0
        self.warnings: list[str] = []
        self.media_end_ns: int | None = None
        self.growing = False
        decoder, first = self._open()
        self._opened: Decoder | None = decoder
        width, height = decoder.size(first)
        live = self._is_live(decoder)
        identity = self._identity(live)
        if not decoder.track.is_best and identity.digest:
            identity = replace(identity, digest=f"{identity.digest}-{decoder.track.number}")
        identity = replace(identity, of_world=decoder.comment == MARK)
        self.info = SourceInfo(
            identity=identity,
            name=suggested_name(name),
            live=live,
            started_at_ns=self._started_at_ns(decoder, live),
            duration_ns=decoder.duration_ns,
            width=width,
            height=height,
        )

    def frames(self) -> Iterator[DecodedFrame | Gap]:
        """Raises SourceError where the film can no longer be opened. Damage on the way is a warning."""
        decoder = self._opened or self._open()[0]
        others = decoder.track.others
        self._opened, self.media_end_ns, self._unshown = None, None, 0
        self.warnings = [f"{self._label}: {others}"] if others else []
        times, gaps = MediaTimes(decoder.period_ns, self._clock()), GapsSeen()
        try:
            for item in self._believable(decoder, times.forward(decoder.pictures())):
                if self._closed:
                    return
                if isinstance(item, Gap):
                    yield gaps.add(item)
                else:
                    yield DecodedFrame(item.pts_ns, partial(self._image, decoder, item))
            self.media_end_ns = times.end_ns
            self.growing = decoder.growing or decoder.unread
            self._note_end(decoder)
        finally:
            self.warnings += [*times.warnings(self._label), *gaps.warnings(self._label)]
            if self._unshown > 1:
                self.warnings.append(f"{self._label}: so were {self._unshown - 1} more")
            decoder.close()

    def continues(self, known: SourceIdentity) -> bool:
        own = self.info.identity
        kept, _, number = known.digest.partition("-")
        if (known.kind, number) != ("file", own.digest.partition("-")[2]) or own.kind != "file":
            return False
        return known.size_bytes < own.size_bytes and self._beginning(known.size_bytes).digest == kept

    def _believable(self, decoder: Decoder, items: Iterator[Picture | Gap]) -> Iterator[Picture | Gap]:
        """The same, but a gap that damage made ends with the first picture that needs none from before."""
        damaged, gap = 0, None
        for item in items:
            if isinstance(item, Gap):
                gap = replace(item, reason=_DAMAGED) if decoder.damaged > damaged else item
                continue
            damaged = decoder.damaged
            if gap is not None:
                behind_ns = item.pts_ns - gap.end_ns
                if gap.reason == _DAMAGED and not item.frame.key_frame and behind_ns < _REFRESH_NS:
                    continue
                yield replace(gap, end_ns=item.pts_ns)
                gap = None
            yield item

    def close(self) -> None:
        self._closed = True
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self) -> tuple[Decoder, Picture]:
        if self._closed:
            raise SourceError(f"{self._label} was closed: open it again")
        from memdb.ingest.sources.decoder import Decoder, FFmpegError

        refused: FFmpegError | None = None
        for opening in self._openings():
            try:
                decoder = Decoder(self._address, self._label, opening)
            except FFmpegError as error:
                refused = refused or error
                continue
            if decoder.first is None:
                decoder.close()
                raise SourceError(f"{self._label}: not one frame could be decoded: {self._advice}")
            return decoder, decoder.first
        assert refused is not None
        raise SourceError(self._refusal(refused)) from refused

    def _image(self, decoder: Decoder, picture: Picture) -> Image:
        from memdb.ingest.sources.decoder import FFmpegError, reason

        try:
            return decoder.rgb(picture)
        except (
            FFmpegError,
            ValueError,
        ) as error:  # ValueError: PyAV's, for a layout of pixels it does not know
            told = f"{self._label}: the frame at {told_time(picture.pts_ns)} is left out: {reason(error)}"
            self._unshown += 1
            if self._unshown == 1:
                self.warnings.append(told)
            raise SourceError(told) from error

    def _note_end(self, decoder: Decoder) -> None:
        end_ns = self.media_end_ns or 0
        if not decoder.growing and decoder.breaks_off(end_ns):
            why = f" ({decoder.stopped_by})" if decoder.stopped_by else ""
            self.warnings.append(
                f"{self._label} breaks off at {told_time(end_ns)}{why}: what was decoded is kept"
            )
        elif decoder.damaged:
            self.warnings.append(f"{self._label}: damaged frames left out: {decoder.damaged}")

    def _is_live(self, decoder: Decoder) -> bool:
        return False

    def _started_at_ns(self, decoder: Decoder, live: bool) -> int | None:
        return decoder.started_at_ns

    def _clock(self) -> Callable[[], int] | None:
        return None

    @abstractmethod
    def _identity(self, live: bool) -> SourceIdentity: ...

    @abstractmethod
    def _beginning(self, size_bytes: int) -> SourceIdentity:
        """What its identity was when it was so long, if it only grew since."""

    @abstractmethod
    def _openings(self) -> Sequence[Opening]:
        """How to try to open it, one after another."""

    @abstractmethod
    def _refusal(self, error: Exception) -> str:
        """What to tell when ffmpeg opens nothing."""


class VideoFile(Video):
    """A video file, or what is there of one that is still being written.

    Raises SourceError for one that is missing, unreadable, empty or no film.
    """

    def __init__(self, path: str | os.PathLike[str], *, track: int | None = None) -> None:
        self._path = Path(path)
        self._found = file_identity(self._path)
        # absolute and with its protocol: a file named `http:x.mp4` or `-` stays a file
        super().__init__(f"file:{self._path.absolute()}", self._path.name, self._path.stem, track=track)

    def _identity(self, live: bool) -> SourceIdentity:
        return self._found

    def _beginning(self, size_bytes: int) -> SourceIdentity:
        return file_identity(self._path, size_bytes)

    def _openings(self) -> Sequence[Opening]:
        from memdb.ingest.sources.decoder import Opening

        # a playlist that calls itself a film reaches no server from here
        usual = Opening({"protocol_whitelist": "file"}, track=self._track, has_grown=self._has_grown)
        if self._path.suffix.lower() not in _TRANSPORT:
            return [usual]
        return [
            usual,
            replace(usual, format="mpegts"),
        ]  # finds its way in from any place; its beginning is damaged

    def _has_grown(self) -> bool:
        try:
            return self._path.stat().st_size > self._found.size_bytes
        except OSError:
            return False

    def _refusal(self, error: Exception) -> str:
        with self._path.open("rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"
        if is_mp4:
            return (
                f"{self._label} is cut off: its index (moov) is missing, copy or record it again, or wait until "
                "its recorder has ended it"
            )
        return f"{self._label} is not a video that can be read: give a film such as mp4, mkv, avi or ts"


def clock_ns() -> int:
    """A clock that no one sets, for durations within this process; it goes on while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return time.monotonic_ns()
