"""The manifest of a table of captions: what a search may believe of the files that LanceDB wrote.

LanceDB syncs nothing and checks no bytes. So a table counts only as far as its manifest vouches for it: a
small file beside the table's folder, `captions.lance/<table>.manifest`, that names the folder, the version
and every file with its size and xxh3, and how far into each recording the table reaches:

    {"encoder":...,"files":[[name,bytes,xxh3],...],"folder":...,...}\\n    canonical JSON
    0123456789abcdef\\n                                                     its xxh3

It is put in place by one rename, and nothing is synced. A power cut may leave the old one, none, or one that
does not agree with its own checksum or with the files; what it can never leave is one that vouches for bytes
that were not written. Then captions are searched one by one, and the table is made anew from the segments.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from memdb.files import File, replace, unlink
from memdb.schemas.errors import CorruptionError

MANIFEST_BYTES_MAX = 16 << 20
_SUM_BYTES = 16 + 1  # hex digits and the end of the line
_FORMAT = 1
_FOLDER = re.compile(r"captions_[0-9a-f]{16}-[0-9a-f]{16}\.lance")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.#-]*")  # of a file's name: nothing that climbs out
_ID = re.compile(r"[0-9a-f]{32}")
_SUM = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class ListedFile:
    """One file of the table."""

    name: str  # relative to the table's folder, with /
    size_bytes: int
    xxh3: str  # 16 hex digits


@dataclass(frozen=True)
class TableManifest:
    """A table as it may be searched."""

    encoder: str
    folder: str  # of the table, in captions.lance; never used a second time
    version: int  # LanceDB's
    vector_size: int  # E
    rows: int
    last_commit: int  # the table holds every caption of its encoder that was committed up to here
    units: Mapping[str, int] = field(default_factory=dict)  # recording id -> units below are in the table
    unread: tuple[tuple[str, int], ...] = ()  # units below that are not, for they could not be read
    files: tuple[ListedFile, ...] = ()

    @property
    def fragments(self) -> int:
        """How many files the rows are spread over."""
        return sum(file.name.startswith("data/") for file in self.files)

    def pack(self) -> bytes:
        """The bytes of the file."""
        plain = asdict(self) | {
            "format": _FORMAT,
            "files": [[file.name, file.size_bytes, file.xxh3] for file in self.files],
        }
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True) + "\n"
        return text.encode() + xxh3_64_hexdigest(text.encode()).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, *, file: str) -> TableManifest:
        """Inverse of `pack`. Raises CorruptionError where one byte differs; nothing is parsed before that."""
        text, end = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
        if end != xxh3_64_hexdigest(text).encode() + b"\n":
            raise CorruptionError(f"{file} is damaged: its bytes differ from what was written", file=file)
        try:
            return _checked(json.loads(text))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CorruptionError(f"{file} is not of this version of memdb: {error!r}", file=file) from None


def _checked(data: object) -> TableManifest:
    """Raises KeyError, TypeError or ValueError for anything but a manifest."""
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError("another format")
    units, files, unread = data["units"], data["files"], data["unread"]
    if not (isinstance(units, dict) and isinstance(files, list) and isinstance(unread, list)):
        raise TypeError("units, files and unread")
    return TableManifest(
        encoder=_text(data["encoder"]),
        folder=_text(data["folder"], _FOLDER),
        version=_count(data["version"]),
        vector_size=_count(data["vector_size"]),
        rows=_count(data["rows"]),
        last_commit=_count(data["last_commit"]),
        units={_text(name, _ID): _count(number) for name, number in units.items()},
        unread=tuple((_text(name, _ID), _count(number)) for name, number in unread),
        files=tuple(ListedFile(_name(name), _count(size), _text(sum_, _SUM)) for name, size, sum_ in files),
    )


def _text(value: object, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        raise ValueError(f"{value!r}"[:80])
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r}"[:80])
    return value


def _name(value: object) -> str:
    name = _text(value)
    if not all(_PART.fullmatch(part) for part in name.split("/")):
        raise ValueError(f"{value!r}"[:80])
    return name


def read_manifest(path: Path, *, file: str) -> bytes | None:
    """The bytes of a manifest, unchecked; None where there is none. `file` is its name in the store.

    Raises CorruptionError where it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CorruptionError(f"{file} cannot be opened: {error.strerror}", file=file) from None
    try:
        size = os.fstat(fd).st_size
        if size > MANIFEST_BYTES_MAX:
            raise CorruptionError(f"{file} is longer than a manifest can be", file=file)
        return os.read(fd, size)
    except OSError as error:
        raise CorruptionError(f"{file} cannot be read: {error.strerror}", file=file) from None
    finally:
        os.close(fd)


def write_manifest(path: Path, data: bytes) -> None:
    """Put a manifest in place whole or not at all. Raises OSError.

    No sync: see above. It would not help either, for nobody syncs what LanceDB wrote.
    """
    temporary = path.with_name(path.name + ".tmp")
    unlink(temporary)
    with File(temporary) as target:
        target.write([data], 0)
    replace(temporary, path)
