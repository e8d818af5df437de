"""Encoder states: bytes in, bytes out, whole or not at all.

A file holds a header and the payload. The newest two of a recording are kept, so that a damaged one costs a
longer replay and nothing else.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from memdb.files import unlink, write_whole
from memdb.room import UPKEEP_RESERVE_BYTES, refused, require
from memdb.schemas.errors import CorruptionError
from memdb.schemas.recording import Tombstone

logger = logging.getLogger(__name__)

_MAGIC = b"memdbSTA"
_FORMAT = 11  # of no older one by a flipped bit
_UNCOUNTED = 4  # the format before bytes were counted: it is read still
_OLDER = (1, 2)
# magic, format, length of the fingerprint, unit number, length of the payload, reach, tombstones seen, recording,
# bytes of states and of units written; then the fingerprint (ASCII), xxh3_128 over all of this and the payload, and
# the payload.
_HEAD = struct.Struct("<8sIIQQqQ16sQQ")
_UNCOUNTED_HEAD = struct.Struct("<8sIIQQqQ16s")
_HASH_BYTES = 16
_KEEP = 2
_FINGERPRINT_BYTES_MAX = 1024
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{10})\.state")


class OlderState(CorruptionError):
    """A state that an older memdb saved: nobody uses it, and it is no damage."""


@dataclass(frozen=True)
class Written:
    """What an ingest wrote up to a state: bytes of units as they were encoded, and of states, that one included."""

    units_bytes: int = 0
    states_bytes: int = 0

    @property
    def ratio(self) -> float | None:
        """Bytes written over bytes of units. None where nothing is known."""
        return (self.units_bytes + self.states_bytes) / self.units_bytes if self.units_bytes else None


@dataclass(frozen=True)
class SavedState:
    """An encoder state as it lies on the disk."""

    recording_id: str
    unit: int  # the unit with which an ingest goes on from it
    encoding_fingerprint: str
    reach_ns: int  # it holds nothing of the stream from before this media time
    tombstones: int  # how many spans had been forgotten when it was taken: it holds nothing of them
    payload: bytes
    written: Written = Written()

    def holds_forgotten(self, tombstones: Sequence[Tombstone]) -> bool:
        """Whether it reaches into a span that was forgotten since, or lies before one: a replay would see it again."""
        return any(self.reach_ns < tombstone.end_ns for tombstone in tombstones[self.tombstones :])


class StateFiles:
    """The saved encoder states of one recording."""

    def __init__(self, folder: Path, recording_id: str, encoding_fingerprint: str) -> None:
        """`folder` is the store's `state/`; see `Store.state`."""
        self._folder = folder
        self._recording_id = recording_id
        self._encoding_fingerprint = encoding_fingerprint

    def save(
        self,
        unit_number: int,
        payload: bytes,
        *,
        reach_ns: int = 0,
        tombstones: int = 0,
        units_bytes: int = 0,
    ) -> None:
        """Keep the state that belongs to a unit number. On the disk when this returns. Raises StoreError, StoreFull.

        `reach_ns`, `tombstones`: see SavedState; by default it may hold something of everything. `units_bytes`: of
        the units that were written since the state before.
        """
        path = self._folder / f"{self._recording_id}-{unit_number:010d}.state"
        found = SavedState(
            self._recording_id, unit_number, self._encoding_fingerprint, reach_ns, tombstones, payload
        )
        before, size = self.written(), len(_head(found)) + len(payload)
        found = replace(found, written=Written(before.units_bytes + units_bytes, before.states_bytes + size))
        require(self._folder, len(payload), reserve_bytes=UPKEEP_RESERVE_BYTES, what="an encoder state")
        try:
            write_whole(
                path, [_head(found), payload], sync="a saved state", sync_name="the name of a saved state"
            )
            for old in self.files()[_KEEP:]:
                unlink(old)
        except OSError as error:
            raise refused(error, f"cannot save the state {path.name}") from error

    def written(self) -> Written:
        """What was written up to the newest state, as its head says: for figures only, so that nothing else is read."""
        for path in self.files():
            with suppress(OSError, struct.error), open(path, "rb") as stream:
                _, version, *_, units_bytes, states_bytes = _HEAD.unpack(stream.read(_HEAD.size))
                if version == _FORMAT:
                    return Written(units_bytes, states_bytes)
        return Written()

    def load_latest(
        self, encoding_fingerprint: str, at_most_unit: int, tombstones: Sequence[Tombstone] = ()
    ) -> SavedState | None:
        """The newest whole state of this encoding at or before a unit number that holds nothing forgotten.

        Damaged states and those of another encoding are passed over with a warning in the log.
        """
        for path in self.files():
            number = unit_of(path)
            if number > at_most_unit:
                continue
            try:
                found = read_state(path)
            except CorruptionError as error:
                logger.warning("passed over: %s", error)
                continue
            if found.encoding_fingerprint != encoding_fingerprint:
                logger.warning("passed over: state/%s is of another encoding", path.name)
                continue
            if found.holds_forgotten(tombstones):
                logger.info("passed over: state/%s holds what was forgotten", path.name)
                continue
            return found
        return None

    def remove_forgotten(self, tombstones: Sequence[Tombstone]) -> int:
        """Remove the states that hold something forgotten, and damaged ones, of which nobody knows; how many."""
        removed = 0
        for path in self.files():
            try:
                if not read_state(path).holds_forgotten(tombstones):
                    continue
            except CorruptionError:
                if not path.exists():
                    continue  # a writer just replaced it
            unlink(path)
            removed += 1
        return removed

    def remove_all(self) -> int:
        """Remove every state; how many there were."""
        for path in (found := self.files()):
            unlink(path)
        return len(found)

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


