"""What stages 2 (reduce), 5 (retain) and 6 (index) cost beside the encoding of the same frames.

    python -m tools.bench_stages [--size 7b] [--recipe NAME ...] [--frames 50] [--device D] [--out FILE.json]

A random LLaVA-OneVision, by default of the 7B shape (16 GB in bf16), made once on the device; random frames; the
encoder that an ingest runs, batch after batch. Each recipe is fed until what it holds (window, memory, queue of
clips) grows no more, and then timed over at least `--frames` frames and three batches. CUDA events stand around the
calls below; on a CPU it is the clock. Every moment is counted once, to the innermost of the calls that are running:

vision   the tower and the projector
encode   stage 3: the language model over visual tokens, without what follows
caption  stage 3 as well, where a recipe has captions: what is left of them, mostly decoding
reduce   stage 2: merging; CTR and the saliency of the vision tower; recurrent tokens with their attention probe
retain   stage 5: rows of a probe and their attention, the guidance prompt's forward, scores, choice, gathering,
         prototypes, keep sets
index    stage 6: mean keys, vectors of captions

A figure is the median over the timed frames of a batch's time by its frames, in ms. `%` is reduce + retain + index by
vision + encode + caption of a batch (median, lowest and highest batch); `no captions %` leaves captions out of what it
is divided by. The mark is 5 %, the goal 2. Rows of the chat template ride in the forward that encodes: their share of
its rows is taken out of `encode` and counted as `retain`.

Not in it: packing (`rest`), and what the writer's thread does with keys later, without a GPU; so nothing is compressed,
and no zstandard needed. No frame merges, and a segment of `streamkv` is 16 frames, so that random weights decide
nothing. Its guidance prompt costs about as much for a segment of any length: the worst case, a film that cuts every
four frames (`unit.frames_min`), costs nearly four times the share. KV is packed as int4 where a recipe may be, captions
have at most 64 tokens, their vectors are of input embeddings.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from memdb.codecs import planes
from memdb.index.mean_key import MeanKey
from memdb.ingest import encoder as encoder_module
from memdb.ingest.encode import caption_clip
from memdb.ingest.encode.caption_blocks import CaptionOverBlocks
from memdb.ingest.encode.caption_clip import CaptionOverClip
from memdb.ingest.encode.chunk import Chunk, OpenMemory
from memdb.ingest.encode.groups import OpenGroups
from memdb.ingest.encode.window import OpenWindow
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.memory import EncoderMemory
from memdb.ingest.reduce.ctr import BesideTheLast, CausalTemporal
from memdb.ingest.reduce.identity import Identity
from memdb.ingest.reduce.merge_frames import MergeFrames, Merging
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.ingest.stages import IngestStages, compose, written_out
from memdb.models import chunk as chunk_module
from memdb.models import random_checkpoint, random_weights
from memdb.models.cache import AttentionProbe
from memdb.models.caption_vectors import InputEmbeddings
from memdb.models.load import load_model
from memdb.models.protocol import VideoModel
from memdb.recipes import RECIPES, recipe
from memdb.retain.keep_all import KeepAll
from memdb.retain.select_kv import SelectKV
from memdb.schemas.recipe import Recipe
from memdb.timing import Laps

MARK, GOAL = 5.0, 2.0  # %
SECOND_NS = 1_000_000_000
PICTURES = 64  # that differ; they come again and again
BATCHES_MIN = 3
FILLING_FRAMES_MAX = 1000
CAPTION_TOKENS = 64
SEGMENT_FRAMES = 16
# Budgets of the recipes are for frames of 196 tokens; tiny ones have 16, and a test has little time.
SHARES = {"7b": 1.0, "tiny": 1 / 49}
BUDGETS = {"encode": ("window_tokens", "probe_tokens"), "retain": ("budget_tokens",)}
CODEC = "int4"  # packing is not timed, but somebody waits for it
OWN_CODEC = ("streamingtom", "livevlm")  # rules R10 and R12
# Batches as ingests on a GPU have them where the recipe's are larger than what is timed.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "rekv": ("encode.chunk_frames=16",),
    "streamkv": ("encode.chunk_frames=16", "unit.theta=1", f"unit.frames_min={SEGMENT_FRAMES}"),
    "streammem": ("reduce.delta=2",),
    "rlivs": (f"caption.tokens_max={CAPTION_TOKENS}",),
    "hybrid": ("caption.encoder=input-embeddings",),
}
ENCODING, BARE = ("vision", "encode", "caption"), ("vision", "encode")
STAGES = ("reduce", "retain", "index")
Moment = torch.cuda.Event | float


# Time, by the innermost call


class Meter:
    """Milliseconds by label, each moment counted to the span that was entered last and is still open."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: list[str] = ["rest"]
        self._marks: list[tuple[Moment, str]] = []  # a moment, and what runs from then on

    @contextmanager
    def span(self, label: str) -> Iterator[None]:
        self._open.append(label)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def start(self) -> None:
        """Forget what was counted so far; nothing is in flight."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks = []
        self._mark()

    def read(self) -> dict[str, float]:
        """Since `start`, by label; `rest` is what no span took."""
        self._mark()
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (begin, label), (end, _) in pairwise(self._marks):
            found[label] = found.get(label, 0.0) + _between(begin, end)
        return found

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append((time.perf_counter(), self._open[-1]))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((event, self._open[-1]))


def _between(begin: Moment, end: Moment) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(begin.elapsed_time(end))
    assert isinstance(begin, float), "one clock"
    assert isinstance(end, float), "one clock"
    return (end - begin) * 1e3


class Metered(Laps):
    """The encoder's own laps, told to the meter: vision, reduce, encode, retain, caption, index."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        with self._meter.span("rest" if stage == "pack" else stage):
            yield


