"""The captions that a question brings back: ranked by MMR, cut to a token budget, put into time order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb.caption_rows import caption_now, unit_now
from memdb.captions import CaptionIndex
from memdb.models.caption_vectors import CaptionVectors
from memdb.query.rebuild.text import CaptionAt
from memdb.query.retrieve.mmr import Floats, joined_relevance, mmr_order, within_budget
from memdb.query.scope import Opened
from memdb.schemas.errors import CorruptionError
from memdb.schemas.times import format_time, to_s
from memdb.store import Store

log = logging.getLogger(__name__)

# Up to here MMR looks at every caption; beyond, at those that the search table ranks first.
EXACT_CAPTIONS_MAX = 20_000
CANDIDATES = 2_048


@dataclass(frozen=True)
class Candidate:
    """A caption that may be taken: a row of a recording's caption table."""

    opened: int  # index into the scope
    unit: int
    tokens: int  # with what goes before it
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class Picked:
    candidate: Candidate
    score: float  # cosine to the question; where words rank, the reciprocal rank, 0 without a common word


# All captions of one encoder that are in question, and rows of them, best first, each with its score.
Ranked = tuple[list[Candidate], Iterator[tuple[int, float]]]


def rank(
    store: Store,
    scope: Sequence[Opened],
    vectors: CaptionVectors,
    index: CaptionIndex,
    text: str,
    warnings: list[str],
    *,
    relevance: float,
    words: bool = False,
    head_tokens: int = 0,
) -> Ranked:
    """All captions in question of one encoder, and their MMR order as it is asked for.

    words: they are relevant by what they say, too. Beyond `EXACT_CAPTIONS_MAX` and `CANDIDATES` captions words count of
    those that vectors rank first.
    """
    query = vectors.of_question(text)
    own = [i for i, opened in enumerate(scope) if opened.row.spec.caption_encoder == vectors.name]
    masks = {i: scope[i].captions for i in own}
    if sum(int(mask.sum()) for mask in masks.values()) > EXACT_CAPTIONS_MAX:
        masks = _narrowed(store, scope, own, vectors, index, query)
    candidates: list[Candidate] = []
    parts = []
    for i, mask in masks.items():
        rows, own_candidates = _candidates(scope, i, mask, head_tokens)
        candidates += own_candidates
        if len(rows):
            parts.append(scope[i].kv.table.caption_vectors()[rows])
    if not candidates:
        return [], iter(())
    said, relevant = np.concatenate(parts), None
    if words:
        first = _nearest(said, query, CANDIDATES)
        places = [(scope[candidates[row].opened].row.id, candidates[row].unit) for row in first]
        matches = np.zeros(len(candidates))
        matches[first], damaged = index.matches(store, text, places)
        if damaged:
            warnings.append(f"{damaged} damaged captions were ranked without their words: run memdb verify")
        relevant = joined_relevance(said, query, matches)
    return candidates, mmr_order(said, query, relevance, relevant)


def _nearest(vectors: Floats, query: Floats, limit: int) -> npt.NDArray[np.intp]:
    """Rows of the `limit` captions nearest to a question, ascending; all of them where there are no more."""
    if len(vectors) <= limit:
        return np.arange(len(vectors))
    cosine = vectors @ query / np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    return np.sort(np.argsort(-cosine, kind="stable")[:limit])


def rank_by_words(
    store: Store,
    scope: Sequence[Opened],
    encoder: str,
    index: CaptionIndex,
    text: str,
    *,
    head_tokens: int = 0,
) -> Ranked:
    """The same where nothing that is loaded can compare vectors: by common words, then the newest first."""
    own = [i for i, opened in enumerate(scope) if opened.row.spec.caption_encoder == encoder]
    candidates: list[Candidate] = []
    for i in own:
        candidates += _candidates(scope, i, scope[i].captions, head_tokens)[1]
    if not candidates:
        return [], iter(())
    row_of = {(scope[found.opened].row.id, found.unit): row for row, found in enumerate(candidates)}
    names = [scope[i].row.id for i in own]
    start_ns = min(found.start_ns for found in candidates)
    end_ns = max(found.end_ns for found in candidates)
    hits = index.search(
        store, encoder, text=text, recordings=names, start_ns=start_ns, end_ns=end_ns, limit=CANDIDATES
    )
    scores = {
        row_of[hit.recording_id, hit.unit]: hit.score
        for hit in hits
        if (hit.recording_id, hit.unit) in row_of
    }
    rest = sorted(set(range(len(candidates))) - set(scores), key=lambda row: -candidates[row].start_ns)
    return candidates, iter([*scores.items(), *((row, 0.0) for row in rest)])


