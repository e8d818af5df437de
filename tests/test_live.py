"""A live source: what comes is kept batch by batch, can be asked while it comes, and goes on after every break."""

from __future__ import annotations

import http.server
import io
import itertools
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from memdb.client import Client, connect
from memdb.ingest import resume
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.sources import open_source
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import Interrupted, SourceError
from memdb.schemas.rows import RecordingRow, UnitRow
from memdb.schemas.units import Unit
from memdb.store import Store
from tests.film_cases import closed_port, shown_number, write_film
from tests.run_cases import (
    CHUNK,
    NAME,
    count_units,
    ingest_words,
    opened,
    small_model,
    small_spec,
    started,
    unit_digests,
    unit_rows,
    until,
)
from tests.run_cases import (
    ingested as ingested_from,
)
from tests.store_cases import directory_digest

ingested = partial(
    ingested_from, reconnect_s=0
)  # a connection is an ingest; tests/test_live_lost.py has the rest
NS = 10**9
SECONDS = 26  # a sampled frame each: six batches of four, and two frames that make none
RATE = 4  # frames a second on film: a decoder that opens a stream wants to see some before it begins


class Camera(http.server.ThreadingHTTPServer):
    """An address that sends a transport stream of unknown length from its beginning to everyone who connects.

    After `share` of the bytes it waits until `go_on` is set.
    """

    daemon_threads = True

    def __init__(self, film: bytes) -> None:
        self.film, self.share = film, 1.0
        self.go_on = threading.Event()
        self.connections = 0
        camera = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                camera.connections += 1
                self.send_response(200)
                self.send_header("Content-Type", "video/mp2t")
                self.end_headers()
                for piece in camera.pieces():
                    self.wfile.write(piece)
                    self.wfile.flush()

            def handle(self) -> None:
                with suppress(ConnectionError):
                    super().handle()

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/lobby.ts"

    def pieces(self) -> Iterator[bytes]:
        pause = int(len(self.film) * self.share) // 188 * 188
        for start in range(0, pause, 1880):
            yield self.film[start : min(start + 1880, pause)]
        if pause < len(self.film):
            self.go_on.wait(60)
            yield self.film[pause:]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return filmed(tmp_path_factory.mktemp("live") / "film.ts", SECONDS)


