"""What is forgotten while an ingest runs leaves its encoder, its hands and its states, and the rest goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb.client import connect
from memdb.forget import OPEN_END_NS
from memdb.ingest.encode.chunk import Chunk
from memdb.ingest.encode.window import SlidingWindow
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.run import Run
from memdb.schemas.errors import Interrupted, StoreError
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import Unit
from memdb.state import SavedState, StateFiles, read_state
from memdb.store import Store
from memdb.writer import RecordingWriter
from tests.forget_cases import (
    FRAMES,
    NS,
    Bench,
    Paced,
    Span,
    batches,
    before_batch,
    check_whole,
    digests,
    epochs,
    expected,
    forget_now,
    made_bench,
    new_encoder,
    overlap,
    states,
    undisturbed,
)
from tests.run_cases import (
    CHUNK,
    NAME,
    RECIPES,
    WINDOW_TOKENS,
    count_units,
    ingested,
    run,
    unit_digests,
    unit_rows,
    until,
)
from tests.test_live import Camera, filmed


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return made_bench(tmp_path_factory.mktemp("forget"))


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
        encode, queue = SlidingWindow.encode, list(self._encoder._clips.queue)
        seen = self._model.visual_tokens([frame.pixels for frame in batch])
        self._tokens += [(f.start_ns, f.end_ns, raw(tokens)) for f, tokens in zip(batch, seen, strict=True)]

        def listening(own: SlidingWindow, model: Any, context: Any, frames: Any, *rest: Any) -> Any:
            kv = encode(own, model, context, frames, *rest)
            at = 0
            for tokens in frames:
                at += len(tokens)
                start, end, _ = self._tokens[len(self._keys)]
                self._keys.append((start, end, raw(kv[-1].k[0, at - 1])))  # the last layer's, (D,)
            return kv

        chunk = Chunk.encode

        def listening_to_chunks(own: Chunk, model: Any, *rest: Any, **more: Any) -> Any:
            context = chunk(own, model, *rest, **more)
            k, tokens = context.fresh[-1].k, model.shape.frame_tokens
            for at in range(tokens, k.shape[1] + 1, tokens):
                start, end, _ = self._tokens[len(self._keys)]
                self._keys.append((start, end, raw(k[0, at - 1])))
            return context

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SlidingWindow, "encode", listening)
            patch.setattr(Chunk, "encode", listening_to_chunks)
            units = self._encoder.step(batch)
        came = [part for part in self._encoder._clips.queue if not any(part is old for old in queue)]
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


# What cannot be taken back


def test_how_far_a_frame_reaches_into_the_kv_of_later_ones(bench: Bench) -> None:
    """In the deepest of L layers (L - 1) * (W - 1) tokens behind its last, in the first layer not at all."""
    frame, shape, window = 5, bench.model.shape, WINDOW_TOKENS
    other = replace(bench.frames[frame], pixels=bench.frames[frame + 1].pixels)
    kv: list[list[Unit]] = []
    for frames in (bench.frames, [*bench.frames[:frame], other, *bench.frames[frame + 1 :]]):
        encoder = new_encoder(bench, "rekv")
        kv.append([unit for one in frames for unit in encoder.step([one])])
    reach_tokens = (shape.layers - 1) * (window - 1)
    for number, (one, two) in enumerate(zip(*kv, strict=True)):
        assert one.keys is not None
        assert two.keys is not None
        same = (one.keys == two.keys).reshape(shape.layers, -1).all(axis=1)
        first_token = (
            number - frame - 1
        ) * shape.frame_tokens + 1  # of this frame, counted from the other's last
        touched = number > frame and first_token <= reach_tokens
        assert same[0] == (number != frame)
        assert same[-1] == (number != frame and not touched), number


# Forgetting what the encoder holds


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


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_it_did_not_hold_costs_no_epoch_and_no_bit(bench: Bench, recipe: str, tmp_path: Path) -> None:
    """The window and the recurrent tokens are past the span: later units are those of an ingest without a forget."""
    store = tmp_path / "s.memdb"
    frames = Paced(bench, {20: lambda: forget_now(store, (1, 3)), 24: lambda: forget_now(store, (40, 50))})
    report = ingested(store, bench.model, frames.frames(), recipe)
    units, _ = expected(bench, recipe, 20, (1, 3), touched=False)
    assert unit_digests(store) == digests(units)
    changed = [one != two for one, two in zip(unit_digests(store), undisturbed(bench, recipe), strict=True)]
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
    assert [row.digest for row in unit_rows(store, "other")] == undisturbed(bench, "rekv")
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.resumed_from_unit, report.epoch) == (None, 0)
    assert unit_digests(store) == undisturbed(bench, recipe)
    with Store.open(store) as found:
        assert found.recording(NAME).id not in found.catalog.forgotten()
    check_whole(store)