def read_state(path: Path) -> SavedState:
    """A state file, verified, and compared with its name. Raises CorruptionError."""
    file = f"state/{path.name}"
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            head, layout = stream.read(_UNCOUNTED_HEAD.size), _UNCOUNTED_HEAD
            if len(head) == layout.size and layout.unpack(head)[1] not in (_UNCOUNTED, *_OLDER):
                head, layout = head + stream.read(_HEAD.size - layout.size), _HEAD
            if len(head) != layout.size:
                raise CorruptionError(f"{file} is no whole state", file=file)
            fields = layout.unpack(head)
            magic, version, name_bytes, unit, payload_bytes, reach_ns, tombstones, owner = fields[:8]
            if magic == _MAGIC and version in _OLDER:
                raise OlderState(f"{file} is of an older format and is not used", file=file)
            whole_bytes = layout.size + name_bytes + _HASH_BYTES + payload_bytes
            if magic != _MAGIC or name_bytes > _FINGERPRINT_BYTES_MAX or whole_bytes != size_bytes:
                raise CorruptionError(f"{file} is no whole state", file=file)
            name, digest, payload = stream.read(name_bytes), stream.read(_HASH_BYTES), stream.read()
    except OSError as error:
        raise CorruptionError(f"{file} cannot be read: {error.strerror}", file=file) from None
    if _digest(head + name, payload) != digest:
        raise CorruptionError(f"{file} is damaged", file=file)
    if version not in (_FORMAT, _UNCOUNTED):
        raise CorruptionError(f"{file} has the unknown format {version}", file=file)
    if (owner.hex(), unit) != (recording_of(path), unit_of(path)):
        raise CorruptionError(f"{file} is the state of unit {unit} of recording {owner.hex()}", file=file)
    encoding = name.decode("ascii", "replace")
    return SavedState(owner.hex(), unit, encoding, reach_ns, tombstones, payload, Written(*fields[8:]))


def _head(state: SavedState) -> bytes:
    name = state.encoding_fingerprint.encode("ascii")
    head = _HEAD.pack(
        _MAGIC,
        _FORMAT,
        len(name),
        state.unit,
        len(state.payload),
        state.reach_ns,
        state.tombstones,
        bytes.fromhex(state.recording_id),
        state.written.units_bytes,
        state.written.states_bytes,
    )
    return head + name + _digest(head + name, state.payload)


def _digest(head: bytes, payload: bytes) -> bytes:
    whole = xxhash.xxh3_128(head)
    whole.update(payload)
    digest: bytes = whole.digest()
    return digest


def unit_of(path: Path) -> int:
    """The unit number in a state's file name."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[2])
