"""Questions to a store whose right answers the model knows: captions by text and vector, keys, slices.

What is not answered with a report (an error, a warning) must be right; without damage there is no report.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from memdb.captions import CaptionIndex
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.reader import SliceReader
from memdb.schemas.rows import RecordingRow
from memdb.schemas.search import CaptionHits
from memdb.schemas.units import Bytes, Unit
from memdb.store import Store
from tools.trust.model import Kept, Model
from tools.trust.units import ENCODER, KEY_SIZE, LAYERS, VECTOR_SIZE, raw_slices

_WORDS_ASKED = 2  # each recording is asked for the words of about so many units, old and new
_TOLERANCE = 1e-4
Row = npt.NDArray[np.float32]


def ask_all(store: Store, model: Model) -> list[str]:
    """Answers that are wrong and come without a report. For a store that is as the model says."""
    rows = {row.name: row for row in store.recordings()}
    known = {
        name: kept for name, kept in model.kept.items() if name in rows and rows[name].units == kept.units
    }
    wrong = list(_captions(store, known, rows, model))
    for name, kept in known.items():
        wrong += _keys(store, kept, rows[name])
        wrong += _slices(store, kept, rows[name])
    return wrong


def _captions(
    store: Store, known: dict[str, Kept], rows: dict[str, RecordingRow], model: Model
) -> Iterator[str]:
    index = CaptionIndex(store.path)
    units = {
        (rows[name].id, number): kept.unit(number)
        for name, kept in known.items()
        for number in range(kept.units)
    }
    said = {key: unit for key, unit in units.items() if unit.caption is not None}
    for name, kept in known.items():
        step = max(1, kept.units // _WORDS_ASKED)
        for number in [*range(0, kept.units, step), kept.units - 1]:
            if number >= 0:
                word = kept.stream.word(number)
                hits = index.search(store, ENCODER, text=word)
                wanted = [key for key, unit in said.items() if word in _text(unit)]
                yield from _compare(f"text of unit {number} of {name}", hits, wanted)
    for kept in model.gone:
        hits = index.search(store, ENCODER, text=kept.stream.word(0))
        wanted = [key for key, unit in said.items() if kept.stream.word(0) in _text(unit)]
        yield from _compare(f"text of a forgotten {kept.stream.name}", hits, wanted)
    hits = index.search(store, ENCODER, text="star", limit=len(units) + 8)
    yield from _compare("text 'star'", hits, list(said))
    query = np.random.default_rng(len(units)).normal(size=VECTOR_SIZE).astype(np.float32)
    scores = {key: _cosine(unit, query) for key, unit in said.items()}
    hits = index.search(store, ENCODER, vector=query, limit=5)
    best = sorted(scores.values(), reverse=True)[:5]
    found = [(hit.recording_id, hit.unit) for hit in hits]
    if hits.warnings:
        return
    if len(set(found)) != len(best) or not set(found) <= set(scores):
        yield f"vector: finds {[number for _, number in found]}"
    elif not np.allclose([scores[key] for key in found], best, atol=_TOLERANCE):
        yield f"vector: finds {[number for _, number in found]}, which are not the nearest"
    elif not np.allclose([hit.score for hit in hits], best, atol=_TOLERANCE):
        yield f"vector: the scores are {[hit.score for hit in hits]}"


def _text(unit: Unit) -> str:
    return unit.caption.text if unit.caption is not None else ""


def _cosine(unit: Unit, query: Row) -> float:
    assert unit.caption is not None
    vector = np.asarray(unit.caption.vector, np.float64)
    return float(vector @ query) / float(np.linalg.norm(vector) * np.linalg.norm(query.astype(np.float64)))


def _compare(what: str, hits: CaptionHits, wanted: list[tuple[str, int]]) -> Iterator[str]:
    found = [(hit.recording_id, hit.unit) for hit in hits]
    if sorted(found) != sorted(wanted) and not hits.warnings:
        yield f"{what}: finds {[number for _, number in found]} instead of {[number for _, number in wanted]}"


def _keys(store: Store, kept: Kept, row: RecordingRow) -> Iterator[str]:
    units = [kept.unit(number) for number in range(kept.units)]
    held = [
        (unit.number, block)
        for unit in units
        if unit.keys is not None
        for block in range(len(unit.blocks))
        if unit.blocks[block]["tokens"]
    ]
    if not held:
        return
    query = np.random.default_rng(kept.units).normal(size=KEY_SIZE).astype(np.float32)
    with KeyTable.open(store, row.id) as table:
        if table.layers != LAYERS:
            if not table.problems:
                yield f"keys of {row.name}: there are {table.layers} layers"
            return
        search = KeySearch(table, backend="exact")
        for layer in range(LAYERS):
            hits = search.search(layer, query, 4)
            found = [(int(table.blocks[at]["unit"]), int(table.blocks[at]["block"])) for at in hits.rows]
            scores = {key: float(_key(units, layer, *key) @ query) for key in held}
            best = sorted(scores.values(), reverse=True)[: len(found)]
            if table.problems:
                continue
            if len(found) != min(4, len(held)) or any(key not in scores for key in found):
                yield f"keys of {row.name}, layer {layer}: finds {found}"
            elif not np.allclose([scores[key] for key in found], best, atol=1e-3):
                yield f"keys of {row.name}, layer {layer}: finds {found}, which are not the best"


def _key(units: list[Unit], layer: int, number: int, block: int) -> Row:
    keys = units[number].keys
    assert keys is not None
    return keys[layer, block].astype(np.float32)


def _slices(store: Store, kept: Kept, row: RecordingRow) -> Iterator[str]:
    rows = store.units(row.id)
    places = [
        (unit.number, int(piece["layer"]), int(piece["block"])) for unit in rows for piece in unit.slices
    ]
    expected: dict[tuple[int, int, int], Bytes] = {}
    for number in range(kept.units):
        unit = kept.unit(number)
        if unit.kv is not None:
            for piece, raw in zip(unit.kv.slices, raw_slices(kept.stream, unit), strict=True):
                expected[number, int(piece["layer"]), int(piece["block"])] = raw
    if sorted(expected) != sorted(places):
        yield f"{row.name} has {len(places)} slices instead of {len(expected)}"
        return
    with SliceReader(store, threads=1) as reader:
        batch = reader.read([(unit, np.arange(len(unit.slices))) for unit in rows if len(unit.slices)])
        for index, (place, whole) in enumerate(zip(places, batch.whole, strict=True)):
            if whole and not np.array_equal(batch.raw(index), expected[place]):
                yield f"slice {place} of {row.name} is another"
