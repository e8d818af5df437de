"""What encoders and captioners are given, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memdb.ingest.reduce.recurrent import Recurrent
from memdb.models.places import LINE, Placing
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV


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