@dataclass(frozen=True)
class Call:
    """A function or method and the label of its time. `when`: of its arguments, whether a call counts at all."""

    owner: Any
    name: str
    label: str
    when: Callable[..., bool] | None = None


# Those that the encoder's laps do not tell apart.
CALLS = (
    Call(BesideTheLast, "reduce", "reduce"),
    Call(Merging, "reduce", "reduce"),
    Call(MergeFrames, "merge", "reduce"),
    Call(AttentionProbe, "observe", "reduce", lambda probe, layer, *_: layer in probe.layers),
    Call(AttentionProbe, "mean", "reduce"),
    Call(Recurrent, "select", "reduce"),
    Call(Recurrent, "remember", "reduce"),
    Call(chunk_module, "importance", "retain"),
    Call(SelectKV, "select", "retain"),
    Call(EncoderMemory, "keep_set", "retain"),
    Call(encoder_module, "add_prototypes", "retain"),
    Call(MeanKey, "keys", "index"),
    Call(InputEmbeddings, "of_caption", "index"),
    Call(caption_clip, "prefill", "encode"),  # of a recipe without KV it is what sees the frames
)


def calls(model: VideoModel, stages: IngestStages) -> list[Call]:
    """What counts for these stages. Saliency is all of `salient_tokens` but the look itself."""
    found = [call for call in CALLS if call.label not in idle(stages)]
    if isinstance(stages.reduce, CausalTemporal):
        found += [Call(type(model), "salient_tokens", "reduce"), Call(type(model), "_see", "vision")]
    return found


@contextmanager
def metered(meter: Meter, found: Sequence[Call]) -> Iterator[None]:
    """The meter around every one of these calls; afterwards they are as they were."""
    with ExitStack() as stack:
        for call in found:
            wrapped = _wrapped(getattr(call.owner, call.name), call, meter)
            stack.enter_context(mock.patch.object(call.owner, call.name, wrapped))
        yield


def _wrapped(inner: Callable[..., Any], call: Call, meter: Meter) -> Callable[..., Any]:
    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if call.when is not None and not call.when(*args, **kwargs):
            return inner(*args, **kwargs)
        with meter.span(call.label):
            return inner(*args, **kwargs)

    return outer


# Models, recipes, frames


