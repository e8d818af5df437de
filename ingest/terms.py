"""What the stages of an ingest work under: the same from a recording's beginning to its end."""

from __future__ import annotations

from dataclasses import dataclass

from memdb.codecs.base import Codec
from memdb.ingest.read_back import StoredGroups
from memdb.models.frame_encoder import FrameEncoder
from memdb.models.places import Placing
from memdb.models.protocol import VideoModel
from memdb.retain.base import Retainer
from memdb.timing import Laps


@dataclass(frozen=True, eq=False)
class Terms:
    """`init_ids`: of the text that stands before the stream. `placing`: how tokens get their ids. `seed`: for reducers
    that draw.

    `codec`, `retain`: the stages behind an encoder, for those that look at them; no codec in recipes without KV.
    `frames`: what puts frames and questions into one space, where the index keeps that. `stored`: the recording, for
    encoders whose window is what it holds.
    """

    model: VideoModel
    init_ids: tuple[int, ...]
    placing: Placing
    profile: str
    seed: int
    codec: Codec | None
    retain: Retainer
    frames: FrameEncoder | None
    stored: StoredGroups | None
    laps: Laps
