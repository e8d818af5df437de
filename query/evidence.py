"""Evidence: the spans that stood in the context, as a person would name them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memdb.caption_rows import caption_now, unit_now
from memdb.query.captions import Picked
from memdb.query.rebuild.text import CaptionAt
from memdb.query.retrieve.topk import Rows
from memdb.query.scope import Opened
from memdb.schemas.answer import Evidence
from memdb.schemas.errors import CorruptionError
from memdb.schemas.times import to_s
from memdb.store import Store

# A question over 28 layers may touch hundreds of spans; the strongest are what a person wants to see.
SPANS_MAX = 64


def of_captions(found: Sequence[tuple[Picked, CaptionAt]]) -> list[Evidence]:
    """One span a caption, the most relevant first."""
    rows = [
        Evidence(
            recording=at.recording,
            start_s=to_s(at.start_ns),
            end_s=to_s(at.end_ns),
            tier="captions",
            score=item.score,
            caption=at.caption.text,
            unit=item.candidate.unit,
        )
        for item, at in found
    ]
    return sorted(rows, key=lambda row: (-row.score, row.start_s))[:SPANS_MAX]


def of_blocks(store: Store, opened: Opened, rows: Sequence[Rows]) -> list[Evidence]:
    """One span a run of neighbouring blocks; its score is the largest share of layers that hold one of them."""
    if not rows or not any(len(mine) for mine in rows):
        return []
    taken, counts = np.unique(np.concatenate(rows), return_counts=True)
    shares = counts / len(rows)
    blocks = opened.kv.table.blocks
    breaks = (
        np.flatnonzero((np.diff(taken) > 1) | (blocks["unit"][taken][1:] != blocks["unit"][taken][:-1])) + 1
    )
    found = []
    for run, share in zip(np.split(taken, breaks), np.split(shares, breaks), strict=True):
        unit = int(blocks["unit"][run[int(np.argmax(share))]])
        found.append((float(share.max()), run, unit))
    found.sort(key=lambda item: (-item[0], int(item[1][0])))
    return [
        Evidence(
            recording=opened.row.name,
            start_s=to_s(int(blocks["start_ns"][run[0]])),
            end_s=to_s(opened.clipped(int(blocks["end_ns"][run[-1]]))),
            tier="kv",
            score=score,
            caption=_caption(store, opened, unit),
            unit=unit,
        )
        for score, run, unit in found[:SPANS_MAX]
    ]


def _caption(store: Store, opened: Opened, unit: int) -> str | None:
    row = unit_now(store, (opened.row.id, unit))
    try:
        caption = caption_now(store, row) if row is not None else None
    except CorruptionError:
        return None
    return caption.text if caption is not None else None
