"""Searching captions: by meaning and by words, over one recording or all. No Video-LLM."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from memdb.caption_rows import caption_now, unit_now
from memdb.captions import CaptionIndex
from memdb.fusion import reciprocal_rank
from memdb.models.caption_vectors import CaptionVectors
from memdb.schemas.answer import SearchHit
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import RecordingRow
from memdb.schemas.search import CaptionHit
from memdb.schemas.times import to_s
from memdb.store import Store

log = logging.getLogger(__name__)


def search(
    store: Store,
    rows: Sequence[RecordingRow],
    text: str,
    *,
    index: CaptionIndex,
    vectors: Callable[[str], CaptionVectors | None],
    start_ns: int | None,
    end_ns: int | None,
    limit: int,
) -> list[SearchHit]:
    """The captions that match best. Recordings of several caption encoders are searched apart and fused by rank."""
    limit = min(limit, max(1, sum(row.units for row in rows)))
    names = {row.id: row.name for row in rows}
    lists: list[list[CaptionHit]] = []
    for encoder in sorted({row.spec.caption_encoder for row in rows} - {""}):
        own = vectors(encoder)
        hits = index.search(
            store,
            encoder,
            text=text,
            vector=own.of_question(text) if own is not None else None,
            recordings=[row.id for row in rows if row.spec.caption_encoder == encoder],
            start_ns=start_ns,
            end_ns=end_ns,
            limit=limit,
        )
        lists.append(list(hits))
    if len(lists) == 1:
        found = [(hit, hit.score) for hit in lists[0]]
    else:
        by_place = {(hit.recording_id, hit.unit): hit for hits in lists for hit in hits}
        ranks = reciprocal_rank([[(hit.recording_id, hit.unit) for hit in hits] for hits in lists])
        found = [(by_place[place], score) for place, score in ranks]
    return [
        SearchHit(names[hit.recording_id], to_s(hit.start_ns), to_s(hit.end_ns), score, caption, hit.how)
        for hit, score in found[:limit]
        if (caption := _text(store, hit)) is not None
    ]


def _text(store: Store, hit: CaptionHit) -> str | None:
    """None where the caption is damaged, or was forgotten since it was found."""
    try:
        row = unit_now(store, (hit.recording_id, hit.unit))
        caption = caption_now(store, row) if row is not None else None
    except CorruptionError as error:
        log.warning("a caption was found and is left out: %s; run memdb verify", error)
        return None
    return caption.text if caption is not None else None
