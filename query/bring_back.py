"""Stage 7 of a question: what a plan reads, of one tier or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from memdb.index.mean_key import fold
from memdb.models.cache import CacheContext, RetrievalContext
from memdb.models.places import LINE, Places, place_frames
from memdb.models.window import LayerKV
from memdb.query import captions as caption_tier
from memdb.query.memory import Memory, newest_of, read_tokens
from memdb.query.paged import read_pages
from memdb.query.planning import Decided
from memdb.query.rebuild.original import Original
from memdb.query.rebuild.text import CaptionAt, caption_ids
from memdb.query.rebuild.written import Written
from memdb.query.retrieve.all import ActivateAll
from memdb.query.retrieve.external import External
from memdb.query.retrieve.groups import GroupTopK
from memdb.query.retrieve.layer_adaptive import LayerAdaptive, cosine_scale
from memdb.query.retrieve.pages import MemoryPages
from memdb.query.retrieve.topk import BlockTopK, Rows, newest
from memdb.query.scope import Opened
from memdb.query.seating import as_written, raster_of
from memdb.query.session import Session
from memdb.query.stored import Readings
from memdb.schemas.errors import CorruptionError
from memdb.schemas.keep import Ids
from memdb.timing import Laps


@dataclass
class Retrieved:
    """What a question brought back. `cache` is the rebuilt context where retrieval made it already."""

    rows: list[Rows] = field(default_factory=list)
    kv: list[LayerKV | None] = field(default_factory=list)
    # Of a memory's tokens, those in `kv`, a layer each: their positions, and when their frames began, ns.
    positions: list[Ids] | None = None
    starts: list[Ids] | None = None
    cache: CacheContext | None = None
    captions: list[tuple[caption_tier.Picked, CaptionAt]] = field(default_factory=list)
    caption_ids: list[int] = field(default_factory=list)  # of all of them, with times and names between
    lost: bool = False  # there was something to bring back, and nothing of it could be read


def bring_back(
    session: Session,
    opened: Sequence[Opened],
    text: str,
    decided: Decided,
    laps: Laps,
    readings: Readings,
    warnings: list[str],
) -> Retrieved:
    """What a plan reads, of one tier or both. What cannot be read is left out with a warning."""
    mode, got = decided.plan.mode, Retrieved()
    if mode in ("captions", "both"):
        with laps("captions"):
            take_captions(session, opened, text, decided, got, warnings)
    if mode != "captions" and decided.chosen is not None:
        with laps("retrieve"):
            retrieve(session, text, decided, decided.chosen, got, readings)
        nothing = bool(readings.bad) and not any(kv is not None for kv in got.kv)
        got.lost = nothing and not got.captions
    return got


def take_captions(
    session: Session,
    opened: Sequence[Opened],
    text: str,
    decided: Decided,
    got: Retrieved,
    warnings: list[str],
) -> None:
    """The captions that are read, as ids in time order, within the plan's share of the context."""
    plan, stages, ranked = decided.plan, decided.stages, decided.ranked
    if ranked is None:
        ranked = session.rank(opened, text, warnings, newest=decided.newest)
    if decided.newest:
        ranked = [caption_tier.newest_first(own) for own in ranked]
    picked = caption_tier.pick(ranked, plan.sizes.caption_tokens)
    found = caption_tier.read(session.store, opened, picked, session.model.identity.fingerprint, warnings)
    got.lost = bool(picked) and not found
    several = len({at.recording for _, at in found}) > 1
    times = bool(stages.rebuild.time_text_s)
    ids = [caption_ids(session.model, [at], times=times, names=several) for _, at in found]
    # Another model writes a caption in more or fewer tokens than the one that said it.
    while sum(map(len, ids)) > plan.sizes.caption_tokens:
        worst = min(range(len(found)), key=lambda index: found[index][0].score)
        del found[worst], ids[worst]
    if not found and any(candidates for candidates, _ in ranked):
        warnings.append("no caption fits into the plan's share of the context")
    got.captions, got.caption_ids = found, [token for own in ids for token in own]


