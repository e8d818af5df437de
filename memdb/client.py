"""The Python client: one object over one store. Heavy libraries load when they are first needed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from memdb.loaded import Loaded
from memdb.schemas.answer import Answer, SearchHit
from memdb.schemas.errors import (
    UnknownRecording,
    UsageError,
)
from memdb.schemas.question import Budget, Question, check_text
from memdb.schemas.times import parse_time, to_ns
from memdb.store import Store, recording_digest

if TYPE_CHECKING:
    from memdb.backup import BackupReport
    from memdb.captions import CaptionIndex
    from memdb.compact import CompactProgress, CompactReport
    from memdb.forget import ForgetReport
    from memdb.ingest.run import IngestReport, Progress
    from memdb.ingest.stages import IngestStages
    from memdb.ladder import LadderReport
    from memdb.policy import Policy
    from memdb.query.engine import Engine
    from memdb.schemas.recipe import Recipe
    from memdb.schemas.rows import RecordingRow
    from memdb.stats import StoreStats
    from memdb.transfer import ImportReport
    from memdb.verify import VerifyReport

log = logging.getLogger(__name__)


def connect(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    key_index: str | None = None,
    create: bool = True,
) -> Client:
    """Open the store in the directory `path`; make it first where there is none, unless `create` is False.

    model: embedded, random:SEED, random-qwen:SEED, a folder or a Hub id; by default the one that the store remembers,
    else embedded. device and dtype as torch names them (float32, bfloat16, float16). key_index: exact, faiss,
    faiss-flat or faiss-gpu, which all give the same blocks; by default faiss where it is installed.
    Raises NotAStore, FormatVersionError.
    """
    if create:
        Store.open(path, create=True, write=True).close()
    return Client(Store.open(path), model=model, device=device, dtype=dtype, key_index=key_index)


class Client:
    """A connection. Threads may share it; the model answers one question at a time."""

    def __init__(
        self,
        store: Store,
        *,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        key_index: str | None = None,
    ) -> None:
        """Use `connect`."""
        self.store = store
        self.loaded = Loaded(store, model, device, dtype)
        self._key_index = key_index
        self._engine: Engine | None = None
        self._captions: CaptionIndex | None = None
        self._lock = threading.RLock()

    # Ingest

    def ingest(
        self,
        source: str | os.PathLike[str] | Iterable[Any],
        *,
        recording: str | None = None,
        recipe: str | os.PathLike[str] | Recipe = "hybrid",
        profile: str | None = None,
        codec: str | None = None,
        settings: Sequence[str] = (),
        sample_fps: float = 0.5,
        fps: float | None = None,
        started_at: str | None = None,
        track: int | None = None,
        reconnect_s: float = 300.0,
        seed: int = 0,
        progress: Callable[[Progress], None] | None = None,
        stop: threading.Event | None = None,
    ) -> IngestReport:
        """Put a film, folder, address or iterator of frames into the store; go on where an earlier call ended.

        recording: its name, by default made from the source's. recipe: a name in memdb.recipes, a TOML file or a
        Recipe; profile, codec and settings (`STAGE.PARAM=VALUE`) change it; one that is named has the settings under
        it that fit the model, where its memdb.json says so. sample_fps: frames a second that
        are looked at. fps: of folders and iterators without times. started_at: ISO 8601, the wall clock at
        media time 0. track: a video track by number, from 0 on, where the best is not meant. reconnect_s: how long a
        live source that was lost is tried again; 0 for not at all, inf for ever. seed: kept with the recording as
        part of its encoding: reduce = ctr draws from it. stop: set it to end after the batch in hand, with Interrupted.

        Raises RecipeError, BudgetError, SourceError, ModelMismatch, EncodingMismatch, SourceMismatch,
        LockedError, StoreError.
        """
        from memdb.ingest.job import Job, Wanted

        wanted = Wanted(
            source=source,
            recording=recording,
            recipe=recipe,
            profile=profile,
            codec=codec,
            settings=settings,
            sample_fps=sample_fps,
            fps=fps,
            started_at=started_at,
            track=track,
            reconnect_s=reconnect_s,
            seed=seed,
        )
        job = Job(self.store.path, wanted, self.loaded, _composed, self._lock)
        return job.run(progress, stop)

    # Questions

    def ask(
        self,
        text: str,
        *,
        recording: str | None = None,
        mode: str = "auto",
        at: float | str | None = None,
        start_s: float | str | None = None,
        end_s: float | str | None = None,
        latency_ms_max: float | None = None,
        gpu_bytes_max: int | None = None,
        read_bytes_max: int | None = None,
        context_tokens_max: int | None = None,
        on_text: Callable[[str], None] | None = None,
        save_frames: str | os.PathLike[str] | None = None,
    ) -> Answer:
        """Answer a question from the store, within the budget.

        recording: one by name, else all. mode: auto, captions, kv, both, recent. at: as of this media time
        (seconds, HH:MM:SS, or ISO 8601 where the wall clock is known). start_s and end_s: only what was seen in
        between; where neither is given, times that the question names count. on_text gets the answer piece by piece.
        save_frames: a folder for the key frames of the evidence.

        Raises UsageError, QuestionError, BudgetError, UnknownRecording, ModelMismatch, NoPlanFits.
        """
        budget = Budget(latency_ms_max, gpu_bytes_max, read_bytes_max, context_tokens_max)
        question = Question(text, mode, recording, None, budget)
        if at is not None:
            question = replace(question, at_ns=to_ns(self._time(at, recording)))
        start_ns, end_ns = self._span_ns(start_s, end_s, recording)
        question = replace(question, start_ns=start_ns, end_ns=end_ns)
        with self._lock:
            engine = self._asking()
            engine.prepare(question)
            answer = engine.ask(question, on_text=on_text)
            if note := self.loaded.model().sheet.note:
                answer = _with_note(answer, note, self.store.recordings(), recording)
        return self.save_frames(answer, save_frames) if save_frames is not None else answer

    def search(
        self,
        text: str,
        *,
        recording: str | None = None,
        start_s: float | str | None = None,
        end_s: float | str | None = None,
        limit: int = 10,
    ) -> list[SearchHit]:
        """Captions by meaning and by words, best first. No Video-LLM is loaded.

        Recordings whose caption vectors only their Video-LLM can make (rlivs) are searched by words.
        Raises UsageError, BudgetError, UnknownRecording.
        """
        from memdb.captions import CaptionIndex
        from memdb.query.search import search

        if not text.strip():
            raise UsageError("nothing to search for: give some words")
        check_text(text)
        if limit < 1:
            raise UsageError(f"limit {limit} finds nothing: give at least 1")
        start_ns, end_ns = self._span_ns(start_s, end_s, recording)
        rows = [self.store.recording(recording)] if recording is not None else self.store.recordings()
        with self._lock:
            self._captions = self._captions or CaptionIndex(self.store.path)
            return search(
                self.store,
                rows,
                text,
                index=self._captions,
                vectors=self.loaded.search_vectors,
                start_ns=start_ns,
                end_ns=end_ns,
                limit=limit,
            )

    def save_frames(self, answer: Answer, folder: str | os.PathLike[str]) -> Answer:
        """Write the key frames of the evidence as JPEG; the answer with their paths, and a warning for each lost."""
        from memdb.frames_out import save_frames

        return save_frames(self.store, answer, Path(folder))

    # The store

    def recordings(self) -> list[RecordingRow]:
        """All recordings, by name."""
        return self.store.recordings()

    def stats(self) -> StoreStats:
        """Recordings, times, and bytes by tier."""
        from memdb.stats import stats

        return stats(self.store)

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read and check every byte. Damage is reported, not raised."""
        from memdb.caption_check import check_captions
        from memdb.page_check import check_pages
        from memdb.policy_check import check_policy
        from memdb.verify import verify

        return verify(self.store, checkers=[check_pages, check_captions, check_policy], progress=progress)

    def digest(self, recording: str | None = None, *, tier: str = "all") -> dict[str, str]:
        """Recording to digest of its content, from the bytes on disk. tier: all, kv or captions."""
        if recording is not None:
            return {recording: recording_digest(self.store, recording, tier)}
        found = {}
        for row in self.store.recordings():
            with suppress(UnknownRecording):  # forgotten since it was listed
                found[row.name] = recording_digest(self.store, row.name, tier)
        return found

    def export(self, recording: str, out: str | os.PathLike[str], *, format: str = "jsonl") -> int:
        """Write a recording's captions as JSON lines (jsonl) or subtitles (srt), or all of it (memdb).

        The number of captions, or of units, that were written. Raises UsageError, UnknownRecording, StoreError.
        """
        from memdb.export import export

        return export(self.store, recording, Path(out), format)

    def import_(
        self,
        path: str | os.PathLike[str],
        *,
        recording: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ImportReport:
        """Take in a recording that `export` wrote as memdb, bit for bit, under its own name or another.

        Raises UsageError, CorruptionError, FormatVersionError, ModelMismatch, StoreError.
        """
        from memdb.transfer import import_recording

        with Store.open(self.store.path, create=True, write=True) as store:
            return import_recording(store, Path(path), recording=recording, progress=progress)

    def backup(
        self, target: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None
    ) -> BackupReport:
        """Copy the store as it is now into a new folder, while others read and write. Raises UsageError, StoreError."""
        from memdb.backup import backup

        return backup(self.store.path, target, progress=progress)

    def forget(
        self, recording: str, *, start_s: float | str | None = None, end_s: float | str | None = None
    ) -> ForgetReport:
        """Forget a span of a recording in all tiers, or all of it where no span is given.

        Gone from every answer when this returns; the bytes go with `compact`. Raises UsageError, BudgetError,
        UnknownRecording, StoreError.
        """
        from memdb.forget import forget

        start = self._time(start_s, recording) if start_s is not None else None
        end = self._time(end_s, recording) if end_s is not None else None
        with Store.open(self.store.path, write=True) as store:
            return forget(
                store,
                recording,
                start_ns=to_ns(start) if start is not None else None,
                end_ns=to_ns(end) if end is not None else None,
            )

    def compact(
        self, *, age_now: bool = False, progress: Callable[[CompactProgress], None] | None = None
    ) -> CompactReport:
        """Remove from the disk what was forgotten, replaced or left half done, and age what the policy says.

        age_now: age although the clock may have jumped, because it is right. Raises StoreError.
        """
        from memdb.compact import compact

        with Store.open(self.store.path, write=True) as store:
            return compact(store, age_now=age_now, progress=progress)

    def policy(self, *, set: str | os.PathLike[str] | Policy | None = None) -> Policy:
        """What the store keeps, for how long and in how many bytes. set: a new policy, or its TOML file.

        Raises UsageError, StoreError, and CorruptionError where the policy is damaged.
        """
        from memdb.clock import set_policy
        from memdb.policy import Policy, read_policy, read_toml

        if set is not None:
            policy = set if isinstance(set, Policy) else read_toml(Path(set))
            with Store.open(self.store.path, write=True) as store:
                set_policy(store, policy)
        return read_policy(self.store.path)

    def due_now(self) -> dict[str, int]:
        """Recording to how many of its units `compact` would age at this moment."""
        from memdb.age import due_now
        from memdb.policy import read_policy

        return due_now(self.store, read_policy(self.store.path).ages, time.time_ns())

    def compare_uncut(
        self,
        source: str | os.PathLike[str] | Iterable[Any],
        recording: str,
        question: str,
        *,
        fps: float | None = None,
    ) -> LadderReport:
        """Logits of a question through the stored KV beside one uncut forward over the source's frames."""
        from memdb.ingest.sampling import sample
        from memdb.ingest.sources import open_source
        from memdb.ladder import compare

        with self._lock, open_source(source, fps=fps) as opened:
            engine = self._asking()
            row = self.store.recording(recording)
            model = self.loaded.model()
            frames = sample(opened.frames(), row.spec.sample_fps)
            pixels = [model.prepare(frame.image, row.spec.grid) for frame in frames]
            ids, logits, blocks = engine.question_logits(recording, question)
            return compare(model, row.spec, pixels, ids, logits, blocks)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self.store.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _asking(self) -> Engine:
        from memdb.query.engine import Engine

        if self._engine is None:
            self._engine = Engine(
                self.store, self.loaded.model(), self.loaded.question_vectors, key_index=self._key_index
            )
        return self._engine

    def _span_ns(
        self, start_s: float | str | None, end_s: float | str | None, recording: str | None
    ) -> tuple[int | None, int | None]:
        start = self._time(start_s, recording) if start_s is not None else None
        end = self._time(end_s, recording) if end_s is not None else None
        if start is not None and end is not None and end <= start:
            raise UsageError(f"the span from {start:g} s to {end:g} s is empty: let it end after it starts")
        return to_ns(start) if start is not None else None, to_ns(end) if end is not None else None

    def _time(self, value: float | str, recording: str | None) -> float:
        """Media seconds; a moment on the wall clock needs a recording that is named, or the only one."""
        started = None
        if isinstance(value, str):
            rows = [self.store.recording(recording)] if recording is not None else self.store.recordings()
            started = rows[0].spec.started_at_ns if len(rows) == 1 else None
        return parse_time(value, started_at_ns=started)


def _composed(row: Recipe) -> IngestStages:
    """Its stages for an ingest; those of a question are looked at too. Raises RecipeError."""
    from memdb.ingest import stages
    from memdb.query import stages as query_stages

    stages.known(row)  # of both sides, before a rule says what does not go together
    query_stages.known(row)
    query_stages.compose(row)
    return stages.compose(row)


def _with_note(answer: Answer, note: str, rows: Sequence[RecordingRow], recording: str | None) -> Answer:
    """The answer with the model's note on films that are not of its world, where it rests on one."""
    named = {item.recording for item in answer.evidence} or ({recording} if recording else set())
    strange = [row for row in rows if (not named or row.name in named) and not row.spec.source.of_world]
    return replace(answer, warnings=(*answer.warnings, note)) if strange else answer
