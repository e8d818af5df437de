"""What an ingest begins with: the recipe asked for, what the recording is to be, and whether anything is left to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memdb import recipes
from memdb.captions import CaptionIndex
from memdb.index.mean_key import MeanKey
from memdb.index.page_writer import index_recording
from memdb.ingest.run import IngestReport
from memdb.keep import Keeper
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import EncodingMismatch, MissingDependency
from memdb.schemas.fingerprint import encoding_fingerprint
from memdb.schemas.recipe import Recipe
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.times import to_s
from memdb.store import Store

log = logging.getLogger(__name__)


def chosen_recipe(
    recipe: str | os.PathLike[str] | Recipe,
    profile: str | None,
    codec: str | None,
    settings: Sequence[str],
    known: Mapping[str, Recipe],
) -> Recipe:
    """What an ingest was asked for: `recipe` by name, file or as it is, with the changes. known: what names mean.

    It is to be composed next, which says whether it is legal. Raises RecipeError.
    """
    if isinstance(recipe, Recipe):
        return recipes.adjusted(recipe, profile=profile, codec=codec, settings=tuple(settings), checked=False)
    return recipes.recipe(
        os.fspath(recipe), profile=profile, codec=codec, settings=tuple(settings), known=known, checked=False
    )


def spec_of(
    recipe: Recipe,
    name: str,
    info: Any,
    sample_fps: float,
    seed: int,
    started_at_ns: int | None,
    model: VideoModel,
    vectors: CaptionVectors | None,
    grid: tuple[int, int] | None,
    index: MeanKey,
) -> RecordingSpec:
    dtype = str(model.dtype).removeprefix("torch.")
    frames = index.open(model)
    init_ids = tuple(model.init_ids(str(recipe.encode.params.get("init_prompt", ""))))
    return RecordingSpec(
        name=name,
        source=info.identity,
        source_name=info.name,
        live=info.live,
        started_at_ns=started_at_ns,
        sample_fps=sample_fps,
        seed=seed,
        dtype=dtype,
        recipe=recipe,
        model=model.identity,
        init_ids=init_ids,
        encoding_fingerprint=encoding_fingerprint(
            recipe,
            model=model.identity.fingerprint,
            init_ids=init_ids,
            sample_fps=sample_fps,
            seed=seed,
            dtype=dtype,
            grid=grid,
            frame_encoder=frames.name if frames is not None else "",
        ),
        caption_encoder=vectors.name if vectors is not None else "",
        grid=grid,
        frame_encoder=frames.name if frames is not None else "",
    )


def already_whole(store: Store, spec: RecordingSpec) -> IngestReport | None:
    """The report of an ingest that has nothing left to do, because the recording is whole already."""
    row = next((row for row in store.recordings() if row.name == spec.name), None)
    if row is None or not row.units:
        return None
    if spec.started_at_ns not in (None, row.spec.started_at_ns):
        log.warning(
            "%s keeps the start that it was begun with: to change it, ingest under another --recording",
            row.name,
        )
    if row.spec.recipe.codec != spec.recipe.codec:
        raise EncodingMismatch(
            f"recording {spec.name!r} is stored as {row.spec.recipe.codec}, not {spec.recipe.codec}: use "
            f"--codec {row.spec.recipe.codec}, or another --recording"
        )
    same = (row.spec.encoding_fingerprint, row.spec.source) == (spec.encoding_fingerprint, spec.source)
    if not (row.finished and same and spec.source.digest):
        return None
    return IngestReport(
        recording=row.name,
        units=0,
        watermark_s=to_s(row.seen_until_ns),
        resumed_from_unit=row.units,
        replayed_units=0,
        epoch=len(row.epochs) - 1,
        written_bytes=0,
        timings_ms={},
        warnings=[f"{row.name} holds all of {spec.source_name} already"],
    )


def indexer(store: Store, spec: RecordingSpec) -> Callable[[bool], None]:
    """Brings a recording's derived indexes up to its units, and sees to its upkeep now and then."""
    keeper: Keeper | None = None
    captions = CaptionIndex(store.path)
    searchable = bool(spec.caption_encoder)

    def index(flush: bool) -> None:
        nonlocal searchable, keeper
        recording_id = store.recording(spec.name).id
        index_recording(store, recording_id, flush=flush)
        try:
            if searchable:
                # With the first caption, so that what LanceDB takes of memory is there from the start.
                captions.index_captions(store, spec.caption_encoder, flush=flush or keeper is None)
        except MissingDependency as error:  # derived data: searches scan until somebody indexes
            searchable = False
            log.warning("captions are kept but not indexed: %s", error)
        keeper = keeper or Keeper(store, recording_id)
        keeper(flush)

    return index
