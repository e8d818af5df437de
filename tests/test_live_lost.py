"""A camera that is lost while it is ingested: tried again, and everything that was seen is kept at once."""

from __future__ import annotations

import io
import itertools
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest

from memdb.client import connect
from memdb.ingest import resume
from memdb.ingest.sources import RECONNECT_S, Reconnecting, VideoAddress, live, open_source, video
from memdb.models.protocol import VideoModel
from memdb.schemas.errors import BudgetError, Interrupted, SourceError
from memdb.schemas.frames import DecodedFrame, SourceIdentity, SourceInfo
from memdb.schemas.recording import Gap
from memdb.schemas.rows import RecordingRow
from memdb.store import Store
from tests.film_cases import numbered_picture, shown_number, write_film
from tests.rtsp_cases import Play, RtspCamera
from tests.run_cases import (
    NAME,
    count_units,
    ingest_words,
    ingested,
    small_model,
    small_spec,
    started,
    unit_digests,
    unit_rows,
    until,
)
from tests.store_cases import directory_digest
from tests.ts_cases import Show, TsCamera

NS, MS = 10**9, 10**6
FRAME_NS = 40 * MS
SAMPLE_FPS = 5  # every fifth frame; a batch of four is 0.8 s of film
SPEED = 8.0


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_spec(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(spec: str) -> VideoModel:
    return small_model(spec)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.h264"
    return write_film(path, [40 * n for n in range(250)], gop=5)


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RETRY_S_MIN", 0.2)
    monkeypatch.setattr(video, "READ_TIMEOUT_S", 0.5)


def row_of(store: Path) -> RecordingRow:
    with Store.open(store) as found:
        return found.recording(NAME)


def seen(store: Path) -> list[tuple[int, int]]:
    """Of every stored frame its time, and of the first of each unit the number that it shows; else -1."""
    found: list[tuple[int, int]] = []
    with Store.open(store) as opened:
        for row in opened.units(opened.recording(NAME).id):
            number = shown_number(np.asarray(PIL.Image.open(io.BytesIO(opened.read_keyframe(row) or b""))))
            starts = [int(ns) for ns in row.blocks["start_ns"]]
            found += zip(starts, [number, *[-1] * (len(starts) - 1)], strict=True)
    return found


def check(store: Path, shows: list[tuple[int, int]], *, unread: int = 0) -> list[Gap]:
    """Everything that was shown is stored, in its place, and between the shows are gaps that nothing reaches into.

    unread: so many sampled frames of a show may be missing at its end.
    """
    row, units, frames = row_of(store), unit_rows(store), seen(store)
    gaps = list(row.gaps)
    assert len(gaps) == len(shows) - 1
    assert all(gap.reason == "the source was not connected" for gap in gaps)
    for gap in gaps:
        assert all(unit.end_ns <= gap.start_ns or unit.start_ns >= gap.end_ns for unit in units)
    assert all(one.end_ns <= two.start_ns for one, two in itertools.pairwise(units))
    bounds = [0, *(gap.end_ns for gap in gaps), 1 << 62]
    for (first, last), (low, high) in zip(shows, itertools.pairwise(bounds), strict=True):
        part = [(ns, number) for ns, number in frames if low <= ns < high]
        assert part[0][0] - low < NS // SAMPLE_FPS + FRAME_NS
        for ns, number in part:
            if number >= 0:
                assert abs(ns - low - (number - first) * FRAME_NS) <= 2 * FRAME_NS
        expected = (last - first) * FRAME_NS * SAMPLE_FPS // NS
        assert len(part) >= expected - 1 - unread, "a part of a batch is kept, too"
    with connect(store, create=False) as client:
        assert client.verify().ok
    return gaps


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_an_rtsp_camera_that_is_lost_twice(
    film: Path, model: VideoModel, recipe: str, tmp_path: Path
) -> None:
    store = tmp_path / "s.memdb"
    plays = [Play(0, 68), Play(100, 168, "say goodbye"), Play(180, 238, "fall silent")]
    with RtspCamera(film, plays, speed=SPEED) as camera:
        began_s = time.monotonic()
        report = ingested(store, model, camera.address, recipe, sample_fps=SAMPLE_FPS, reconnect_s=1)
        whole_s = time.monotonic() - began_s
        assert len(camera.played) == 3
    gaps = check(store, [(0, 68), (100, 168), (180, 238)])
    assert all(0.2 * NS - NS // SAMPLE_FPS <= gap.end_ns - gap.start_ns <= whole_s * NS for gap in gaps)
    row = row_of(store)
    assert [epoch.number for epoch in row.epochs] == [0], "the window is carried over"
    assert not row.finished
    assert report.epoch == 0
    assert "connections lost and found again: 2" in report.warnings[0]
    assert "did not come back within 1 s" in report.warnings[1]
    assert len(report.warnings) == 2


@pytest.mark.parametrize("kind", ["http", "tcp"])
@pytest.mark.parametrize("end", ["hang up", "reset", "fall silent", "sound only"])
def test_a_transport_stream_that_is_lost(kind: str, end: str, model: VideoModel, tmp_path: Path) -> None:
    """However it is lost; also where only its pictures are, and where its clock goes on or begins anew."""
    store = tmp_path / "s.memdb"
    shows = [Show(0, 68, end), Show(100, 150, start_s=1000.0)]
    with TsCamera(shows, kind=kind, speed=SPEED, sound=end == "sound only") as camera:
        ingested(store, model, camera.address, "rekv", sample_fps=SAMPLE_FPS, reconnect_s=0.5)
        assert len(camera.spans_s) == 2
        away_s = camera.spans_s[1][0] - camera.spans_s[0][1]
    # A reset takes away what has come and was not read yet: much where the machine is slow.
    unread = 8 if end == "reset" else 0
    gap = check(store, [(0, 66 if end == "sound only" else 68), (100, 150)], unread=unread)[0]
    assert gap.end_ns - gap.start_ns <= (away_s + 0.5 + unread / SAMPLE_FPS) * NS


def test_what_was_seen_is_kept_as_soon_as_the_camera_is_lost(
    film: Path, model: VideoModel, tmp_path: Path
) -> None:
    """Before it comes back: the last seconds before somebody cuts its wire are the ones that matter."""
    store, stop = tmp_path / "s.memdb", threading.Event()
    failed: list[BaseException] = []

    def ingest() -> None:
        try:
            ingested(store, model, camera.address, "hybrid", sample_fps=SAMPLE_FPS, stop=stop)
        except BaseException as error:
            failed.append(error)

    with RtspCamera(film, [Play(0, 48)], speed=SPEED) as camera:  # ten frames: two batches, and two more
        thread = threading.Thread(target=ingest)
        thread.start()
        until(lambda: bool(failed) or (count_units(store) > 0 and len(seen(store)) == 10))
        assert not failed
        assert row_of(store).gaps == ()
        asked_s = time.monotonic()
        stop.set()
        thread.join()
        assert time.monotonic() - asked_s < 30, "nobody waits for a camera who wants to end"
    assert isinstance(failed[0], Interrupted)
    assert len(seen(store)) == 10
    assert connect(store, create=False).verify().ok


def test_killed_while_the_camera_is_away(film: Path, spec: str, model: VideoModel, tmp_path: Path) -> None:
    """By the real command; the next one goes on from the state that was saved when the camera was lost."""
    store = tmp_path / "s.memdb"
    with RtspCamera(film, [Play(0, 48), Play(100, 148)], speed=SPEED) as camera:
        words = [*ingest_words(store, spec, camera.address, "hybrid"), "--sample-fps", str(SAMPLE_FPS)]
        camera.pause.set()  # after the first play nobody is let in
        with started(*words) as process:
            until(lambda: count_units(store) > 0 and len(seen(store)) == 10, process)
            units = count_units(store)
            until(lambda: any((store / "state").glob(f"*-{units:010d}.state")), process)
            process.send_signal(signal.SIGKILL)
            process.wait()
        before = unit_digests(store)
        camera.pause.clear()
        report = ingested(store, model, camera.address, "hybrid", sample_fps=SAMPLE_FPS, reconnect_s=0.3)
    assert unit_digests(store)[: len(before)] == before
    assert (report.resumed_from_unit, report.epoch) == (len(before), 0)
    check(store, [(0, 48), (100, 148)])


@pytest.mark.parametrize("jump_s", [3 * 3600, -3 * 3600, 20 * 365 * 86_400])
def test_a_wall_clock_that_is_set_meanwhile_tears_nothing(
    jump_s: int, film: Path, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, wall = tmp_path / "s.memdb", time.time_ns
    with RtspCamera(film, [Play(0, 68), Play(100, 168)], speed=SPEED) as camera:
        monkeypatch.setattr(
            time, "time_ns", lambda: wall() + (jump_s * NS if len(camera.played) and camera.ended_s else 0)
        )
        report = ingested(store, model, camera.address, "rekv", sample_fps=SAMPLE_FPS, reconnect_s=0.3)
    gap = check(store, [(0, 68), (100, 168)])[0]
    assert gap.end_ns - gap.start_ns < 30 * NS
    told = [warning for warning in report.warnings if "the wall clock was set" in warning]
    assert len(told) == 1
    assert ("ahead" if jump_s > 0 else "back") in told[0]
    started_ns = row_of(store).spec.started_at_ns
    assert started_ns is not None
    assert abs(started_ns - wall()) < 600 * NS, "media time 0 is when the camera was called first"


def test_the_start_on_the_wall_clock_is_kept_by_those_who_go_on(
    film: Path, model: VideoModel, tmp_path: Path
) -> None:
    store = tmp_path / "s.memdb"
    starts = []
    for _ in range(2):
        before_ns = time.time_ns()
        with RtspCamera(film, [Play(0, 48)], speed=SPEED) as camera:
            ingested(store, model, camera.address, "rekv", sample_fps=SAMPLE_FPS, reconnect_s=0)
        row = row_of(store)
        assert row.spec.started_at_ns == row.created_ns
        starts.append(row.spec.started_at_ns)
        if len(starts) == 1:
            assert before_ns <= row.created_ns <= time.time_ns()
    assert starts[0] == starts[1]
    assert abs(row.gaps[0].end_ns - (before_ns - row.created_ns)) < 60 * NS


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["rtsp", "http", "tcp"])
def test_a_camera_that_is_lost_again_and_again(
    kind: str, film: Path, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the pace of the world, in one ingest: a dozen connections of a few seconds, ended in every way."""
    monkeypatch.setattr(video, "READ_TIMEOUT_S", 1.0)
    choose = random.Random(f"{kind} {os.environ.get('MEMDB_SEED', '0')}")
    ends = ["hang up", "fall silent", "say goodbye" if kind == "rtsp" else "reset"]
    shows = []
    for _ in range(12):
        first, count = choose.randrange(60), choose.randint(48, 110)
        shows.append((first, first + count, choose.choice(ends)))
    camera: RtspCamera | TsCamera
    if kind == "rtsp":
        camera = RtspCamera(film, [Play(*show) for show in shows])
    else:
        starts = [choose.choice((0.0, 500.0)) for _ in shows]
        camera = TsCamera(
            [Show(*show, start_s=at) for show, at in zip(shows, starts, strict=True)], kind=kind
        )
    store = tmp_path / "s.memdb"
    with camera:
        began_s = time.monotonic()
        ingested(store, model, camera.address, "hybrid", sample_fps=SAMPLE_FPS, reconnect_s=2)
        whole_s = time.monotonic() - began_s
    gaps = check(store, [show[:2] for show in shows])
    row = row_of(store)
    assert row.watermark_ns <= whole_s * NS
    missed_s = sum(gap.end_ns - gap.start_ns for gap in gaps) / NS
    assert missed_s > 11 * 0.2 - 11 / SAMPLE_FPS


# --- another process goes on: the wall clock is all there is


def _gone_on(
    store: Path, film: Path, model: VideoModel, patch: pytest.MonkeyPatch, now_ns: int
) -> tuple[Gap, int]:
    """A second ingest at that moment of the wall clock; its gap, and the watermark before it."""
    watermark_ns = row_of(store).watermark_ns
    patch.setattr(resume, "time", SimpleNamespace(time_ns=lambda: now_ns))
    with RtspCamera(film, [Play(100, 140)], speed=SPEED) as camera:
        ingested(store, model, camera.address, "rekv", sample_fps=SAMPLE_FPS, reconnect_s=0)
    return row_of(store).gaps[-1], watermark_ns


def test_in_another_process_a_clock_that_was_set_while_it_ran_is_seen(
    film: Path, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording began by a clock three hours late, which was set on the way: not three hours are missing."""
    store, wall = tmp_path / "s.memdb", time.time_ns
    with RtspCamera(film, [Play(0, 48)], speed=SPEED) as camera, monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: wall() - 3 * 3600 * NS)
        ingested(store, model, camera.address, "rekv", sample_fps=SAMPLE_FPS, reconnect_s=0)
    gap, watermark_ns = _gone_on(store, film, model, monkeypatch, wall() + 60 * NS)
    assert 60 * NS <= gap.end_ns - watermark_ns < 180 * NS


@pytest.mark.parametrize("away_s", [-3600, 30 * 365 * 86_400])
def test_a_clock_that_cannot_be_right_is_not_believed(
    away_s: int, film: Path, model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.memdb"
    with RtspCamera(film, [Play(0, 48)], speed=SPEED) as camera:
        ingested(store, model, camera.address, "rekv", sample_fps=SAMPLE_FPS, reconnect_s=0)
    gap, _ = _gone_on(store, film, model, monkeypatch, time.time_ns() + away_s * NS)
    assert gap.end_ns - gap.start_ns == NS // SAMPLE_FPS
    assert ("is not believed" in gap.reason) == (away_s > 0)


# --- back-off, on a clock of its own


@dataclass
class Stage:
    """A camera that is not there, and a clock that goes on only while somebody waits."""

    lasts_s: list[float]  # how long each connection lasts
    away: list[int]  # how often nobody answers before each but the first
    now_s: float = 0.0
    waits_s: list[float] = field(default_factory=list)

    def now_ns(self) -> int:
        return round(self.now_s * NS)

    def wait(self, seconds: float) -> bool:
        self.waits_s.append(seconds)
        self.now_s += seconds
        return False

    def connection(self) -> VideoAddress:
        return cast(VideoAddress, Connection(self, self.lasts_s.pop(0)))


class Connection:
    label, growing = "cam", False

    def __init__(self, stage: Stage, lasts_s: float) -> None:
        self._stage, self._lasts_s = stage, lasts_s
        self.info = SourceInfo(SourceIdentity("stream", 0, ""), "cam", True, None, None, 96, 64)
        self.warnings: list[str] = []
        self.media_end_ns = 0
        self.lost_by: str | None = "it hung up"

    def frames(self) -> Iterator[DecodedFrame]:
        for number in range(round(self._lasts_s)):
            self._stage.now_s += 1
            yield DecodedFrame(number * NS, lambda: numbered_picture(0))
        self.media_end_ns = round(self._lasts_s) * NS

    def close(self) -> None:
        pass

    def again(self) -> VideoAddress:
        if not self._stage.away:
            raise SourceError("nobody is there")
        if self._stage.away[0]:
            self._stage.away[0] -= 1
            raise SourceError("nobody is there")
        self._stage.away.pop(0)
        return self._stage.connection()


def _played(stage: Stage, patience_s: float, patch: pytest.MonkeyPatch) -> tuple[list[Any], Reconnecting]:
    patch.setattr(live, "RETRY_S_MIN", 1.0)
    source = Reconnecting(stage.connection(), patience_s, stage.now_ns)
    patch.setattr(source._closed, "wait", stage.wait)
    return [item if isinstance(item, Gap) else item.pts_ns // NS for item in source.frames()], source


def test_tries_are_made_after_waits_that_double_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage([2, 3], [9])
    items, _ = _played(stage, 1000, monkeypatch)
    assert stage.waits_s[:10] == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    away_s = sum(stage.waits_s[:10])
    gap = Gap(2 * NS, round((2 + away_s) * NS), "the source was not connected")
    assert items[:6] == [0, 1, Gap(2 * NS, 2 * NS, "it hung up"), gap, 2 + away_s, 3 + away_s]


def test_it_is_given_up_when_nobody_was_there_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage([5], [])
    monkeypatch.setattr(time, "time_ns", stage.now_ns)
    items, source = _played(stage, 100, monkeypatch)
    assert sum(stage.waits_s) == 100
    assert items == [0, 1, 2, 3, 4, Gap(5 * NS, 5 * NS, "it hung up")]
    assert source.media_end_ns == 5 * NS
    assert source.warnings == [
        "cam is gone since 00:00:05 and did not come back within 100 s: run the same command again when it is there"
    ]


def test_a_camera_that_comes_and_goes_is_not_hammered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits begin anew only behind a connection that held for a minute."""
    stage = Stage([1, 1, 1, 1, 100, 1], [0, 0, 0, 0, 0])
    _played(stage, 70, monkeypatch)
    assert stage.waits_s[:5] == [1, 2, 4, 8, 1]


def test_thousands_of_losses_leave_a_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage([1] * 2000, [0] * 1999)
    monkeypatch.setattr(time, "time_ns", stage.now_ns)
    items, source = _played(stage, 70, monkeypatch)
    times = [item for item in items if not isinstance(item, Gap)]
    assert len(times) == 2000
    assert all(one < two for one, two in itertools.pairwise(times))
    assert len(source.warnings) == 2
    assert "lost and found again: 1999" in source.warnings[0]


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_a_time_that_nobody_can_wait_is_refused(seconds: float, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="reconnect_s"):
        open_source(write_film(tmp_path / "film.mp4", [0]), reconnect_s=seconds)


def test_the_default_is_one(tmp_path: Path) -> None:
    import inspect

    from memdb.cli import ingest
    from memdb.client import Client

    options = {option.name: option.default for option in ingest.params}
    assert options["reconnect_s"] == RECONNECT_S
    assert inspect.signature(Client.ingest).parameters["reconnect_s"].default == RECONNECT_S


# --- what an address gives away, and to whom


def test_a_password_is_used_and_never_told(film: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level("DEBUG"),
        RtspCamera(film, [Play(0, 48), Play(50, 98)], speed=SPEED, user="guard:secret") as camera,
    ):
        with open_source(camera.address, reconnect_s=0.3) as source:
            assert sum(1 for item in source.frames() if not isinstance(item, Gap)) == 96
        with pytest.raises(SourceError, match="401") as caught:
            open_source(camera.address.replace("secret", "s3cret"))
    for text in (caplog.text, str(caught.value), *source.warnings, source.info.name):
        assert "secret" not in text
        assert "s3cret" not in text


def test_an_address_leads_to_no_file_and_a_file_to_no_address(tmp_path: Path) -> None:
    """A playlist is a text that names others: one that is fetched must not read a disk, nor one on it call home."""
    from tests.film_cases import served

    write_film(tmp_path / "film.ts", [40 * n for n in range(60)])
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n"
    with served(tmp_path) as address:
        (tmp_path / "far.m3u8").write_text(f"{head}{address}film.ts\n#EXT-X-ENDLIST\n")
        (tmp_path / "near.m3u8").write_text(f"{head}file:{tmp_path}/film.ts\n#EXT-X-ENDLIST\n")
        (tmp_path / "fine.m3u8").write_text(f"{head}film.ts\n#EXT-X-ENDLIST\n")
        with open_source(address + "fine.m3u8", reconnect_s=0) as source:
            assert sum(1 for _ in source.frames()) == 60
        with pytest.raises(SourceError):
            open_source(address + "near.m3u8", reconnect_s=0)
        with pytest.raises(SourceError):
            open_source(tmp_path / "far.m3u8")
    assert directory_digest(tmp_path)
