"""What makes a film the same film: its size and a digest of its parts, from the disk or through a server."""

from __future__ import annotations

import base64
import logging
import re
import stat
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import xxhash

from memdb.schemas.errors import SourceError
from memdb.schemas.frames import SourceIdentity

log = logging.getLogger(__name__)
_MIB = 1 << 20
UNKNOWN = SourceIdentity("stream", 0, "")


def file_identity(path: Path, size_bytes: int | None = None) -> SourceIdentity:
    """Size and xxh3_128 of the first, middle and last MiB, or of all where it is no longer than these.

    With `size_bytes`: of the file as it was when it was so long, if it only grew since. Raises SourceError where
    `path` is not a plain file with something in it that may be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or device would be read without end
            raise SourceError(f"{path} is not a plain file: give a video file")
        size_bytes = status.st_size if size_bytes is None else size_bytes
        with path.open("rb") as file:
            digest = xxhash.xxh3_128()
            for offset, length in _parts(size_bytes):
                file.seek(offset)
                digest.update(file.read(length))
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist: check the path") from error
    except PermissionError as error:
        raise SourceError(f"{path} may not be read: give yourself the right to read it") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise SourceError(f"{path!s} cannot be read: {error}") from error
    if size_bytes == 0:
        raise SourceError(f"{path} is empty: record or copy it again")
    return SourceIdentity("file", size_bytes, digest.hexdigest())


def address_identity(url: str, timeout_s: float, known_bytes: int | None = None) -> SourceIdentity:
    """Of a film behind http:// or https://: that of the same film on a disk, where the server gives ranges.

    Else size and first MiB, and nothing at all where it does not say how much it has, or does not answer. With
    `known_bytes`: of the film as it was when it was so long.
    """
    try:
        first, size_bytes, has_ranges = _fetched(url, 0, _MIB, timeout_s)
        if size_bytes is None:
            return UNKNOWN
        if has_ranges and known_bytes is not None:
            size_bytes = min(size_bytes, known_bytes)
        digest = xxhash.xxh3_128()
        if not has_ranges:
            digest.update(first)
            return SourceIdentity("stream", size_bytes, digest.hexdigest())
        for offset, length in _parts(size_bytes):
            data = (
                first[:length]
                if offset == 0 and length <= len(first)
                else _fetched(url, offset, length, timeout_s)[0]
            )
            if len(data) != length:
                raise OSError(f"{len(data)} bytes came, not {length}")
            digest.update(data)
    except (
        OSError,
        ValueError,
    ) as error:  # URLError and HTTPException's kin; a film may be played all the same
        log.info("what is behind the address cannot be told apart from other films: %s", type(error).__name__)
        return UNKNOWN
    return SourceIdentity("file", size_bytes, digest.hexdigest())


def _parts(size_bytes: int) -> list[tuple[int, int]]:
    """Offset and length of what goes into the digest."""
    if size_bytes <= 3 * _MIB:
        return [(0, size_bytes)]
    return [(offset, _MIB) for offset in (0, (size_bytes - _MIB) // 2, size_bytes - _MIB)]


def _fetched(url: str, offset: int, length: int, timeout_s: float) -> tuple[bytes, int | None, bool]:
    """Bytes of a film, the size of all of it, and whether the server gave the range that was asked for."""
    parts = urlsplit(url)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
    request = urllib.request.Request(plain)  # noqa: S310 - the caller has made sure that it is http
    request.add_header("Range", f"bytes={offset}-{offset + length - 1}")
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
        total = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        has_ranges = answer.status == 206 and total is not None
        size = total[1] if has_ranges and total is not None else answer.headers.get("Content-Length", "")
        data = answer.read(length) if has_ranges or offset == 0 else b""
        return data, int(size) if size.isdecimal() else None, has_ranges
