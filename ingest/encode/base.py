"""What encoders and captioners are given, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.ingest.encoder_state import Part
from memdb.ingest.frames import SeenFrame
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.ingest.terms import Terms
from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.retain.prototypes import Prototypes
from memdb.schemas.keep import KeepSet
from memdb.schemas.recording import Tombstone


class Encoder(Protocol):
    """A frozen dataclass of parameters with one verb."""

    @property
    def chunk_frames(self) -> int:
        """How many frames, as the model sees them, a batch of an ingest has."""
        ...

    def begin(self, terms: Terms, widths: Mapping[int, int]) -> Opened:
        """Itself at work on a recording, behind the init prompt and with nothing of the stream in view.

        widths: the recording's scale widths so far, a layer each.
        """
        ...


class Opened(Part, Protocol):
    """An encoder at work: its context, and what that holds of the stream."""

    @property
    def init(self) -> Sequence[LayerKV]:
        """Keys and values of the init prompt, a layer each."""
        ...

    def encode(self, groups: Sequence[Sequence[SeenFrame]], unit: int, position: int) -> Iterator[Encoded]:
        """The units that close with a batch, one after another; each is committed before the next is asked for.

        unit, position: number of the first, and of its first token in the stream.
        """
        ...

    def without(self, tombstones: Sequence[Tombstone]) -> Opened | None:
        """What may be used on when spans that it holds are forgotten; None for nothing, so that all begins anew."""
        ...


def no_keep_set() -> None:
    """Of a unit of which nothing is ever dropped."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A unit behind the language model.

    kv: keys and values of its frames' tokens, then of the summary's, a layer each; None without KV. position: of its
    first token in the stream, None where it follows on. keep: see Unit; asked for once the unit is packed,
    since a GPU may have to be waited for, and before the next unit is encoded. prototypes: what joins the unit's tokens
    in a memory. queries: of the retainer's guidance prompt, a layer each. embeddings (F, E): of the frames, where the
    index keeps them.
    """

    frames: Sequence[SeenFrame]
    kv: Sequence[LayerKV] | None = None
    summary: SeenFrame | None = None
    position: int | None = None
    keep: Callable[[], KeepSet | None] = no_keep_set
    prototypes: Prototypes | None = None
    queries: Sequence[Tensor] = ()
    embeddings: npt.NDArray[np.float16] | None = None

    @property
    def stored(self) -> list[SeenFrame]:
        """The frames of its blocks."""
        return [*self.frames, *([self.summary] if self.summary is not None else ())]

    @property
    def own_kv(self) -> Sequence[LayerKV] | None:
        """Without the summary's."""
        if self.kv is None:
            return None
        T = sum(len(frame.tokens) for frame in self.frames)
        return [layer.part(0, T) for layer in self.kv]


@dataclass(frozen=True, eq=False)
class ClipSeen:
    """A closed unit at the moment of its caption.

    tokens (T, E): its visual tokens. kv: per layer its keys and values at compute precision, None without KV.
    init: per layer those of the init prompt. queue: recurrent tokens of past clips, oldest first. frames: how many
    tokens each frame of the clip has; on a line (see places) nobody asks.
    """

    tokens: Tensor
    kv: Sequence[LayerKV] | None
    init: Sequence[LayerKV]
    init_ids: Sequence[int]
    queue: Sequence[Tensor]
    frames: Sequence[int] = ()
    placing: Placing = LINE


@dataclass(frozen=True, eq=False)
class Said:
    """A caption's ids and text, and the clip's attention (T,) where a captioner listens to it."""

    ids: tuple[int, ...]
    text: str
    attention: Tensor | None


class Captioner(Protocol):
    """A frozen dataclass of parameters with one verb. Stored KV never depends on what it does."""

    @property
    def encoder(self) -> str:
        """Name of the encoder of caption vectors, '' without captions."""
        ...

    def say(
        self, model: VideoModel, clip: ClipSeen, recurrent: Recurrent | None, *, profile: str
    ) -> Said | None: ...

    def recurrent(self, reduce: object) -> Recurrent | None:
        """The rule by which this captioner's attention selects recurrent tokens, None where it does not."""
        ...


def no_kv(model: VideoModel) -> list[LayerKV]:
    """Keys and values of no tokens, a layer each: the start of a context without an init prompt."""
    shape = model.shape
    empty = torch.empty(shape.kv_heads, 0, shape.head_size, dtype=model.dtype, device=model.device)
    return [LayerKV(empty, empty) for _ in range(shape.layers)]


def apart(kv: Sequence[LayerKV], sizes: Sequence[int]) -> list[list[LayerKV]]:
    """Keys and values, a layer each, of tokens that follow one another: those of runs of these sizes, one by one."""
    found, at = [], 0
    for size in sizes:
        found.append([layer.part(at, at + size) for layer in kv])
        at += size
    return found


def numbers(
    *, seen: int = 0, window: Sequence[object] = (), memory: Sequence[object] = (), **own: object
) -> dict[str, object]:
    """An encoder's part of a saved state, in which every encoder has these three, and in this order."""
    return {"seen": seen, **own, "window": list(window), "memory": list(memory)}
