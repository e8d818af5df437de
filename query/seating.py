"""Where the blocks of a question stand: as they were written, and at which places of their frames."""

from __future__ import annotations

import torch

from memdb.models.places import Grid, Places, Placing
from memdb.query.rebuild.written import Written
from memdb.query.retrieve.topk import Rows
from memdb.query.scope import Opened
from memdb.query.session import Session


def as_written(session: Session, method: Written, opened: Opened, rows: Rows, start: int) -> Places:
    """Places of one layer's groups, behind `start` init tokens, where the encoder wrote them."""
    spec, stands = opened.row.spec, torch.from_numpy(opened.kv.stands(rows))
    placing = session.model.placing(spec.sample_fps, spec.grid)
    raster, sizes = raster_of(opened, placing, rows), opened.kv.tokens(rows).tolist()
    return method.places(session.model, start, sizes, stands, placing, raster)


def raster_of(opened: Opened, placing: Placing, rows: Rows) -> Rows | None:
    """Where in their frames the tokens of these blocks stand, if a question needs to be told."""
    if not isinstance(placing, Grid) or not opened.row.spec.recipe.reads_back:
        return None
    return opened.kv.raster(rows, placing.tokens)
