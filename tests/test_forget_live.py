"""What is forgotten while an ingest runs leaves its encoder, its hands and its states, and the rest goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from memdb.ingest.encode.window import SlidingWindow
from memdb.ingest.encoder import Counters, StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.pipeline import _ready
from memdb.ingest.run import Run
from memdb.ingest.sampling import sample
from memdb.ingest.sources import open_source
from memdb.ingest.stages import compose
from memdb.models.caption_vectors import caption_vectors
from memdb.models.protocol import VideoModel
from memdb.recipes import recipe as named
from memdb.schemas.errors import Interrupted, StoreError
from memdb.schemas.recording import Tombstone
from memdb.schemas.rows import RecordingRow
from memdb.schemas.units import Unit
from memdb.state import SavedState, StateFiles, read_state
from memdb.store import Store
from memdb.writer import RecordingWriter
from tests.run_cases import (
    CHUNK,
    CODEC,
    NAME,
    RECIPES,
    SETTINGS,
    WINDOW_TOKENS,
    count_units,
    ingested,
    run,
    small_film,
    small_model,
    small_spec,
    unit_digests,
    unit_rows,
    until,
)
from tests.test_live import Camera, filmed

NS = 10**9
FRAMES = 26  # six batches of four and one of two
Span = tuple[float, float | None]  # seconds; None: up to now


@dataclass(frozen=True)
class Bench:
    model: VideoModel
    film: Path
    frames: list[ReadyFrame]
    whole: dict[str, list[bytes]]  # by recipe, the units' digests of an ingest in which nothing is forgotten


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("forget")
    model, film = small_model(small_spec(folder)), small_film(folder / "film.mp4", FRAMES)
    with open_source(film) as source:
        frames = [_ready(frame, model) for frame in sample(source.frames(), 1)]
    whole = {}
    for recipe in RECIPES:
        ingested(folder / f"{recipe}.memdb", model, film, recipe)
        whole[recipe] = unit_digests(folder / f"{recipe}.memdb")
    return Bench(model, film, frames, whole)


def new_encoder(bench: Bench, recipe: str, counters: Counters | None = None) -> StreamEncoder:
    row = named(recipe, codec=CODEC[recipe], settings=SETTINGS[recipe])
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


# How far back an encoder reaches


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_the_reach_is_what_the_state_holds(bench: Bench, recipe: str, size: int) -> None:
    """After every batch, against the bytes of the state: which frames' keys, visual tokens and clips are in it."""
    encoder = new_encoder(bench, recipe)
    kept = KeptBytes(bench, encoder)
    assert encoder.reach_ns == 0
    for batch in batches(bench, size):
        kept.step(batch)
        payload = encoder.state()
        held = kept.held(payload)
        assert held, "something is held after the first batch"
        assert encoder.reach_ns == min(start for start, _ in held)
        for frame in bench.frames[: batch[-1].number + 1]:
            inside = any(start <= frame.start_ns < end for start, end in held)
            # A slot's first and last nanosecond, and the moment at which it ends: [start, end) against [start, end).
            for at_ns in (frame.start_ns, frame.end_ns - 1):
                assert encoder.holds([Tombstone(0, at_ns, at_ns + 1, 99, 0)]) == inside
        assert not encoder.holds([Tombstone(0, 0, encoder.reach_ns, 99, 0)])
        assert not encoder.holds([Tombstone(0, batch[-1].end_ns, OPEN_END_NS, 99, 0)])
        again = new_encoder(bench, recipe)
        again.restore(payload)
        assert (again.reach_ns, again.state()) == (encoder.reach_ns, payload)
    if recipe == "rekv":
        assert encoder.reach_ns == bench.frames[-WINDOW_TOKENS // 4].start_ns


class KeptBytes:
    """Steps an encoder and remembers the bytes of what it computed, to look for them in its states."""

    def __init__(self, bench: Bench, encoder: StreamEncoder) -> None:
        self._encoder, self._model = encoder, bench.model
        self._keys: list[tuple[int, int, bytes]] = []  # of each frame: start, end, a key of its last token
        self._tokens: list[tuple[int, int, bytes]] = []  # of each frame: start, end, its visual tokens
        self._clips: list[tuple[int, int, bytes]] = []  # of each unit: start, end, its recurrent tokens

    def step(self, batch: Sequence[ReadyFrame]) -> list[Unit]:
        encode, queue = SlidingWindow.encode, list(self._encoder._queue)
        seen = self._model.visual_tokens([frame.pixels for frame in batch])
        self._tokens += [(f.start_ns, f.end_ns, raw(tokens)) for f, tokens in zip(batch, seen, strict=True)]

        def listening(own: SlidingWindow, model: Any, context: Any, frames: Any) -> Any:
            kv = encode(own, model, context, frames)
            at = 0
            for tokens in frames:
                at += len(tokens)
                start, end, _ = self._tokens[len(self._keys)]
                self._keys.append((start, end, raw(kv[-1].k[0, at - 1])))  # the last layer's, (D,)
            return kv

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SlidingWindow, "encode", listening)
            units = self._encoder.step(batch)
        came = [part for part in self._encoder._queue if not any(part is old for old in queue)]
        for unit, part in zip(units[len(units) - len(came) :], came, strict=True):
            self._clips.append((unit.start_ns, unit.end_ns, raw(part)))
        return units

    def held(self, payload: bytes) -> list[tuple[int, int]]:
        """The spans of what a state holds, found by its bytes."""
        tensors = self._keys + self._tokens + self._clips
        return [(start, end) for start, end, data in tensors if data in payload]

    def bytes_of(self, start_ns: int, end_ns: int) -> list[bytes]:
        tensors = self._keys + self._tokens + self._clips
        return [data for start, end, data in tensors if start < end_ns and end > start_ns]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