def retrieve(
    session: Session, text: str, decided: Decided, chosen: Opened, got: Retrieved, readings: Readings
) -> None:
    """Blocks layer by layer: the newest ones, or those that the question's own queries choose."""
    plan, stages, model, kv = decided.plan, decided.stages, session.model, chosen.kv
    blocks, method = plan.sizes.blocks, stages.retrieve
    if isinstance(method, ActivateAll | MemoryPages):
        memory = decided.memory
        if plan.mode == "recent":
            memory = newest_of(session.store, chosen, model.shape.layers, blocks)
        assert memory is not None, "whoever plans has it"
        if isinstance(method, ActivateAll) or plan.mode == "recent":
            activate(session, memory, chosen, got, readings)
            return
        assert isinstance(stages.rebuild, Original), "rule R2 sees to it"
        read = read_pages(session, text, method, stages.rebuild, memory, chosen, decided.init, readings)
        got.rows, got.kv, got.positions, got.starts, got.cache = read
        return
    assert isinstance(method, BlockTopK | LayerAdaptive | GroupTopK | External), "rule R1 sees to it"

    def fetch(layer: int, rows: Rows) -> LayerKV | None:
        found, whole = kv.read(layer, rows, model.device, model.dtype, readings)
        got.rows.append(whole)
        got.kv.append(found)
        return found

    rows: list[Rows] | None = None
    layers = range(model.shape.layers)
    if decided.newest:
        rows = [newest(kv.search, layer, chosen.blocks, blocks) for layer in layers]
    elif isinstance(method, External):
        nearest = session.frames_like(text, chosen, method, blocks, readings)
        rows = [
            nearest[kv.table.holds(layer)[nearest]] for layer in layers
        ]  # R9: what a layer has not, it skips
    if rows is not None:
        with kv.reader.pinned(), kv.knowing(rows, readings):
            for layer in layers:
                fetch(layer, rows[layer])
        return

    assert isinstance(method, BlockTopK | LayerAdaptive | GroupTopK), (
        "the others know their blocks before a layer runs"
    )
    spec = chosen.row.spec
    placing = model.placing(spec.sample_fps, spec.grid)

    rebuilt = stages.rebuild

    def seat(layer: int, start: int) -> Places:
        if isinstance(rebuilt, Written):
            return as_written(session, rebuilt, chosen, got.rows[layer], start)
        rows = got.rows[layer]
        raster = raster_of(chosen, placing, rows)
        return place_frames(placing, start, kv.tokens(rows).tolist(), model.device, raster)

    def read_question(select: Callable[[int, torch.Tensor], Rows]) -> RetrievalContext:
        """The question through all layers, each with the blocks that `select` gives it for its own queries."""
        got.rows, got.kv = [], []

        def fetch_selected(layer: int, q: torch.Tensor) -> LayerKV | None:
            try:
                rows = select(layer, q)
            except CorruptionError as error:  # its keys do not come: the layer goes without
                readings.bad.append(f"{chosen.row.name}, layer {layer}: {error}")
                rows = np.zeros(0, np.int64)
            return fetch(layer, rows)

        context = RetrievalContext(
            model.rotary,
            decided.init,
            fetch_selected,
            window=stages.window_tokens,
            seat=None if placing == LINE and not isinstance(rebuilt, Written) else seat,
            placing=placing,
        )
        with kv.reader.pinned(), torch.inference_mode():
            model.forward(model.embed(model.encode_text(text)), context)
        return context

    def best(layer: int, q: torch.Tensor, count: int) -> Rows:
        query = fold(q, model.shape.kv_heads).cpu().numpy()
        return method.select(kv.search, layer, query, chosen.blocks, count)

    counts = [blocks] * model.shape.layers
    if isinstance(method, LayerAdaptive):
        counts = _shared_out(method, chosen, model.shape.kv_heads, counts, read_question)
    got.cache = read_question(lambda layer, q: best(layer, q, counts[layer]))
    readings.bad[:] = dict.fromkeys(readings.bad)  # what two passes met counts once


def _shared_out(
    method: LayerAdaptive,
    chosen: Opened,
    kv_heads: int,
    counts: list[int],
    read_question: Callable[[Callable[[int, torch.Tensor], Rows]], object],
) -> list[int]:
    """The first of two passes, in which each layer brings back the same number: what each is to bring back then."""
    search, blocks = chosen.kv.search, counts[0]
    held = [int((chosen.blocks & search.table.holds(layer)).sum()) for layer in range(len(counts))]
    if max(held) <= blocks:  # every layer takes all that it holds, whatever its scores
        return counts
    scores = [np.zeros(0, np.float32) for _ in counts]

    def score_all(layer: int, q: torch.Tensor) -> Rows:
        query: npt.NDArray[np.float32] = fold(q, kv_heads).cpu().numpy()
        scores[layer] = method.scores(search, layer, query, chosen.blocks, cosine_scale(q, query))
        return method.select(search, layer, query, chosen.blocks, blocks)

    read_question(score_all)
    return method.counts(scores, blocks)


def activate(session: Session, memory: Memory, opened: Opened, got: Retrieved, readings: Readings) -> None:
    """A memory token by token, layer by layer, each token with its position."""
    kv, got.positions, got.starts = opened.kv, [], []
    with kv.reader.pinned(), kv.knowing([own.rows for own in memory.layers], readings):
        for layer, own in enumerate(memory.layers):
            found, own = read_tokens(session, kv, layer, own, readings)
            got.rows.append(own.rows)
            got.kv.append(found)
            got.positions.append(own.in_order()[1])
            got.starts.append(kv.table.blocks["start_ns"][own.rows_in_order()])
