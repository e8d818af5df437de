"""A file that is still being written: what is there is kept, and a later ingest goes on with what has come since."""

from __future__ import annotations

import io
import shutil
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

from memdb.client import connect
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.sources import open_source
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import Interrupted, SourceMismatch
from memdb.schemas.rows import RecordingRow
from memdb.schemas.units import Unit
from memdb.store import Store
from tests.film_cases import numbered_picture, shown_number, write_film
from tests.run_cases import NAME, content, ingested, small_model, small_spec, unit_rows
from tests.store_cases import directory_digest

NS = 10**9
RATE = 4  # frames a second on film
SECONDS = 38  # sampled frames: nine batches of four, and two


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    return small_model(small_spec(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A transport stream: its end can be cut anywhere."""
    path = tmp_path_factory.mktemp("film") / "film.ts"
    return write_film(path, [1000 * n // RATE for n in range(SECONDS * RATE)], gop=RATE).read_bytes()


@pytest.fixture(scope="module", params=["rekv", "hybrid"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: VideoModel, film: bytes
) -> tuple[str, str]:
    """Recipe, and the content of a store that saw all of the film at once."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "film.ts").write_bytes(film)
    ingested(folder / "s.memdb", model, folder / "film.ts", request.param)
    return request.param, content(folder / "s.memdb")


def row_of(store: Path) -> RecordingRow:
    with Store.open(store) as found:
        return found.recording(NAME)


def check_frames(store: Path, seconds: int) -> None:
    """Every second of the film is there once, in order, and its picture is the one of that second."""
    rows = unit_rows(store)
    starts = [int(ns) for row in rows for ns in row.blocks["start_ns"]]
    assert starts == [second * NS for second in range(seconds)]
    with Store.open(store) as found:
        for row in rows:
            jpeg = found.read_keyframe(row)
            assert jpeg is not None
            shown = shown_number(np.asarray(PIL.Image.open(io.BytesIO(jpeg))))
            assert shown == row.start_ns // NS * RATE % 256
    with connect(store, create=False) as client:
        assert client.verify().ok


def writing(path: Path, piece: bytes, patch: pytest.MonkeyPatch) -> None:
    """A recorder that adds a piece while the first batch is in hand: then most of the film is not decoded yet."""
    step, rest = StreamEncoder.step, iter([piece])

    def adding(self: StreamEncoder, frames: Any) -> list[Unit]:
        with path.open("ab") as file:
            file.write(next(rest, b""))
        return step(self, frames)

    patch.setattr(StreamEncoder, "step", adding)


def cut(film: bytes, share: float) -> int:
    return int(len(film) * share)


@pytest.mark.parametrize("odd", [0, 100], ids=["whole packets", "half a packet"])
def test_seen_while_it_grows_it_ends_as_if_it_had_been_whole(
    film: bytes,
    model: VideoModel,
    whole: tuple[str, str],
    odd: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches are cut at fixed frames: one that is not full waits, and so does the frame that may be half there."""
    recipe, straight = whole
    store, path = tmp_path / "s.memdb", tmp_path / "film.ts"
    half, more = (cut(film, share) // 188 * 188 + odd for share in (0.6, 0.75))
    path.write_bytes(film[:half])
    with monkeypatch.context() as patch:
        writing(path, film[half:more], patch)
        report = ingested(store, model, path, recipe)
    assert any("not at its end yet" in warning for warning in report.warnings)
    assert not any("breaks off" in warning or "damaged" in warning for warning in report.warnings)
    before, row = unit_rows(store), row_of(store)
    assert (row.finished, row.gaps) == (False, ())
    assert before
    assert row.watermark_ns <= 0.75 * SECONDS * NS
    with path.open("ab") as file:
        file.write(film[more:])
    report = ingested(store, model, path, recipe)
    assert (report.epoch, report.replayed_units) == (0, 0)
    assert [unit.digest for unit in unit_rows(store)[: len(before)]] == [unit.digest for unit in before]
    assert content(store) == straight
    assert row_of(store).finished
    check_frames(store, SECONDS)


def test_stopped_and_grown_it_ends_as_if_it_had_been_whole(
    film: bytes, model: VideoModel, whole: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, straight = whole
    store, path, stop = tmp_path / "s.memdb", tmp_path / "film.ts", threading.Event()
    path.write_bytes(film[: cut(film, 0.7)])
    step, calls = StreamEncoder.step, iter(range(99))

    def stopping(self: StreamEncoder, frames: Any) -> list[Unit]:
        if next(calls) == 1:
            stop.set()
        return step(self, frames)

    with monkeypatch.context() as patch:
        patch.setattr(StreamEncoder, "step", stopping)
        with pytest.raises(Interrupted):
            ingested(store, model, path, recipe, stop=stop)
    path.write_bytes(film)
    ingested(store, model, path, recipe)
    assert content(store) == straight


def test_grown_behind_its_end_it_goes_on(film: bytes, model: VideoModel, tmp_path: Path) -> None:
    """Nobody saw it grow, and its end went on record: that no longer counts when there is more, twice."""
    store, path = tmp_path / "s.memdb", tmp_path / "film.ts"
    units = 0
    for share in (0.3, 0.62, 1.0):
        path.write_bytes(film[: cut(film, share)])
        report = ingested(store, model, path, "rekv")
        row = row_of(store)
        assert row.finished
        assert row.units > units
        assert (report.units, report.epoch, report.replayed_units) == (row.units - units, 0, 0)
        units = row.units
    check_frames(store, SECONDS)
    assert row.end_ns == SECONDS * NS
    before = [unit.digest for unit in unit_rows(store)]
    report = ingested(store, model, path, "rekv")
    assert report.units == 0
    assert [unit.digest for unit in unit_rows(store)] == before


def test_grown_without_a_state_it_loses_nothing(film: bytes, model: VideoModel, tmp_path: Path) -> None:
    """The end that was no end cut a batch short, which a replay does not: it goes on as another epoch."""
    store, path = tmp_path / "s.memdb", tmp_path / "film.ts"
    path.write_bytes(film[: cut(film, 0.3)])
    ingested(store, model, path, "rekv")
    before = [unit.digest for unit in unit_rows(store)]
    for state in (store / "state").iterdir():
        state.unlink()
    path.write_bytes(film)
    ingested(store, model, path, "rekv")
    assert [unit.digest for unit in unit_rows(store)[: len(before)]] == before
    check_frames(store, SECONDS)


def test_a_file_that_has_hardly_begun_is_no_error(
    film: bytes, model: VideoModel, tmp_path: Path, whole: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seconds make no batch: nothing is kept yet, and nothing is wrong."""
    from memdb.ingest.sources import VideoFile

    recipe, straight = whole
    store, path = tmp_path / "s.memdb", tmp_path / "film.ts"
    path.write_bytes(film[: cut(film, 0.08)])
    with monkeypatch.context() as patch:
        patch.setattr(VideoFile, "_has_grown", lambda self: True)
        report = ingested(store, model, path, recipe)
    assert (report.units, row_of(store).units) == (0, 0)
    assert any("not at its end yet" in warning for warning in report.warnings)
    path.write_bytes(film)
    ingested(store, model, path, recipe)
    assert content(store) == straight


def test_another_film_is_no_growth(film: bytes, model: VideoModel, tmp_path: Path) -> None:
    store, path = tmp_path / "s.memdb", tmp_path / "film.ts"
    path.write_bytes(film[: cut(film, 0.5)])
    ingested(store, model, path, "rekv")
    before = directory_digest(store)
    path.write_bytes(film[:1000] + film)
    with pytest.raises(SourceMismatch, match="begins in another way"):
        ingested(store, model, path, "rekv")
    path.write_bytes(film[: cut(film, 0.4)])  # shorter
    with pytest.raises(SourceMismatch, match="another film"):
        ingested(store, model, path, "rekv")
    shutil.copy(path, tmp_path / "other.ts")
    (tmp_path / "other.ts").write_bytes(film[188:] * 2)
    with pytest.raises(SourceMismatch, match="another film"):
        ingested(store, model, tmp_path / "other.ts", "rekv")
    assert directory_digest(store) == before


def _mkv_while_written(path: Path) -> list[bytes]:
    """What lies on the disk after 20 and after 30 seconds of a recording, and when it has ended."""
    seen: list[bytes] = []
    recorder = {"flush_packets": "1", "cluster_time_limit": "1000"}
    with av.open(str(path), "w", container_options=recorder) as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "g": str(RATE)})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(SECONDS * RATE):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
            if number in (20 * RATE, 30 * RATE):
                seen.append(path.read_bytes())
        container.mux(stream.encode(None))
    return [*seen, path.read_bytes()]


def test_an_mkv_grows_until_its_recorder_ends_it(model: VideoModel, tmp_path: Path) -> None:
    """Then its beginning is written anew, and only its name says that it is the same: refused, and why."""
    store, path = tmp_path / "s.memdb", tmp_path / "film.mkv"
    one, two, ended = _mkv_while_written(path)
    assert len(one) < len(two) < len(ended)
    assert two.startswith(one)
    assert not ended.startswith(two)
    counts = []
    for part in (one, two):
        path.write_bytes(part)
        ingested(store, model, path, "rekv")
        counts.append(row_of(store).units)
    assert 0 < counts[0] < counts[1]
    check_frames(store, counts[1])
    path.write_bytes(ended)
    with pytest.raises(SourceMismatch, match="recorders of mkv and mp4"):
        ingested(store, model, path, "rekv")


def test_an_mp4_without_an_index_says_to_wait(tmp_path: Path) -> None:
    from memdb.schemas.errors import SourceError

    path = write_film(tmp_path / "film.mp4", [250 * n for n in range(40)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SourceError, match="wait until its recorder has ended it"):
        open_source(path)


def test_a_folder_that_a_camera_adds_to_goes_on(model: VideoModel, tmp_path: Path) -> None:
    store, folder = tmp_path / "s.memdb", tmp_path / "shots"
    folder.mkdir()
    for number in range(30):
        if number in (9, 14):
            ingested(store, model, folder, "rekv")
            assert row_of(store).units == number
        PIL.Image.fromarray(numbered_picture(number * RATE)).save(folder / f"{number}.png")
    ingested(store, model, folder, "rekv")
    check_frames(store, 30)
    PIL.Image.new("RGB", (8, 8)).save(folder / "0-before.png")
    with pytest.raises(SourceMismatch):
        ingested(store, model, folder, "rekv")


def test_what_continues_and_what_does_not(tmp_path: Path) -> None:
    """Larger than three MiB: first, middle and last part of the known length are looked at."""
    path = write_film(tmp_path / "film.ts", [40 * n for n in range(60)])
    film = path.read_bytes()
    filler = bytes(5 << 20)
    path.write_bytes(film + filler)
    known = open_source(path).info.identity
    assert not open_source(path).continues(known), "the same length is no growth"
    for at in (None, 0, known.size_bytes // 2, known.size_bytes - 1):
        data = bytearray(film + filler + b"more")
        if at is not None:
            data[at] ^= 1
        path.write_bytes(data)
        with open_source(path) as source:
            assert source.continues(known) == (at is None)


@pytest.mark.parametrize("b_frames", [0, 2])
def test_the_frame_at_the_end_of_a_growing_file_waits(b_frames: int, tmp_path: Path) -> None:
    """Of the last one nobody knows whether it is all there, though a decoder may show something without a word."""
    path = write_film(tmp_path / "film.ts", [40 * n for n in range(60)], b_frames=b_frames)
    whole = path.read_bytes()
    at_rest, growing = [], []
    for share in range(20, 100, 7):
        path.write_bytes(whole[: cut(whole, share / 100) // 188 * 188])
        for numbers, piece in ((at_rest, b""), (growing, b"\0")):
            with open_source(path) as source, path.open("ab") as file:
                file.write(piece)
                file.flush()
                numbers.append([shown_number(frame.image()) for frame in source.frames()])  # type: ignore[union-attr]
                assert source.growing == bool(piece)
                assert not (piece and source.warnings)
    for seen, sure in zip(at_rest, growing, strict=True):
        assert sure == list(range(len(sure)))
        assert 1 <= len(seen) - len(sure) <= 1 + 2 * b_frames
