"""An ingest that stops or dies anywhere and runs again leaves what one without a break leaves, bit for bit."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from memdb.digest import unit_digest
from memdb.ingest.encode.window import OpenWindow
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.encoder_state import Counters
from memdb.ingest.pipeline import BATCHES_AHEAD, _ready
from memdb.ingest.sampling import sample
from memdb.ingest.sources import open_source
from memdb.ingest.stages import compose
from memdb.models.caption_vectors import caption_vectors
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import (
    CorruptionError,
    EncodingMismatch,
    Interrupted,
    ModelMismatch,
    SourceError,
    SourceMismatch,
)
from memdb.schemas.units import Unit
from memdb.store import Store
from tests.run_cases import (
    CHUNK,
    NAME,
    RECIPES,
    SETTINGS,
    content,
    found_recipe,
    ingested,
    small_film,
    small_model,
    small_spec,
    unit_digests,
    unit_rows,
)
from tests.store_cases import directory_digest, flip

FRAMES = 22  # five batches of four and one of two


@dataclass(frozen=True)
class Bench:
    model: VideoModel
    film: Path
    spec: str
    whole: dict[str, Path]  # by recipe, a store whose ingest was not disturbed


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("resume")
    spec = small_spec(folder)
    model, film = small_model(spec), small_film(folder / "film.mp4", FRAMES)
    whole = {recipe: folder / f"{recipe}.memdb" for recipe in RECIPES}
    for recipe, store in whole.items():
        ingested(store, model, film, recipe)
    return Bench(model, film, spec, whole)


class Crash(Exception):
    """Stands for a death between two batches: nothing more is encoded, what was handed over is written."""


def crash_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """The next ingest dies when it comes to batch number `batch`, counted from 0."""
    step, calls = StreamEncoder.step, iter(range(1 << 30))

    def dying(self: StreamEncoder, frames: Any) -> list[Unit]:
        if next(calls) == batch:
            raise Crash
        return step(self, frames)

    monkeypatch.setattr(StreamEncoder, "step", dying)


def stop_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> threading.Event:
    """An event that is set while batch number `batch` is in hand."""
    step, calls, stop = StreamEncoder.step, iter(range(1 << 30)), threading.Event()

    def stopping(self: StreamEncoder, frames: Any) -> list[Unit]:
        if next(calls) == batch:
            stop.set()
        return step(self, frames)

    monkeypatch.setattr(StreamEncoder, "step", stopping)
    return stop


def stopped_at(bench: Bench, store: Path, recipe: str, batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingested(store, bench.model, bench.film, recipe, stop=stop_at(patch, batch))


def crashed_at(bench: Bench, store: Path, recipe: str, batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, batch)
        with pytest.raises(Crash):
            ingested(store, bench.model, bench.film, recipe)


def states(store: Path) -> list[Path]:
    return sorted((store / "state").glob("*.state"))


def test_the_window_overflows_and_clips_stay_open(bench: Bench) -> None:
    """What the tests below stand on."""
    from tests.run_cases import WINDOW_TOKENS

    tokens = FRAMES * bench.model.shape.frame_tokens
    assert tokens > 2 * WINDOW_TOKENS
    assert CHUNK % 3
    assert FRAMES % CHUNK
    assert FRAMES % 3
    assert len(unit_rows(bench.whole["rekv"])) == FRAMES
    assert len(unit_rows(bench.whole["hybrid"])) == -(-FRAMES // 3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_after_any_batch_and_run_again(bench: Bench, recipe: str, tmp_path: Path) -> None:
    whole = unit_digests(bench.whole[recipe])
    for batch in range(5):
        store = tmp_path / f"{batch}.memdb"
        stopped_at(bench, store, recipe, batch)
        seen = CHUNK * (batch + 1)
        before = unit_digests(store)
        assert before == whole[: seen if recipe == "rekv" else seen // 3], "the batch in hand is kept"
        report = ingested(store, bench.model, bench.film, recipe)
        assert (report.resumed_from_unit, report.replayed_units) == (len(before), 0), "its state was saved"
        assert unit_digests(store) == whole
        assert content(store) == content(bench.whole[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_dead_before_any_batch_and_run_again(bench: Bench, recipe: str, tmp_path: Path) -> None:
    """No state is saved at a death: the next ingest encodes again from the last one, or from the beginning."""
    whole, lags = unit_digests(bench.whole[recipe]), set()
    for batch in range(6):
        store = tmp_path / f"{batch}.memdb"
        crashed_at(bench, store, recipe, batch)
        before = unit_digests(store)
        assert before == whole[: CHUNK * batch if recipe == "rekv" else CHUNK * batch // 3]
        report = ingested(store, bench.model, bench.film, recipe)
        assert report.replayed_units == len(before) - (report.resumed_from_unit or 0)
        assert report.epoch == 0
        lags.add(report.replayed_units)
        assert unit_digests(store) == whole
        assert content(store) == content(bench.whole[recipe])
    assert len(lags) > 1, "some resumed from a state, some from before it"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("harm", ["missing", "flipped", "cut", "of another film"])
def test_without_a_whole_state_it_begins_again_and_compares(
    bench: Bench, recipe: str, harm: str, tmp_path: Path
) -> None:
    store = tmp_path / "s.memdb"
    stopped_at(bench, store, recipe, 3)
    before = unit_digests(store)
    for path in states(store):
        if harm == "missing":
            path.unlink()
        elif harm == "flipped":
            flip(path, path.stat().st_size // 2)
        elif harm == "cut":
            path.write_bytes(path.read_bytes()[:-5])
        else:
            path.write_bytes(b"")
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.resumed_from_unit, report.replayed_units) == (0, len(before))
    assert content(store) == content(bench.whole[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_damaged_state_costs_a_longer_replay(bench: Bench, recipe: str, tmp_path: Path) -> None:
    """The newer of two states is damaged: the older one serves, and what came after it is compared."""
    store = tmp_path / "s.memdb"
    stopped_at(bench, store, recipe, 1)
    older = {path.name: path.read_bytes() for path in states(store)}
    resumed_at = len(unit_digests(store))
    stopped_at(bench, store, recipe, 2)
    before = unit_digests(store)
    assert len(before) > resumed_at > 0
    for path in states(store):
        flip(path, path.stat().st_size - 1)
    for name, data in older.items():
        (store / "state" / name).write_bytes(data)
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.resumed_from_unit, report.replayed_units) == (resumed_at, len(before) - resumed_at)
    assert content(store) == content(bench.whole[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_bits_on_replay_begin_an_epoch_and_lose_nothing(
    bench: Bench,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = tmp_path / "s.memdb"
    stopped_at(bench, store, recipe, 2)
    before = unit_rows(store)
    for path in states(store):
        path.unlink()
    see = bench.model.visual_tokens
    monkeypatch.setattr(bench.model, "visual_tokens", lambda pixels: -see(pixels))
    with caplog.at_level(logging.WARNING):
        report = ingested(store, bench.model, bench.film, recipe)
    monkeypatch.undo()
    assert "came out otherwise" in caplog.text
    after = unit_rows(store)
    assert [row.digest for row in after[: len(before)]] == [row.digest for row in before]
    assert report.epoch == 1
    assert {row.epoch for row in after[len(before) :]} == {1}
    with Store.open(store) as found:
        row = found.recording(NAME)
    assert [(epoch.number, epoch.first_unit) for epoch in row.epochs] == [(0, 0), (1, len(before))]
    assert "otherwise" in row.epochs[1].reason
    assert row.finished
    # every sampled frame behind the watermark is there once, in order
    assert after[len(before)].start_ns == before[-1].end_ns
    spans = [(unit.start_ns, unit.end_ns) for unit in after]
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] == FRAMES * 10**9
    if recipe != "rlivs":
        blocks = np.concatenate([unit.blocks for unit in after])
        assert blocks["start_ns"].tolist() == [second * 10**9 for second in range(FRAMES)]
        assert (np.diff(blocks["position"]) > 0).all()
    report = ingested(store, bench.model, bench.film, recipe)
    assert report.units == 0
    assert "already" in report.warnings[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_epoch_is_resumed_as_well(
    bench: Bench, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the second epoch, and run again from its state: as if there had been no second stop."""
    digests = []
    for disturbed in (False, True):
        store = tmp_path / f"{disturbed}.memdb"
        stopped_at(bench, store, recipe, 1)
        for path in states(store):
            path.unlink()
        with pytest.MonkeyPatch.context() as patch:
            see = bench.model.visual_tokens
            patch.setattr(bench.model, "visual_tokens", lambda pixels, see=see: -see(pixels))
            if disturbed:
                # two batches are tried again before they differ, or one; then the second epoch begins
                with pytest.raises(Interrupted):
                    ingested(store, bench.model, bench.film, recipe, stop=stop_at(patch, 3))
            report = ingested(store, bench.model, bench.film, recipe)
        assert report.epoch == 1
        digests.append(content(store))
    assert digests[0] == digests[1]


