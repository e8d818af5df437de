"""A folder of pictures as a film: image i, in the natural order of names, stands at i / fps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from memdb.ingest.sampling import checked_fps
from memdb.ingest.sources.base import Source, check_size, fitted, on_black, suggested_name
from memdb.schemas.errors import SourceError
from memdb.schemas.frames import DecodedFrame, Image, SourceIdentity, SourceInfo
from memdb.schemas.times import NS_PER_S

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FPS_DEFAULT = 1.0
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_TOLD = 10  # broken pictures that are named one by one


class ImageFolder(Source):
    """The pictures of a folder (not of folders in it), `fps` a second; sizes may differ.

    A picture that cannot be read is left out with a warning, and its time stays empty. Raises SourceError
    for a folder without a readable picture, BudgetError for an absurd rate.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float | None = None) -> None:
        self._folder = Path(path)
        self._fps = checked_fps(FPS_DEFAULT if fps is None else fps, "fps")
        self._entries = _listed(self._folder)
        self._paths = [self._folder / name for name, _ in self._entries]
        self._closed = False
        self._broken = 0
        self.warnings: list[str] = []
        self.media_end_ns: int | None = None
        self.growing = False
        width, height = self._first_size()
        self.info = SourceInfo(
            identity=_identity(self._entries),
            name=suggested_name(self._folder.resolve().name),
            live=False,
            started_at_ns=None,
            duration_ns=self._time_ns(len(self._paths)),
            width=width,
            height=height,
        )

    def frames(self) -> Iterator[DecodedFrame]:
        self.warnings, self.media_end_ns, self._broken = [], None, 0
        for index, path in enumerate(self._paths):
            if self._closed:
                return
            yield DecodedFrame(self._time_ns(index), partial(self._image, path))
        self.media_end_ns = self._time_ns(len(self._paths))
        if self._broken > _TOLD:
            self.warnings.append(f"{self._folder}: and {self._broken - _TOLD} pictures more: left out")

    def close(self) -> None:
        self._closed = True

    def continues(self, known: SourceIdentity) -> bool:
        if known.kind != "folder":
            return False
        size_bytes, digest = 0, xxhash.xxh3_128()
        for name, picture_bytes in self._entries[:-1]:
            _add(digest, name, picture_bytes)
            size_bytes += picture_bytes
            if size_bytes >= known.size_bytes:
                break
        return (size_bytes, digest.hexdigest()) == (known.size_bytes, known.digest)

    def _time_ns(self, index: int) -> int:
        return round(index * NS_PER_S / self._fps)

    def _first_size(self) -> tuple[int, int]:
        """Width and height of the first picture that can be read."""
        for path in self._paths:
            try:
                height, width, _ = _read(path).shape
            except SourceError:
                continue
            return width, height
        raise SourceError(f"{self._folder}: none of its {len(self._paths)} pictures can be read")

    def _image(self, path: Path) -> Image:
        try:
            return _read(path)
        except SourceError as error:
            self._broken += 1
            if self._broken <= _TOLD:
                self.warnings.append(f"{error}: left out")
            raise


def _listed(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the pictures, in natural order."""
    try:
        found = {e.name: e.stat().st_size for e in os.scandir(folder) if _is_picture(e)}
    except FileNotFoundError as error:
        raise SourceError(f"{folder} does not exist: check the path") from error
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror}") from error
    if not found:
        raise SourceError(
            f"{folder} holds no pictures ({' '.join(sorted(SUFFIXES))}): give a film, or a folder of them"
        )
    return [(name, found[name]) for name in sorted(found, key=natural_order)]


def _identity(entries: Sequence[tuple[str, int]]) -> SourceIdentity:
    digest = xxhash.xxh3_128()
    for name, size_bytes in entries:
        _add(digest, name, size_bytes)
    return SourceIdentity("folder", sum(size_bytes for _, size_bytes in entries), digest.hexdigest())


def _add(digest: Any, name: str, size_bytes: int) -> None:
    digest.update(os.fsencode(name) + b"\0" + size_bytes.to_bytes(8, "little"))


def _is_picture(entry: os.DirEntry[str]) -> bool:
    hidden = entry.name.startswith(".")
    return not hidden and os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file()


def natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key under which `2.jpg` comes before `10.jpg`; equal ones (`1`, `01`) are told apart by the name."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def _read(path: Path) -> Image:
    """The picture upright, as RGB, at native size or shrunk. Raises SourceError."""
    import PIL.Image
    from PIL.ImageOps import exif_transpose

    bombs = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
    try:
        with PIL.Image.open(path, formats=_FORMATS) as picture:
            check_size(*picture.size, path.name)
            size = fitted(*picture.size)
            picture.draft("RGB", size)  # JPEG: decoded at a half or a quarter where that is enough
            upright = _as_rgb(exif_transpose(picture))
            if max(upright.size) > max(size):
                upright = upright.resize(fitted(*upright.size), PIL.Image.Resampling.BOX)
            return np.array(upright)
    except SourceError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise SourceError(f"{path.name} is not a picture") from error
    except (OSError, ValueError, SyntaxError, *bombs) as error:
        raise SourceError(f"{path.name} cannot be read ({error})") from error


def _as_rgb(picture: Picture) -> Picture:
    import PIL.Image

    if picture.mode.startswith("I;16"):  # 16-bit grey: PIL would clip it to white
        return PIL.Image.fromarray((np.array(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        return PIL.Image.fromarray(on_black(np.array(picture.convert("RGBA"))))
    return picture.convert("RGB")
