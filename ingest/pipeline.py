"""An ingest on one screen: decode, encode and write overlap; batches are cut at fixed frame numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch

from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame, thumbnail
from memdb.ingest.queues import Sink, Stream
from memdb.ingest.resume import later, reconnected, resume, told
from memdb.ingest.run import IngestReport, Progress, Run
from memdb.ingest.sampling import sample
from memdb.ingest.sources.base import Source
from memdb.ingest.stages import IngestStages
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import Interrupted, SourceError
from memdb.schemas.frames import Frame
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
    """
    live = source.info.live
    laps = Laps(torch.cuda.synchronize if model.device.type == "cuda" else None)
    size = stages.encode.chunk_frames
    with store.writer(spec) as writer:
        with turn:
            encoder = StreamEncoder(model, stages, spec.init_ids, vectors, laps)
            resumed = resume(store, writer, encoder, new_epoch, live=live)
        gap = reconnected(writer, encoder.counters.taken_ns) if live and writer.recording.epochs else None
        run = Run(store, writer, encoder, index, progress, source.info.duration_ns, laps)
        counters = encoder.counters
        decoded = later(source.frames(), gap.end_ns) if gap is not None else source.frames()
        frames = sample(decoded, spec.sample_fps, after_ns=counters.taken_ns, number=counters.frame)
        ready = Stream(
            (_ready(frame, model) for frame in frames), ahead=2 * size, name="memdb-decode", stop=stop
        )
        sink = Sink(run.commit, ahead=BATCHES_AHEAD, name="memdb-write")
        waiting = 0
        try:
            if gap is not None:
                with turn:
                    encoded = run.ending(flush=True)  # no clip spans a gap
                sink.put(encoded)
            for batch in _batches(iter(ready), size):
                if len(batch) < size and (ready.stopped or live):
                    waiting = len(batch)  # whoever goes on cuts the same batches: a partial one is the last
                    break
                with turn:
                    encoded = run.encode(batch)
                sink.put(encoded)
            with turn:
                encoded = run.ending(flush=not ready.stopped and not live)
            sink.put(encoded)
        finally:
            ready.close()
            sink.finish()
        warnings = list(source.warnings)
        if gap is not None:
            warnings.append(f"{spec.name} was connected again: {told(gap)}")
        if live and waiting:
            warnings.append(f"the last {waiting} frames make no full batch of {size} and were not kept")
        ended_ns = None if live or ready.stopped else source.media_end_ns
        report = run.report(resumed, warnings, ended_ns)
        if ready.stopped:
            raise Interrupted(
                f"stopped at {format_time(report.watermark_s)}: everything up to there is kept; run the same "
                "command again to go on"
            )
        if writer.next_unit == 0 and not live:
            raise SourceError(f"{spec.source_name} gave no frame: is it a film with a picture track?")
        if ended_ns is not None:
            writer.end(ended_ns)
        return report


def _ready(frame: Frame, model: VideoModel) -> ReadyFrame:
    return ReadyFrame(
        frame.number, frame.start_ns, frame.end_ns, model.prepare(frame.image), thumbnail(frame)
    )


def _batches(frames: Iterator[ReadyFrame], size: int) -> Iterator[list[ReadyFrame]]:
    while batch := list(islice(frames, size)):
        yield batch