def build(size: str, device: str | None) -> VideoModel:
    """A model of random weights, drawn where they stand: a GPU takes a second for what a CPU draws in a minute."""
    with tempfile.TemporaryDirectory(prefix="memdb-bench-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"size": size}))
        with mock.patch.object(random_checkpoint, "draw_weights", draw):
            return load_model(f"random:0:{config}", device=device)


def draw(network: Any, seed: int) -> None:
    """The same law as `random_weights.draw_weights`, of other numbers."""
    scale = float(network.config.text_config.initializer_range)
    generator = torch.Generator(network.device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        centre, std = random_weights._law(name, parameter, scale)
        reach = std * math.sqrt(3)
        parameter.uniform_(centre - reach, centre + reach, generator=generator)


def settled(name: str, model: VideoModel, share: float) -> Recipe:
    """The recipe as it is timed, with a share of its budgets."""
    settings = list(SETTINGS.get(name, ()))
    plain = RECIPES[name]
    for stage, params in BUDGETS.items():
        given = getattr(plain, stage).params
        settings += [
            f"{stage}.{param}={max(1, round(given[param] * share))}" for param in params if given.get(param)
        ]
    codec = CODEC if plain.keeps_kv and name not in OWN_CODEC else None
    return written_out(recipe(name, codec=codec, settings=tuple(settings)), model, model.shape.frame_tokens)


def idle(stages: IngestStages) -> dict[str, str]:
    """The stages of which there is nothing to time, each with its reason."""
    found = {}
    if isinstance(stages.reduce, Identity) and stages.recurrent is None:
        found["reduce"] = "identity: every visual token goes to the language model"
    if isinstance(stages.retain, KeepAll):
        found["retain"] = "all: nothing is dropped"
    return found


def template_share(stages: IngestStages, model: VideoModel) -> float:
    """The rows of a chat template among those of a forward, whose cost is about alike."""
    if not isinstance(stages.encode, Chunk) or stages.encode.probe != "template":
        return 0.0
    rows, frames = len(model.prompt_ids("")), int(getattr(stages.unit, "frames", 1))
    return rows / (rows + frames * model.shape.frame_tokens)


def frames_of(model: VideoModel) -> Iterator[ReadyFrame]:
    """Noise, one frame a second, without end."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (384, 384, 3), np.uint8) for _ in range(PICTURES)]
    pixels = [model.prepare(picture) for picture in pictures]
    number = 0
    while True:
        at, start_ns = number % PICTURES, number * SECOND_NS
        yield ReadyFrame(number, start_ns, start_ns + SECOND_NS, pixels[at], pictures[at])
        number += 1


@contextmanager
def uncompressed() -> Iterator[None]:
    """Whatever is packed stays as it is; what is no smaller is stored so anyway."""
    with mock.patch.object(planes, "pack", lambda raw, element_bytes, **_: raw):
        yield


# One recipe


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


# What it says


HEAD = (
    f"{'recipe':<13} {'frames':>6} {'held':>6}  {'vision':>7} {'encode':>7} {'caption':>7}  "
    f"{'reduce':>7} {'retain':>7} {'index':>7} {'rest':>7}  {'% (low-high)':>20} {'no captions %':>13}  mark"
)


def line(found: Row) -> str:
    def cell(ms: float | None) -> str:
        return f"{'-':>7}" if ms is None else f"{ms:>7.2f}"

    reached = "goal met" if found.percent <= GOAL else "met" if found.is_met else "MISSED"
    spread = f"{found.percent:.2f} ({found.percent_low:.2f}-{found.percent_high:.2f})"
    encoding = " ".join(map(cell, (found.vision_ms, found.encode_ms, found.caption_ms)))
    own = " ".join(map(cell, (found.reduce_ms, found.retain_ms, found.index_ms, found.rest_ms)))
    return (
        f"{found.recipe:<13} {found.frames:>6} {found.held_tokens:>6}  {encoding}  {own}  {spread:>20} "
        f"{found.percent_without_captions:>13.2f}  <= {MARK:g}: {reached}"
    )


def machine(model: VideoModel, size: str, build_s: float) -> dict[str, object]:
    on_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "shape": asdict(model.shape),
        "build_s": build_s,
    }


def bench(
    names: Sequence[str], frames: int, size: str, device: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every recipe on one model. One that fails is told of and stops none that follows."""
    started = time.perf_counter()
    model = build(size, device)
    notes = machine(model, size, time.perf_counter() - started)
    say(f"{notes}\nms a frame, medians\n{HEAD}")
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            with uncompressed():
                found = measure(name, model, frames, SHARES[size])
        except Exception as error:  # of any kind: the machine is lent for minutes
            failed[name] = f"{type(error).__name__}: {error}"
            say(f"{name:<13} failed: {failed[name]}")
            continue
        say(line(found))
        rows.append(asdict(found))
    for found_row in rows:
        for stage, reason in found_row["idle"].items():
            say(f"{found_row['recipe']}: no {stage}: {reason}")
    say(f"{time.perf_counter() - started:.0f} s in all")
    return {"machine": notes, "rows": rows, "failed": failed, "mark": MARK, "goal": GOAL}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--frames", type=int, default=50, help="at least so many are timed")
    parser.add_argument("--size", default="7b", choices=list(SHARES))
    parser.add_argument("--device", help="cpu, cuda or cuda:0; by default a GPU where there is one")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    args = parser.parse_args()
    found = bench(args.recipe, args.frames, args.size, args.device, functools.partial(print, flush=True))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
