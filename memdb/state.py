"""Encoder states: bytes in, bytes out, whole or not at all.

A file holds a header and the payload. The newest two of a recording are kept, so that a damaged one costs a
longer replay and nothing else.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from pathlib import Path

import xxhash

from memdb.schemas.errors import CorruptionError, StoreError
from memdb.segments import sync_folder

logger = logging.getLogger(__name__)

_MAGIC = b"memdbSTA"
_FORMAT = 1
# magic, format, length of the fingerprint, unit number, length of the payload; then the fingerprint (ASCII),
# xxh3_128 over all of this and the payload, and the payload.
_HEAD = struct.Struct("<8sIIQQ")
_HASH_BYTES = 16
_KEEP = 2
_FINGERPRINT_BYTES_MAX = 1024
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{10})\.state")


class StateFiles:
    """The saved encoder states of one recording."""

    def __init__(self, folder: Path, recording_id: str, encoding_fingerprint: str) -> None:
        """`folder` is the store's `state/`; see `Store.state`."""
        self._folder = folder
        self._recording_id = recording_id
        self._encoding_fingerprint = encoding_fingerprint

    def save(self, unit_number: int, payload: bytes) -> None:
        """Keep the state that belongs to a unit number. On the disk when this returns. Raises StoreError."""
        path = self._folder / f"{self._recording_id}-{unit_number:010d}.state"
        temporary = path.with_suffix(".tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with open(os.open(temporary, flags, 0o644), "wb") as file:
                file.write(_head(unit_number, payload, self._encoding_fingerprint))
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(self._folder)
            for old in self.files()[_KEEP:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot save the state {path.name}: {error.strerror}") from error

    def load_latest(self, encoding_fingerprint: str, at_most_unit: int) -> tuple[int, bytes] | None:
        """The newest whole state of this encoding at or before a unit number, with its number.

        Damaged states and those of another encoding are passed over with a warning in the log.
        """
        for path in self.files():
            number = _number_of(path)
            if number > at_most_unit:
                continue
            try:
                found_number, fingerprint, payload = read_state(path)
            except CorruptionError as error:
                logger.warning("passed over: %s", error)
                continue
            if found_number != number or fingerprint != encoding_fingerprint:
                logger.warning("passed over: state/%s is of another unit or encoding", path.name)
                continue
            return number, payload
        return None

    def files(self) -> list[Path]:
        """Its files, the newest unit first."""
        return sorted(
            (path for path in state_files(self._folder) if path.name.startswith(self._recording_id)),
            reverse=True,
        )


def state_files(folder: Path) -> list[Path]:
    """All files in `state/` that are named as states are."""
    return sorted(folder / name for name in os.listdir(folder) if _NAME.fullmatch(name))


def recording_of(path: Path) -> str:
    """The recording id in a state's file name."""
    return path.name[:32]


def read_state(path: Path) -> tuple[int, str, bytes]:
    """Unit number, encoding fingerprint and payload of a state file. Raises CorruptionError."""
    file = f"state/{path.name}"
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            head = stream.read(_HEAD.size)
            if len(head) != _HEAD.size:
                raise CorruptionError(f"{file} is no whole state", file=file)
            magic, version, name_bytes, unit_number, payload_bytes = _HEAD.unpack(head)
            whole_bytes = _HEAD.size + name_bytes + _HASH_BYTES + payload_bytes
            if magic != _MAGIC or name_bytes > _FINGERPRINT_BYTES_MAX or whole_bytes != size_bytes:
                raise CorruptionError(f"{file} is no whole state", file=file)
            name, digest, payload = stream.read(name_bytes), stream.read(_HASH_BYTES), stream.read()
    except OSError as error:
        raise CorruptionError(f"{file} cannot be read: {error.strerror}", file=file) from None
    if _digest(head + name, payload) != digest:
        raise CorruptionError(f"{file} is damaged", file=file)
    if version != _FORMAT:
        raise CorruptionError(f"{file} has the unknown format {version}", file=file)
    return unit_number, name.decode("ascii", "replace"), payload


def _head(unit_number: int, payload: bytes, encoding_fingerprint: str) -> bytes:
    name = encoding_fingerprint.encode("ascii")
    head = _HEAD.pack(_MAGIC, _FORMAT, len(name), unit_number, len(payload)) + name
    return head + _digest(head, payload)


def _digest(head: bytes, payload: bytes) -> bytes:
    whole = xxhash.xxh3_128(head)
    whole.update(payload)
    digest: bytes = whole.digest()
    return digest


def _number_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[2])