def test_a_finished_recording_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    for recipe in RECIPES:
        store = tmp_path / f"{recipe}.memdb"
        shutil.copytree(bench.whole[recipe], store)
        before = directory_digest(store)
        report = ingested(store, bench.model, bench.film, recipe)
        assert (report.units, report.replayed_units) == (0, 0)
        assert f"{NAME} holds all of" in report.warnings[0]
        assert directory_digest(store) == before


def test_a_copy_of_the_film_under_another_name_is_the_same_film(bench: Bench, tmp_path: Path) -> None:
    store, copy = tmp_path / "s.memdb", tmp_path / "other-name.mp4"
    stopped_at(bench, store, "rekv", 2)
    shutil.copy(bench.film, copy)
    ingested(store, bench.model, copy, "rekv")
    assert content(store) == content(bench.whole["rekv"])


def _refused(bench: Bench, store: Path, error: type[Exception], *words: str, **changes: Any) -> None:
    before = directory_digest(store)
    arguments = {"film": bench.film, "recipe": "hybrid", "model": bench.model} | changes
    with pytest.raises(error) as caught:
        ingested(store, arguments.pop("model"), arguments.pop("film"), arguments.pop("recipe"), **arguments)
    for word in words:
        assert word in str(caught.value)
    assert directory_digest(store) == before, "a refusal changes nothing"


