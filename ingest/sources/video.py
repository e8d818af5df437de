"""Films through PyAV: a file, or an address that is read by the same decoder."""

from __future__ import annotations

import os
import stat
from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import xxhash

from memdb.ingest.sources.base import Source, Timeline, suggested_name
from memdb.schemas.errors import SourceError
from memdb.schemas.frames import DecodedFrame, Image, SourceIdentity, SourceInfo
from memdb.schemas.times import format_time, to_s

if TYPE_CHECKING:
    from memdb.ingest.sources.decoder import Decoder, Picture

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 10.0  # a camera that is silent for longer has gone
_MIB = 1 << 20
_LIVE_SCHEMES = ("rtsp", "rtsps")


class Video(Source):
    """What a file and an address have in common: a decoder, opened up to its first picture.

    A decoder serves one pass. The one that was opened to look at the first picture serves the first
    `frames()`; another call opens the film again.
    """

    _advice = "it is damaged, give another copy"

    def __init__(self, address: str, label: str, identity: SourceIdentity, name: str) -> None:
        self._address, self._label = address, label
        self._closed = False
        self.warnings: list[str] = []
        self.media_end_ns: int | None = None
        decoder, first = self._open()
        self._opened: Decoder | None = decoder
        width, height = decoder.size(first)
        self.info = SourceInfo(
            identity=identity,
            name=suggested_name(name),
            live=self._is_live(decoder),
            started_at_ns=decoder.started_at_ns,
            duration_ns=decoder.duration_ns,
            width=width,
            height=height,
        )

    def frames(self) -> Iterator[DecodedFrame]:
        """Raises SourceError where the film can no longer be opened. Damage on the way is a warning."""
        decoder = self._opened or self._open()[0]
        self._opened, self.warnings, self.media_end_ns = None, [], None
        timeline = Timeline(decoder.period_ns)
        try:
            for picture in decoder.pictures():
                if self._closed:
                    return
                if timeline.accepts(picture.pts_ns, picture.duration_ns):
                    yield DecodedFrame(picture.pts_ns, partial(self._image, decoder, picture))
            self.media_end_ns = timeline.end_ns
            self._warn_of_break(decoder)
        finally:
            self.warnings += timeline.warnings(self._label)
            decoder.close()

    def close(self) -> None:
        self._closed = True
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self) -> tuple[Decoder, Picture]:
        if self._closed:
            raise SourceError(f"{self._label} was closed: open it again")
        from memdb.ingest.sources.decoder import Decoder, FFmpegError

        try:
            decoder = Decoder(
                self._address,
                self._label,
                options=self._options(),
                timeout_s=(OPEN_TIMEOUT_S, READ_TIMEOUT_S),
            )
        except FFmpegError as error:
            raise SourceError(self._refusal(error)) from error
        if decoder.first is None:
            decoder.close()
            raise SourceError(f"{self._label}: not one frame could be decoded: {self._advice}")
        return decoder, decoder.first

    def _image(self, decoder: Decoder, picture: Picture) -> Image:
        from memdb.ingest.sources.decoder import FFmpegError, reason

        try:
            return decoder.rgb(picture)
        except FFmpegError as error:
            at = format_time(to_s(picture.pts_ns))
            self.warnings.append(f"{self._label}: the frame at {at} is left out: {reason(error)}")
            raise SourceError(self.warnings[-1]) from error

    def _warn_of_break(self, decoder: Decoder) -> None:
        end_ns = self.media_end_ns or 0
        if decoder.breaks_off(end_ns):
            why = f" ({decoder.stopped_by})" if decoder.stopped_by else ""
            at = format_time(to_s(end_ns))
            self.warnings.append(f"{self._label} breaks off at {at}{why}: what was decoded is kept")
        elif decoder.damaged:
            self.warnings.append(f"{self._label}: damaged frames left out: {decoder.damaged}")

    def _options(self) -> dict[str, str]:
        return {}

    def _is_live(self, decoder: Decoder) -> bool:
        return False

    @abstractmethod
    def _refusal(self, error: Exception) -> str:
        """What to tell when ffmpeg opens nothing."""


class VideoFile(Video):
    """A video file. Raises SourceError for one that is missing, unreadable, empty or no film."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        identity = file_identity(self._path)
        # absolute and with its protocol: a file named `http:x.mp4` or `-` stays a file
        super().__init__(f"file:{self._path.absolute()}", self._path.name, identity, self._path.stem)

    def _refusal(self, error: Exception) -> str:
        with self._path.open("rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"
        if is_mp4:
            return f"{self._label} is cut off: its index (moov) is missing, copy or record it again"
        return f"{self._label} is not a video that can be read: give a film such as mp4, mkv, avi or ts"


class VideoAddress(Video):
    """`rtsp://`, `rtsps://`, `http://` or `https://`. RTSP, and HTTP of unknown length, is live.

    Raises SourceError where nobody answers within 10 s or what answers is no film. A stream that fails
    later, or is silent for 10 s, ends there with a warning.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise SourceError(f"not an address ({error}): write it like rtsp://camera:554/stream") from error
        self._scheme = parts.scheme.lower()
        if not parts.hostname:
            raise SourceError(f"{_redacted(url)} names no host: write it like rtsp://camera:554/stream")
        self._advice = "check the address and that it can be reached from here"
        if self._scheme not in _LIVE_SCHEMES:
            self._advice += " (an mp4 needs its index in front, or a server that knows ranges)"
        name = f"{parts.hostname}-{Path(parts.path).stem}" if parts.path.strip("/") else parts.hostname
        super().__init__(url, _redacted(url), SourceIdentity("stream", 0, ""), name)

    def _options(self) -> dict[str, str]:
        # over UDP the default, lost datagrams are lost pictures, and firewalls drop them all
        return {"rtsp_transport": "tcp"} if self._scheme in _LIVE_SCHEMES else {}

    def _is_live(self, decoder: Decoder) -> bool:
        return self._scheme in _LIVE_SCHEMES or decoder.duration_ns is None

    def _refusal(self, error: Exception) -> str:
        from memdb.ingest.sources.decoder import reason

        return f"{self._label} gives no video: {reason(error)}; {self._advice}"


def file_identity(path: Path) -> SourceIdentity:
    """Size and xxh3_128 of the first, middle and last MiB, or of all where it is no longer than these.

    Raises SourceError where `path` is not a plain file with something in it that may be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or device would be read without end
            raise SourceError(f"{path} is not a plain file: give a video file")
        size_bytes = status.st_size
        with path.open("rb") as file:
            digest = xxhash.xxh3_128()
            if size_bytes <= 3 * _MIB:
                digest.update(file.read(3 * _MIB))
            else:
                for offset in (0, (size_bytes - _MIB) // 2, size_bytes - _MIB):
                    file.seek(offset)
                    digest.update(file.read(_MIB))
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist: check the path") from error
    except PermissionError as error:
        raise SourceError(f"{path} may not be read: give yourself the right to read it") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise SourceError(f"{path!s} cannot be read: {error}") from error
    if size_bytes == 0:
        raise SourceError(f"{path} is empty: record or copy it again")
    return SourceIdentity("file", size_bytes, digest.hexdigest())


def _redacted(url: str) -> str:
    """The address without user and password, for messages, logs and names."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
