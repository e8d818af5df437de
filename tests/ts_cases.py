"""A camera that sends MPEG-TS, made by PyAV while it is sent, over HTTP or bare TCP on loopback."""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import Any, Self

import av
import numpy as np

from tests.film_cases import HEIGHT, WIDTH, numbered_picture


@dataclass(frozen=True)
class Show:
    """What one client gets: pictures that show `[first, last)`, from media time `start_s` on, and an end."""

    first: int
    last: int
    end: str = "hang up"  # or "reset", "fall silent", "sound only"
    start_s: float = 0.0


class TsCamera:
    """Serves `shows`, one to each client; a client beyond them is hung up on. `speed` times as fast as filmed."""

    def __init__(
        self,
        shows: Sequence[Show],
        *,
        kind: str = "http",
        fps: int = 25,
        speed: float = 1.0,
        sound: bool = False,
    ) -> None:
        self._shows, self._kind, self._fps, self._speed, self._sound = iter(shows), kind, fps, speed, sound
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._clients: list[socket.socket] = []
        self.address = f"{kind}://127.0.0.1:{self._listener.getsockname()[1]}" + "/gate.ts" * (kind == "http")
        self.spans_s: list[tuple[float, float]] = []  # of every show, on the monotonic clock
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            client.close()
        self._thread.join(5)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                if show := next(self._shows, None):
                    threading.Thread(target=self._serve, args=(client, show), daemon=True).start()
                else:
                    client.close()

    def _serve(self, client: socket.socket, show: Show) -> None:
        with suppress(OSError):
            if self._kind == "http":
                client.recv(65_536)
                client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: video/mp2t\r\n\r\n")
            self._send(client, show)
            if show.end == "fall silent":
                self._over.wait()
            if show.end == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    def _send(self, client: socket.socket, show: Show) -> None:
        began_s = time.monotonic()
        out = _Sender(client)
        container = av.open(
            out, "w", format="mpegts", options={"flush_packets": "1", "max_interleave_delta": "100000"}
        )
        stream = container.add_stream(
            "libx264", rate=self._fps, options={"preset": "ultrafast", "crf": "10", "g": "5", "bf": "0"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        tone = container.add_stream("aac", rate=16_000, layout="mono") if self._sound else None
        for number in range(show.first, show.last):
            at = number - show.first
            if self._over.wait(max(0.0, began_s + at / self._fps / self._speed - time.monotonic())):
                return
            frame = av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")
            frame.pts, frame.time_base = round((show.start_s + at / self._fps) * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
            if tone is not None:
                container.mux(tone.encode(self._tone(show, at)))
        container.mux(stream.encode(None))
        at = show.last - show.first
        if show.end != "sound only":
            container.close()
        self.spans_s.append((began_s, time.monotonic()))
        while show.end == "sound only" and tone is not None and not self._over.wait(0.01):
            container.mux(tone.encode(self._tone(show, at)))
            at += 1

    def _tone(self, show: Show, at: int) -> Any:
        samples = np.sin(np.arange(16_000 // self._fps) * 0.2).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = 16_000, Fraction(1, 16_000)
        frame.pts = round(show.start_s * 16_000) + at * samples.shape[1]
        return frame


class _Sender(io.RawIOBase):
    """A file that is a socket."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._client.sendall(data)
        return len(data)
