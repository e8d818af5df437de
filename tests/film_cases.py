"""Films for the tests: small H.264 files whose frames show their numbers, and addresses that serve them."""

from __future__ import annotations

import http.server
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from memdb.schemas.frames import Image

WIDTH, HEIGHT = 96, 64
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))  # top left, top right, bottom left, right
_BITS = 8
_CORNER = 16


def numbered_picture(number: int) -> Image:
    """(HEIGHT, WIDTH, 3): four coloured corners and, in the middle `number` in binary, ones white."""
    picture = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    c = _CORNER
    for corner, (y, x) in zip(CORNERS, ((0, 0), (0, -c), (-c, 0), (-c, -c)), strict=True):
        picture[y : y + c or None, x : x + c or None] = corner
    for bit in range(_BITS):
        picture[24:40, 16 + 8 * bit : 24 + 8 * bit] = 255 if number >> bit & 1 else 0
    return picture


def shown_number(picture: Image) -> int:
    """The number that an upright, unscaled picture shows, modulo 256."""
    return sum(int(picture[32, 20 + 8 * bit].mean() > 128) << bit for bit in range(_BITS))


def shown_corners(picture: Image) -> tuple[tuple[int, ...], ...]:
    """The colours near the four corners, each channel as 0 or 255."""
    places = ((6, 6), (6, -7), (-7, 6), (-7, -7))
    return tuple(tuple(255 * int(v > 128) for v in picture[y, x]) for y, x in places)


def write_film(
    path: Path,
    pts_ms: Sequence[int],
    *,
    audio_ms: int = 0,
    cover: bool = False,
    rotate: int = 0,
    aspect: Fraction | None = None,
    container_options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    gop: int = 10,
    b_frames: int = 0,
) -> Path:
    """Frame i shows i and stands at `pts_ms[i]`; the container follows from the suffix.

    `audio_ms` of a tone from time 0 on; `cover` puts a still picture before the film; `rotate` writes a
    display matrix (counter-clockwise) without turning the pictures.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        container.metadata.update(metadata or {})
        still = _cover_stream(container) if cover else None
        options = {"preset": "ultrafast", "crf": "10", "g": str(gop), "bf": str(b_frames)}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        # AVI has no times: it stores an empty frame for every tick at which nothing new is shown
        stream.codec_context.time_base = Fraction(1, 25) if path.suffix == ".avi" else Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotate:
            stream.set_display_rotation(rotate)
        tone = container.add_stream("aac", rate=16_000, layout="mono") if audio_ms else None
        if still is not None:
            _mux_cover(container, still)
        for number, pts in enumerate(pts_ms):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if tone is not None:
            _mux_tone(container, tone, audio_ms)
    return path


def write_pictures(
    path: Path,
    pictures: Sequence[npt.NDArray[Any]],
    codec: str,
    pix_fmt: str,
    *,
    layout: str = "rgb24",
    options: dict[str, str] | None = None,
    colorspace: int | None = None,
    color_range: int | None = None,
) -> Path:
    """A film of these arrays, 25 a second, in any codec and layout of pixels. `layout` is that of the arrays."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=layout)
            if colorspace is not None:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=colorspace, dst_color_range=color_range)
                frame.colorspace, frame.color_range = colorspace, color_range
                stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_tracks(path: Path, sizes: Sequence[tuple[int, int]], *, default: int | None = None) -> Path:
    """A film with a video track of ten grey frames for each (width, height); track i is of grey 40 * (i + 1)."""
    with av.open(str(path), "w") as container:
        streams = []
        for number, (width, height) in enumerate(sizes):
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "10"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            if default is not None:
                kind = av.stream.Disposition
                stream.disposition = kind.default if number == default else kind.original
            streams.append(stream)
        for tick in range(10):
            for number, stream in enumerate(streams):
                grey = np.full((stream.height, stream.width, 3), 40 * (number + 1), np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, 25)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def write_tone(path: Path, duration_ms: int) -> Path:
    """A file with sound and nothing to see."""
    with av.open(str(path), "w") as container:
        _mux_tone(container, container.add_stream("aac", rate=16_000, layout="mono"), duration_ms)
    return path


def _mux_tone(container: Any, stream: Any, duration_ms: int) -> None:
    samples = np.sin(np.arange(16 * duration_ms) * 0.2).astype(np.float32)[None]
    for start in range(0, samples.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(samples[:, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _cover_stream(container: Any) -> Any:
    stream = container.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    return stream


def _mux_cover(container: Any, stream: Any) -> None:
    frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
    frame.pts, frame.time_base = 0, Fraction(1, 1)
    container.mux(stream.encode(frame))


def truncated(path: Path, share: float) -> Path:
    """A copy that ends after `share` of the bytes."""
    whole = path.read_bytes()
    copy = path.with_name(f"cut-{path.name}")
    copy.write_bytes(whole[: int(len(whole) * share)])
    return copy


def with_late_track(path: Path) -> int:
    """Rewrite a transport stream so that three frames of its last third belong to a track of their own.

    Gives how many frames were moved: what a recorder does that begins to send sound later on.
    """
    data, moved = bytearray(path.read_bytes()), 0
    for at in range(len(data) * 2 // 3 // 188 * 188, len(data), 188):
        starts_frame, track = data[at + 1] & 0x40, (data[at + 1] & 0x1F) << 8 | data[at + 2]
        if starts_frame and track == 0x100 and moved < 3:
            data[at + 2] += 1
            moved += 1
    path.write_bytes(data)
    return moved


class _PlainHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files from their beginning only, as a live stream comes."""

    def log_message(self, *args: object) -> None:
        pass


class _RangeHandler(_PlainHandler):
    """Serves ranges of files, too: without these an mp4 with its index at the end cannot be read."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not path.is_file() or wanted is None:
            return super().do_GET()
        whole = path.read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2] or len(whole)), len(whole) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(whole[first : last + 1])
        return None


@contextmanager
def served(folder: Path, *, ranges: bool = True) -> Iterator[str]:
    """The folder over HTTP on loopback; gives the address in front of the file names."""

    class Handler(_RangeHandler if ranges else _PlainHandler):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def handle(self) -> None:
            with suppress(ConnectionError):  # the decoder hangs up when it has seen enough
                super().handle()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@contextmanager
def stalling(answer: bytes) -> Iterator[int]:
    """A port on loopback that takes one request, sends `answer` and then falls silent; gives its number."""
    done = threading.Event()

    def serve() -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            if answer:
                connection.recv(4096)
                connection.sendall(answer)
            done.wait()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            done.set()
            thread.join(5)


def closed_port() -> int:
    """A port on loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
