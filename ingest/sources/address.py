"""A film or a camera behind an address: one connection to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from memdb.ingest.sources import video
from memdb.ingest.sources.identity import UNKNOWN, address_identity
from memdb.ingest.sources.video import Video, clock_ns
from memdb.schemas.errors import SourceError
from memdb.schemas.frames import SourceIdentity
from memdb.schemas.times import NS_PER_S

if TYPE_CHECKING:
    from memdb.ingest.sources.decoder import Decoder, Opening

# What an address may lead to. Never a file of this machine, whatever a playlist says.
_PROTOCOLS = {
    "http": "http,https,httpproxy,tcp,tls,crypto,data",
    "rtsp": "rtsp,rtsps,rtp,srtp,http,https,httpproxy,udp,tcp,tls",
    "tcp": "tcp",
}
SCHEMES = {"rtsp": "rtsp", "rtsps": "rtsp", "http": "http", "https": "http", "tcp": "tcp"}
_CAMERAS = ("rtsp", "tcp")
_YEAR_2020_NS = 1_577_836_800 * NS_PER_S


class VideoAddress(Video):
    """`rtsp://`, `rtsps://`, `tcp://`, `http://` or `https://`, connected once.

    The first three are live, and so is HTTP of unknown length. Raises SourceError where nobody answers within
    10 s or what answers is no film. A stream that fails later, or is silent for 10 s, ends there with a warning;
    `lost_by` then says why, and is None where what was there came to its end.
    """

    def __init__(self, url: str, *, track: int | None = None) -> None:
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise SourceError(f"not an address ({error}): write it like rtsp://camera:554/stream") from error
        self._kind = SCHEMES[parts.scheme.lower()]
        if not parts.hostname:
            raise SourceError(f"{_redacted(url)} names no host: write it like rtsp://camera:554/stream")
        self._advice = "check the address and that it can be reached from here"
        if self._kind == "http":
            self._advice += " (an mp4 needs its index in front, or a server that knows ranges)"
        name = f"{parts.hostname}-{Path(parts.path).stem}" if parts.path.strip("/") else parts.hostname
        self.lost_by: str | None = None
        self._called_ns = time.time_ns()
        super().__init__(url, _redacted(url), name, track=track)

    @property
    def label(self) -> str:
        return self._label

    def again(self) -> VideoAddress:
        """Another connection to the same. Raises SourceError while nobody is there."""
        return VideoAddress(self._address, track=self._track)

    def _note_end(self, decoder: Decoder) -> None:
        super()._note_end(decoder)
        whole = decoder.stopped_by is None and decoder.is_of_known_size
        if self._kind == "rtsp" and decoder.duration_ns is not None:  # a film that a server of films plays
            whole = (self.media_end_ns or 0) + NS_PER_S >= decoder.duration_ns
        self.lost_by = None if whole else decoder.stopped_by or "it hung up"
        if not self.info.live and decoder.breaks_off(self.media_end_ns or 0):
            self.growing = True  # the server has more of it than the network brought

    def _openings(self) -> Sequence[Opening]:
        from memdb.ingest.sources.decoder import Opening

        options = {"protocol_whitelist": _PROTOCOLS[self._kind]}
        if self._kind == "http":  # a film is read on from where it was, for some seconds
            options |= {"reconnect": "1", "reconnect_delay_max": "4"}
        # Over UDP, the default, lost datagrams are lost pictures, and firewalls drop them all.
        if self._kind == "rtsp":
            options["rtsp_transport"] = "tcp"
        timeout_s = (video.OPEN_TIMEOUT_S, video.READ_TIMEOUT_S)
        return [Opening(options, timeout_s=timeout_s, track=self._track, silence_s=video.READ_TIMEOUT_S)]

    def _is_live(self, decoder: Decoder) -> bool:
        return self._kind in _CAMERAS or decoder.duration_ns is None

    def _identity(self, live: bool) -> SourceIdentity:
        return UNKNOWN if live else address_identity(self._address, video.READ_TIMEOUT_S)

    def _beginning(self, size_bytes: int) -> SourceIdentity:
        return address_identity(self._address, video.READ_TIMEOUT_S, size_bytes)

    def _started_at_ns(self, decoder: Decoder, live: bool) -> int | None:
        """What is seen live begins with the call, if this machine knows what time it is."""
        return self._called_ns if live and self._called_ns > _YEAR_2020_NS else decoder.started_at_ns

    def _clock(self) -> Callable[[], int] | None:
        return clock_ns if self.info.live else None

    def _refusal(self, error: Exception) -> str:
        from memdb.ingest.sources.decoder import reason

        return f"{self._label} gives no video: {reason(error)}; {self._advice}"


def _redacted(url: str) -> str:
    """The address without user and password, for messages, logs and names."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
