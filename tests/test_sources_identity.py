"""A film behind http:// is known again: resumed from its beginning, and not taken for another one."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.sources import open_source
from memdb.ingest.sources.identity import UNKNOWN, address_identity, file_identity
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import Interrupted, SourceMismatch
from memdb.schemas.frames import SourceIdentity
from memdb.schemas.units import Unit
from memdb.store import Store
from tests.film_cases import closed_port, served, write_film
from tests.run_cases import NAME, content, ingested, small_model, small_spec
from tests.store_cases import directory_digest

SECONDS = 22


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    return small_model(small_spec(tmp_path_factory.mktemp("model")))


def film(path: Path, *, seconds: int = SECONDS) -> Path:
    return write_film(
        path, [250 * n for n in range(seconds * 4)], gop=4, container_options={"movflags": "+faststart"}
    )


def _stopped(store: Path, model: VideoModel, source: str, patch: pytest.MonkeyPatch) -> None:
    """Ended after its second batch, and its states are lost."""
    step, calls, stop = StreamEncoder.step, iter(range(99)), threading.Event()

    def stopping(self: StreamEncoder, frames: Any) -> list[Unit]:
        if next(calls) == 1:
            stop.set()
        return step(self, frames)

    with patch.context() as stepped:
        stepped.setattr(StreamEncoder, "step", stopping)
        with pytest.raises(Interrupted):
            ingested(store, model, source, "rekv", stop=stop)
    for state in (store / "state").iterdir():
        state.unlink()


@pytest.mark.parametrize("ranges", [True, False])
def test_resumed_without_a_state_it_is_encoded_again_and_compared(
    ranges: bool, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store, straight = film(tmp_path / "film.mp4"), tmp_path / "s.memdb", tmp_path / "straight.memdb"
    ingested(straight, model, path, "rekv")
    with served(tmp_path, ranges=ranges) as address:
        _stopped(store, model, address + "film.mp4", monkeypatch)
        report = ingested(store, model, address + "film.mp4", "rekv")
    assert (report.epoch, report.resumed_from_unit, report.replayed_units) == (0, 0, 8)
    assert content(store) == content(straight)
    with Store.open(store) as found:
        assert found.recording(NAME).finished


def test_on_the_disk_it_is_the_same_film(
    model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = film(tmp_path / "film.mp4"), tmp_path / "s.memdb"
    with served(tmp_path) as address:
        _stopped(store, model, address + "film.mp4", monkeypatch)
        report = ingested(store, model, path, "rekv")
        assert report.replayed_units == 8
        report = ingested(store, model, address + "film.mp4", "rekv")
    assert report.units == 0
    assert "already" in report.warnings[0]


@pytest.mark.parametrize("ranges", [True, False])
def test_another_film_at_the_same_address_is_refused(
    ranges: bool, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = film(tmp_path / "film.mp4"), tmp_path / "s.memdb"
    with served(tmp_path, ranges=ranges) as address:
        _stopped(store, model, address + "film.mp4", monkeypatch)
        before = directory_digest(store)
        film(path, seconds=SECONDS + 3)
        with pytest.raises(SourceMismatch, match=r"another film|begins in another way"):
            ingested(store, model, address + "film.mp4", "rekv")
    assert directory_digest(store) == before


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_film_whose_connection_is_lost_is_read_on(suffix: str, tmp_path: Path) -> None:
    data = film(tmp_path / f"film.{suffix}").read_bytes()
    with (
        serving(data, losses=1) as server,
        open_source(f"http://127.0.0.1:{server.server_port}/film.{suffix}") as source,
    ):
        assert server.losses == 0
        assert sum(1 for _ in source.frames()) == 4 * SECONDS
        assert not source.growing
        assert source.warnings == []


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_what_the_network_did_not_bring_is_fetched_by_the_next_ingest(
    suffix: str, model: VideoModel, tmp_path: Path
) -> None:
    """The server knows no ranges: what came is kept, the film is not taken for whole, and the rest follows."""
    path, store, straight = (
        film(tmp_path / f"film.{suffix}"),
        tmp_path / "s.memdb",
        tmp_path / "straight.memdb",
    )
    ingested(straight, model, path, "hybrid")
    with serving(path.read_bytes(), losses=1, ranges=False) as server:
        address = f"http://127.0.0.1:{server.server_port}/film.{suffix}"
        report = ingested(store, model, address, "hybrid")
        assert any("breaks off" in warning for warning in report.warnings)
        assert any("not at its end yet" in warning for warning in report.warnings)
        with Store.open(store) as found:
            row = found.recording(NAME)
            assert row.units > 0
            assert not row.finished
        report = ingested(store, model, address, "hybrid")
        assert (report.epoch, report.replayed_units) == (0, 0)
    assert content(store) == content(straight)


class _Server(http.server.ThreadingHTTPServer):
    """Serves `data`, with ranges, to who knows the password; counts what it sent."""

    daemon_threads = True

    def __init__(
        self, data: bytes, *, password: str = "", length: bool = True, losses: int = 0, ranges: bool = True
    ) -> None:
        self.sent_bytes, self.losses = 0, losses
        server = self
        wanted = "Basic " + base64.b64encode(f"guard:{password}".encode()).decode()

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                if password and self.headers.get("Authorization") != wanted:
                    self.send_response(401)
                    self.end_headers()
                    return
                wanted_range = self.headers.get("Range", "bytes=0-") if ranges else "bytes=0-"
                first, _, last = wanted_range.removeprefix("bytes=").partition("-")
                part = data[int(first) : int(last or len(data)) + 1] if length else data
                self.send_response(206 if length and ranges else 200)
                if length and ranges:
                    self.send_header(
                        "Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
                    )
                if length:
                    self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                if server.losses and len(part) > len(data) // 2:
                    server.losses -= 1
                    part = part[: len(part) * 6 // 10]
                self.wfile.write(part)
                server.sent_bytes += len(part)

            def handle(self) -> None:
                with suppress(ConnectionError):
                    super().handle()

        super().__init__(("127.0.0.1", 0), Handler)


@contextmanager
def serving(data: bytes, **how: Any) -> Iterator[_Server]:
    with _Server(data, **how) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.mark.parametrize("size_bytes", [1, 1 << 20, 3 << 20, (3 << 20) + 1, 9_000_001])
def test_it_is_that_of_the_file_for_three_megabytes_at_most(size_bytes: int, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(size_bytes)
    (tmp_path / "film").write_bytes(data)
    with serving(data, password="s e:c/ret") as server:
        address = f"http://guard:s%20e%3Ac%2Fret@127.0.0.1:{server.server_port}/film"
        assert address_identity(address, 5.0) == file_identity(tmp_path / "film")
        assert server.sent_bytes <= 4 << 20


def test_a_film_that_grows_behind_a_server_goes_on(model: VideoModel, tmp_path: Path) -> None:
    whole, store = film(tmp_path / "whole.ts"), tmp_path / "s.memdb"
    data, path = whole.read_bytes(), tmp_path / "film.ts"
    with served(tmp_path) as address:
        for share, units in ((0.5, 11), (1.0, 22)):
            path.write_bytes(data[: int(len(data) * share) // 188 * 188])
            ingested(store, model, address + "film.ts", "rekv")
            with Store.open(store) as found:
                assert abs(found.recording(NAME).units - units) <= 1
        path.write_bytes(data[188:] * 2)
        with pytest.raises(SourceMismatch, match="begins in another way"):
            ingested(store, model, address + "film.ts", "rekv")


def test_where_nothing_is_said_nothing_is_known(tmp_path: Path) -> None:
    data = bytes(range(256)) * 100
    with serving(data, length=False) as server:
        assert address_identity(f"http://127.0.0.1:{server.server_port}/film", 5.0) == UNKNOWN
    with serving(data, password="secret") as server:
        assert address_identity(f"http://127.0.0.1:{server.server_port}/film", 5.0) == UNKNOWN
    assert address_identity(f"http://127.0.0.1:{closed_port()}/film", 5.0) == UNKNOWN


def test_a_film_whose_size_a_server_names_ends_where_it_ends(tmp_path: Path) -> None:
    """Though without ranges nobody knows how long it is: nothing was lost, and nobody is called again."""
    film(tmp_path / "film.ts")
    with served(tmp_path, ranges=False) as address, open_source(address + "film.ts") as source:
        assert source.info.live
        assert sum(1 for _ in source.frames()) == 4 * SECONDS
        assert source.warnings == []


def test_another_track_is_another_film(tmp_path: Path) -> None:
    from tests.film_cases import write_tracks

    path = write_tracks(tmp_path / "film.mkv", [(64, 48), (128, 96)])
    plain, small = (open_source(path, track=track).info.identity for track in (None, 0))
    assert small == SourceIdentity("file", plain.size_bytes, f"{plain.digest}-0")
    with served(tmp_path) as address:
        assert open_source(address + "film.mkv", track=0).info.identity == small
