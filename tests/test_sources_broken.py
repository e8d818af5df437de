"""Films with a hole: what can be decoded is kept in its place, what cannot is a gap on record, stopped or not."""

from __future__ import annotations

import io
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from memdb.client import connect
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.sources import open_source
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import Interrupted
from memdb.schemas.recording import Gap
from memdb.schemas.times import format_time
from memdb.schemas.units import Unit
from memdb.store import Store
from tests.film_cases import shown_number, write_film
from tests.run_cases import NAME, content, ingested, small_model, small_spec, unit_rows

NS = 10**9
RATE = 4  # frames a second on film
SECONDS = 38


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    return small_model(small_spec(tmp_path_factory.mktemp("model")))


def harmed(path: Path, harm: str) -> Path:
    """A film of 38 s of which about the seconds 11 to 23 are harmed."""
    write_film(path, [1000 * n // RATE for n in range(SECONDS * RATE)], gop=RATE)
    data = path.read_bytes()
    low, high = (len(data) * second // SECONDS for second in (11, 23))
    if harm == "cut out":
        data = data[:low] + data[high:]
    else:
        filler = bytes(high - low) if harm == "zeros" else np.random.default_rng(7).bytes(high - low)
        data = data[:low] + filler + data[high:]
    path.write_bytes(data)
    return path


def gaps_of(store: Path) -> tuple[Gap, ...]:
    with Store.open(store) as found:
        return found.recording(NAME).gaps


def check(store: Path) -> None:
    """One gap where the harm is, no unit reaches into it, and around it every frame stands in its place."""
    rows, gaps = unit_rows(store), gaps_of(store)
    assert len(gaps) == 1
    gap = gaps[0]
    assert 8 * NS < gap.start_ns < 14 * NS
    assert 20 * NS < gap.end_ns <= 27 * NS
    assert all(row.end_ns <= gap.start_ns or row.start_ns >= gap.end_ns for row in rows)
    assert all(one.end_ns <= two.start_ns for one, two in itertools.pairwise(rows))
    with Store.open(store) as found:
        for row in rows:
            jpeg = found.read_keyframe(row)
            shown = shown_number(np.asarray(PIL.Image.open(io.BytesIO(jpeg or b""))))
            assert shown == row.start_ns * RATE // NS
    seen = {int(ns) // NS for row in rows for ns in row.blocks["start_ns"]}
    assert {*range(gap.start_ns // NS), *range(-(-gap.end_ns // NS), SECONDS)} <= seen
    with connect(store, create=False) as client:
        assert client.verify().ok


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
@pytest.mark.parametrize("harm", ["garbage", "zeros", "cut out"])
def test_a_long_hole_is_a_gap_on_record(suffix: str, harm: str, model: VideoModel, tmp_path: Path) -> None:
    store, path = tmp_path / "s.memdb", harmed(tmp_path / f"film.{suffix}", harm)
    report = ingested(store, model, path, "rekv")
    check(store)
    told = [warning for warning in report.warnings if "nothing to see from 00:00:" in warning]
    assert len(told) == 1
    assert f"to {format_time(gaps_of(store)[0].end_ns / NS)}, in all" in told[0]
    with Store.open(store) as found:
        assert found.recording(NAME).finished


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_stopped_anywhere_around_a_hole_it_ends_the_same(
    recipe: str, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are cut at the gap each time, the clip closes there, and the gap is on record once."""
    path = harmed(tmp_path / "film.ts", "garbage")
    straight = tmp_path / "straight.memdb"
    ingested(straight, model, path, recipe)
    check(straight)
    step = StreamEncoder.step
    for batch in (1, 2, 3, 5):
        store, stop, calls = tmp_path / f"{batch}.memdb", threading.Event(), itertools.count()

        def stopping(self: StreamEncoder, frames: Any, batch: int = batch) -> list[Unit]:
            if next(calls) == batch:  # noqa: B023
                stop.set()  # noqa: B023
            return step(self, frames)

        with monkeypatch.context() as patch:
            patch.setattr(StreamEncoder, "step", stopping)
            with pytest.raises(Interrupted):
                ingested(store, model, path, recipe, stop=stop)
        if batch % 2:  # and once more from the beginning, compared with what was written first
            for state in (store / "state").iterdir():
                state.unlink()
        report = ingested(store, model, path, recipe)
        assert report.epoch == 0
        assert gaps_of(store) == gaps_of(straight)
        assert content(store) == content(straight)


def test_dead_between_the_units_and_the_gap_behind_them(
    model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memdb.writer import RecordingWriter

    class Crash(Exception):
        pass

    def dying(*_: object) -> None:
        raise Crash

    path = harmed(tmp_path / "film.ts", "garbage")
    store, straight = tmp_path / "s.memdb", tmp_path / "straight.memdb"
    ingested(straight, model, path, "hybrid")
    with monkeypatch.context() as patch:
        patch.setattr(RecordingWriter, "gap", dying)
        with pytest.raises(Crash):
            ingested(store, model, path, "hybrid")
    assert gaps_of(store) == ()
    assert unit_rows(store)
    ingested(store, model, path, "hybrid")
    assert gaps_of(store) == gaps_of(straight)
    assert content(store) == content(straight)


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_the_part_behind_a_damaged_beginning_is_kept(suffix: str, tmp_path: Path) -> None:
    path = write_film(tmp_path / f"film.{suffix}", [250 * n for n in range(120)], gop=4)
    data = bytearray(path.read_bytes())
    head = 0 if suffix == "ts" else 2000  # an mkv without its head is none
    data[head : len(data) // 4] = np.random.default_rng(1).bytes(len(data) // 4 - head)
    path.write_bytes(data)
    with open_source(path) as source:
        shown = [shown_number(item.image()) for item in source.frames() if not isinstance(item, Gap)]
    assert shown[-60:] == list(range(60, 120))


@pytest.mark.parametrize(
    "filler", [bytes(1 << 20), np.random.default_rng(3).bytes(1 << 20)], ids=["zeros", "noise"]
)
def test_a_transport_stream_is_found_again_behind_a_megabyte(filler: bytes, tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.ts", [250 * n for n in range(120)], gop=4)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + filler + data[len(data) // 2 :])
    with open_source(path) as source:
        shown = [shown_number(item.image()) for item in source.frames() if not isinstance(item, Gap)]
    assert shown[-50:] == list(range(70, 120))
    assert len(shown) > 110


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_transport_stream_that_is_cut_within_a_picture_says_so(share: float, tmp_path: Path) -> None:
    """Cut between two pictures it says nothing, for nothing in it says that there was more."""
    path = write_film(tmp_path / "film.ts", [250 * n for n in range(120)], gop=4)
    data = path.read_bytes()
    film = [at for at in range(0, len(data), 188) if (data[at + 1] & 31) << 8 | data[at + 2] == 0x100]
    begins = [index for index, at in enumerate(film) if data[at + 1] & 0x40]
    long = [one for one, two in itertools.pairwise(begins) if two - one > 2]  # pictures of some packets
    index = next(index for index in long if index > share * len(film))
    for end, told in ((film[index], False), (film[index + 1], True), (film[index + 2], True)):
        path.write_bytes(data[:end])
        with open_source(path) as source:
            frames = [item for item in source.frames() if not isinstance(item, Gap)]
        assert [shown_number(frame.image()) for frame in frames] == list(range(begins.index(index)))
        assert any("breaks off" in warning for warning in source.warnings) == told


def test_glued_films_are_one_recording(model: VideoModel, tmp_path: Path) -> None:
    """Half a day of a camera in one file, its clock begun anew in the middle: none of it is left out."""
    store, path = tmp_path / "s.memdb", tmp_path / "day.ts"
    one = write_film(tmp_path / "one.ts", [250 * n for n in range(64)], gop=4)
    two = write_film(tmp_path / "two.ts", [250 * n for n in range(100)], gop=4)
    path.write_bytes(one.read_bytes() + two.read_bytes())
    report = ingested(store, model, path, "rekv")
    assert report.units == 41
    assert any("its clock jumps at 00:00:16" in warning for warning in report.warnings)
    with Store.open(store) as found:
        rows = found.units(found.recording(NAME).id)
        shown = [
            shown_number(np.asarray(PIL.Image.open(io.BytesIO(found.read_keyframe(row) or b""))))
            for row in rows
        ]
    assert [row.start_ns // NS for row in rows] == list(range(41))
    assert shown == [*range(0, 64, 4), *range(0, 100, 4)]
