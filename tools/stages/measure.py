"""One recipe: fed until what it holds grows no more, then timed batch after batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from memdb.ingest.encode.caption_blocks import CaptionOverBlocks
from memdb.ingest.encode.caption_clip import CaptionOverClip
from memdb.ingest.encode.chunk import Chunk, OpenMemory
from memdb.ingest.encode.groups import OpenGroups
from memdb.ingest.encode.window import OpenWindow
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.stages import IngestStages, compose
from memdb.models.caption_vectors import InputEmbeddings
from memdb.models.protocol import VideoModel
from memdb.schemas.recipe import Recipe
from tools.stages.calls import calls, idle
from tools.stages.ground import frames_of, settled
from tools.stages.meter import Meter, Metered, metered

MARK, GOAL = 5.0, 2.0  # %
BATCHES_MIN = 3
FILLING_FRAMES_MAX = 1000
ENCODING, BARE = ("vision", "encode", "caption"), ("vision", "encode")
STAGES = ("reduce", "retain", "index")


@dataclass(frozen=True)
class Row:
    """Times are medians over the frames that were timed, in ms a frame. None: the stage does nothing, see `idle`."""

    recipe: str
    filled_frames: int  # before the clock started
    frames: int
    batch_frames: int
    held_tokens: int  # a layer, of window or memory
    queued_clips: int
    vision_ms: float
    encode_ms: float
    caption_ms: float
    rest_ms: float
    reduce_ms: float | None
    retain_ms: float | None
    index_ms: float
    percent: float
    percent_low: float
    percent_high: float
    percent_without_captions: float
    is_met: bool
    idle: dict[str, str]
    settings: dict[str, object] = field(default_factory=dict)


def measure(name: str, model: VideoModel, frames_min: int, share: float) -> Row:
    chosen = settled(name, model, share)
    stages, meter = compose(chosen), Meter(model.device)
    stages.check_frames(model.shape.frame_tokens)
    vectors = InputEmbeddings(model) if stages.captioner.encoder else None
    init = model.init_ids(str(chosen.encode.params["init_prompt"]))
    made = StreamEncoder(model, stages, init, vectors, Metered(meter))
    frames, size = frames_of(model), stages.encode.chunk_frames
    with metered(meter, calls(model, stages)):
        filled = fill(made, frames, size)
        count = max(BATCHES_MIN, math.ceil(frames_min / size))
        batches = [timed(made, meter, list(islice(frames, size))) for _ in range(count)]
    part = template_share(stages, model)
    by_frame = [{label: ms / size for label, ms in moved(batch, part).items()} for batch in batches]
    held, clips = held_by(made)
    return row(name, by_frame, idle(stages), filled, size, held, clips, chosen)


def template_share(stages: IngestStages, model: VideoModel) -> float:
    """The rows of a chat template among those of a forward, whose cost is about alike."""
    if not isinstance(stages.encode, Chunk) or stages.encode.probe != "template":
        return 0.0
    rows, frames = len(model.prompt_ids("")), int(getattr(stages.unit, "frames", 1))
    return rows / (rows + frames * model.shape.frame_tokens)


def timed(made: StreamEncoder, meter: Meter, batch: Sequence[ReadyFrame]) -> dict[str, float]:
    meter.start()
    made.step(batch)
    return meter.read()


def fill(made: StreamEncoder, frames: Iterator[ReadyFrame], size: int) -> int:
    """Batches until a unit comes and goes and the encoder holds as much as before. Captions are cut short meanwhile.

    One batch more warms up what is timed.
    """
    clips, captioner = made._clips, made._clips._captioner
    if isinstance(captioner, CaptionOverBlocks | CaptionOverClip):
        clips._captioner = replace(captioner, tokens_max=1)
    fed, held = 0, held_by(made)
    while True:
        units = made.step(list(islice(frames, size)))
        fed += size
        before, held = held, held_by(made)
        if units and held == before:
            break
        assert fed < FILLING_FRAMES_MAX, f"{held} tokens and clips, and still growing"
    clips._captioner = captioner
    made.step(list(islice(frames, size)))
    return fed + size


def held_by(made: StreamEncoder) -> tuple[int, int]:
    """Tokens a layer of whatever frames are encoded in, and clips in the queue."""
    tokens, encoding = 0, made._encoding
    if isinstance(encoding, OpenWindow) and encoding.context.local:
        tokens = encoding.context.local[0].tokens
    elif isinstance(encoding, OpenGroups):
        tokens = encoding.context.held_tokens
    elif isinstance(encoding, OpenMemory):
        tokens = encoding.memory.kv[0].tokens
    return tokens, len(made._clips.queue)


def moved(batch: Mapping[str, float], part: float) -> dict[str, float]:
    """The rows of a probe that rode along, from the encoding to the retainer."""
    rows = part * batch.get("encode", 0.0)
    return {
        **batch,
        "encode": batch.get("encode", 0.0) - rows,
        "retain": batch.get("retain", 0.0) + rows,
    }


def row(
    name: str,
    batches: Sequence[Mapping[str, float]],
    nothing: dict[str, str],
    filled: int,
    size: int,
    held: int,
    clips: int,
    chosen: Recipe,
) -> Row:
    """Of the times of equally long batches, ms a frame by label: the median over frames is that over batches."""

    def total(batch: Mapping[str, float], labels: Sequence[str]) -> float:
        return sum(batch.get(label, 0.0) for label in labels if label not in nothing)

    def median(label: str) -> float:
        return statistics.median(batch.get(label, 0.0) for batch in batches)

    def percents(labels: Sequence[str]) -> list[float]:
        return [100 * total(batch, STAGES) / total(batch, labels) for batch in batches]

    own = percents(ENCODING)
    return Row(
        recipe=name,
        filled_frames=filled,
        frames=len(batches) * size,
        batch_frames=size,
        held_tokens=held,
        queued_clips=clips,
        vision_ms=median("vision"),
        encode_ms=median("encode"),
        caption_ms=median("caption"),
        rest_ms=median("rest"),
        reduce_ms=None if "reduce" in nothing else median("reduce"),
        retain_ms=None if "retain" in nothing else median("retain"),
        index_ms=median("index"),
        percent=statistics.median(own),
        percent_low=min(own),
        percent_high=max(own),
        percent_without_captions=statistics.median(percents(BARE)),
        is_met=statistics.median(own) <= MARK,
        idle=nothing,
        settings=settings_of(chosen),
    )


def settings_of(chosen: Recipe) -> dict[str, object]:
    """What was timed, by stage: its method and parameters."""
    names = ("unit", "reduce", "encode", "caption", "write", "retain", "index")
    return {
        name: {"method": stage.method, **stage.params}
        for name in names
        if (stage := getattr(chosen, name)).method != "none"
    }
