"""A camera of other people's making: GStreamer's RTSP server, lost and found again within one ingest.

Needs Debian's python3-gi, gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-good and gstreamer1.0-plugins-bad.
"""

from __future__ import annotations

import io
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from memdb.client import connect
from memdb.ingest.sources import live, open_source
from memdb.schemas.recording import Gap
from memdb.store import Store
from tests.film_cases import closed_port, shown_number, write_film
from tests.run_cases import CHUNK, NAME, count_units, ingested, small_model, small_spec, until

MS = 10**6
_PYTHON = "/usr/bin/python3"
_ASK = (
    "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst; Gst.init(None); "
    "assert all(map(Gst.ElementFactory.find, ('qtdemux', 'h264parse', 'rtph264pay')))"
)


def _is_there() -> bool:
    try:
        return subprocess.run([_PYTHON, "-c", _ASK], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not _is_there(), reason="no GStreamer RTSP server for the system's Python")


@contextmanager
def camera(film: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    words = [_PYTHON, str(Path(__file__).with_name("gst_camera.py")), str(film), str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def film(path: Path, seconds: float) -> Path:
    return write_film(path, [40 * n for n in range(round(seconds * 25))], gop=10)


def test_its_pictures_and_times_come_as_they_are(tmp_path: Path) -> None:
    port = closed_port()
    with (
        camera(film(tmp_path / "film.mp4", 3), port),
        open_source(f"rtsp://127.0.0.1:{port}/gate", reconnect_s=0) as source,
    ):
        frames = [
            (item.pts_ns, shown_number(item.image())) for item in source.frames() if not isinstance(item, Gap)
        ]
    assert source.info.live
    assert [number for _, number in frames] == list(range(75))
    assert all(abs(ns - number * 40 * MS) < MS for ns, number in frames)


def test_killed_and_started_again_it_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is killed in the middle of its film; another one plays it from the beginning, to its end."""
    monkeypatch.setattr(live, "RETRY_S_MIN", 0.2)
    store, port = tmp_path / "s.memdb", closed_port()
    model, path = small_model(small_spec(tmp_path)), film(tmp_path / "film.mp4", 4)
    with ExitStack() as cameras:
        process = cameras.enter_context(camera(path, port))

        def replace() -> None:
            until(lambda: count_units(store) >= CHUNK)
            process.kill()
            process.wait()
            cameras.enter_context(camera(path, port))

        thread = threading.Thread(target=replace)
        thread.start()
        report = ingested(store, model, f"rtsp://127.0.0.1:{port}/gate", "rekv", sample_fps=5)
        thread.join()
    assert any("lost and found again: 1" in warning for warning in report.warnings)
    with Store.open(store) as found:
        row = found.recording(NAME)
        rows = found.units(row.id)
        shown = [
            shown_number(np.asarray(PIL.Image.open(io.BytesIO(found.read_keyframe(unit) or b""))))
            for unit in rows
        ]
    assert len(row.gaps) == 1
    gap = row.gaps[0]
    before = [unit.start_ns for unit in rows if unit.end_ns <= gap.start_ns]
    after = [unit.start_ns for unit in rows if unit.start_ns >= gap.end_ns]
    assert len(before) + len(after) == len(rows)
    assert len(before) >= CHUNK
    assert len(after) >= 16, "a film of 4 s, 5 frames a second, in batches of four"
    origins = [0] * len(before) + [gap.end_ns] * len(after)
    for ns, origin_ns, number in zip(before + after, origins, shown, strict=True):
        assert abs(ns - origin_ns - number * 40 * MS) <= 80 * MS
    with connect(store, create=False) as client:
        assert client.verify().ok
