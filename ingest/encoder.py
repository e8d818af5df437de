"""Stages 1 to 6 over one batch of frames, and everything that is carried from one batch to the next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from memdb.codecs.pack import pack_unit
from memdb.index.frame_embedding import unit_vectors
from memdb.ingest.encode.base import ClipSeen, no_kv
from memdb.ingest.encode.chunk import Chunk
from memdb.ingest.encode.groups import Groups
from memdb.ingest.encode.segment import SegmentWithSummary
from memdb.ingest.encode.window import SlidingWindow
from memdb.ingest.frames import ReadyFrame, SeenFrame
from memdb.ingest.held import Held, Timed, is_meant, newest
from memdb.ingest.memory import EncoderMemory, chunk_words, grid_of
from memdb.ingest.open_frames import frame_from, frame_row, frame_tensors
from memdb.ingest.read_back import StoredGroups
from memdb.ingest.reduce.ctr import CausalTemporal
from memdb.ingest.reduce.merge_frames import MergeFrames
from memdb.ingest.stages import IngestStages
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.groups import GroupContext
from memdb.models.image_text import ImageText
from memdb.models.joint import JointHead
from memdb.models.places import LINE
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.models.yarn import stretched
from memdb.retain.base import Bounded
from memdb.retain.keep_all import KeepAll
from memdb.retain.select_kv import SelectKV
from memdb.retain.template import Prototypes, Template, prototypes
from memdb.schemas.errors import CorruptionError
from memdb.schemas.keep import KeepSet, token_ids
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import BLOCK_DTYPE, BlockKind, Caption, Table, Unit, no_blocks
from memdb.timing import Laps


@dataclass
class Counters:
    """Where the encoder stands. `taken_ns` is the start of the last frame taken; -1 before the first.

    `tombstones`: how many spans of the recording had been forgotten when it last took note. It holds nothing of
    what they forgot.
    """

    unit: int = 0  # number of the next unit
    frame: int = 0  # number of the next frame
    taken_ns: int = -1
    until_ns: int = 0  # end of that frame
    position: int = 0  # stream position of the next token
    epoch: int = 0
    tombstones: int = 0
    widths: dict[int, int] = field(default_factory=dict)  # scale width by layer


# What reading a state raises where it is none, its tensors or its numbers.
_NO_STATE = (
    *(SafetensorError, KeyError, ValueError, TypeError, IndexError),
    *(AttributeError, OverflowError, RecursionError),
)


class StreamEncoder:
    """The encoder state of one recording: window or memory, recurrent tokens, open unit, last raw frame, counters.

    `step` takes a batch of frames and gives the units that closed. The same batches give the same bits; where
    batches are cut is the caller's, at fixed frame numbers. `state` and `restore` are exact.
    """

    def __init__(
        self,
        model: VideoModel,
        stages: IngestStages,
        init_ids: Sequence[int],
        vectors: CaptionVectors | None,
        laps: Laps | None = None,
        *,
        sample_fps: float = 1.0,
        grid: tuple[int, int] | None = None,
        seed: int = 0,
        stored: StoredGroups | None = None,
    ) -> None:
        """`sample_fps`, raw frames a second, and `grid`: the recording's, for models whose ids count them. `seed`:
        the recording's, for reducers that draw. `stored`: the recording, for encoders whose window is what it holds.
        """
        model = stretched(model, stages.scaling)
        self._placing = model.placing(sample_fps, grid)
        self._model, self._stages, self._vectors = model, stages, vectors
        self._frames = stages.index.open(model)
        self._init_ids, self._seed, self._stored = tuple(init_ids), seed, stored
        self.laps = laps or Laps()
        self.start_fresh(Counters())

    def start_fresh(self, counters: Counters) -> None:
        """A fresh window that begins with the init tokens, at the beginning or as a new epoch."""
        self.counters = counters
        self._window: WindowContext | None = None
        if isinstance(self._stages.encode, SlidingWindow):
            self._window = self._stages.encode.open(
                self._model, self._init_ids, profile=self._stages.profile, placing=self._placing
            )
        self._groups: GroupContext | None = None
        if isinstance(self._stages.encode, Groups):
            assert self._stages.codec is not None, "rule R10 sees to it"
            self._groups = self._stages.encode.open(
                self._model,
                self._init_ids,
                self._stages.codec,
                profile=self._stages.profile,
                placing=self._placing,
                widths=counters.widths,
            )
        self._memory: EncoderMemory | None = None
        if isinstance(self._stages.encode, Chunk):
            assert isinstance(self._stages.retain, Bounded), "rule R8b sees to it"
            init = self._stages.encode.open(self._model, self._init_ids)
            self._memory = EncoderMemory(init, self._stages.retain)
        if self._context is not None:
            counters.position = max(counters.position, len(self._init_ids))
        self._in_window: list[Held] = []  # frames, oldest first
        self._opened: list[SeenFrame] = []  # where frames merge, the last is not yet the unit's own
        self._before: SeenFrame | None = None  # the last frame that was reduced, as it was before
        self._queue: list[Tensor] = []
        self._queued: list[Held] = []  # the clip of each entry of the queue

    @property
    def _context(self) -> WindowContext | GroupContext | EncoderMemory | None:
        """What frames are encoded in, whichever it is."""
        return self._window or self._groups or self._memory

    @property
    def reach_ns(self) -> int:
        """It holds nothing of the stream from before this media time."""
        starts = [held[0].start_ns for held in self._holders if held]
        return min(starts, default=self.counters.until_ns)

    def holds(self, tombstones: Sequence[Tombstone]) -> bool:
        """Whether a span overlaps something that it holds: a frame in window or memory, a queued clip, an open frame,
        the frame beside which the next one is reduced.
        """
        return any(is_meant(item, tombstones) for held in self._holders for item in held)

    def forget(self, tombstones: Sequence[Tombstone]) -> list[Unit]:
        """Let go of what overlaps these spans, and of all that was computed beside it: a new epoch begins.

        Open frames that do not overlap stay. No unit spans what was between them: returns the units that close.
        Of a bounded memory the rest stays: it is all that there is of the past, and the store keeps those tokens too.
        """
        opened, memory = self._opened, self._memory
        self.counters.epoch += 1
        self.start_fresh(self.counters)
        if memory is not None:
            memory.forget(tombstones)
            self._memory = memory
        runs = [
            list(frames) for gone, frames in groupby(opened, lambda x: is_meant(x, tombstones)) if not gone
        ]
        if runs and runs[-1][-1] is opened[-1]:
            self._opened = runs.pop()
        return self._close(runs)

    def pass_over(self, frames: Sequence[ReadyFrame]) -> list[Unit]:
        """Frames that were forgotten before they came here: no unit spans them."""
        units = self.finish()
        self._took(frames[-1])
        return units

    @property
    def _reduced_beside(self) -> list[SeenFrame]:
        return [self._before] if self._before is not None else []

    @property
    def _holders(self) -> list[Sequence[Timed]]:
        """Everything of the stream that it holds, each oldest first."""
        remembered = self._memory.frames if self._memory is not None else []
        return [self._in_window, remembered, self._queued, self._opened, self._reduced_beside]

    def step(self, frames: Sequence[ReadyFrame]) -> list[Unit]:
        """One batch: see, cut units, reduce, encode, caption, pack."""
        closed: list[list[SeenFrame]] = []
        for seen in self._see(frames):
            closed += self._extend(seen)
        self._took(frames[-1])
        return self._close(closed)

    def finish(self) -> list[Unit]:
        """The unit that is still open when the stream ends."""
        closed: list[list[SeenFrame]] = []
        if self._opened and isinstance(self._stages.reduce, MergeFrames):
            closed, self._opened = self._stages.unit.extend(self._opened[:-1], self._opened[-1])
        if self._opened:
            closed.append(self._opened)
        self._opened = []
        return self._close(closed)

    def _see(self, frames: Sequence[ReadyFrame]) -> list[SeenFrame]:
        """What the model sees as one frame is `frames_together` raw ones; batches are cut at multiples of that, so
        that only a stream's end, a gap and what is forgotten leave a frame without its partner.
        """
        together, pixels = self._model.frames_together, [frame.pixels for frame in frames]
        seen_as_one = [frames[first : first + together] for first in range(0, len(frames), together)]
        saliency: list[Tensor | None] = [None] * len(seen_as_one)
        vectors: list[Tensor | None] = [None] * len(seen_as_one)
        with self.laps("vision"):
            if isinstance(self._stages.reduce, CausalTemporal):
                tokens, looked = self._model.salient_tokens(pixels)  # (F, N, E), (F, N)
                saliency = list(looked)
            else:
                tokens = self._model.visual_tokens(pixels)
        if isinstance(self._frames, ImageText):
            with self.laps("index"):
                vectors = list(self._frames.of_pictures([raw[0].picture for raw in seen_as_one]))
        return [
            SeenFrame(
                raw[0].number,
                raw[0].start_ns,
                raw[-1].end_ns,
                seen,
                raw[0].picture,
                saliency=looked_at,
                vector=vector,
            )
            for raw, seen, looked_at, vector in zip(seen_as_one, tokens, saliency, vectors, strict=True)
        ]

    def _extend(self, frame: SeenFrame) -> list[list[SeenFrame]]:
        """The units that close with this frame. Where frames merge, one goes to its unit when the next is another."""
        unit, reduce = self._stages.unit, self._stages.reduce
        if not isinstance(reduce, MergeFrames):
            closed, self._opened = unit.extend(self._opened, frame)
            return closed
        closed = []
        if self._opened:
            *before, last = self._opened
            merged = reduce.merge(self._opened[0].start_ns, last, frame)
            if merged is not None:
                self._opened = [*before, merged]
                return []
            closed, self._opened = unit.extend(before, last)
        self._opened = [*self._opened, frame]
        return closed

    def _reduce(self, groups: Sequence[Sequence[SeenFrame]]) -> Sequence[Sequence[SeenFrame]]:
        """Stage 2 over the units that close: frames as the language model will take them."""
        reduce = self._stages.reduce
        if isinstance(reduce, MergeFrames):  # a mean is kept in fp32 while it grows
            dtype = self._model.dtype
            return [[replace(frame, tokens=frame.tokens.to(dtype)) for frame in group] for group in groups]
        if not isinstance(reduce, CausalTemporal):
            return groups
        with self.laps("reduce"):
            frames = [frame for group in groups for frame in group]
            tokens, raster = reduce.reduce(
                torch.stack([frame.tokens for frame in frames]),
                torch.stack([frame.saliency for frame in frames if frame.saliency is not None]),
                self._before.tokens if self._before is not None else None,
                seed=self._seed,
                numbers=[frame.number for frame in frames],
            )
            self._before = replace(frames[-1], picture=b"", saliency=None)
            reduced = iter(
                replace(frame, tokens=kept, raster=places)
                for frame, kept, places in zip(frames, tokens, raster, strict=True)
            )
            return [[next(reduced) for _ in group] for group in groups]

    def _took(self, last: ReadyFrame) -> None:
        self.counters.frame = last.number + 1
        self.counters.taken_ns, self.counters.until_ns = last.start_ns, last.end_ns

    def _close(self, groups: Sequence[Sequence[SeenFrame]]) -> list[Unit]:
        if not groups:
            return []
        groups = self._reduce(groups)
        if self._memory is not None:  # each unit is encoded against what the one before it left in memory
            return [self._remember(group) for group in groups]
        if isinstance(self._stages.encode, SegmentWithSummary):
            return [self._segment(group, self._stages.encode) for group in groups]
        frames, states = [frame for group in groups for frame in group], list[Tensor]()
        kv, places = self._encode(frames, states)
        embeddings = self._embeddings(frames, states)
        units: list[Unit] = []
        at, first = 0, 0
        for group in groups:
            if places:
                self.counters.position = places[len(units)]  # of its one frame
            T = sum(len(frame.tokens) for frame in group)
            own = None if kv is None else [layer.part(at, at + T) for layer in kv]
            found = None if embeddings is None else embeddings[first : first + len(group)]
            units.append(self._unit(group, own, keep=self._stood(group), embeddings=found))
            at, first = at + T, first + len(group)
        return units

    def _encode(
        self, frames: Sequence[SeenFrame], states: list[Tensor]
    ) -> tuple[list[LayerKV] | None, list[int]]:
        """Keys and values, a layer each, and the positions of the frames where these do not just follow on."""
        encode, window, groups = self._stages.encode, self._window, self._groups
        tokens, places = [frame.tokens for frame in frames], list[int]()
        if window is not None and isinstance(encode, SlidingWindow):
            with self.laps("encode"):
                asked = states if isinstance(self._frames, JointHead) else None
                kv = encode.encode(self._model, window, tokens, asked)
            held_tokens = window.local[0].tokens
        elif groups is not None and isinstance(encode, Groups):
            with self.laps("encode"):
                known = [frame.raster for frame in frames if frame.raster is not None]
                rasters = torch.stack(known) if known else None
                kv, places = encode.encode(self._model, groups, tokens, rasters)
            held_tokens = groups.held_tokens
        else:
            return None, places
        came = [Held(frame.start_ns, frame.end_ns, len(frame.tokens)) for frame in frames]
        self._in_window = newest([*self._in_window, *came], held_tokens)
        return kv, places

    def _stood(self, group: Sequence[SeenFrame]) -> KeepSet | None:
        """Where in their frame the tokens of a unit stood, if ids depend on it and some were left out."""
        raster, number = group[0].raster, self.counters.unit
        if self._groups is None or self._placing == LINE or raster is None:
            return None
        ids, places = token_ids(number, 0, np.arange(len(raster))), raster.cpu().numpy().astype(np.int64)
        L = self._model.shape.layers
        return KeepSet((ids,) * L, (places,) * L)

    def _embeddings(
        self, frames: Sequence[SeenFrame], states: Sequence[Tensor]
    ) -> npt.NDArray[np.float16] | None:
        """(F, E) of frames, where the index keeps them: of their pictures, or of their final states."""
        if self._frames is None:
            return None
        with self.laps("index"):
            if isinstance(self._frames, JointHead):
                return unit_vectors([self._frames.of_frame(own) for own in states])
            return unit_vectors([frame.vector for frame in frames if frame.vector is not None])

    def _segment(self, group: Sequence[SeenFrame], encode: SegmentWithSummary) -> Unit:
        """Encode a segment and its summary, and let a guidance prompt say what each layer keeps of its frames."""
        summary, retain = encode.summary_of(group), self._stages.retain
        frames = [*group, *([summary] if summary is not None else ())]
        kv, _ = self._encode(frames, [])
        guided: list[Tensor] = []
        if isinstance(retain, SelectKV):
            with self.laps("retain"):
                assert kv is not None, "a window gives keys and values"
                sizes = [len(frame.tokens) for frame in frames]
                guided = encode.guided(self._model, kv, sizes, retain.prompt, self._placing)
        return self._unit(group, kv, summary=summary, guided=guided)

    def _remember(self, group: Sequence[SeenFrame]) -> Unit:
        """Encode a unit against the memory, and let the retainer decide what of both stays."""
        encode, memory, retain = self._stages.encode, self._memory, self._stages.retain
        assert memory is not None
        assert isinstance(encode, Chunk)
        start, number = self.counters.position, self.counters.unit
        with self.laps("encode"):
            chunk = torch.cat([frame.tokens for frame in group])
            context = encode.encode(
                self._model,
                memory.init,
                memory.kv,
                memory.positions,
                chunk,
                start,
                frame_tokens=len(group[0].tokens),
                placing=self._placing,
            )
        with self.laps("retain"):
            made: Prototypes | None = None
            if isinstance(retain, Template):
                words = chunk_words(number, group, start, chunk.device)
                keys, values = (
                    torch.stack([getattr(kv, name) for kv in context.fresh]) for name in ("k", "v")
                )
                paid = torch.stack([heard[-len(chunk) :] for heard in context.heard])  # (L, C)
                numbers = [frame.number for frame in group]
                made = prototypes(keys, values, paid, words[2], words[1], numbers)
            grid = grid_of(self._placing, self._model.shape.frame_tokens)
            memory.take(number, group, context.fresh, made, context.heard, start, grid)
        return self._unit(group, context.fresh, made, memory.keep_set())

    def _unit(
        self,
        group: Sequence[SeenFrame],
        kv: Sequence[LayerKV] | None,
        made: Prototypes | None = None,
        keep: KeepSet | None = None,
        embeddings: npt.NDArray[np.float16] | None = None,
        *,
        summary: SeenFrame | None = None,
        guided: Sequence[Tensor] = (),
    ) -> Unit:
        """The commit of a group. kv: of its tokens, and of the summary behind them. guided: queries of the prompt by
        which SelectKV scores its frames, a layer each.
        """
        T = sum(len(frame.tokens) for frame in group)
        caption = self._caption(group, None if kv is None else [layer.part(0, T) for layer in kv])
        stored = [*group, *([summary] if summary is not None else ())]
        blocks, packed, keys = no_blocks(), None, None
        if kv is not None and self._stages.codec is not None:
            with self.laps("pack"):
                sizes = [len(frame.tokens) for frame in stored]
                whole, retain = [_split(layer, sizes) for layer in kv], self._stages.retain
                # A bounded memory's blocks are stored as they came: what of them stays, keep sets say.
                layers: list[list[LayerKV | None]] = [list(row) for row in whole]
                if isinstance(retain, KeepAll):
                    layers = retain.keep(whole)
                if isinstance(retain, SelectKV):
                    layers = retain.select(whole, guided, len(group))
                blocks = self._blocks(stored)
                if made is not None:
                    blocks = _add_prototypes(group, blocks, layers, made)
                packed = pack_unit(self._stages.codec, layers, self.counters.widths, self._model.dtype)
                keys = self._stages.index.keys(layers)
                self.counters.widths = {
                    int(row["layer"]): int(row["scale_bytes"]) for row in packed.slices if row["scale_bytes"]
                }
        unit = Unit(
            number=self.counters.unit,
            start_ns=group[0].start_ns,
            end_ns=group[-1].end_ns,
            epoch=self.counters.epoch,
            blocks=blocks,
            kv=packed,
            keys=keys,
            caption=caption,
            keyframe=group[0].jpeg(),
            keep=keep,
            embeddings=embeddings,
        )
        self.counters.unit += 1
        return unit

    def _blocks(self, group: Sequence[SeenFrame]) -> Table:
        blocks = np.zeros(len(group), BLOCK_DTYPE)
        for row, frame in zip(blocks, group, strict=True):
            row["kind"], row["tokens"] = frame.kind, len(frame.tokens)
            row["start_ns"], row["end_ns"] = frame.start_ns, frame.end_ns
            row["position"] = self.counters.position
            self.counters.position += len(frame.tokens)
        return blocks

    def _caption(self, group: Sequence[SeenFrame], kv: Sequence[LayerKV] | None) -> Caption | None:
        stages, model = self._stages, self._model
        if self._vectors is None:
            return None
        with self.laps("caption"):
            tokens = torch.cat([frame.tokens for frame in group])
            held = self._context
            init = held.init if held is not None and held.init else no_kv(model)
            sizes = [len(frame.tokens) for frame in group]
            clip = ClipSeen(tokens, kv, init, self._init_ids, self._queue, sizes, self._placing)
            said = stages.captioner.say(model, clip, stages.recurrent, profile=stages.profile)
            if said is None:
                return None
            if stages.recurrent is not None and said.attention is not None:
                chosen = stages.recurrent.select(tokens, said.attention)
                self._queue = stages.recurrent.remember(self._queue, chosen)
                came = Held(group[0].start_ns, group[-1].end_ns, len(chosen))
                self._queued = [*self._queued, came][len(self._queued) + 1 - len(self._queue) :]
            return Caption(said.text, said.ids, self._vectors.of_caption(said.text, said.ids))

    # The exact byte form of everything above that outlives a batch.

    def state(self) -> bytes:
        tensors: dict[str, Tensor] = {}
        window = self._window
        if window is not None and window.local:
            tensors["window.k"] = torch.stack([kv.k for kv in window.local])  # (L, H, w, D)
            tensors["window.v"] = torch.stack([kv.v for kv in window.local])
            if window.ids is not None:
                tensors["window.ids"] = window.ids  # (3, w), as they were given
                tensors["window.frames"] = torch.tensor(window.frames)
        if self._memory is not None:
            tensors |= dict(self._memory.tensors())
        for index, kept in enumerate(self._queue):
            tensors[f"queue.{index}"] = kept
        for index, frame in enumerate(self._opened):
            tensors |= frame_tensors(f"open.{index}", frame)
        if self._before is not None:
            tensors |= frame_tensors("before", self._before)
        meta = {
            "counters": asdict(self.counters),
            "seen": window.seen if window is not None else 0,
            **({"frames": self._groups.frames} if self._groups is not None else {}),
            "window": [astuple(held) for held in self._in_window],
            "memory": self._memory.frame_rows() if self._memory is not None else [],
            "queue": [astuple(held) for held in self._queued],
            "open": [frame_row(frame) for frame in self._opened],
            "before": [frame_row(frame) for frame in self._reduced_beside],
        }
        tensors["meta"] = _bytes_tensor(json.dumps(meta).encode())
        if self._opened:  # of what may open a unit
            tensors["jpeg"] = _bytes_tensor(self._opened[0].jpeg())
        if len(self._opened) > 1 and isinstance(self._stages.reduce, MergeFrames):
            tensors["jpeg.last"] = _bytes_tensor(self._opened[-1].jpeg())
        saved: bytes = save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        return saved

    def restore(self, payload: bytes) -> None:
        """Inverse of `state`. Raises CorruptionError for bytes that are no state of this encoder."""
        try:
            tensors = load_tensors(payload)
            meta = json.loads(bytes(tensors["meta"].numpy()))
            counters = Counters(**meta["counters"])
            counters.widths = {int(layer): int(width) for layer, width in counters.widths.items()}
            self.start_fresh(counters)
            device = self._model.device
            if self._window is not None and "window.k" in tensors:
                pairs = zip(tensors["window.k"].to(device), tensors["window.v"].to(device), strict=True)
                self._window.local = [LayerKV(k, v) for k, v in pairs]
                self._window.seen = int(meta["seen"])
                if self._placing != LINE:
                    self._window.ids = tensors["window.ids"]
                    self._window.frames = int(tensors["window.frames"])
            if self._memory is not None:
                self._memory.restore(tensors, meta["memory"], device)
            self._in_window = _held(meta["window"])
            if self._groups is not None and self._in_window:
                assert self._stored is not None, "whoever goes on says where from"
                # Each of its groups is a unit; the newest is the one before the next.
                units = range(counters.unit - len(self._in_window), counters.unit)
                self._groups.take_back(*self._stored.read(units), frames=int(meta["frames"]))
            self._queued = _held(meta["queue"])
            self._queue = [tensors[f"queue.{index}"].to(device) for index in range(len(self._queued))]
            jpeg = bytes(tensors["jpeg"].numpy()) if "jpeg" in tensors else b""
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            self._opened = [
                frame_from(f"open.{index}", row, tensors, jpeg) for index, row in enumerate(meta["open"])
            ]
            if "jpeg.last" in tensors:
                last = bytes(tensors["jpeg.last"].cpu().numpy())
                self._opened[-1] = replace(self._opened[-1], picture=last)
            for row in meta.get("before", ()):  # none in states of older versions
                self._before = frame_from("before", row, tensors, b"")
        except _NO_STATE as error:
            raise CorruptionError(f"the saved encoder state cannot be read: {error}", file="state") from error

    @property
    def state_bytes(self) -> int:
        """About what `state` takes, without making it."""
        local = self._window.local if self._window is not None else []
        parts = [*(kv.k for kv in local), *(kv.v for kv in local), *self._queue]
        parts += [part for _, part in self._memory.tensors()] if self._memory is not None else []
        for frame in (*self._opened, *self._reduced_beside):
            parts += frame_tensors("", frame).values()
        return 4096 + sum(part.numel() * part.element_size() for part in parts)


def _add_prototypes(
    group: Sequence[SeenFrame],
    blocks: Table,
    layers: Sequence[list[LayerKV | None]],
    made: Prototypes,
) -> Table:
    """Prototypes are blocks of one token behind those of the frames, one a frame.

    Their rows say where the frame stands; where each layer's prototype does, its keep sets say.
    """
    rows = blocks.copy()
    rows["kind"], rows["tokens"] = BlockKind.PROTOTYPE, 1
    assert made.frame.tolist() == [frame.number for frame in group], "one a frame, in their order"
    for held, k, v in zip(layers, made.k, made.v, strict=True):
        held += _split(LayerKV(k, v), [1] * len(group))
    return np.concatenate((blocks, rows))


def _split(kv: LayerKV, sizes: Sequence[int]) -> list[LayerKV]:
    ks, vs = torch.split(kv.k, list(sizes), 1), torch.split(kv.v, list(sizes), 1)
    return [LayerKV(k, v) for k, v in zip(ks, vs, strict=True)]


def _held(rows: Sequence[Sequence[int]]) -> list[Held]:
    return [Held(int(start), int(end), int(tokens)) for start, end, tokens in rows]


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
