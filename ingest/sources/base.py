"""What a source of frames is, and the little that all of them share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from memdb.schemas.errors import SourceError
from memdb.schemas.frames import DecodedFrame, Image, SourceIdentity, SourceInfo
from memdb.schemas.recording import Gap

# Vision towers here look at 384 to 1,000 pixels. A 4K frame as RGB is 25 MB, of which a queue holds dozens;
# at 1920 it is 6 MB, and detail enough is left for key frames and for models that cut a picture into tiles.
LONG_SIDE_PX_MAX = 1920
# 8192 x 8192: twice an 8K film. Headers may claim anything, and a picture is allocated by what they claim.
PICTURE_PX_MAX = 1 << 26


class Source(Protocol):
    """A film, folder, address or iterator, opened: its first picture is known to be there.

    `frames()` decodes straight from the beginning; media times are relative to the recording's start and
    strictly increasing. A Gap stands where the source gave nothing for long: between the frames around it, or,
    with an end that is its start, where nothing comes for now and nobody knows for how long.

    When the frames have come to their end, `warnings` is complete, `media_end_ns` (the end of the last frame) is
    set, and `growing` says that there is more than came: more is being written, or a disk or network failed. A
    context manager; `close()` may be called from another thread, and ends a running `frames()` at its next frame.
    """

    info: SourceInfo
    warnings: list[str]
    media_end_ns: int | None
    growing: bool = False

    def frames(self) -> Iterator[DecodedFrame | Gap]: ...

    def close(self) -> None: ...

    def continues(self, known: SourceIdentity) -> bool:
        """Whether this source begins with all of the known one, and goes on: a file that has grown."""
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Timeline:
    """Lets times pass that go forward, counts the others, and knows where the last frame ends."""

    def __init__(self, period_ns: int) -> None:
        self.left_out = 0
        self._last_ns = -1
        self._duration_ns = 0
        self._step_ns = period_ns  # until two frames have shown their distance

    def accepts(self, pts_ns: int, duration_ns: int = 0) -> bool:
        """Whether this frame is later than the last. `duration_ns` is 0 where the source does not say."""
        if pts_ns <= self._last_ns:
            self.left_out += 1
            return False
        if self._last_ns >= 0:
            self._step_ns = pts_ns - self._last_ns
        self._last_ns, self._duration_ns = pts_ns, duration_ns
        return True

    @property
    def end_ns(self) -> int | None:
        """The last time and its duration, or the distance of the last two frames; None before the first."""
        return None if self._last_ns < 0 else self._last_ns + (self._duration_ns or self._step_ns)

    def warnings(self, label: str) -> list[str]:
        if not self.left_out:
            return []
        return [f"{label}: frames left out because their time repeats or jumps back: {self.left_out}"]


def fitted(width: int, height: int) -> tuple[int, int]:
    """Width and height, shrunk in proportion until the long side is at most `LONG_SIDE_PX_MAX`."""
    scale = min(1.0, LONG_SIDE_PX_MAX / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def check_size(width: int, height: int, label: str) -> None:
    """Raises SourceError for a size that no picture has or that is too large to allocate."""
    if not (width > 0 and height > 0 and width * height <= PICTURE_PX_MAX):
        raise SourceError(
            f"{label}: a picture of {width} x {height} pixels is not read (at most {PICTURE_PX_MAX} pixels): "
            "scale it down first"
        )


def on_black(pixels: Image) -> Image:
    """(h, w, 3) of RGB or RGBA: what is transparent shows the black behind it, not the colour it happens to have."""
    if pixels.shape[2] == 3:
        return pixels
    colours, alpha = pixels[:, :, :3], pixels[:, :, 3:]
    if alpha.min(initial=255) == 255:
        return colours
    return ((colours.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def suggested_name(text: str) -> str:
    """A recording's name made of `text`: what a name may not hold becomes `_`."""
    name = re.sub(r"[^A-Za-z0-9 ._@+-]+|\.{2,}", "_", text).lstrip(" ._@+-")
    return name[:128] or "recording"