# Forgetting what the encoder holds


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
        opened = bench.frames[whole - len(first._opened) : whole]
    units = without(bench, recipe, units, span)
    for batch in [opened, *batches(bench)[at // CHUNK :]]:
        for gone, frames in groupby(batch, lambda frame: frame.number < at and overlap(frame, span)):
            units += encoder.finish() if gone else encoder.step(list(frames))
    return units + encoder.finish(), begins


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("at", "span"),
    [(4, (11.5, 12.2)), (4, (10, None)), (2, (6, 7)), (2, (7, 8))],
)
def test_what_the_encoder_held_is_dropped_and_an_epoch_begins(
    bench: Bench, recipe: str, at: int, span: Span, tmp_path: Path
) -> None:
    """Earlier units are husks, later ones those of a fresh window; of an open clip only what overlaps goes."""
    store = tmp_path / "s.memdb"
    frames = Paced(bench, {CHUNK * at: lambda: forget_now(store, span)}).frames()
    report = ingested(store, bench.model, frames, recipe)
    units, begins = expected(bench, recipe, CHUNK * at, span, touched=True)
    assert unit_digests(store) == digests(units)
    assert (report.epoch, epochs(store)) == (1, [(0, 0), (1, begins)])
    rows = unit_rows(store)
    assert {row.epoch for row in rows[begins:]} == {1}
    start_ns, end_ns = round(span[0] * NS), round(span[1] * NS) if span[1] else CHUNK * at * NS
    for row in rows:
        meant = row.start_ns < end_ns and row.end_ns > start_ns
        if meant:
            assert not row.has_caption
            gone = (row.blocks["start_ns"] < end_ns) & (row.blocks["end_ns"] > start_ns)
            assert (row.blocks["tokens"] > 0).tolist() == (~gone).tolist()
            assert set(row.slices["block"].tolist()) == set(np.flatnonzero(~gone).tolist())
        assert row.number < begins or not meant, "nothing that came later spans it"
    check_whole(store)


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


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_it_did_not_hold_costs_no_epoch_and_no_bit(bench: Bench, recipe: str, tmp_path: Path) -> None:
    """The window and the recurrent tokens are past the span: later units are those of an ingest without a forget."""
    store = tmp_path / "s.memdb"
    frames = Paced(bench, {20: lambda: forget_now(store, (1, 3)), 24: lambda: forget_now(store, (40, 50))})
    report = ingested(store, bench.model, frames.frames(), recipe)
    units, _ = expected(bench, recipe, 20, (1, 3), touched=False)
    assert unit_digests(store) == digests(units)
    changed = [one != two for one, two in zip(unit_digests(store), bench.whole[recipe], strict=True)]
    assert changed == [row.start_ns < 3 * NS and row.end_ns > NS for row in unit_rows(store)]
    assert (report.epoch, epochs(store)) == (0, [(0, 0)])
    assert read_state(states(store)[-1]).tombstones == 2, "it took note"
    check_whole(store)


@pytest.mark.parametrize("recipe", RECIPES)
def test_units_on_their_way_to_the_disk_are_forgotten_too(
    bench: Bench, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer has written two batches of four when the fifth is due: the content is the same as if all were."""
    store, written, done = tmp_path / "s.memdb", [0], threading.Event()
    append, save, offered = RecordingWriter.append, StateFiles.save, []
    taken: list[int] = []

    def late(self: RecordingWriter, units: Sequence[Unit], **more: Any) -> int:
        if written[0] >= 2:
            assert done.wait(60)
        written[0] += 1
        return append(self, units, **more)

    def offering(self: Run, state: SavedState, keep: Any = Run._save) -> None:
        offered.append(state)
        keep(self, state)

    def taking(self: StateFiles, unit: int, payload: bytes, **more: int) -> None:
        taken.append(len(offered) - 1)
        save(self, unit, payload, **more)

    def forget_then() -> None:
        forget_now(store, (3, 13))
        assert len(unit_rows(store)) < len(expected(bench, recipe, 16, (3, 13), touched=True)[0])
        done.set()

    monkeypatch.setattr(RecordingWriter, "append", late)
    monkeypatch.setattr(Run, "_save", offering)
    monkeypatch.setattr(StateFiles, "save", taking)
    monkeypatch.setattr(StreamEncoder, "state_bytes", 0)  # a state with every commit
    before_batch(monkeypatch, {4: forget_then})
    ingested(store, bench.model, bench.film, recipe)
    units, begins = expected(bench, recipe, 16, (3, 13), touched=True)
    assert unit_digests(store) == digests(units)
    assert epochs(store) == [(0, 0), (1, begins)]
    refused = [state for at, state in enumerate(offered) if at not in taken]
    assert refused, "states were on their way as well"
    assert all(state.reach_ns < 13 * NS and state.tombstones == 0 for state in refused)
    check_whole(store)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("span", "touched"), [((15, None), True), ((16, 18), False), ((16.5, 30), False)])
def test_frames_that_wait_for_their_batch_are_forgotten_too(
    bench: Bench, recipe: str, span: Span, touched: bool, tmp_path: Path
) -> None:
    """Frames 16 and 17 wait for 18 and 19, which come later and stay, whatever the span says of their times."""
    store = tmp_path / "s.memdb"
    ingested(store, bench.model, Paced(bench, {18: lambda: forget_now(store, span)}).frames(), recipe)
    units, begins = expected(bench, recipe, 18, span, touched=touched)
    assert unit_digests(store) == digests(units)
    assert epochs(store) == ([(0, 0), (1, begins)] if touched else [(0, 0)])
    spans = [(row.start_ns // NS, row.end_ns // NS) for row in unit_rows(store)]
    assert all(end <= 16 or start >= 18 for start, end in spans), "no unit spans what is gone"
    assert 18 in {start for start, _ in spans}
    check_whole(store)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_byte_of_it_is_in_the_states_that_follow(
    bench: Bench, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped a batch after the forget, with a window that would hold it still."""
    kept = KeptBytes(bench, new_encoder(bench, recipe))
    for batch in batches(bench)[:5]:
        kept.step(batch)
    held = {}
    for span in ((14, 16), None):
        store, stop = tmp_path / f"{span}.memdb", threading.Event()
        with pytest.MonkeyPatch.context() as patch:
            before_batch(patch, {4: lambda: forget_now(store, span) if span else None})  # noqa: B023
            before_batch(patch, {4: stop.set})
            with pytest.raises(Interrupted):
                ingested(store, bench.model, bench.film, recipe, stop=stop)
        payloads = [path.read_bytes() for path in states(store)]
        assert payloads
        held[span] = [
            any(data in payload for payload in payloads) for data in kept.bytes_of(14 * NS, 16 * NS)
        ]
    assert any(held[None]), "without a forget they are there"
    assert not any(held[14, 16])


def test_forgotten_again_and_again_at_any_moment(bench: Bench, tmp_path: Path) -> None:
    """Whatever is forgotten when: a frame is there, once, unless something that overlaps it was forgotten later."""
    random = np.random.default_rng(5)
    for recipe in ("rekv", "hybrid", "hybrid"):
        store = tmp_path / f"{random.integers(1 << 30)}.memdb"
        moments = sorted(random.choice(np.arange(3, FRAMES), 4, replace=False).tolist())
        spans: dict[int, Span] = {}
        for moment in moments:
            start = float(random.uniform(0, moment))
            spans[moment] = (start, None if random.random() < 0.25 else start + float(random.uniform(0.1, 4)))
        hooks = {moment: lambda span=span: forget_now(store, span) for moment, span in spans.items()}  # noqa: B023
        ingested(store, bench.model, Paced(bench, hooks).frames(), recipe)
        left = [
            frame.start_ns
            for frame in bench.frames
            if not any(frame.number < moment and overlap(frame, span) for moment, span in spans.items())
        ]
        rows = unit_rows(store)
        blocks = np.concatenate([row.blocks for row in rows])
        assert blocks["start_ns"][blocks["tokens"] > 0].tolist() == left, (recipe, spans)
        held = [row.blocks["start_ns"][row.slices["block"][row.slices["layer"] == 0]] for row in rows]
        assert np.concatenate(held).tolist() == left, (recipe, spans)
        check_whole(store)


def test_a_camera_whose_last_seconds_another_process_forgets(bench: Bench, tmp_path: Path) -> None:
    """From the eighth second up to now: units, window, and frames that make no batch yet. What comes later is kept."""
    store = tmp_path / "s.memdb"
    with Camera(filmed(tmp_path / "film.ts", FRAMES)) as camera, ThreadPoolExecutor(1) as threads:
        camera.share = 0.6
        live = threads.submit(ingested, store, bench.model, camera.address, "rekv", reconnect_s=0)
        try:
            until(lambda: count_units(store) >= 12)
            told = run("forget", "--store", str(store), "--recording", NAME, "--start", "8", "--json").json
        finally:
            camera.go_on.set()
        report = live.result()
        camera.shutdown()
    rows = unit_rows(store)
    left = [row.start_ns // NS for row in rows if row.blocks["tokens"].all()]
    came = next(second for second in left if second >= 8)
    assert came >= 8 + told["units"] >= 12
    assert left == [*range(8), *range(came, 24)]
    assert [row.number for row in rows if not row.blocks["tokens"].all()] == list(range(8, 8 + told["units"]))
    assert (report.epoch, epochs(store)) == (1, [(0, 0), (1, 8 + told["units"])])
    assert all(row.parts == {} for row in rows[8 : 8 + told["units"]])
    check_whole(store)


# The whole recording


@pytest.mark.parametrize("recipe", ["rekv", "rlivs"])
def test_a_recording_forgotten_while_it_is_written_ends_the_ingest_and_begins_anew(
    bench: Bench, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.memdb"
    ingested(store, bench.model, bench.film, "rekv", recording="other")
    with pytest.MonkeyPatch.context() as patch:
        before_batch(patch, {3: lambda: forget_now(store)})
        with pytest.raises(StoreError, match="'lobby' was forgotten while it was written"):
            ingested(store, bench.model, bench.film, recipe)
    with connect(store, create=False) as client:
        assert [row.name for row in client.recordings()] == ["other"]
        assert client.verify().problems == []
    assert [row.digest for row in unit_rows(store, "other")] == bench.whole["rekv"]
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.resumed_from_unit, report.epoch) == (None, 0)
    assert unit_digests(store) == bench.whole[recipe]
    with Store.open(store) as found:
        assert found.recording(NAME).id not in found.catalog.forgotten()
    check_whole(store)


# Going on after a stop or a death


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


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("death", [False, True])
def test_a_state_behind_the_span_serves(bench: Bench, recipe: str, death: bool, tmp_path: Path) -> None:
    """Also where units behind it are encoded again: none of them is a husk. No epoch, no other bit."""
    store = tmp_path / "s.memdb"
    units = dead(bench, store, recipe, 6) if death else stopped(bench, store, recipe, 4)
    if death:
        states(store)[-1].unlink()
    before = states(store)
    forget_now(store, (1, 3))
    assert states(store) == before
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.epoch, report.replayed_units > 0, report.resumed_from_unit) == (
        0,
        death,
        units - report.replayed_units,
    )
    plain, _ = expected(bench, recipe, 24, (1, 3), touched=False)
    assert unit_digests(store) == digests(plain)
    check_whole(store)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("span", [(13, 15), (0, None)])
def test_without_a_state_behind_the_span_an_epoch_begins_behind_the_watermark(
    bench: Bench, recipe: str, span: Span, tmp_path: Path
) -> None:
    """The film is not encoded again from its beginning, where the forgotten would be seen; positions go on."""
    store = tmp_path / "s.memdb"
    units = stopped(bench, store, recipe, 4)
    forget_now(store, span)
    assert states(store) == []
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.replayed_units, report.epoch) == (0, 1)
    assert epochs(store) == [(0, 0), (1, units)]
    assert unit_digests(store) == digests(behind(bench, recipe, units, span))
    check_whole(store)


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_an_epoch_that_has_no_unit_yet_is_not_begun_twice(
    bench: Bench, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgotten between the last batch and the end of the ingest, whose state is then lost."""
    store, ending = tmp_path / "s.memdb", Run.ending

    def forgetting(self: Run, *, flush: bool) -> Any:
        forget_now(store, (17, 18))
        return ending(self, flush=flush)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "ending", forgetting)
        units = stopped(bench, store, recipe, 4)
    assert epochs(store) == [(0, 0), (1, units)]
    assert len(states(store)) == 1, "that of the new epoch"
    states(store)[0].unlink()
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.epoch, epochs(store)) == (1, [(0, 0), (1, units)])
    assert unit_digests(store) == digests(behind(bench, recipe, units, (17, 18)))
    check_whole(store)


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_dead_after_the_forget_it_goes_on_from_its_new_epoch(
    bench: Bench, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the state of that epoch: as if there had been no death. Without it: another epoch behind the units."""
    for lost in (False, True):
        store = tmp_path / f"{lost}.memdb"
        with pytest.MonkeyPatch.context() as patch:
            before_batch(patch, {4: lambda: forget_now(store, (11, 12))})  # noqa: B023
            units = dead(bench, store, recipe, 5)
        plain, begins = expected(bench, recipe, 16, (11, 12), touched=True)
        assert unit_digests(store) == digests(plain)[:units]
        for path in states(store) if lost else []:
            path.unlink()
        report = ingested(store, bench.model, bench.film, recipe)
        assert epochs(store) == [(0, 0), (1, begins), *([(2, units)] if lost else [])]
        assert report.epoch == (2 if lost else 1)
        if not lost:
            assert unit_digests(store) == digests(plain)
        assert unit_digests(store)[:units] == digests(plain)[:units]
        check_whole(store)


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
@pytest.mark.parametrize("moment", ["before a batch", "within a batch", "behind it"])
def test_forgotten_while_the_film_is_encoded_again(
    bench: Bench, recipe: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No state is left, so the film is encoded again and compared: up to where it would see what is gone."""
    store = tmp_path / "s.memdb"
    units = dead(bench, store, recipe, 5)
    for path in states(store):
        path.unlink()
    span = {"before a batch": (12, 14), "within a batch": (9, 10), "behind it": (1, 3)}[moment]
    step, calls = StreamEncoder.step, iter(range(1 << 30))

    def forgetting(self: StreamEncoder, frames: Any) -> list[Unit]:
        if next(calls) == 2:
            forget_now(store, span)
        return step(self, frames)

    if moment == "within a batch":
        monkeypatch.setattr(StreamEncoder, "step", forgetting)
    else:
        number = 2 if moment == "before a batch" else 4
        before_batch(monkeypatch, {number: lambda: forget_now(store, span)})
    report = ingested(store, bench.model, bench.film, recipe)
    if moment == "behind it":
        assert (report.replayed_units, epochs(store)) == (units, [(0, 0)])
        assert unit_digests(store) == digests(expected(bench, recipe, 24, span, touched=False)[0])
    else:
        assert 0 < report.replayed_units < units
        assert epochs(store) == [(0, 0), (1, units)]
        assert unit_digests(store)[:units] == digests(behind(bench, recipe, units, span))[:units]
        assert [row.start_ns for row in unit_rows(store)][-1] >= 24 * NS
        seconds = [row.end_ns // NS - row.start_ns // NS for row in unit_rows(store)]
        assert sum(seconds) == FRAMES, "every frame is there once"
    check_whole(store)