def filmed(path: Path, seconds: int) -> bytes:
    times = [1000 * number // RATE for number in range(seconds * RATE)]
    return write_film(path, times, gop=RATE).read_bytes()


@pytest.fixture
def camera(film: bytes) -> Iterator[Camera]:
    with Camera(film) as server:
        yield server
        server.go_on.set()
        server.shutdown()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_spec(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(spec: str) -> VideoModel:
    return small_model(spec)


def recording(store: Path) -> RecordingRow:
    with Store.open(store) as found:
        return found.recording(NAME)


def shown_s(store: Path) -> list[float]:
    """The second on film that the key frames of the units show."""
    with Store.open(store) as found:
        jpegs = [found.read_keyframe(row) for row in found.units(found.recording(NAME).id)]
    return [shown_number(np.asarray(PIL.Image.open(io.BytesIO(jpeg or b"")))) / RATE for jpeg in jpegs]


def starts_s(store: Path) -> list[int]:
    return [row.start_ns // NS for row in unit_rows(store)]


def check_times(store: Path) -> None:
    """Times never go back, and no unit reaches into a gap or a gap into another."""
    row, units = recording(store), unit_rows(store)
    assert all(one.end_ns <= two.start_ns for one, two in itertools.pairwise(units))
    assert all(one.end_ns <= two.start_ns for one, two in itertools.pairwise(row.gaps))
    for gap in row.gaps:
        assert gap.start_ns < gap.end_ns
        assert all(unit.end_ns <= gap.start_ns or unit.start_ns >= gap.end_ns for unit in units)
    with connect(store, create=False) as client:
        assert client.verify().ok


def at_wall_clock(monkeypatch: pytest.MonkeyPatch, store: Path, seconds: float) -> None:
    """For the ingest that follows: so long after the recording was begun."""
    moment = recording(store).created_ns + round(seconds * NS)
    monkeypatch.setattr(resume, "time", SimpleNamespace(time_ns=lambda: moment))


def test_only_full_batches_are_kept_and_the_recording_stays_open(
    camera: Camera, model: VideoModel, tmp_path: Path
) -> None:
    store = tmp_path / "s.memdb"
    report = ingested(store, model, camera.address, "rekv")
    assert shown_s(store) == list(range(24))
    assert starts_s(store) == list(range(24))
    assert report.units == 24
    assert any("the last 2 frames make no full batch" in warning for warning in report.warnings)
    row = recording(store)
    assert (row.spec.live, row.finished, row.gaps) == (True, False, ())
    assert [epoch.number for epoch in row.epochs] == [0]


def test_connected_again_it_goes_on_behind_a_gap_of_the_wall_clock(
    camera: Camera, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window is carried over: the second stretch has the bits of a stream that paused for an hour."""
    store, straight = tmp_path / "s.memdb", tmp_path / "straight.memdb"
    ingested(store, model, camera.address, "rekv")
    before = unit_digests(store)
    at_wall_clock(monkeypatch, store, 3600)
    report = ingested(store, model, camera.address, "rekv")
    assert (report.resumed_from_unit, report.epoch, report.units) == (24, 0, 24)
    assert any("00:00:24 to 01:00:00" in warning for warning in report.warnings)
    assert starts_s(store) == [*range(24), *range(3600, 3624)]
    assert shown_s(store) == [*range(24)] * 2
    assert [(gap.start_ns, gap.end_ns) for gap in recording(store).gaps] == [(24 * NS, 3600 * NS)]
    assert unit_digests(store)[:24] == before
    check_times(store)
    with open_source(camera.address, reconnect_s=0) as source:
        pictures = [frame.image() for frame in source.frames()][: 24 * RATE : RATE]
    paused = zip([*range(24), *range(3600, 3624)], pictures * 2, strict=True)
    ingested(straight, model, [(float(second), picture) for second, picture in paused], "rekv")
    assert unit_digests(store) == unit_digests(straight)


def test_where_the_clock_does_not_help_it_goes_on_a_slot_later(
    camera: Camera, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends faster than it happened, or a clock that was set back: never back in time."""
    store = tmp_path / "s.memdb"
    ingested(store, model, camera.address, "rekv")
    for moment, behind in ((20.0, 24), (-1000.0, 49)):
        at_wall_clock(monkeypatch, store, moment)
        ingested(store, model, camera.address, "rekv")
        last = recording(store).gaps[-1]
        assert (last.start_ns, last.end_ns) == (behind * NS, (behind + 1) * NS)
    assert starts_s(store) == [*range(24), *range(25, 49), *range(50, 74)]
    check_times(store)


@pytest.mark.parametrize("recipe", ["rlivs", "hybrid"])
def test_no_clip_spans_a_gap(
    recipe: str, camera: Camera, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips of five frames in batches of four: four are open when the connection ends, and close at the gap."""
    store = tmp_path / "s.memdb"
    settings = {
        "settings": (
            f"encode.chunk_frames={CHUNK}",
            "unit.frames=5",
            "caption.tokens_max=3",
            "caption.encoder=input-embeddings",
        )
    }
    ingested(store, model, camera.address, recipe, **settings)
    before = unit_rows(store)
    assert [(row.start_ns // NS, row.end_ns // NS) for row in before] == [(0, 5), (5, 10), (10, 15), (15, 20)]
    at_wall_clock(monkeypatch, store, 60.4)
    ingested(store, model, camera.address, recipe, **settings)
    after = unit_rows(store)
    spans = [(row.start_ns // NS, row.end_ns // NS) for row in after]
    assert spans[:4] == [(row.start_ns // NS, row.end_ns // NS) for row in before]
    assert spans[4:7] == [(20, 24), (61, 66), (66, 71)]
    assert [(gap.start_ns // NS, gap.end_ns // NS) for gap in recording(store).gaps] == [(24, 61)]
    check_times(store)


def test_killed_without_a_state_it_goes_on_as_a_new_epoch(
    camera: Camera, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.memdb"
    ingested(store, model, camera.address, "rekv")
    before = unit_digests(store)
    for path in (store / "state").iterdir():
        path.unlink()
    at_wall_clock(monkeypatch, store, 100)
    report = ingested(store, model, camera.address, "rekv")
    row = recording(store)
    assert [(epoch.number, epoch.first_unit) for epoch in row.epochs] == [(0, 0), (1, 24)]
    assert (report.epoch, {unit.epoch for unit in unit_rows(store)[24:]}) == (1, {1})
    assert starts_s(store) == [*range(24), *range(100, 124)]
    assert [(gap.start_ns // NS, gap.end_ns // NS) for gap in row.gaps] == [(24, 100)]
    assert unit_digests(store)[:24] == before
    check_times(store)


def test_a_state_that_is_older_than_the_watermark_cannot_be_gone_on_from(
    camera: Camera, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came between cannot be encoded again: a new epoch, and no unit is compared with another's frames."""
    store, older = tmp_path / "s.memdb", tmp_path / "older"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingested(store, model, camera.address, "rekv", stop=_stop_in_batch(patch, 2))
    shutil.copytree(store / "state", older)
    before = unit_digests(store)
    at_wall_clock(monkeypatch, store, 50)
    ingested(store, model, camera.address, "rekv")
    shutil.rmtree(store / "state")
    shutil.copytree(older, store / "state")
    at_wall_clock(monkeypatch, store, 100)
    ingested(store, model, camera.address, "rekv")
    row = recording(store)
    assert [(epoch.number, epoch.first_unit) for epoch in row.epochs] == [(0, 0), (1, 36)]
    assert starts_s(store) == [*range(12), *range(50, 74), *range(100, 124)]
    assert unit_digests(store)[:12] == before
    check_times(store)


def _stop_in_batch(patch: pytest.MonkeyPatch, batch: int) -> threading.Event:
    step, calls, stop = StreamEncoder.step, itertools.count(), threading.Event()

    def stopping(self: StreamEncoder, frames: Any) -> list[Unit]:
        if next(calls) == batch:
            stop.set()
        return step(self, frames)

    patch.setattr(StreamEncoder, "step", stopping)
    return stop


def test_connections_that_bring_no_full_batch_leave_gaps_that_follow_each_other(
    camera: Camera, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.memdb"
    whole, short = camera.film, filmed(tmp_path / "short.ts", 3)
    camera.film = short
    report = ingested(store, model, camera.address, "rekv")
    assert (report.units, recording(store).units) == (0, 0)
    for moment in (10, 20, 15):
        at_wall_clock(monkeypatch, store, moment)
        ingested(store, model, camera.address, "rekv")
    assert [(gap.start_ns // NS, gap.end_ns // NS) for gap in recording(store).gaps] == [
        (0, 10),
        (10, 20),
        (20, 21),
    ]
    camera.film = whole
    at_wall_clock(monkeypatch, store, 30)
    ingested(store, model, camera.address, "rekv")
    assert starts_s(store) == list(range(30, 54))
    assert [epoch.number for epoch in recording(store).epochs] == [0]
    check_times(store)


def test_a_camera_that_is_gone_changes_nothing(camera: Camera, model: VideoModel, tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    ingested(store, model, camera.address, "rekv")
    before = directory_digest(store)
    with pytest.raises(SourceError):
        ingested(store, model, f"http://127.0.0.1:{closed_port()}/lobby.ts", "rekv")
    assert directory_digest(store) == before


def test_asked_while_it_comes(camera: Camera, model: VideoModel, spec: str, tmp_path: Path) -> None:
    """Another connection answers up to the watermark, and a later question from it sees what came since."""
    store = tmp_path / "s.memdb"
    camera.share = 0.6
    failed: list[BaseException] = []

    def ingest() -> None:
        try:
            ingested(store, model, camera.address, "rekv")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=ingest)
    thread.start()
    until(lambda: bool(failed) or count_units(store) >= 2 * CHUNK)
    assert not failed
    with opened(store, small_model(spec), create=False) as client:
        first = client.ask("what is shown?", mode="recent")
        assert thread.is_alive()
        assert first.text
        assert first.watermark_s == client.recordings()[0].units
        assert first.watermark_s < 24
        _evidence_is_stored(first, unit_rows(store))
        camera.go_on.set()
        thread.join()
        assert not failed
        second = client.ask("what is shown?", mode="recent")
        assert second.watermark_s == 24
        assert max(item.end_s for item in second.evidence) == 24
        _same_as_a_new_connection(client, store, spec)


def _evidence_is_stored(answer: Any, units: list[UnitRow]) -> None:
    """Spans begin and end where units do, and end by the watermark."""
    starts, ends = {unit.start_ns for unit in units}, {unit.end_ns for unit in units}
    assert answer.evidence
    for item in answer.evidence:
        assert round(item.start_s * NS) in starts
        assert round(item.end_s * NS) in ends
        assert item.end_s <= answer.watermark_s


def _same_as_a_new_connection(client: Client, store: Path, spec: str) -> None:
    """A connection that saw the recording grow answers like one that was opened just now."""
    with opened(store, small_model(spec), create=False) as new:
        for mode in ("kv", "recent"):
            grown, fresh = client.ask("where?", mode=mode), new.ask("where?", mode=mode)
            assert (grown.token_ids, grown.evidence) == (fresh.token_ids, fresh.evidence)


def test_a_silent_camera_can_be_stopped(camera: Camera, model: VideoModel, tmp_path: Path) -> None:
    """Ctrl-C while the next frame is waited for: whole batches are kept, and the next connection goes on."""
    store, stop = tmp_path / "s.memdb", threading.Event()
    camera.share = 0.5
    waiter = threading.Thread(
        target=lambda: (
            until(lambda: count_units(store) >= CHUNK),
            stop.set(),
            camera.go_on.set(),
        )
    )
    waiter.start()
    with pytest.raises(Interrupted, match="is kept"):
        ingested(store, model, camera.address, "rekv", stop=stop)
    waiter.join()
    kept = count_units(store)
    assert kept % CHUNK == 0
    assert 0 < kept < 24
    camera.share = 1.0
    report = ingested(store, model, camera.address, "rekv")
    assert (report.resumed_from_unit, report.epoch, count_units(store)) == (kept, 0, kept + 24)
    check_times(store)


def test_a_killed_live_ingest_goes_on(camera: Camera, spec: str, model: VideoModel, tmp_path: Path) -> None:
    """The real command, killed while the camera is silent, and run again."""
    store = tmp_path / "s.memdb"
    camera.share = 0.6
    with started(*ingest_words(store, spec, camera.address, "hybrid")) as process:
        until(lambda: count_units(store) >= 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = unit_digests(store)
    assert 0 < len(before) < 8
    camera.go_on.set()
    began = time.time_ns() - recording(store).created_ns
    ingested(store, model, camera.address, "hybrid")
    after = unit_rows(store)
    assert [row.digest for row in after[: len(before)]] == before
    gap = recording(store).gaps[0]
    assert gap.start_ns >= after[len(before) - 1].end_ns
    assert gap.end_ns >= began
    assert any(row.start_ns == gap.end_ns for row in after)
    check_times(store)
