"""Everything that a store answers, question by question: each answer, and whether a report came with it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memdb.captions import CaptionIndex
from memdb.client import Client
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.policy import read_policy
from memdb.reader import SliceReader
from memdb.schemas.errors import MemdbError
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.search import CaptionHits
from memdb.store import Store
from tools.trust.units import ENCODER, KEY_SIZE, LAYERS, VECTOR_SIZE

WORDS = ("star", "red white", "q")


@dataclass(frozen=True)
class Answer:
    value: object
    told: bool = False  # a warning, a problem or a typed error came with it
    untyped: bool = False  # an exception that is none of memdb's


Answers = dict[str, Answer]


OnError = Callable[[str, Exception], None]


def answers(path: Path, words: tuple[str, ...] = (), on_error: OnError | None = None) -> Answers:
    """Ask everything. Never raises; `on_error` gets what is raised and is none of memdb's own errors."""
    found = _Asked(on_error)
    with _heard() as heard:
        found.ask("policy", lambda: (repr(read_policy(path)), False))
        try:
            store = Store.open(path)
        except MemdbError as error:
            found["open"] = Answer(f"{type(error).__name__}: {error}", True)
            return found
        except Exception as error:
            found.untyped("open", error)
            return found
        with store:
            rows: list[RecordingRow] = []
            found.ask("model", lambda: (repr(store.model), False))
            found.ask(
                "recordings",
                lambda: (
                    [repr(replace(row, generation=0, last_commit=0)) for row in _rows(store, rows)],
                    False,
                ),
            )
            for row in rows:
                _ask_recording(found, store, row, heard)
            _ask_captions(found, store, (*WORDS, *words))
    return found


class _Asked(Answers):
    def __init__(self, on_error: OnError | None) -> None:
        super().__init__()
        self._on_error = on_error

    def untyped(self, name: str, error: Exception) -> None:
        self[name] = Answer(f"{type(error).__name__}: {error}", True, True)
        if self._on_error is not None:
            self._on_error(name, error)

    def ask(self, name: str, question: Callable[[], tuple[object, bool]]) -> None:
        try:
            self[name] = Answer(*question())
        except MemdbError as error:
            self[name] = Answer(f"{type(error).__name__}: {error}", True)
        except Exception as error:
            self.untyped(name, error)


def _rows(store: Store, rows: list[RecordingRow]) -> list[RecordingRow]:
    rows += store.recordings()
    return rows


def _ask_recording(found: _Asked, store: Store, row: RecordingRow, heard: list[str]) -> None:
    name = row.name
    units: list[UnitRow] = []

    def list_units() -> tuple[object, bool]:
        units.extend(store.units(row.id))
        return [_as_value(unit) for unit in units], False

    found.ask(f"units of {name}", list_units)
    if found[f"units of {name}"].told:
        return  # that is the answer to all that follows
    for tier in ("all", "kv", "captions"):
        found.ask(
            f"digest of {name}, {tier}",
            lambda tier=tier: (Client(store).digest(name, tier=tier), False),  # type: ignore[misc]
        )
    for unit in units:
        _ask_unit(found, store, name, unit)
    found.ask(f"state of {name}", lambda: _state(store, row, heard))
    _ask_slices(found, store, name, units)
    found.ask(f"keys of {name}", lambda: _keys(store, row))


def _ask_unit(found: _Asked, store: Store, name: str, unit: UnitRow) -> None:
    def caption() -> tuple[object, bool]:
        said = store.read_caption(unit)
        return (said.text, said.token_ids, _hash(said.vector)), False

    if unit.has_caption:
        found.ask(f"caption of {name} {unit.number}", caption)
    found.ask(f"key frame of {name} {unit.number}", lambda: (store.read_keyframe(unit), False))
    found.ask(f"own keys of {name} {unit.number}", lambda: (_hash(store.read_keys(unit)), False))


def _ask_slices(found: _Asked, store: Store, name: str, units: list[UnitRow]) -> None:
    """Each slice is an answer of its own: a bad one is told."""

    def read() -> tuple[object, bool]:
        wanted = [(unit, np.arange(len(unit.slices))) for unit in units if len(unit.slices)]
        places = [(unit.number, int(at)) for unit, numbers in wanted for at in numbers]
        with SliceReader(store, threads=1) as reader:
            batch = reader.read(wanted)
            for index, (place, whole) in enumerate(zip(places, batch.whole, strict=True)):
                value = _hash(batch.raw(index)) if whole else "bad"
                found[f"slice {place} of {name}"] = Answer(value, told=not whole)
        return len(places), False

    found.ask(f"slices of {name}", read)


def _state(store: Store, row: RecordingRow, heard: list[str]) -> tuple[object, bool]:
    heard.clear()
    state = store.state(row.id).load_latest(row.spec.encoding_fingerprint, row.units, row.tombstones)
    return (None if state is None else (state.unit, state.payload)), any("state/" in what for what in heard)


def _keys(store: Store, row: RecordingRow) -> tuple[object, bool]:
    query = np.random.default_rng(3).normal(size=KEY_SIZE).astype(np.float32)
    with KeyTable.open(store, row.id) as table:
        search = KeySearch(table, backend="exact")
        value: list[object] = []
        for layer in range(LAYERS):
            hits = search.search(layer, query, 6)
            places = [(int(table.blocks[at]["unit"]), int(table.blocks[at]["block"])) for at in hits.rows]
            value.append((places, hits.scores.tolist(), _hash(table.layer_keys(layer)[table.holds(layer)])))
        # What was forgotten may have a row without tokens or none: that says nothing either way.
        left = table.captions["tokens"] > 0
        value.append((table.blocks[table.blocks["tokens"] > 0].tolist(), table.captions[left].tolist()))
        value.append(_hash(table.caption_vectors()[left]))
        return value, bool(table.problems)


def _ask_captions(found: _Asked, store: Store, words: tuple[str, ...]) -> None:
    index = CaptionIndex(store.path)
    vector = np.random.default_rng(4).normal(size=VECTOR_SIZE).astype(np.float32)

    def hits_of(hits: CaptionHits) -> tuple[object, bool]:
        value = [(hit.recording_id, hit.unit, hit.start_ns, hit.end_ns) for hit in hits]
        return value, bool(hits.warnings)

    for limit in (5, 100):
        found.ask(
            f"{limit} captions by vector",
            lambda limit=limit: hits_of(index.search(store, ENCODER, vector=vector, limit=limit)),  # type: ignore[misc]
        )
    for word in words:
        found.ask(
            f"captions with {word}",
            lambda word=word: hits_of(index.search(store, ENCODER, text=word, limit=100)),  # type: ignore[misc]
        )
    found.ask(
        "captions by both",
        lambda: hits_of(index.search(store, ENCODER, text="red star", vector=vector, limit=100)),
    )


def _as_value(unit: UnitRow) -> tuple[object, ...]:
    return (
        *(unit.number, unit.revision, unit.start_ns, unit.end_ns, unit.epoch, unit.digest, unit.first_digest),
        *(unit.caption_tokens, unit.codec, unit.kept_ppm, unit.blocks.tobytes(), unit.slices.tobytes()),
    )


def _hash(array: object) -> str | None:
    if array is None:
        return None
    data = np.ascontiguousarray(array)
    return hashlib.blake2b(str((data.dtype, data.shape)).encode() + data.tobytes(), digest_size=8).hexdigest()


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What memdb logs as a warning, and nowhere else."""
    logger, ear = logging.getLogger("memdb"), _Ear()
    propagated = logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield ear.heard
    finally:
        logger.removeHandler(ear)
        logger.propagate = propagated
