"""The recordings that are asked about: films from seeds, ingested by the real pipeline into one store a seed."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from memdb.client import Client
from memdb.models.load import resolve_device
from memdb.query.engine import Engine
from memdb.schemas.question import Question as Asked
from memdb.stats import stats
from memdb.store import Store
from memdb.world import films
from memdb.world.questions import Asker, Question
from memdb.world.scenes import Scene, plan
from memdb.world.source import painted
from tools.answers.job import OWN, SAMPLE_FPS, SPLIT, Ingested, Job, Tell
from tools.answers.tap import Tap, TappedKV

log = logging.getLogger(__name__)

OTHER = "other"  # the recording of another seed
OTHER_SEED = 1_000_003  # is added to it
OTHER_S_MAX = 3600
WORLD = Path(films.__file__).parent


class TappedClient(Client):
    """A client whose questions read the KV tier through a tap; all else is the product's."""

    def __init__(self, store: Store, tap: Tap, **options: Any) -> None:
        super().__init__(store, **options)
        self._tap = tap

    def _asking(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(
                self.store,
                self.loaded.model(),
                self.loaded.question_vectors,
                key_index=self._key_index,
                open_kv=partial(TappedKV, tap=self._tap),
            )
        return self._engine

    def prepare(self, recording: str, mode: str) -> None:
        """Load and measure what the first question would: it reads blocks that are no question's."""
        self._asking().prepare(Asked("what was seen?", mode, recording))


@dataclass(frozen=True, eq=False)
class Ground:
    """One seed's store, opened: a recording for each codec, named as the codec, and OTHER where a row needs it."""

    seed: int
    client: TappedClient
    tap: Tap
    questions: list[Question]
    ingested: list[Ingested]


@contextmanager
def ground(job: Job, seed: int, others: bool, tell: Tell) -> Iterator[Ground]:
    path = job.folder / "stores" / _store_name(job, seed)
    if path.exists() and not job.reuse:
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Store.open(path, create=True, write=True).close()
    tap = Tap(seed)
    options = {"model": job.model, "device": job.device, "dtype": job.dtype}
    client = TappedClient(Store.open(path), tap, **options)
    with client:
        scenes = plan(seed, job.length_s, SPLIT)
        took_s = {codec: _ingest(client, job, seed, scenes, codec, codec, tell) for codec in job.codecs}
        if others:
            there = plan(seed + OTHER_SEED, min(job.length_s, OTHER_S_MAX), SPLIT)
            _ingest(client, job, seed + OTHER_SEED, there, OTHER, job.codecs[0], tell)
        tap.blocks = _blocks(client, job.codecs[0]) if job.blocks is None else job.blocks
        sizes = {row.name: row.bytes for row in stats(client.store).recordings}
        ingested = [Ingested(seed, codec, job.length_s, took_s[codec], sizes[codec]) for codec in job.codecs]
        questions = Asker(scenes, seed, SPLIT).some(job.per_kind)
        yield Ground(seed, client, tap, questions, ingested)


def _blocks(client: Client, recording: str) -> int:
    """How many blocks retrieval takes: the recipe says so, as the model's own settings and the job's left it.

    0 where that is no number of the recipe's: a memory is taken as a whole.
    """
    blocks = client.store.recording(recording).spec.recipe.retrieve.params.get("blocks", 0)
    assert isinstance(blocks, int)
    return blocks


def _ingest(
    client: Client, job: Job, seed: int, scenes: list[Scene], name: str, codec: str, tell: Tell
) -> float:
    """Seconds that it took; 0 where it was there already."""
    if any(row.name == name and row.finished for row in client.recordings()):
        return 0.0
    if job.paint:
        side = {"height": job.size[1], "width": job.size[0]}
        source: Any = painted(scenes, fps=SAMPLE_FPS, device=resolve_device(job.device), **side)
    else:
        source = film_of(job, seed, scenes, tell)
    what = f"ingest of seed {seed} as {name}"
    length_s = float(scenes[-1].end_s)
    client.loaded.model()  # loading is no part of it
    began_s = time.perf_counter()
    client.ingest(
        source,
        recording=name,
        recipe=job.recipe,
        codec=None if codec == OWN else codec,
        settings=job.settings,
        sample_fps=SAMPLE_FPS,
        progress=lambda at: tell(what, at.media_s, length_s),
    )
    return time.perf_counter() - began_s


def film_of(job: Job, seed: int, scenes: list[Scene], tell: Tell) -> Path:
    """The film of a seed, rendered once: by its name it is known again while nothing that draws it has changed."""
    width, height = job.size
    name = f"{SPLIT}-{seed}-{scenes[-1].end_s}s-{job.fps}fps-{width}x{height}-{_drawn_by()}.mp4"
    path = job.folder / "films" / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part.mp4")
    frames = scenes[-1].end_s * job.fps
    films.render(
        part,
        scenes,
        fps=job.fps,
        width=width,
        height=height,
        on_frame=lambda done: tell(f"film of seed {seed}", done, frames),
    )
    part.replace(path)
    return path


def _drawn_by() -> str:
    """A digest of what plans and draws films."""
    digest = hashlib.blake2b(digest_size=4)
    for path in (*sorted(WORLD.glob("*.py")), WORLD.parent / "h264.py"):
        if path.name not in ("questions.py", "captions.py", "source.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _store_name(job: Job, seed: int) -> str:
    said = repr((job.recipe, job.settings, job.model, job.dtype, job.paint, job.fps, job.size)).encode()
    return f"{seed}-{job.length_s}s-{hashlib.blake2b(said, digest_size=4).hexdigest()}.memdb"


def drop_cache(path: Path) -> None:
    """Put every file of a store out of the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
