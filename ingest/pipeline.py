"""An ingest on one screen: decode, encode and write overlap; batches are cut at fixed frame numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame, thumbnail
from memdb.ingest.queues import Sink, Stream
from memdb.ingest.read_back import StoredGroups
from memdb.ingest.resume import reconnected, resume
from memdb.ingest.run import IngestReport, Progress, Run
from memdb.ingest.sampling import sample_with_gaps
from memdb.ingest.sources.base import Source
from memdb.ingest.sources.times import later, told
from memdb.ingest.stages import IngestStages
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import Interrupted, SourceError
from memdb.schemas.frames import Frame
from memdb.schemas.recording import Gap
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.times import format_time
from memdb.store import Store
from memdb.timing import Laps

# Batches that may wait for the writer: enough to overlap, flat in memory.
BATCHES_AHEAD = 2


def ingest(
    store: Store,
    source: Source,
    spec: RecordingSpec,
    model: VideoModel,
    stages: IngestStages,
    vectors: CaptionVectors | None,
    *,
    index: Callable[[bool], None],
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    new_epoch: str = "",
    turn: AbstractContextManager[object] = nullcontext(),  # noqa: B008
) -> IngestReport:
    """Put a source into the store, from where an earlier ingest of it ended.

    `index(flush)` brings the derived indexes up; the writer's thread calls it after commits, with flush at the
    end. `stop` ends the ingest after the batch in hand, with Interrupted. `new_epoch` is a reason not to resume
    but to go on from a fresh window. `turn` is held while the model works on a batch, so that questions over the
    same model have theirs in between. Raises Diverged where the replay differs from what was written first.

    A live source has no beginning to go back to: connected again it goes on behind what was seen, after a gap.
    Where a source gives a gap itself, the batch in hand is encoded and the open unit closes there. A file that is
    still being written, or that could not be read to its end, ends like a stopped ingest, so that a later one
    goes on as if it had been whole.

    What is forgotten meanwhile goes before the next batch, from the encoder and from the frames in hand (see
    memdb/forget.py). StoreError where all of the recording was forgotten.
    """
    live = source.info.live
    laps = Laps(torch.cuda.synchronize if model.device.type == "cuda" else None)
    size = stages.encode.chunk_frames * model.frames_together
    with store.writer(spec, now_ns=source.info.started_at_ns if live else None) as writer:
        with turn:
            encoder = StreamEncoder(
                model,
                stages,
                spec.init_ids,
                vectors,
                laps,
                sample_fps=spec.sample_fps,
                grid=spec.grid,
                seed=spec.seed,
                stored=StoredGroups(store, writer.recording.id, model),
            )
            resumed = resume(store, writer, encoder, new_epoch, live=live)
        gap = (
            reconnected(store, writer, encoder.counters.taken_ns)
            if live and writer.recording.epochs
            else None
        )
        run = Run(store, writer, encoder, index, progress, source.info.duration_ns, laps)
        counters = encoder.counters
        decoded = later(source.frames(), gap.end_ns) if gap is not None else source.frames()
        items = sample_with_gaps(decoded, spec.sample_fps, after_ns=counters.taken_ns, number=counters.frame)
        ready = Stream(
            (_ready(item, model, run.forgotten(), spec.grid) for item in items),
            ahead=2 * size,
            name="memdb-decode",
            stop=stop,
        )
        sink = Sink(run.commit, ahead=BATCHES_AHEAD, name="memdb-write")
        waiting = 0
        try:
            if gap is not None:
                with turn:
                    encoded = run.ending(flush=True)  # no clip spans a gap
                sink.put(encoded)
            for batch, cut in _batches(iter(ready), size):
                if cut is None and len(batch) < size and (ready.stopped or live or source.growing):
                    waiting = len(batch)  # whoever goes on cuts the same batches: a partial one is the last
                    break
                if batch:
                    with turn:
                        encoded = run.encode(batch)
                    sink.put(encoded)
                if cut is not None:
                    with turn:
                        encoded = run.at_gap(cut)
                    sink.put(encoded)
            goes_on = live or source.growing
            with turn:
                encoded = run.ending(flush=not ready.stopped and not goes_on)
            sink.put(encoded)
        finally:
            source.close()  # first: it may be waiting for a camera, and the thread of `ready` with it
            ready.close()
            sink.finish()
        warnings = list(source.warnings)
        if gap is not None:
            warnings.append(f"{spec.name} was connected again: nothing was seen from {told(gap)}")
        if live and waiting:
            warnings.append(f"the last {waiting} frames make no full batch of {size} and were not kept")
        elif source.growing:
            warnings.append(
                f"{spec.source_name} is not at its end yet: run the same command again for the rest of it"
            )
        ended_ns = None if goes_on or ready.stopped else source.media_end_ns
        report = run.report(resumed, warnings, ended_ns)
        if ready.stopped:
            raise Interrupted(
                f"stopped at {format_time(report.watermark_s)}: everything up to there is kept; run the same "
                "command again to go on"
            )
        if writer.next_unit == 0 and not goes_on:
            raise SourceError(f"{spec.source_name} gave no frame: is it a film with a picture track?")
        if ended_ns is not None:
            writer.end(ended_ns)
        return report


def _ready(
    item: Frame | Gap, model: VideoModel, tombstones: int = 0, grid: tuple[int, int] | None = None
) -> ReadyFrame | Gap:
    if isinstance(item, Gap):
        return item
    pixels, picture = model.prepare(item.image, grid), thumbnail(item)
    return ReadyFrame(item.number, item.start_ns, item.end_ns, pixels, picture, tombstones)


def _batches(items: Iterator[ReadyFrame | Gap], size: int) -> Iterator[tuple[list[ReadyFrame], Gap | None]]:
    """Full batches; one that is not full ends at a gap, which comes with it, or is the last."""
    batch: list[ReadyFrame] = []
    for item in items:
        if isinstance(item, Gap):
            yield batch, item
            batch = []
            continue
        batch.append(item)
        if len(batch) == size:
            yield batch, None
            batch = []
    if batch:
        yield batch, None
