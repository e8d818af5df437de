"""A camera that speaks RTSP (RFC 2326) on loopback: H.264 in RTP (RFC 6184), interleaved in the TCP connection."""

from __future__ import annotations

import base64
import itertools
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import av

_PAYLOAD_BYTES_MAX = 1400
_CLOCK_HZ = 90_000
_TYPE_PPS, _TYPE_SPS, _TYPE_FU_A = 8, 7, 28


@dataclass(frozen=True)
class Play:
    """What one client that connects gets: frames `[first, last)` of the film, and then how it ends."""

    first: int
    last: int
    end: str = "hang up"  # or "fall silent", "say goodbye"


def access_units(film: Path) -> list[list[bytes]]:
    """The NAL units of every frame of an H.264 file in Annex B."""
    with av.open(str(film), format="h264") as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    return [_nals(packet) for packet in packets]


def _nals(data: bytes) -> list[bytes]:
    return [piece.rstrip(b"\0") for piece in data.split(b"\0\0\1") if piece.rstrip(b"\0")]


class RtspCamera:
    """Serves `plays`, one to each client that says PLAY; a client beyond them is told 404.

    Frames are sent `speed` times as fast as they were filmed, the clocks of the clients begin anywhere. `user` and
    `password` are asked for where they are given (Basic).
    """

    def __init__(
        self, film: Path, plays: Sequence[Play], *, fps: int = 25, speed: float = 1.0, user: str = ""
    ) -> None:
        self._units, self._plays = access_units(film), iter(plays)
        self._fps, self._speed, self._user = fps, speed, user
        self._over = threading.Event()
        self.pause = threading.Event()  # while it is set, only the first client is let in
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._clients: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])
        self.played: list[Play] = []
        self.ended_s: list[float] = []  # when each play ended, on the monotonic clock
        self.requests: list[str] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"rtsp://{self._user}{'@' if self._user else ''}127.0.0.1:{self.port}/gate"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        # a thread that waits in accept() keeps the port alive: shut down first
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()
        self._thread.join(5)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError, ValueError), client.makefile("rb") as lines:
            for method, url, headers in _requests(lines):
                self.requests.append(method)
                if self._user and not self._is_known(headers):
                    _answer(client, headers, "401 Unauthorized", 'WWW-Authenticate: Basic realm="gate"')
                elif method == "OPTIONS":
                    _answer(
                        client, headers, "200 OK", "Public: DESCRIBE, SETUP, PLAY, GET_PARAMETER, TEARDOWN"
                    )
                elif method == "DESCRIBE":
                    self._describe(client, url, headers)
                elif method == "SETUP":
                    _answer(
                        client,
                        headers,
                        "200 OK",
                        "Transport: RTP/AVP/TCP;unicast;interleaved=0-1",
                        "Session: 7;timeout=60",
                    )
                elif method == "PLAY":
                    play = next(self._plays)
                    self.played.append(play)
                    _answer(client, headers, "200 OK", "Session: 7", "Range: npt=now-")
                    threading.Thread(target=self._send, args=(client, play), daemon=True).start()
                else:
                    _answer(client, headers, "200 OK", "Session: 7")

    def _is_known(self, headers: dict[str, str]) -> bool:
        return headers.get("authorization") == "Basic " + base64.b64encode(self._user.encode()).decode()

    def _describe(self, client: socket.socket, url: str, headers: dict[str, str]) -> None:
        self._plays, ahead = itertools.tee(self._plays)
        if next(ahead, None) is None or (self.pause.is_set() and self.played):
            return _answer(client, headers, "404 Not Found")
        sps = next(nal for nal in self._units[0] if nal[0] & 31 == _TYPE_SPS)
        pps = next(nal for nal in self._units[0] if nal[0] & 31 == _TYPE_PPS)
        sets = ",".join(base64.b64encode(nal).decode() for nal in (sps, pps))
        sdp = (
            "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=gate\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\na=range:npt=now-\r\n"
            "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=control:track1\r\n"
            f"a=framerate:{self._fps}\r\na=fmtp:96 packetization-mode=1;sprop-parameter-sets={sets}\r\n"
        )
        _answer(client, headers, "200 OK", f"Content-Base: {url}/", "Content-Type: application/sdp", body=sdp)
        return None

    def _send(self, client: socket.socket, play: Play) -> None:
        sequence, start = itertools.count(65_000), 0xFFFF_F000  # both wrap on the way
        began_s = time.monotonic()
        with suppress(OSError):
            for number in range(play.first, play.last):
                due_s = began_s + (number - play.first) / self._fps / self._speed
                if self._over.wait(max(0.0, due_s - time.monotonic())):
                    return
                stamp = start + (number - play.first) * _CLOCK_HZ // self._fps
                for packet in _rtp(self._units[number], sequence, stamp):
                    client.sendall(struct.pack(">BBH", 0x24, 0, len(packet)) + packet)
            self.ended_s.append(time.monotonic())
            self._end(client, play)

    def _end(self, client: socket.socket, play: Play) -> None:
        if play.end == "fall silent":
            self._over.wait()
            return
        if play.end == "say goodbye":
            bye = struct.pack(">BBHI", 0x81, 203, 1, 7)
            client.sendall(struct.pack(">BBH", 0x24, 1, len(bye)) + bye)
        client.shutdown(socket.SHUT_RDWR)
        client.close()


def _rtp(nals: Sequence[bytes], sequence: Iterator[int], stamp: int) -> Iterator[bytes]:
    """RTP packets of one frame: a NAL each, or pieces of one (FU-A); the last one is marked."""
    payloads: list[bytes] = []
    for nal in nals:
        if len(nal) <= _PAYLOAD_BYTES_MAX:
            payloads.append(nal)
            continue
        pieces = [nal[at : at + _PAYLOAD_BYTES_MAX] for at in range(1, len(nal), _PAYLOAD_BYTES_MAX)]
        for index, piece in enumerate(pieces):
            edge = 0x80 * (index == 0) | 0x40 * (index == len(pieces) - 1)
            payloads.append(bytes([nal[0] & 0x60 | _TYPE_FU_A, edge | nal[0] & 31]) + piece)
    for index, payload in enumerate(payloads):
        marker = 0x80 * (index == len(payloads) - 1)
        head = struct.pack(">BBHII", 0x80, marker | 96, next(sequence) & 0xFFFF, stamp & 0xFFFF_FFFF, 7)
        yield head + payload


def _requests(lines: object) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Requests of a client; its RTCP reports in between are passed over."""
    while first := lines.read(1):  # type: ignore[attr-defined]
        if first == b"$":
            _, length = struct.unpack(">BH", lines.read(3))  # type: ignore[attr-defined]
            lines.read(length)  # type: ignore[attr-defined]
            continue
        method, url, _ = (first + lines.readline()).decode().split()  # type: ignore[attr-defined]
        headers: dict[str, str] = {}
        while line := lines.readline().decode().strip():  # type: ignore[attr-defined]
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        yield method, url, headers


def _answer(
    client: socket.socket, request: dict[str, str], status: str, *headers: str, body: str = ""
) -> None:
    head = [f"RTSP/1.0 {status}", f"CSeq: {request['cseq']}", f"Content-Length: {len(body)}", *headers]
    client.sendall(("\r\n".join(head) + "\r\n\r\n" + body).encode())
