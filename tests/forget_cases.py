"""Ingests in which something is forgotten, and what they must leave: computed by encoders that never forget."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb.client import connect
from memdb.codecs.planes import element_bytes
from memdb.contents import husk
from memdb.digest import unit_digest
from memdb.forget import OPEN_END_NS, forget
from memdb.ingest.encode.chunk import OpenMemory
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.encoder_state import Counters
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.pipeline import _ready
from memdb.ingest.run import Run
from memdb.ingest.sampling import sample
from memdb.ingest.sources import open_source
from memdb.ingest.stages import compose
from memdb.models.caption_vectors import caption_vectors
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import Interrupted
from memdb.schemas.rows import RecordingRow
from memdb.schemas.units import Unit
from memdb.state import read_state
from memdb.store import Store
from tests.run_cases import (
    CHUNK,
    CODEC,
    NAME,
    found_recipe,
    ingested,
    small_film,
    small_model,
    small_spec,
    unit_rows,
    until,
)

NS = 10**9
FRAMES = 26  # six batches of four and one of two
Span = tuple[float, float | None]  # seconds; None: up to now


@dataclass(frozen=True)
class Bench:
    model: VideoModel
    film: Path
    frames: list[ReadyFrame]


def made_bench(folder: Path) -> Bench:
    model, film = small_model(small_spec(folder)), small_film(folder / "film.mp4", FRAMES)
    with open_source(film) as source:
        frames = [_ready(frame, model) for frame in sample(source.frames(), 1)]
    return Bench(model, film, frames)


def new_encoder(bench: Bench, recipe: str, counters: Counters | None = None) -> StreamEncoder:
    row = found_recipe(recipe)
    stages = compose(row)
    init = bench.model.init_ids(str(row.encode.params["init_prompt"]))
    name = stages.captioner.encoder
    vectors = caption_vectors(name, lambda: bench.model) if name else None
    encoder = StreamEncoder(bench.model, stages, init, vectors)
    if counters is not None:
        encoder.start_fresh(counters)
    return encoder


def batches(bench: Bench, size: int = CHUNK) -> list[list[ReadyFrame]]:
    return [bench.frames[start : start + size] for start in range(0, FRAMES, size)]


def undisturbed(bench: Bench, recipe: str) -> list[bytes]:
    """The units' digests of an ingest in which nothing is forgotten."""
    encoder = new_encoder(bench, recipe)
    units = [unit for batch in batches(bench) for unit in encoder.step(batch)]
    return digests(units + encoder.finish())


def digests(units: Sequence[Unit]) -> list[bytes]:
    return [unit_digest(unit) for unit in units]


def forget_now(store: Path, span: Span | None = None, name: str = NAME) -> None:
    """As another process would: with a connection of its own."""
    with Store.open(store, write=True) as found:
        if span is None:
            forget(found, name)
        else:
            start, end = span
            forget(found, name, start_ns=round(start * NS), end_ns=None if end is None else round(end * NS))


def without(bench: Bench, recipe: str, units: Sequence[Unit], span: Span) -> list[Unit]:
    """Units as a forget of a span leaves them."""
    start_ns, end_ns = round(span[0] * NS), OPEN_END_NS if span[1] is None else round(span[1] * NS)
    size = element_bytes(CODEC[recipe] or "none", "float32") if CODEC[recipe] else 0
    return [
        husk(unit, start_ns, end_ns, size) if unit.start_ns < end_ns and unit.end_ns > start_ns else unit
        for unit in units
    ]


def row_of(store: Path) -> RecordingRow:
    with Store.open(store) as found:
        return found.recording(NAME)


def epochs(store: Path) -> list[tuple[int, int]]:
    return [(epoch.number, epoch.first_unit) for epoch in row_of(store).epochs]


def states(store: Path) -> list[Path]:
    return sorted((store / "state").glob("*.state"))


def check_whole(store: Path) -> None:
    """Nothing is damaged, the digest is what is on the disk, positions and times only grow, states are clean."""
    with connect(store, create=False) as client:
        assert client.verify().problems == []
        first = client.digest(NAME)
    with connect(store, create=False) as client:
        assert client.digest(NAME) == first
    rows, recording = unit_rows(store), row_of(store)
    assert all(one.end_ns <= two.start_ns for one, two in pairwise(rows))
    assert [row.epoch for row in rows] == sorted(row.epoch for row in rows)
    known = {epoch.number for epoch in recording.epochs}
    assert {row.epoch for row in rows} <= known
    positions = np.concatenate([row.blocks["position"] for row in rows])
    assert (np.diff(positions) > 0).all()
    for path in states(store):
        assert not read_state(path).holds_forgotten(recording.tombstones)


