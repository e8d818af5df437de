"""H.264 by hand: films that claim any size, in a few bytes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av


class _Bits:
    """A NAL unit as its bits are written (ITU-T H.264, 7.3)."""

    def __init__(self) -> None:
        self._bits: list[int] = []

    def u(self, width: int, value: int) -> None:
        self._bits += [value >> at & 1 for at in range(width - 1, -1, -1)]

    def ue(self, *values: int) -> None:
        for value in values:
            length = (value + 1).bit_length()
            self.u(length - 1, 0)
            self.u(length, value + 1)

    def nal(self, head: int) -> bytes:
        bits = [*self._bits, 1]
        bits += [0] * (-len(bits) % 8)
        raw = bytes(int("".join(map(str, bits[at : at + 8])), 2) for at in range(0, len(bits), 8))
        out, zeros = bytearray(), 0
        for byte in raw:
            if zeros >= 2 and byte <= 3:
                out.append(3)
                zeros = 0
            out.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes([head]) + bytes(out)


def claimed_frame(width: int, height: int) -> bytes:
    """An access unit whose headers promise a picture of this size, with nearly nothing of it."""
    sps, pps, piece = _Bits(), _Bits(), _Bits()
    for byte in (66, 0xC0, 62):  # baseline, level 6.2
        sps.u(8, byte)
    sps.ue(0, 0, 2, 1)
    sps.u(1, 0)
    sps.ue(width // 16 - 1, height // 16 - 1)
    sps.u(4, 0b1100)
    pps.ue(0, 0)
    pps.u(2, 0)
    pps.ue(0, 0, 0)
    pps.u(3, 0)
    pps.ue(0, 0, 0)
    pps.u(3, 0)
    piece.ue(0, 7, 0)
    piece.u(4, 0)
    piece.ue(0)
    piece.u(2, 0)
    piece.ue(0)
    for _ in range(40):
        piece.ue(25, 0)
    return sps.nal(0x67) + pps.nal(0x68) + piece.nal(0x65)


def endless_film(path: Path, width: int, height: int, frames: int = 6) -> Path:
    """Such frames in a container, which repeats the size in its own header."""
    frame = claimed_frame(width, height)
    if path.suffix == ".h264":
        path.write_bytes(frame * frames)
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(frames):
            packet = av.Packet(frame)
            packet.pts = packet.dts = number
            packet.time_base = Fraction(1, 25)
            packet.stream = stream
            container.mux(packet)
    return path
