"""Stage 8 of a question: a context from what was brought back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from memdb.models.cache import CacheContext
from memdb.models.places import LINE, place_frames
from memdb.models.window import LayerKV
from memdb.query.bring_back import Retrieved, activate
from memdb.query.memory import frame_tokens, memory_of
from memdb.query.planning import Decided
from memdb.query.rebuild.consecutive import Consecutive
from memdb.query.rebuild.original import Original
from memdb.query.rebuild.restored import Restored
from memdb.query.rebuild.written import Written
from memdb.query.retrieve.all import ActivateAll
from memdb.query.retrieve.pages import MemoryPages
from memdb.query.scope import Opened
from memdb.query.seating import as_written, raster_of
from memdb.query.session import Session
from memdb.query.stages import QueryStages
from memdb.query.stored import Readings
from memdb.schemas.errors import CorruptionError


def at_original(
    session: Session, method: Original, opened: Opened, init: Sequence[LayerKV], got: Retrieved
) -> CacheContext:
    """[init | tokens of a memory where they stood in the stream, or where the method puts them]."""
    assert got.positions is not None
    spec = opened.row.spec
    placing = session.model.placing(spec.sample_fps, spec.grid)
    return method.rebuild(session.rotated(spec), init, got.kv, got.positions, frame_tokens(opened), placing)


def with_times(
    session: Session,
    method: Restored,
    opened: Opened,
    init: Sequence[LayerKV],
    got: Retrieved,
    tokens_max: int,
) -> CacheContext:
    """[init | tokens of a memory without gaps, and between them times in at most so many tokens]."""
    assert got.positions is not None, "whoever activated them knows"
    assert got.starts is not None
    spec, got.cache = opened.row.spec, None  # where it was read with no times between, it goes first
    placing = session.model.placing(spec.sample_fps, spec.grid)
    tokens = list(zip(got.positions, got.starts, strict=True))
    model = session.rotated(spec)
    return method.dated(model, init, got.kv, tokens, frame_tokens(opened), placing, tokens_max)


def rebuild(session: Session, decided: Decided, got: Retrieved, room: int) -> CacheContext:
    """[init | blocks in time order, with times | captions in time order, with times], in at most `room` tokens."""
    stages, init, chosen = decided.stages, decided.init, decided.chosen
    longest = max((0 if kv is None else kv.tokens for kv in got.kv), default=0)
    left = max(0, room - init[0].tokens - longest - len(got.caption_ids))
    if got.kv and got.positions is not None:
        assert isinstance(stages.rebuild, Original), "rule R2 sees to it"
        assert chosen is not None, "whoever activated it had it"
        if isinstance(stages.rebuild, Restored) and stages.rebuild.time_text_s:
            plan = decided.plan
            times = left if plan.mode == "recent" else min(left, plan.sizes.time_tokens)
            context = with_times(session, stages.rebuild, chosen, init, got, times)
        else:
            context = got.cache or at_original(session, stages.rebuild, chosen, init, got)
    elif got.kv and chosen is not None:
        if isinstance(stages.rebuild, Consecutive) and (stages.rebuild.time_text_s or got.cache is None):
            # The blocks move: what was rotated for retrieval is not needed beside the new cache.
            got.cache = None
            spec = chosen.row.spec
            placing = session.model.placing(spec.sample_fps, spec.grid)
            context = stages.rebuild.rebuild(
                session.model,
                init,
                chosen.kv.table.blocks,
                got.rows,
                got.kv,
                stages.window_tokens,
                stamp_tokens_max=left,
                placing=placing,
                rasters=[raster_of(chosen, placing, rows) for rows in got.rows],
            )
        elif isinstance(stages.rebuild, Written) and got.cache is None:
            written, start = stages.rebuild, init[0].tokens
            places = [as_written(session, written, chosen, rows, start) for rows in got.rows]
            spec = chosen.row.spec
            placing = session.model.placing(spec.sample_fps, spec.grid)
            context = written.rebuild(session.model, init, got.kv, places, placing)
        else:
            assert got.cache is not None
            context = got.cache
    else:
        context = CacheContext(decided.model.rotary, init, [None] * len(init), window=stages.window_tokens)
    if got.caption_ids:
        with torch.inference_mode():
            session.model.forward(session.model.embed(got.caption_ids), context)
    return context


def everything(session: Session, opened: Opened, init: list[LayerKV], stages: QueryStages) -> CacheContext:
    """The context with all blocks of a recording in every layer and no time text, or all of a memory: for the
    equality ladder. Raises CorruptionError where a slice is not whole.
    """
    readings, model, window = Readings(), session.model, stages.window_tokens
    if isinstance(stages.retrieve, ActivateAll | MemoryPages):
        memory, got = memory_of(session.store, opened), Retrieved()
        activate(session, memory, opened, got, readings)
        if readings.bad or memory.bad:
            raise CorruptionError([*readings.warnings(), *memory.bad][0])
        assert isinstance(stages.rebuild, Original), "rule R2 sees to it"
        return at_original(session, stages.rebuild, opened, init, got)
    # A layer holds what its retainer left it.
    rows = [
        np.flatnonzero(opened.blocks & opened.kv.table.holds(layer)) for layer in range(model.shape.layers)
    ]
    found = [
        opened.kv.read(layer, own, model.device, model.dtype, readings)[0] for layer, own in enumerate(rows)
    ]
    if readings.bad:
        raise CorruptionError(readings.warnings()[0])
    spec, places = opened.row.spec, None
    placing = model.placing(spec.sample_fps, spec.grid)
    if isinstance(stages.rebuild, Written):
        places = [as_written(session, stages.rebuild, opened, own, init[0].tokens) for own in rows]
        return stages.rebuild.rebuild(model, init, found, places, placing)
    if placing != LINE:
        places = []
        for own in rows:
            sizes, raster = opened.kv.tokens(own).tolist(), raster_of(opened, placing, own)
            places.append(place_frames(placing, init[0].tokens, sizes, model.device, raster))
    return CacheContext(model.rotary, init, found, window=window, places=places, placing=placing)
