"""Stages 1 to 6 over one batch of frames, and everything that is carried from one batch to the next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from itertools import groupby

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from memdb.codecs.pack import pack_unit
from memdb.ingest.encode.base import ClipSeen, no_kv
from memdb.ingest.encode.window import SlidingWindow
from memdb.ingest.frames import ReadyFrame, SeenFrame
from memdb.ingest.held import Held, Timed, is_meant, newest
from memdb.ingest.stages import IngestStages
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.schemas.errors import CorruptionError
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
    """The encoder state of one recording: window, recurrent tokens, open unit, counters.

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
    ) -> None:
        self._model, self._stages, self._vectors = model, stages, vectors
        self._init_ids = tuple(init_ids)
        self.laps = laps or Laps()
        self.start_fresh(Counters())

    def start_fresh(self, counters: Counters) -> None:
        """A fresh window that begins with the init tokens, at the beginning or as a new epoch."""
        self.counters = counters
        self._window: WindowContext | None = None
        if isinstance(self._stages.encode, SlidingWindow):
            self._window = self._stages.encode.open(self._model, self._init_ids, profile=self._stages.profile)
            counters.position = max(counters.position, len(self._init_ids))
        self._in_window: list[Held] = []  # frames, oldest first
        self._opened: list[SeenFrame] = []
        self._queue: list[Tensor] = []
        self._queued: list[Held] = []  # the clip of each entry of the queue

    @property
    def reach_ns(self) -> int:
        """It holds nothing of the stream from before this media time."""
        starts = [held[0].start_ns for held in (self._in_window, self._queued, self._opened) if held]
        return min(starts, default=self.counters.until_ns)

    def holds(self, tombstones: Sequence[Tombstone]) -> bool:
        """Whether a span overlaps something that it holds: a frame in the window, a queued clip, an open frame."""
        held: list[Timed] = [*self._in_window, *self._queued, *self._opened]
        return any(is_meant(item, tombstones) for item in held)

    def forget(self, tombstones: Sequence[Tombstone]) -> list[Unit]:
        """Let go of what overlaps these spans, and of all that was computed beside it: a new epoch begins.

        Open frames that do not overlap stay. No unit spans what was between them: returns the units that close.
        """
        opened = self._opened
        self.counters.epoch += 1
        self.start_fresh(self.counters)
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

    def step(self, frames: Sequence[ReadyFrame]) -> list[Unit]:
        """One batch: see, cut units, encode, caption, pack."""
        with self.laps("vision"):
            tokens = self._model.visual_tokens([frame.pixels for frame in frames])  # (F, N, E)
        closed: list[list[SeenFrame]] = []
        for frame, seen in zip(frames, tokens, strict=True):
            done, self._opened = self._stages.unit.extend(
                self._opened, SeenFrame(frame.number, frame.start_ns, frame.end_ns, seen, frame.picture)
            )
            closed += done
        self._took(frames[-1])
        return self._close(closed)

    def finish(self) -> list[Unit]:
        """The unit that is still open when the stream ends."""
        opened, self._opened = self._opened, []
        return self._close([opened]) if opened else []

    def _took(self, last: ReadyFrame) -> None:
        self.counters.frame = last.number + 1
        self.counters.taken_ns, self.counters.until_ns = last.start_ns, last.end_ns

    def _close(self, groups: Sequence[Sequence[SeenFrame]]) -> list[Unit]:
        if not groups:
            return []
        kv = self._encode([frame for group in groups for frame in group])
        units, at = [], 0
        for group in groups:
            T = sum(len(frame.tokens) for frame in group)
            own = None if kv is None else [layer.part(at, at + T) for layer in kv]
            units.append(self._unit(group, own))
            at += T
        return units

    def _encode(self, frames: Sequence[SeenFrame]) -> list[LayerKV] | None:
        encode, window = self._stages.encode, self._window
        if window is None or not isinstance(encode, SlidingWindow):
            return None
        with self.laps("encode"):
            kv = encode.encode(self._model, window, [frame.tokens for frame in frames])
        came = [Held(frame.start_ns, frame.end_ns, len(frame.tokens)) for frame in frames]
        self._in_window = newest([*self._in_window, *came], window.local[0].tokens)
        return kv

    def _unit(self, group: Sequence[SeenFrame], kv: Sequence[LayerKV] | None) -> Unit:
        caption = self._caption(group, kv)
        blocks, packed, keys = no_blocks(), None, None
        if kv is not None and self._stages.codec is not None:
            with self.laps("pack"):
                sizes = [len(frame.tokens) for frame in group]
                layers = self._stages.retain.keep([_split(layer, sizes) for layer in kv])
                blocks = self._blocks(group)
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
        )
        self.counters.unit += 1
        return unit

    def _blocks(self, group: Sequence[SeenFrame]) -> Table:
        blocks = np.zeros(len(group), BLOCK_DTYPE)
        for row, frame in zip(blocks, group, strict=True):
            row["kind"], row["tokens"] = BlockKind.FRAME, len(frame.tokens)
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
            init = self._window.init if self._window is not None and self._window.init else no_kv(model)
            clip = ClipSeen(tokens, kv, init, self._init_ids, self._queue)
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
        for index, kept in enumerate(self._queue):
            tensors[f"queue.{index}"] = kept
        for index, frame in enumerate(self._opened):
            tensors[f"open.{index}"] = frame.tokens
        meta = {
            "counters": asdict(self.counters),
            "seen": window.seen if window is not None else 0,
            "window": [astuple(held) for held in self._in_window],
            "queue": [astuple(held) for held in self._queued],
            "open": [[frame.number, frame.start_ns, frame.end_ns] for frame in self._opened],
        }
        tensors["meta"] = _bytes_tensor(json.dumps(meta).encode())
        if self._opened:
            tensors["jpeg"] = _bytes_tensor(self._opened[0].jpeg())
        saved: bytes = save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
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
            self._in_window = _held(meta["window"])
            self._queued = _held(meta["queue"])
            self._queue = [tensors[f"queue.{index}"].to(device) for index in range(len(self._queued))]
            jpeg = bytes(tensors["jpeg"].numpy()) if "jpeg" in tensors else b""
            self._opened = [
                SeenFrame(int(number), int(start), int(end), tensors[f"open.{index}"].to(device), jpeg)
                for index, (number, start, end) in enumerate(meta["open"])
            ]
        except _NO_STATE as error:
            raise CorruptionError(f"the saved encoder state cannot be read: {error}", file="state") from error

    @property
    def state_bytes(self) -> int:
        """About what `state` takes, without making it."""
        local = self._window.local if self._window is not None else []
        parts = [*(kv.k for kv in local), *(kv.v for kv in local), *self._queue]
        parts += [frame.tokens for frame in self._opened]
        return 4096 + sum(part.numel() * part.element_size() for part in parts)


def _split(kv: LayerKV, sizes: Sequence[int]) -> list[LayerKV]:
    ks, vs = torch.split(kv.k, list(sizes), 1), torch.split(kv.v, list(sizes), 1)
    return [LayerKV(k, v) for k, v in zip(ks, vs, strict=True)]


def _held(rows: Sequence[Sequence[int]]) -> list[Held]:
    return [Held(int(start), int(end), int(tokens)) for start, end, tokens in rows]


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