def before_batch(patch: pytest.MonkeyPatch, hooks: dict[int, Callable[[], object]]) -> None:
    """Do something just before batch number `n` is encoded, and before the encoder takes note."""
    encode, calls = Run.encode, iter(range(1 << 30))

    def hooked(self: Run, batch: Any) -> Any:
        number = next(calls)
        if number in hooks:
            hooks[number]()
        return encode(self, batch)

    patch.setattr(Run, "encode", hooked)


class Crash(Exception):
    """Stands for a death: nothing more is encoded, what was handed over is written."""


def crash() -> None:
    raise Crash


def overlap(frame: ReadyFrame, span: Span) -> bool:
    return frame.start_ns < (OPEN_END_NS if span[1] is None else span[1] * NS) and frame.end_ns > span[0] * NS


def expected(bench: Bench, recipe: str, at: int, span: Span, *, touched: bool) -> tuple[list[Unit], int]:
    """Units of an ingest in which a span is forgotten before frame `at`, and how many there were by then.

    Where the encoder was `touched`, another one goes on, with the open frames that are left. A unit closes where
    the frame behind it is gone.
    """
    first, whole = new_encoder(bench, recipe), at // CHUNK * CHUNK
    units = [unit for batch in batches(bench)[: at // CHUNK] for unit in first.step(batch)]
    begins, encoder, opened = len(units), first, []
    if touched:
        encoder = new_encoder(bench, recipe, replace(first.counters, epoch=1))
        if isinstance(first._encoding, OpenMemory):  # of a bounded memory what does not overlap goes over
            encoder._encoding, memory = first._encoding, first._encoding.memory
            memory.settle()
            gone = torch.tensor([frame.number for frame in bench.frames if overlap(frame, span)])
            memory._hold([own.at((~torch.isin(own.frame, gone)).nonzero()[:, 0]) for own in memory.layers])
            memory._look([])
        opened = bench.frames[whole - len(first._carried.opened) : whole]
    units = without(bench, recipe, units, span)
    for batch in [opened, *batches(bench)[at // CHUNK :]]:
        for gone, frames in groupby(batch, lambda frame: frame.number < at and overlap(frame, span)):
            units += encoder.finish() if gone else encoder.step(list(frames))
    return units + encoder.finish(), begins


class Paced:
    """The film's sampled frames, and `hooks`: what to do before frame number `n` is given.

    By then the encoder has taken every whole batch of the frames before, and the others wait in its hands.
    """

    def __init__(self, bench: Bench, hooks: dict[int, Callable[[], object]]) -> None:
        with open_source(bench.film) as source:
            self._pictures = [frame.image for frame in sample(source.frames(), 1)]
        self._hooks, self._encoded = hooks, 0
        encode = Run.encode

        def counted(own: Run, batch: Any) -> Any:
            done = encode(own, batch)
            self._encoded += 1
            return done

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(Run, "encode", counted)

    def frames(self) -> Iterator[tuple[float, Any]]:
        try:
            for number, picture in enumerate(self._pictures):
                hook = self._hooks.get(number)
                if hook is not None:
                    until(lambda number=number: self._encoded == number // CHUNK)
                    hook()
                yield float(number), picture
        finally:
            self._patch.undo()


def stopped(bench: Bench, store: Path, recipe: str, batch: int) -> int:
    """An ingest that stops after batch number `batch`, its state saved; its units."""
    stop = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        before_batch(patch, {batch: stop.set})
        with pytest.raises(Interrupted):
            ingested(store, bench.model, bench.film, recipe, stop=stop)
    return len(unit_rows(store))


def dead(bench: Bench, store: Path, recipe: str, batch: int, **hooks: Any) -> int:
    """An ingest that dies before batch number `batch`, with a state after every commit; its units."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamEncoder, "state_bytes", 0)
        before_batch(patch, {batch: crash})
        with pytest.raises(Crash):
            ingested(store, bench.model, bench.film, recipe)
    return len(unit_rows(store))


def behind(bench: Bench, recipe: str, units: int, span: Span, epoch: int = 1) -> list[Unit]:
    """Units of an ingest that lost its state after so many units: the rest is of a fresh window behind them."""
    whole = new_encoder(bench, recipe)
    first = [unit for batch in batches(bench) for unit in whole.step(batch)][:units]
    tokens = bench.model.shape.frame_tokens if len(first[-1].blocks) else 0
    position = int(first[-1].blocks[-1]["position"]) + tokens if tokens else 0
    counters = Counters(unit=units, epoch=epoch, position=position, widths=dict(whole.counters.widths))
    encoder = new_encoder(bench, recipe, counters)
    rest = [frame for frame in bench.frames if frame.start_ns >= first[-1].end_ns]
    last = [unit for at in range(0, len(rest), CHUNK) for unit in encoder.step(rest[at : at + CHUNK])]
    return without(bench, recipe, first, span) + last + encoder.finish()