def _candidates(
    scope: Sequence[Opened], opened: int, mask: npt.NDArray[np.bool_], head_tokens: int
) -> tuple[npt.NDArray[np.intp], list[Candidate]]:
    """The captions of one recording that are not empty: their rows in its table, and as candidates."""
    captions = scope[opened].kv.table.captions
    rows = np.flatnonzero(mask & (captions["tokens"] > 0))
    return rows, [
        Candidate(
            opened,
            int(row["unit"]),
            int(row["tokens"]) + head_tokens,
            int(row["start_ns"]),
            int(row["end_ns"]),
        )
        for row in captions[rows]
    ]


def _narrowed(
    store: Store,
    scope: Sequence[Opened],
    own: Sequence[int],
    vectors: CaptionVectors,
    index: CaptionIndex,
    query: npt.NDArray[np.float32],
) -> dict[int, npt.NDArray[np.bool_]]:
    """Masks of the captions that the search table finds nearest: ids only, vectors come from the pages."""
    by_id = {scope[i].row.id: i for i in own}
    names = [scope[i].row.id for i in own]
    start_ns = min(int(scope[i].usable_captions["start_ns"].min()) for i in own if scope[i].captions.any())
    end_ns = max(scope[i].watermark_ns for i in own)
    hits = index.search(
        store,
        vectors.name,
        vector=query,
        recordings=names,
        start_ns=start_ns,
        end_ns=end_ns,
        limit=CANDIDATES,
    )
    masks = {}
    for name, i in by_id.items():
        units = [hit.unit for hit in hits if hit.recording_id == name]
        masks[i] = scope[i].captions & np.isin(scope[i].kv.table.captions["unit"], units)
    return masks


def newest_first(ranked: Ranked) -> Ranked:
    """The same captions from the last one back, each with the score of a block that was not looked for: 1."""
    candidates, _ = ranked
    rows = sorted(range(len(candidates)), key=lambda row: -candidates[row].start_ns)
    return candidates, ((row, 1.0) for row in rows)


def pick(ranked: Sequence[Ranked], budget_tokens: int) -> list[Picked]:
    """Captions within the budget, best first. Several encoders take turns: their cosines do not compare."""
    whole = sum(row.tokens for candidates, _ in ranked for row in candidates)
    if len(ranked) == 1:
        candidates, order = ranked[0]
        return [
            Picked(candidates[row], score)
            for row, score in within_budget(order, [row.tokens for row in candidates], budget_tokens)
        ]
    picked: list[Picked] = []
    used = 0
    queues = [(candidates, order) for candidates, order in ranked]
    while queues:
        for turn in list(queues):
            candidates, order = turn
            taken = next(order, None)
            if taken is None:
                queues.remove(turn)
                continue
            row, score = taken
            if whole > budget_tokens and used + candidates[row].tokens >= budget_tokens:
                return picked
            used += candidates[row].tokens
            picked.append(Picked(candidates[row], score))
    return picked


def read(
    store: Store,
    scope: Sequence[Opened],
    picked: Sequence[Picked],
    model_fingerprint: str,
    warnings: list[str],
) -> list[tuple[Picked, CaptionAt]]:
    """Texts and ids from the segments, in time order. A damaged caption is left out with a warning."""
    found = []
    ordered = sorted(picked, key=lambda item: (item.candidate.opened, item.candidate.start_ns))
    for item in ordered:
        opened = scope[item.candidate.opened]
        row = opened.row
        try:
            unit = unit_now(store, (row.id, item.candidate.unit))
            caption = caption_now(store, unit) if unit is not None else None
        except CorruptionError as error:
            start = format_time(to_s(item.candidate.start_ns))
            warnings.append(f"the caption of {row.name} at {start} is damaged and was left out: {error}")
            continue
        if caption is None:
            continue  # it was forgotten since it was ranked
        same = row.spec.model.fingerprint == model_fingerprint
        end_ns = opened.clipped(item.candidate.end_ns)
        at = CaptionAt(caption, item.candidate.start_ns, end_ns, row.name, same)
        found.append((item, at))
    return found