@pytest.mark.parametrize("finished", [False, True])
def test_another_encoding_film_or_model_is_refused(bench: Bench, finished: bool, tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    if finished:
        shutil.copytree(bench.whole["hybrid"], store)
    else:
        stopped_at(bench, store, "hybrid", 2)
    settings = SETTINGS["hybrid"]
    out = "another --recording"
    _refused(bench, store, EncodingMismatch, out, settings=(*settings, "encode.window_tokens=32"))
    _refused(bench, store, EncodingMismatch, out, settings=(*settings, "caption.prompt='What?'"))
    _refused(bench, store, EncodingMismatch, out, sample_fps=2)
    _refused(bench, store, EncodingMismatch, out, seed=1)
    _refused(bench, store, EncodingMismatch, out, recipe="rekv")
    _refused(bench, store, EncodingMismatch, "--codec int4", out, codec="int8")
    _refused(bench, store, SourceMismatch, out, film=small_film(tmp_path / "b.mp4", FRAMES, seed=1))
    other = small_model(bench.spec.replace("random:7", "random:8"))
    _refused(bench, store, ModelMismatch, "--model", "another store", model=other)
    ingested(store, bench.model, bench.film, "hybrid")
    assert content(store) == content(bench.whole["hybrid"])


def test_what_is_chosen_at_question_time_may_change(bench: Bench, tmp_path: Path) -> None:
    """Retrieval, rebuilding and answering are no part of the encoding."""
    store = tmp_path / "s.memdb"
    stopped_at(bench, store, "hybrid", 2)
    ingested(
        store,
        bench.model,
        bench.film,
        "hybrid",
        settings=(*SETTINGS["hybrid"], "retrieve.blocks=3", "answer.tokens_max=5"),
    )
    assert content(store) == content(bench.whole["hybrid"])


def test_a_number_is_the_same_however_it_is_written(bench: Bench, tmp_path: Path) -> None:
    """A script says 1 frame a second and the command line 1.0: that is one encoding."""
    store = tmp_path / "s.memdb"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingested(store, bench.model, bench.film, "rlivs", sample_fps=1, stop=stop_at(patch, 2))
    settings = (*SETTINGS["rlivs"], "unit.unit_s_max=120")
    ingested(store, bench.model, bench.film, "rlivs", sample_fps=1.0, settings=settings)
    assert content(store) == content(bench.whole["rlivs"])


# Frames that a program hands over


def _pictures(count: int, shade: int = 0) -> list[tuple[float, Any]]:
    random = np.random.default_rng(shade)
    return [(float(second), random.integers(0, 256, (64, 96, 3), np.uint8)) for second in range(count)]


def test_an_iterator_given_again_goes_on(bench: Bench, tmp_path: Path) -> None:
    frames = _pictures(FRAMES)
    ingested(tmp_path / "whole.memdb", bench.model, iter(frames), "hybrid")
    store = tmp_path / "s.memdb"
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(Crash):
            ingested(store, bench.model, iter(frames), "hybrid")
    report = ingested(store, bench.model, iter(frames), "hybrid")
    if report.epoch == 0:  # a state was saved on the way
        assert content(store) == content(tmp_path / "whole.memdb")
    stopped = tmp_path / "t.memdb"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingested(stopped, bench.model, iter(frames), "hybrid", stop=stop_at(patch, 3))
    ingested(stopped, bench.model, iter(frames), "hybrid")
    assert content(stopped) == content(tmp_path / "whole.memdb")


def test_other_frames_from_an_iterator_are_refused_and_nothing_is_lost(bench: Bench, tmp_path: Path) -> None:
    """An iterator that was used up to compare cannot be begun again: the call says so, and the next may go on."""
    store = tmp_path / "s.memdb"
    stopped_at_first = _pictures(FRAMES)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingested(store, bench.model, iter(stopped_at_first), "rekv", stop=stop_at(patch, 0))
    older = {path.name: path.read_bytes() for path in states(store)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingested(store, bench.model, iter(stopped_at_first), "rekv", stop=stop_at(patch, 1))
    for path in states(store):
        path.unlink()
    for name, data in older.items():
        (store / "state" / name).write_bytes(data)
    before = unit_digests(store)
    with pytest.raises(SourceMismatch, match="another recording"):
        ingested(store, bench.model, iter(_pictures(FRAMES, shade=1)), "rekv")
    assert unit_digests(store) == before
    ingested(store, bench.model, iter(stopped_at_first), "rekv")
    assert unit_digests(store)[: len(before)] == before
    assert len(unit_digests(store)) == FRAMES


# The encoder state


def _encoder(bench: Bench, recipe: str) -> StreamEncoder:
    row = found_recipe(recipe)
    stages = compose(row)
    init = bench.model.init_ids(str(row.encode.params["init_prompt"]))
    encoder = stages.captioner.encoder
    vectors = caption_vectors(encoder, lambda: bench.model) if encoder else None
    return StreamEncoder(bench.model, stages, init, vectors)


def _batches(bench: Bench, size: int) -> Iterator[list[Any]]:
    with open_source(bench.film) as source:
        frames = [_ready(frame, bench.model) for frame in sample(source.frames(), 1)]
    return (frames[start : start + size] for start in range(0, len(frames), size))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_state_and_restore_are_exact(bench: Bench, recipe: str, size: int) -> None:
    """At every batch boundary: the bytes come back as they went in, and what follows has the same bits."""
    plain, carried = _encoder(bench, recipe), _encoder(bench, recipe)
    open_frames, queued = set(), set()
    for batch in _batches(bench, size):
        state = carried.state()
        carried = _encoder(bench, recipe)
        carried.restore(state)
        assert carried.state() == state == plain.state()
        open_frames.add(len(carried._carried.opened))
        queued.add(len(carried._clips.queue))
        assert digests(carried.step(batch)) == digests(plain.step(batch))
    assert digests(carried.finish()) == digests(plain.finish())
    assert plain.state() == carried.state()
    if recipe == "rekv":
        assert isinstance(plain._encoding, OpenWindow)
        window = plain._encoding.context
        assert window.seen > len(window.local[0].k[0])
    else:
        assert open_frames == {0, 1, 2}, "states with open clips"
        assert queued == {0, 1, 2} or recipe == "bounded", "and with recurrent tokens"


def digests(units: Sequence[Unit]) -> list[bytes]:
    return [unit_digest(unit) for unit in units]


def test_restoring_leaves_the_encoder_that_saved_alone(bench: Bench) -> None:
    """A state is a copy: going on in one encoder does not change what another restored."""
    encoder = _encoder(bench, "hybrid")
    batches = list(_batches(bench, CHUNK))
    for batch in batches[:3]:
        encoder.step(batch)
    state = encoder.state()
    encoder.step(batches[3])
    again = _encoder(bench, "hybrid")
    again.restore(state)
    assert again.state() == state


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("counters", []),
        ("counters", {"widths": []}),
        ("counters", {"widths": {"0": float("inf")}}),
        ("window", 5),
        ("window", [[0, 1]]),
        ("queue", {"a": 1}),
        ("open", [1]),
        ("open", [[float("inf"), 0, 1]]),
    ],
)
def test_a_state_with_another_thing_in_a_place_is_refused(bench: Bench, key: str, value: object) -> None:
    encoder = _encoder(bench, "hybrid")
    encoder.step(next(_batches(bench, CHUNK)))
    tensors = load(encoder.state())
    meta = json.loads(bytes(tensors["meta"].numpy())) | {key: value}
    tensors["meta"] = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
    with pytest.raises(CorruptionError):
        _encoder(bench, "hybrid").restore(save(tensors))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_that_is_none_is_refused(bench: Bench, recipe: str) -> None:
    encoder = _encoder(bench, recipe)
    encoder.step(next(_batches(bench, CHUNK)))
    state = encoder.state()
    for bad in (b"", b"\0" * 64, state[:-1], state[: len(state) // 2], b"{}" + state):
        with pytest.raises(CorruptionError):
            _encoder(bench, recipe).restore(bad)


def test_the_size_of_a_state_is_known_beforehand(bench: Bench) -> None:
    """It decides how often states are saved: it may not be far from the truth."""
    for recipe in RECIPES:
        encoder = _encoder(bench, recipe)
        for batch in _batches(bench, CHUNK):
            encoder.step(batch)
            assert abs(encoder.state_bytes - len(encoder.state())) < 8192


def test_a_fresh_window_forgets(bench: Bench) -> None:
    """A new epoch carries nothing over: its units have the bits of a stream that begins there."""
    batches = list(_batches(bench, CHUNK))
    used, new = _encoder(bench, "hybrid"), _encoder(bench, "hybrid")
    for batch in batches[:3]:
        used.step(batch)
    used.start_fresh(Counters())
    assert digests(used.step(batches[3])) == digests(new.step(batches[3]))


# Memory


class Counted:
    """An image source that counts how many frames were asked for and how many the encoder has taken."""

    def __init__(self, count: int, patch: pytest.MonkeyPatch) -> None:
        self.count, self.given, self.taken, self.most = count, 0, 0, 0
        step = StreamEncoder.step

        def counting(encoder: StreamEncoder, frames: Any) -> list[Unit]:
            self.most = max(self.most, self.given - self.taken)
            self.taken += len(frames)
            return step(encoder, frames)

        patch.setattr(StreamEncoder, "step", counting)

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        for second, picture in _pictures(self.count):
            self.given += 1
            yield second, picture


def test_decoding_stays_a_few_batches_ahead_and_so_does_encoding(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is flat: a slow writer holds the encoder back, and that the decoder."""
    from memdb.writer import RecordingWriter

    frames = Counted(60, monkeypatch)
    append, written, ahead = RecordingWriter.append, [0], []

    def slow(self: RecordingWriter, units: Sequence[Unit], **more: Any) -> int:
        # as slow as it can be: nothing is written before the encoder has come as far as it may
        limit = min(frames.count, written[0] + CHUNK * (BATCHES_AHEAD + 2))
        waited = threading.Event()
        for _ in range(2000):
            if frames.taken >= limit:
                break
            waited.wait(0.002)
        ahead.append(frames.taken - written[0])
        written[0] += len(units)
        return append(self, units, **more)

    monkeypatch.setattr(RecordingWriter, "append", slow)
    ingested(tmp_path / "s.memdb", bench.model, frames, "rekv")
    assert written[0] == 60
    # waiting for the writer: two batches; in its hands: one; waiting to be put: one
    assert max(ahead) <= CHUNK * (BATCHES_AHEAD + 2)
    assert max(ahead) > CHUNK, "they overlap"
    # decoded ahead: a queue of two batches, one frame in hand; and the batch that was just taken
    assert frames.most <= 2 * CHUNK + 1 + CHUNK + 1


def test_an_error_of_the_source_keeps_what_was_written(bench: Bench, tmp_path: Path) -> None:
    """Frames that end in an exception: whole batches before it are kept, and the next call goes on."""
    store = tmp_path / "s.memdb"
    frames = _pictures(FRAMES)

    def breaking() -> Iterator[Any]:
        yield from frames[:10]
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="camera is gone"):
        ingested(store, bench.model, breaking(), "rekv")
    kept = unit_digests(store)
    assert len(kept) == 2 * CHUNK
    ingested(store, bench.model, iter(frames), "rekv")
    assert unit_digests(store)[: len(kept)] == kept
    assert len(unit_digests(store)) == FRAMES


def test_no_frame_at_all_is_an_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no frames"):
        ingested(tmp_path / "s.memdb", bench.model, iter(()), "rekv")


def test_threads_are_left_as_they_were(bench: Bench, tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    crashed_at(bench, tmp_path / "a.memdb", "rekv", 2)
    stopped_at(bench, tmp_path / "b.memdb", "rekv", 2)
    ingested(tmp_path / "c.memdb", bench.model, bench.film, "rekv")
    assert {thread.name for thread in threading.enumerate()} == before
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
