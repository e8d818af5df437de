"""Everything that can be asked of a store, as answers that compare: a value, and whether it came with a report."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memdb.captions import CaptionIndex
from memdb.client import Client
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.reader import SliceReader
from memdb.schemas.errors import MemdbError
from memdb.schemas.rows import RecordingRow
from memdb.schemas.search import CaptionHits
from memdb.store import Store
from tools.trust.units import ENCODER, KEY_SIZE, LAYERS, VECTOR_SIZE


@dataclass(frozen=True)
class Answer:
    """`value` compares; `reported`: it came with an error or a warning, and may be less than all."""

    value: object
    reported: str = ""


def observe(path: Path, words: tuple[str, ...]) -> dict[str, Answer]:
    """Ask everything. `words` are searched for, one after another. Anything but a typed error comes out."""
    try:
        with Store.open(path) as store:
            return _Observation(store, words).run()
    except MemdbError as error:
        return {"open": Answer(None, str(error))}


class _Observation:
    def __init__(self, store: Store, words: tuple[str, ...]) -> None:
        self._store, self._words = store, words
        self.answers: dict[str, Answer] = {}

    def run(self) -> dict[str, Answer]:
        self._ask("open", lambda: Answer("opened"))
        self._ask("model", lambda: Answer(self._store.model))
        rows: list[RecordingRow] = []

        def recordings() -> Answer:
            rows.extend(self._store.recordings())
            return Answer([(row.name, row.spec, row.units, row.gaps, row.epochs, row.end_ns) for row in rows])

        self._ask("recordings", recordings)
        for row in rows:
            self._recording(row)
        index = CaptionIndex(self._store.path)
        query = np.random.default_rng(5).normal(size=VECTOR_SIZE).astype(np.float32)
        for word in self._words:
            self._ask(f"text {word}", lambda word=word: _hits(index.search(self._store, ENCODER, text=word)))
        self._ask("vector", lambda: _hits(index.search(self._store, ENCODER, vector=query)))
        self._ask(
            "both",
            lambda: _hits(index.search(self._store, ENCODER, text="a red star", vector=query, limit=5)),
        )
        return self.answers

    def _recording(self, row: RecordingRow) -> None:
        store, name = self._store, row.name
        self._ask(f"digest of {name}", lambda: Answer(Client(store).digest(name)))
        self._ask(f"captions of {name}", lambda: Answer(_captions(store, row)))
        self._ask(f"keys of {name}", lambda: _keys(store, row))
        self._ask(f"slices of {name}", lambda: _slices(store, row))
        self._ask(f"tombstones of {name}", lambda: Answer(row.tombstones))

    def _ask(self, what: str, question: Callable[[], Answer]) -> None:
        try:
            self.answers[what] = question()
        except MemdbError as error:
            self.answers[what] = Answer(None, str(error) or "an error without words")


def _hits(found: CaptionHits) -> Answer:
    hits = [(hit.recording_id, hit.unit, hit.start_ns, hit.end_ns, hit.how) for hit in found]
    scores = [round(hit.score, 4) for hit in found]
    return Answer((hits, scores), "; ".join(found.warnings))


def _captions(store: Store, row: RecordingRow) -> list[object]:
    units = store.units(row.id)
    said = [store.read_caption(unit) for unit in units if unit.has_caption]
    frames = [store.read_keyframe(unit) for unit in units]
    return [
        [(caption.text, caption.token_ids, np.asarray(caption.vector).tobytes()) for caption in said],
        frames,
    ]


def _keys(store: Store, row: RecordingRow) -> Answer:
    query = np.random.default_rng(7).normal(size=KEY_SIZE).astype(np.float32)
    found: list[object] = []
    with KeyTable.open(store, row.id) as table:
        search = KeySearch(table, backend="exact")
        for layer in range(min(LAYERS, table.layers)):
            hits = search.search(layer, query, 6)
            blocks = [(int(table.blocks[at]["unit"]), int(table.blocks[at]["block"])) for at in hits.rows]
            found.append((blocks, [round(float(score), 3) for score in hits.scores]))
        vectors = table.caption_vectors()
        found.append(hashlib.blake2b(vectors.tobytes()).hexdigest())
        found.append(table.captions["unit"].tolist())
        return Answer(found, "; ".join(problem.what for problem in table.problems))


def _slices(store: Store, row: RecordingRow) -> Answer:
    units = [unit for unit in store.units(row.id) if len(unit.slices)]
    with SliceReader(store, threads=1) as reader:
        batch = reader.read([(unit, np.arange(len(unit.slices))) for unit in units])
        raw = [batch.raw(index).tobytes() if whole else b"" for index, whole in enumerate(batch.whole)]
    return Answer(raw, "; ".join(bad.reason for bad in batch.bad))


class Quiet(logging.Handler):
    """Keeps what memdb logs from the terminal while a campaign provokes it, and counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
