"""Those of a crowd who ask: each answer is held to what was acknowledged before and begun by its end."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from memdb.captions import CaptionIndex
from memdb.client import Client
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.reader import SliceReader
from memdb.schemas.errors import StoreError, UnknownRecording
from memdb.schemas.rows import RecordingRow
from memdb.schemas.search import CaptionHits
from memdb.schemas.units import Unit
from memdb.store import Store, recording_digest
from tools.trust.crowd_log import Between, Key, Life, Moments, life_of
from tools.trust.crowd_worker import Worker
from tools.trust.questions import Row
from tools.trust.units import ENCODER, KEY_SIZE, LAYERS, make_unit, raw_slices

_STAY = 40  # questions, about, to one open store before it is opened anew
_PAUSE_S = 0.1
_TOLERANCE = 1e-3


def read(worker: Worker) -> None:
    """Questions of all kinds; now and then from a store that is opened anew."""
    while worker.goes_on:
        with Store.open(worker.path) as store:
            reader = _Reader(worker, store)
            for _ in range(worker.random.randrange(1, 2 * _STAY)):
                if not worker.goes_on:
                    return
                reader.ask()
                time.sleep(worker.random.random() * _PAUSE_S)


class _Reader:
    def __init__(self, worker: Worker, store: Store) -> None:
        self._worker, self._store = worker, store
        self._random = worker.random
        self._captions = CaptionIndex(store.path)
        self._kinds: dict[str, tuple[int, Callable[[], None]]] = {
            "text": (4, self._text),
            "vector": (3, self._vector),
            "keys": (3, self._keys),
            "slices": (4, self._slices),
            "parts": (3, self._parts),
            "digest": (1, self._digest),
            "stats": (1, self._stats),
            "verify": (1, self._verify),
        }

    def ask(self) -> None:
        weights = [weight for weight, _ in self._kinds.values()]
        kind = self._random.choices(list(self._kinds), weights)[0]
        with self._worker.operation(kind):
            self._kinds[kind][1]()

    def _text(self) -> None:
        self._ask_captions("text", lambda unit, word: {"text": word})

    def _vector(self) -> None:
        def by_vector(unit: Unit, word: str) -> dict[str, object]:
            assert unit.caption is not None
            return {"vector": unit.caption.vector, "limit": 1}

        self._ask_captions("vector", by_vector)

    def _ask_captions(self, what: str, question: Callable[[Unit, str], dict[str, object]]) -> None:
        """For the one caption that has this word or vector."""
        before = self._worker.log.now()
        drawn = self._draw(before)
        if drawn is None:
            return
        key, number = drawn
        stream = before[key].stream
        unit = make_unit(stream, number)
        if unit.caption is None:
            return
        rows = self._ids()
        hits = self._captions.search(self._store, ENCODER, **question(unit, stream.word(number)))  # type: ignore[arg-type]
        rows |= self._ids()
        life = self._moments(before)[key]
        said = {kept.unit(number).caption is not None for kept in life.keeps()}
        may = True in said and life.may_be_there
        must = said == {True} and not life.may_be_missing
        self._judge(f"{what} of unit {number} of {key}", hits, rows, key, number, may=may, must=must)

    def _judge(
        self,
        what: str,
        hits: CaptionHits,
        rows: dict[str, Key],
        key: Key,
        number: int,
        *,
        may: bool,
        must: bool,
    ) -> None:
        found = [(rows.get(hit.recording_id), hit.unit) for hit in hits]
        if hits.warnings:
            self._worker.wrong(f"{what}: warns of {hits.warnings}")
        if must and (not found or found[0] != (key, number)):
            self._worker.wrong(f"{what}: finds {found}")
        if not may and (key, number) in found:
            self._worker.wrong(f"{what}: is forgotten, and is found")
        if what.startswith("text") and any(one != (key, number) and one[0] is not None for one in found):
            self._worker.wrong(f"{what}: finds {found}")

    def _keys(self) -> None:
        before = self._worker.log.now()
        drawn = self._draw(before)
        row = self._row(drawn[0]) if drawn else None
        if drawn is None or row is None:
            return
        key, _ = drawn
        layer = self._random.randrange(LAYERS)
        query = (
            np.random.default_rng(self._random.randrange(1 << 30)).normal(size=KEY_SIZE).astype(np.float32)
        )
        try:
            with KeyTable.open(self._store, row.id) as table:
                hits = KeySearch(table, backend="exact").search(layer, query, 4)
                found = [(int(table.blocks[at]["unit"]), int(table.blocks[at]["block"])) for at in hits.rows]
                problems = list(table.problems)
                size = f"{len(table)} rows up to unit {int(table.blocks['unit'].max(initial=0))}"
        except (StoreError, UnknownRecording) as error:
            self._excuse("keys", key, before, error)
            return
        life = self._moments(before)[key]
        if problems:
            self._worker.wrong(f"keys of {key}: {problems}")
        self._judge_keys(f"keys of {key}, layer {layer}, {size}", life, layer, query, found)

    def _judge_keys(
        self, what: str, life: Between, layer: int, query: Row, found: list[tuple[int, int]]
    ) -> None:
        keeps = life.keeps()
        if any(
            all(_score(kept.unit(unit), layer, block, query) is None for kept in keeps)
            for unit, block in found
        ):
            self._worker.wrong(f"{what}: finds {found}, not all of which there are")
            return
        first = life.after.stream
        scores = [_score(make_unit(first, unit), layer, block, query) or 0.0 for unit, block in found]
        least = min(scores, default=-np.inf) if len(found) == 4 else -np.inf
        for number in range(life.before.units):
            units = [kept.unit(number) for kept in keeps]
            for block in range(len(units[0].blocks)):
                score = _score(units[-1], layer, block, query)  # the one of which most is forgotten
                if score is not None and score > least + _TOLERANCE and (number, block) not in found:
                    self._worker.wrong(f"{what}: misses block {block} of unit {number}, finds {found}")
                    return

    def _slices(self) -> None:
        before = self._worker.log.now()
        drawn = self._draw(before)
        row = self._row(drawn[0]) if drawn else None
        if drawn is None or row is None:
            return
        key, number = drawn
        try:
            units = self._store.units(row.id, first=number, last=number + 3)
        except (StoreError, UnknownRecording) as error:
            self._excuse("slices", key, before, error)
            return
        wanted = [(unit, np.arange(len(unit.slices))) for unit in units if len(unit.slices)]
        with SliceReader(self._store, threads=2) as reader:
            batch = reader.read(wanted)
            at = 0
            now = self._moments(before)[key]
            for unit, places in wanted:
                possible = [
                    raw_slices(now.after.stream, kept.unit(unit.number))
                    for kept in now.keeps()
                    if kept.unit(unit.number).kv is not None
                ]
                possible = [one for one in possible if len(one) == len(places)]
                for place in range(len(places)):
                    if batch.whole[at + place]:
                        got = batch.raw(at + place)
                        if not any(np.array_equal(got, one[place]) for one in possible):
                            self._worker.wrong(f"slice {place} of unit {unit.number} of {key} is another")
                    elif not (now.after.is_going or now.after.begun_spans[now.before.spans :]):
                        self._worker.wrong(f"slice {place} of unit {unit.number} of {key} cannot be read")
                at += len(places)

    def _parts(self) -> None:
        before = self._worker.log.now()
        drawn = self._draw(before)
        row = self._row(drawn[0]) if drawn else None
        if drawn is None or row is None:
            return
        key, number = drawn
        try:
            unit = self._store.unit(row.id, number)
            text = self._store.read_caption(unit).text if unit.has_caption else None
            picture = self._store.read_keyframe(unit)
        except (StoreError, UnknownRecording) as error:
            life = self._moments(before)[key]
            if not life.after.begun_spans[life.before.spans :]:  # a row of before a forgetting has no file
                self._excuse("parts", key, before, error)
            return
        kept = [one.unit(number) for one in self._moments(before)[key].keeps()]
        if text not in [one.caption.text if one.caption else None for one in kept]:
            self._worker.wrong(f"the caption of unit {number} of {key} is {text!r}")
        if picture not in [one.keyframe for one in kept]:
            self._worker.wrong(f"the key frame of unit {number} of {key} is another")

    def _digest(self) -> None:
        before = self._worker.log.now()
        drawn = self._draw(before)
        row = self._row(drawn[0]) if drawn else None
        if drawn is None or row is None:
            return
        try:
            digest = recording_digest(self._store, row.name)
        except (StoreError, UnknownRecording) as error:
            self._excuse("digest", drawn[0], before, error)
            return
        moments = self._moments(before)
        if not any(digest in life.digests() for key, life in moments.items() if key[0] == row.name):
            self._worker.wrong(f"the digest of {row.name} is another")

    def _stats(self) -> None:
        before = self._worker.log.now()
        seen = {row.name: row.units for row in Client(self._store).stats().recordings}
        for (name, _), life in self._moments(before).items():
            if life.after.is_going or not life.before.units:
                continue
            if not life.before.units <= seen.get(name, -1) <= life.after.begun_units:
                self._worker.wrong(f"stats count {seen.get(name)} units of {name}")

    def _verify(self) -> None:
        for problem in Client(self._store).verify().problems:
            self._worker.wrong(f"verify: {problem.file}: {problem.what}")

    # Helpers

    def _draw(self, lives: dict[Key, Life]) -> tuple[Key, int] | None:
        """A recording, also one that is forgotten, and one of its units."""
        known = [(key, life) for key, life in lives.items() if life.units]
        alive = [one for one in known if not one[1].is_gone]
        if not known:
            return None
        key, life = self._random.choice(alive if alive and self._random.random() < 0.8 else known)
        return key, self._random.randrange(life.units)

    def _row(self, key: Key) -> RecordingRow | None:
        """The recording of a life; None where it is another's by now, of which other questions know."""
        for row in self._store.recordings():
            if (row.name, life_of(row.spec)) == key:
                return row
        return None

    def _ids(self) -> dict[str, Key]:
        return {row.id: (row.name, life_of(row.spec)) for row in self._store.recordings()}

    def _moments(self, before: dict[Key, Life]) -> Moments:
        return Moments(before, self._worker.log.now())

    def _excuse(self, what: str, key: Key, before: dict[Key, Life], error: Exception) -> None:
        """An error is right where the recording was being forgotten."""
        if not self._moments(before)[key].after.is_going:
            raise error


def _score(unit: Unit, layer: int, block: int, query: Row) -> float | None:
    """None where there is no such block any more."""
    if unit.keys is None or block >= len(unit.blocks) or not unit.blocks[block]["tokens"]:
        return None
    return float(unit.keys[layer, block].astype(np.float32) @ query)
