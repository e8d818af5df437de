"""What a run of the benchmark is, and what it found of one question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.answers.rows import ROWS

FILM_FPS, FILM_FPS_LONG = 25, 5  # the second from LONG_S on: only a frame a second is looked at
LONG_S = 4 * 3600
FILM_SIZE = (640, 360)
PAINTED_SIZE = (320, 180)  # no decoder is to meet a real size, and to paint it would be most of the work
SAMPLE_FPS = 1.0
SPLIT = "test"
OWN = "own"  # in place of a codec: the recipe's


@dataclass(frozen=True)
class Job:
    """`per_kind`: questions of each kind and seed. `codecs`: the first one answers in all rows, the others in PAIRED.

    `paint`: pictures go into the ingest as they are painted, without a film. `cold`: the store's files leave the
    page cache before each question. `reuse`: recordings that an earlier run ingested are asked again.
    `blocks`: how many the rows read that choose for themselves, where that is another number than the recipe retrieves.
    """

    folder: Path  # films and stores
    seeds: tuple[int, ...] = (1,)
    length_s: int = 600
    per_kind: int = 60
    rows: tuple[str, ...] = tuple(ROWS)
    codecs: tuple[str, ...] = ("int4",)
    settings: tuple[str, ...] = ()
    recipe: str = "hybrid"
    blocks: int | None = None
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    film_fps: int | None = None
    film_size: tuple[int, int] | None = None
    paint: bool = False
    cold: bool = False
    reuse: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.film_size or (PAINTED_SIZE if self.paint else FILM_SIZE)

    @property
    def fps(self) -> int:
        return self.film_fps or (FILM_FPS if self.length_s < LONG_S else FILM_FPS_LONG)


@dataclass(frozen=True)
class Outcome:
    """One question in one row. Shares of its true spans that stood in the context are None where it has none."""

    row: str
    mode: str  # that answered: auto chooses one
    codec: str
    seed: int
    number: int
    kind: str
    about: str
    question: str
    answer: str
    said: str
    right: bool
    choices: int
    latency_ms: float
    context_tokens: int
    read_bytes: int
    recall: float | None  # by blocks or captions
    recall_kv: float | None  # mean over layers
    recall_captions: float | None
    age_s: float  # of the newest evidence, at the moment that is asked about
    at_s: float | None
    error: str = ""


@dataclass(frozen=True)
class Ingested:
    """What the ingest of one recording took and made. Bytes count everything that the recording has in the store.

    The encoder's state is of one size however long a recording is: it is no part of the bytes an hour.
    """

    seed: int
    codec: str
    length_s: float
    ingest_s: float
    bytes_by_tier: dict[str, int]

    @property
    def bytes_per_hour(self) -> float:
        growing = sum(size for tier, size in self.bytes_by_tier.items() if tier != "state")
        return growing / self.length_s * 3600

    @property
    def times_real_time(self) -> float:
        return self.length_s / self.ingest_s if self.ingest_s else float("nan")


Tell = Callable[[str, float, float], None]  # what is being done, how much of it is done, of how much
