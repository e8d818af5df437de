"""What a store holds, read through its own calls, every byte of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from memdb.client import Client
from memdb.contents import digests_from, stored_element_bytes
from memdb.database import CATALOG
from memdb.records import read_body, read_record
from memdb.schemas.errors import CodecError, CorruptionError, MemdbError
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.segments import reading
from memdb.store import Store
from memdb.verify import Problem, VerifyReport


@dataclass
class Seen:
    """A recording as a reader finds it. A unit that cannot be read has its error instead of a digest."""

    units: list[bytes | str] = field(default_factory=list)
    spans: int = 0
    gaps: list[int] = field(default_factory=list)  # their starts
    epochs: list[int] = field(default_factory=list)  # first units
    end_ns: int | None = None
    state: int | None = None  # the unit of the state from which an ingest would go on
    state_hash: bytes = b""
    digest: str = ""

    @property
    def is_empty(self) -> bool:
        return not (self.units or self.gaps or self.epochs)


def look(store: Store) -> dict[str, Seen]:
    """All recordings by name. Raises MemdbError where the catalog cannot be read."""
    found = {row.name: _look_at(store, row) for row in store.recordings()}
    return {name: seen for name, seen in found.items() if not seen.is_empty}


def _look_at(store: Store, row: RecordingRow) -> Seen:
    seen = Seen(
        [_digest_of(store, row, unit) for unit in store.units(row.id)],
        len(row.tombstones),
        [gap.start_ns for gap in row.gaps],
        [epoch.first_unit for epoch in row.epochs],
        row.end_ns,
    )
    state = store.state(row.id).load_latest(row.spec.encoding_fingerprint, row.units, row.tombstones)
    if state is not None:
        seen.state, seen.state_hash = state.unit, state.payload[:16]
    try:
        seen.digest = Client(store).digest(row.name)[row.name]
    except MemdbError as error:
        seen.digest = f"{type(error).__name__}: {error}"
    return seen


def _digest_of(store: Store, recording: RecordingRow, row: UnitRow) -> bytes | str:
    """Computed from the bytes on the disk, not taken from the catalog."""
    try:
        with reading(store.segments_path, row.segment) as segment:
            record = read_record(segment.fd, row.offset, segment.size_bytes, file=segment.file)
            body = read_body(segment.fd, record, segment.size_bytes, file=segment.file)
        return digests_from(row, body, stored_element_bytes(recording.spec, row)).all
    except (CorruptionError, CodecError) as error:
        return f"{type(error).__name__}: {error}"


def problems(store: Store) -> list[tuple[str, str]]:
    """What `verify` reports: file and what."""
    return [(problem.file, problem.what) for problem in Client(store).verify().problems]


def verify_any(path: Path) -> VerifyReport:
    """What `memdb verify` says, also of a store that is too damaged to open. Raises FormatVersionError."""
    try:
        with Store.open(path) as store:
            return Client(store).verify()
    except CorruptionError as error:
        return VerifyReport(problems=[Problem(error.file or CATALOG, str(error))])


def is_derived(file: str) -> bool:
    """Whether a file, relative to the store, can be made again from the others."""
    return file.startswith(("keys", "captions.lance"))


def files_of(path: Path) -> list[Path]:
    """Every file of a store, the catalog first."""
    found = sorted(file for file in path.rglob("*") if file.is_file())
    return sorted(found, key=lambda file: file.name != CATALOG)
