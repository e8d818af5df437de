"""One ingest as a client asks for it: from what was wanted to a report, with a source and a model made ready."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdb.ingest.begin import already_whole, chosen_recipe, indexer, spec_of
from memdb.ingest.growing import grown, started_at_ns
from memdb.ingest.pipeline import ingest
from memdb.ingest.run import Diverged, IngestReport, Progress
from memdb.ingest.sampling import slot_ns
from memdb.ingest.sources import Source, open_source
from memdb.ingest.stages import IngestStages, written_out
from memdb.loaded import Loaded
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.protocol import VideoModel
from memdb.models.sheet import ModelSheet, unfit
from memdb.recipes import for_live
from memdb.schemas.errors import ModelError, RecipeError, SourceMismatch
from memdb.schemas.recipe import Recipe
from memdb.schemas.recording import check_name
from memdb.schemas.rows import RecordingRow, RecordingSpec
from memdb.schemas.times import parse_wall_clock
from memdb.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Wanted:
    """What Client.ingest was given, under the same names."""

    source: str | os.PathLike[str] | Iterable[Any]
    recording: str | None
    recipe: str | os.PathLike[str] | Recipe
    profile: str | None
    codec: str | None
    settings: Sequence[str]
    sample_fps: float
    fps: float | None
    started_at: str | None
    track: int | None
    reconnect_s: float
    seed: int

    def chosen(self, known: Mapping[str, Recipe]) -> Recipe:
        """The recipe with its changes. known: what names mean. Raises RecipeError."""
        return chosen_recipe(self.recipe, self.profile, self.codec, self.settings, known)


@dataclass(frozen=True, eq=False)
class _Ready:
    """What an ingest into an open store runs with."""

    spec: RecordingSpec
    known: RecordingRow | None
    model: VideoModel
    stages: IngestStages
    vectors: CaptionVectors | None


class Job:
    """`composed`: a recipe's stages, refused where a stage of any side of the store cannot be. `turn`: the lock under
    which the model is used; threads that ask take turns with the ingest.
    """

    def __init__(
        self,
        path: Path,
        wanted: Wanted,
        loaded: Loaded,
        composed: Callable[[Recipe], IngestStages],
        turn: threading.RLock,
    ) -> None:
        """Raises RecipeError, ModelError, UsageError for what can be refused before a model loads."""
        self._path, self._wanted, self._loaded = path, wanted, loaded
        self._composed, self._turn = composed, turn
        if (sheet := loaded.sheet()) is not None:
            composed(wanted.chosen(self._fitted(sheet)))
        slot_ns(wanted.sample_fps)
        at = wanted.started_at
        self._started_ns = parse_wall_clock(at) if at is not None else None

    def run(
        self, progress: Callable[[Progress], None] | None = None, stop: threading.Event | None = None
    ) -> IngestReport:
        """Goes on from a fresh window where this machine encodes otherwise than the one before."""
        wanted = self._wanted
        new_epoch = ""
        while True:
            with (
                open_source(
                    wanted.source, fps=wanted.fps, track=wanted.track, reconnect_s=wanted.reconnect_s
                ) as source,
                Store.open(self._path, create=True, write=True) as store,
            ):
                with self._turn:
                    ready = self._ready(store, source)
                done = already_whole(store, ready.spec)
                if done is not None:
                    return done
                spec = grown(ready.spec, ready.known, source)
                try:
                    return ingest(
                        store,
                        source,
                        spec,
                        ready.model,
                        ready.stages,
                        ready.vectors,
                        index=indexer(store, spec),
                        progress=progress,
                        stop=stop,
                        new_epoch=new_epoch,
                        turn=self._turn,
                    )
                except Diverged as error:
                    # An iterator is used up: the frames behind the watermark are gone.
                    if isinstance(wanted.source, Iterator):
                        raise SourceMismatch(
                            f"{error}: give the same frames as at first, or another recording"
                        ) from None
                    log.warning("%s; going on from a fresh window", error)
                    new_epoch = f"{error}: another machine or library version"

    def _ready(self, store: Store, source: Source) -> _Ready:
        """Load the model, and write the recipe out for it and for frames of this size."""
        wanted, info = self._wanted, source.info
        name = check_name(wanted.recording if wanted.recording is not None else info.name)
        model = self._loaded.model()
        fits = self._fitted(model.sheet)
        row = wanted.chosen(fits)
        if info.live:
            row = for_live(row, fits["hybrid"])
        known = next((found for found in store.recordings() if found.name == name), None)
        # One a recording, whatever comes later.
        grid = (known.spec.grid if known is not None else None) or model.frame_grid(info.height, info.width)
        frame_tokens = model.shape.tokens_of(grid)
        row = written_out(row, model, frame_tokens)
        stages = self._composed(row)
        stages.check_frames(frame_tokens, grid)
        vectors = self._loaded.vectors(stages.captioner.encoder) if row.keeps_captions else None
        store.bind_model(model.identity)
        started_ns = started_at_ns(self._started_ns, known, source)
        spec = spec_of(
            row, name, info, wanted.sample_fps, wanted.seed, started_ns, model, vectors, grid, stages.index
        )
        return _Ready(spec, known, model, stages, vectors)

    def _fitted(self, sheet: ModelSheet) -> dict[str, Recipe]:
        """The recipes with what the model says fits it. Raises ModelError where it does not fit."""
        found = sheet.fitted()
        for name in sheet.recipes:
            try:
                self._composed(found[name])
            except RecipeError as error:
                raise ModelError(f"{unfit(name)}: {error}") from None
        return found
