"""`memdb repair`: the catalog made anew from the segments alone, and every derived file from them.

    read      every record of every segment                      memdb/salvage.py
    settle    which files and which copies of units count         memdb/truth.py
    mend      what is lost gets a place in a segment of its own   memdb/mend.py
    fill      a new catalog beside the old one                    memdb/rebuild.py
    swap      the old catalog goes, then its WAL, then the new one gets the name

A kill at any step leaves a store that opens, or one that says to run repair again; that begins anew and ends the
same. No segment is changed or removed. A forgetting that was killed between its last record and its seal is carried
out: it was asked for and not acknowledged, so it may go either way, and forgetting more is the safer one.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from memdb import policy_seal
from memdb.applying import FORGET
from memdb.catalog import Catalog
from memdb.database import CATALOG
from memdb.derived import drop_derived, next_generation, rebuild_derived
from memdb.files import make_folder, unlink
from memdb.folder import BESIDE, FILES, FOLDERS, POLICY, TRUTH, has_segments
from memdb.locks import FileLock, commit_lock, many_files, rewrite_lock, writer_lock
from memdb.mend import Mender
from memdb.network import check_locks_hold
from memdb.rebuild import Known, check, fill
from memdb.records import Kind, Record
from memdb.remembered import Remembered
from memdb.repair_report import Repaired, RepairReport
from memdb.roll_forward import check_format
from memdb.room import refused
from memdb.salvage import SegmentContents, read_contents
from memdb.schemas.errors import NotAStore, StoreError
from memdb.schemas.fingerprint import ModelIdentity
from memdb.schemas.rows import RecordingRow
from memdb.schemas.times import to_s
from memdb.sealed import SealedSegment
from memdb.segments import segment_files
from memdb.swap import NEW, drop_states, swap
from memdb.truth import Truth

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes of segments read, bytes in all


def repair(path: str | os.PathLike[str], *, progress: Progress | None = None) -> RepairReport:
    """Make the catalog and all derived files anew. Nobody may write meanwhile.

    Raises NotAStore, LockedError where a writer is alive, FormatVersionError, StoreFull, StoreError.
    """
    folder = Path(path).absolute()
    if not (folder / "segments").is_dir():
        raise NotAStore(f"{folder} holds no segments/ to make a catalog from: name the folder of a store")
    if not has_segments(folder) and not (folder / CATALOG).exists():
        raise NotAStore(f"{folder} holds no store: name one")
    for name in (*FILES, *FOLDERS):
        if (folder / name).is_symlink():
            raise StoreError(f"{folder / name} is a symbolic link: a store holds none")
    remembered = Remembered(folder / CATALOG)
    try:
        with many_files():
            return _Repair(folder, remembered, progress).run()
    except OSError as error:
        raise refused(error, "cannot repair") from error
    finally:
        remembered.close()


class _Repair:
    def __init__(self, folder: Path, remembered: Remembered, progress: Progress | None) -> None:
        self._folder, self._segments = folder, folder / "segments"
        self._remembered, self._progress = remembered, progress
        self.report = RepairReport()
        self._store_id = ""
        self._forgotten: dict[str, int] = {}

    def run(self) -> RepairReport:
        for name in TRUTH:
            make_folder(self._folder / name)
        check_locks_hold(self._folder)
        names = segment_files(self._segments)
        with _every_lock(self._folder, sorted(names)):
            with FileLock(self._folder / "locks" / "derived.lock", held_message=_busy("derived data")):
                truths = self._read(names)
                catalog = self._new_catalog(truths)
                try:
                    known = self._settle(catalog, truths)
                    fill(catalog, self._segments, self._model(known), known, self._forgotten)
                    self._take_policy(catalog)
                    check(catalog)
                    catalog.database.checkpoint()
                    rows = catalog.recordings()
                finally:
                    catalog.close()
                self._remembered.close()
                if removed := drop_states(self._folder, rows, self._forgotten):
                    self.report.dropped.append(f"{removed} encoder states that fit no more")
                drop_derived(self._folder)
                swap(self._folder)
            self.report.notes += rebuild_derived(self._folder)
        self._tell(rows)
        return self.report

    # Reading

    def _read(self, names: dict[str, list[tuple[int, str]]]) -> list[Truth]:
        """Every recording as its files have it, those of other stores left out."""
        total = sum((self._segments / name).stat().st_size for found in names.values() for _, name in found)
        done = 0

        def told(size: int) -> None:
            nonlocal done
            done += size
            if self._progress is not None:
                self._progress(min(done, total), total)

        read = {
            recording_id: [read_contents(self._segments, name, sequence, told) for sequence, name in found]
            for recording_id, found in sorted(names.items())
        }
        headers = [file.header for files in read.values() for file in files if file.header is not None]
        for header in headers:
            check_format(header)
        self._find_store_id(headers)
        own = {
            recording_id: [file for file in files if self._is_own(recording_id, file)]
            for recording_id, files in read.items()
        }
        return [self._truth(recording_id, files) for recording_id, files in own.items() if files]

    def _truth(self, recording_id: str, files: list[SegmentContents]) -> Truth:
        told = self._remembered
        return Truth(
            recording_id,
            files,
            told.events(recording_id),
            told.unit_count(recording_id),
            told.forgotten_at_ns(recording_id),
        )

    def _find_store_id(self, headers: list[Record]) -> None:
        """The id that the old catalog tells, if any header has it; else that of most headers."""
        ids = Counter(str(header.meta["store_id"]) for header in headers)
        told = self._remembered.store_id
        most = max(sorted(ids), key=ids.__getitem__) if ids else uuid.uuid4().hex
        self._store_id = told if told is not None and (told in ids or not ids) else most

    def _is_own(self, recording_id: str, file: SegmentContents) -> bool:
        meta = file.header.meta if file.header else None
        own = meta is None or (meta["recording_id"], meta["store_id"]) == (recording_id, self._store_id)
        if not own:
            self.report.dropped.append(
                f"{file.file} is of another recording or store: if it was not always, what it held is lost, and "
                "if that was a forgetting, what it forgot may be back"
            )
        return own

    # Settling

    def _new_catalog(self, truths: list[Truth]) -> Catalog:
        path = self._folder / NEW
        for suffix in ("", *BESIDE):
            unlink(path.with_name(NEW + suffix))
        begun = [truth.created_ns for truth in truths if truth.created_ns]
        Catalog.create(path, store_id=self._store_id, created_ns=min(begun, default=time.time_ns()))
        return Catalog(path, write=True)

    def _settle(self, catalog: Catalog, truths: list[Truth]) -> list[Known]:
        found: list[tuple[Truth, RecordingRow]] = []
        for truth in truths:
            self._warn_of_lost_files(truth)
            if truth.forgotten_at_ns is not None:
                self._forgotten[truth.id] = truth.forgotten_at_ns
                self._put_on_record(catalog, truth)
                continue
            if not truth.standing and not len(truth.copies) and not truth.events:
                self.report.dropped += [f"{file.file}: nothing in it ever counted" for file in truth.files]
                continue
            row = self._described(truth)
            if row is None:
                continue
            mender = Mender(catalog, self._segments, truth, row, self._remembered)
            written = mender.run()
            self.report.notes += mender.notes
            self.report.add_spans(row.name, mender.touched)
            if written is not None:
                truth = self._truth(truth.id, [*truth.files, written])
            self._warn_of_tails(truth, row.name)
            self.report.notes += [f"{row.name}: {note}" for note in truth.notes]
            found.append((truth, row))
        return self._named(self._without_empty_ones(found))

    def _without_empty_ones(
        self, found: list[tuple[Truth, RecordingRow]]
    ) -> list[tuple[Truth, RecordingRow]]:
        """Of recordings of one name those that were begun, never filled and begun anew are none."""
        kept: list[tuple[Truth, RecordingRow]] = []
        for truth, row in sorted(
            found, key=lambda item: (not len(item[0].found), -item[1].created_ns, item[0].id)
        ):
            if len(truth.found) or row.name not in {other.name for _, other in kept}:
                kept.append((truth, row))
            else:
                self.report.notes.append(f"a recording {row.name!r} that holds nothing was left out")
        return kept

    def _put_on_record(self, catalog: Catalog, truth: Truth) -> None:
        """Write the tombstone of a recording again, where only the old catalog knows of it."""
        row = self._described(truth)
        if row is None or any(file.tombstones(whole=True) and file.sealed for file in truth.files):
            return
        segment = SealedSegment(catalog, self._segments, row, FORGET)
        try:
            for number in range(2):
                meta: dict[str, object] = {"whole": True, "at_ns": truth.forgotten_at_ns}
                segment.event(Kind.TOMBSTONE, number, meta)
            segment.seal_whole()
        finally:
            segment.close()
        self.report.notes.append(f"the tombstone of {row.name!r} is damaged, and was written again")

    def _described(self, truth: Truth) -> RecordingRow | None:
        """What is known of a recording beside its units: by its headers, else by the old catalog."""
        spec, created_ns = truth.spec, truth.created_ns
        told = self._remembered.recording(truth.id)
        if spec is None and told is not None:
            spec, created_ns = told
        if spec is None:
            files = ", ".join(file.file for file in truth.files)
            if any(len(file.units) or file.holes for file in truth.files):
                self.report.dropped.append(
                    f"{files}: no header can be read, so that nobody knows what recording this is: "
                    f"{len(truth.found)} units are left out"
                )
            return None
        return RecordingRow.begun(truth.id, spec, created_ns)

    def _named(self, found: list[tuple[Truth, RecordingRow]]) -> list[Known]:
        """Names that clash get a number: the recording that was begun first keeps its own."""
        known: list[Known] = []
        taken = {row.name for _, row in found}
        used: set[str] = set()
        for truth, row in sorted(found, key=lambda item: (item[1].created_ns, item[0].id)):
            name, number = row.name, 1
            while name in used or (number > 1 and name in taken):
                number += 1
                name = f"{row.name[:120]}-{number}"
            if name != row.name:
                self.report.notes.append(
                    f"two recordings are named {row.name!r}: the later one is {name!r} now"
                )
            used.add(name)
            generation = next_generation(self._folder, truth.id, self._remembered.generation(truth.id))
            known.append(Known(truth, row.spec, name, row.created_ns, generation))
        return known

    def _model(self, known: list[Known]) -> ModelIdentity | None:
        """The model of most recordings; those of another one stay, and are told."""
        models = {one.spec.model.fingerprint: one.spec.model for one in known}
        counts = Counter(one.spec.model.fingerprint for one in known)
        if not counts:
            return None
        chosen = max(sorted(counts), key=counts.__getitem__)
        for one in known:
            if one.spec.model.fingerprint != chosen:
                self.report.notes.append(f"{one.name} was made with another model, {one.spec.model.spec!r}")
        return models[chosen]

    def _take_policy(self, catalog: Catalog) -> None:
        """The policy counts that lies there: segments know of none."""
        there, told = policy_seal.seal_there(self._folder), self._remembered.policies
        policy_seal.admit(catalog.database, [there])
        if there not in told and (told or there != policy_seal.NONE):
            known = "is not the one that was set last" if told else "may be an older one, for nobody knows"
            self.report.notes.append(
                f"{POLICY} {'is not there, and' if there == policy_seal.NONE else 'was taken as it lies there:'} it "
                f"{known}: look at it with memdb policy"
            )

    # What is told

    def _warn_of_lost_files(self, truth: Truth) -> None:
        for file in truth.files:
            stones = file.tombstones(whole=False) + file.tombstones(whole=True)
            if file.role == FORGET and file.holes and not stones:
                self.report.notes.append(
                    f"{file.file} is so damaged that no tombstone in it can be read: what it forgot may be back; "
                    "forget it again"
                )
            elif file in truth.obeyed:
                self.report.notes.append(f"{file.file}: a forgetting whose end is damaged was carried out")
            elif file.holes and file.header is None and not len(file.units) and not file.events:
                self.report.notes.append(
                    f"{file.file}: nothing of its {file.size_bytes:,} bytes can be read: units of its recording "
                    "may be lost, and if it was a forgetting, what it forgot may be back"
                )
            elif (
                file.role != FORGET and not file.sealed and file in truth.spare and file not in truth.replaced
            ):
                self.report.dropped.append(f"{file.file} was never finished, and does not count")

    def _warn_of_tails(self, truth: Truth, name: str) -> None:
        """What stands behind the last record that counts, where nothing later goes on from there."""
        for file in truth.standing:
            end, lost = truth.end_bytes(file), file.size_bytes
            if end < lost and truth.limits.get(file.name, 0) >= truth.unit_count:
                self.report.dropped.append(
                    f"{file.file}: {lost - end:,} bytes behind byte {end} are torn or damaged: what was never "
                    f"acknowledged, or the last units of {name!r}; the next ingest goes on before them"
                )

    def _tell(self, rows: list[RecordingRow]) -> None:
        report = self.report
        report.forgotten = len(self._forgotten)
        for row in rows:
            segments = len(segment_files(self._segments).get(row.id, []))
            report.recordings.append(
                Repaired(row.name, row.units, segments, len(row.tombstones), to_s(row.watermark_ns))
            )
            logger.info("%s: %d units are in the new catalog", row.name, row.units)
        for line in (*map(str, report.spans), *report.dropped, *report.notes):
            logger.warning("%s", line)


@contextmanager
def _every_lock(folder: Path, recording_ids: list[str]) -> Iterator[None]:
    """All locks of a store. Raises LockedError where anybody has one."""
    with ExitStack() as held:
        held.enter_context(FileLock(folder / "locks" / "names.lock", held_message=_busy("the store")))
        held.enter_context(FileLock(folder / "locks" / "policy.lock", held_message=_busy("the policy")))
        for recording_id in recording_ids:
            for lock in (writer_lock, rewrite_lock, commit_lock):
                what = "a recording" if lock is writer_lock else "a recording's upkeep"
                held.enter_context(FileLock(lock(folder, recording_id), held_message=_busy(what)))
        yield


def _busy(what: str) -> str:
    return f"another process works on {what}: end it, then run memdb repair again"
