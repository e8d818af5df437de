"""Stage 7 over a memory by pages: the question goes through the layers, and each reads what its own queries choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from memdb.models.cache import CacheContext, RetrievalContext
from memdb.models.places import Places
from memdb.models.window import LayerKV
from memdb.query.memory import Memory, frame_tokens, read_tokens
from memdb.query.rebuild.original import Original, behind
from memdb.query.retrieve.pages import MemoryPages
from memdb.query.retrieve.topk import Rows
from memdb.query.scope import Opened
from memdb.query.session import Session
from memdb.query.stored import Readings
from memdb.schemas.keep import Ids


def read_pages(
    session: Session,
    text: str,
    pages: MemoryPages,
    seating: Original,
    memory: Memory,
    opened: Opened,
    init: Sequence[LayerKV],
    readings: Readings,
) -> tuple[list[Rows], list[LayerKV | None], list[Ids], list[Ids], CacheContext]:
    """The blocks of which anything was chosen, what was chosen, its positions, and when its frames began, a layer each;
    and the context of all that.

    Deeper layers choose by queries that have seen what shallower ones brought back. The question stands behind all
    that may be chosen, in this pass and in the answer.
    """
    model, kv, spec = session.model, opened.kv, opened.row.spec
    placing, size = model.placing(spec.sample_fps, spec.grid), frame_tokens(opened)
    end = behind(placing, init[0].tokens, [own.positions for own in memory.layers], size)
    rows: list[Rows] = []
    picked: list[LayerKV | None] = []
    stands: list[Ids] = []
    starts: list[Ids] = []
    began: Ids = kv.table.blocks["start_ns"]

    def fetch(layer: int, q: Tensor) -> LayerKV:
        found, own = read_tokens(session, kv, layer, memory.layers[layer], readings)
        _, positions = own.in_order()
        if found is None:
            rows.append(own.rows)
            picked.append(None)
            stands.append(positions)
            starts.append(began[own.rows_in_order()])
            return init[layer].part(0, 0)  # nothing, but the question keeps its place
        at = pages.pick(q, found.k, int(np.searchsorted(positions, memory.short_from)))
        chosen, places = LayerKV(found.k[:, at], found.v[:, at]), at.cpu().numpy()
        of_tokens = own.rows_in_order()[places]
        rows.append(np.unique(of_tokens))
        starts.append(began[of_tokens])
        picked.append(chosen)
        stands.append(positions[places])
        return chosen

    def seat(layer: int, start: int) -> Places:
        return seating.seat(placing, start, stands[layer], size, end).to(model.device)

    rotary = session.rotated(spec).rotary
    context = RetrievalContext(rotary, init, fetch, seat=seat, placing=placing)
    with (
        kv.reader.pinned(),
        kv.knowing([own.rows for own in memory.layers], readings),
        torch.inference_mode(),
    ):
        model.forward(model.embed(model.encode_text(text)), context)
    return rows, picked, stands, starts, context
