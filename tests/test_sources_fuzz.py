"""Harmed films and pictures give frames or a typed error: no crash, no hang, no memory that they only claim."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.film_cases import numbered_picture, write_film, write_pictures, write_tracks

TIMES_MS = [40 * n for n in range(100)]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    fast = {"movflags": "+faststart"}
    write_film(folder / "film.mp4", TIMES_MS, container_options=fast, b_frames=2, audio_ms=2000)
    write_film(folder / "piece.mp4", TIMES_MS, container_options={"movflags": "frag_keyframe+empty_moov"})
    write_film(folder / "film.mkv", TIMES_MS, audio_ms=2000)
    write_film(folder / "film.avi", TIMES_MS)
    write_film(folder / "film.ts", TIMES_MS, audio_ms=2000, b_frames=2)
    write_film(folder / "film.h264", TIMES_MS)
    write_film(folder / "turned.mp4", TIMES_MS, rotate=90, container_options=fast)
    write_tracks(folder / "tracks.mkv", [(64, 48), (128, 96)])
    pictures = [numbered_picture(n) for n in range(20)]
    write_pictures(folder / "vp9.webm", pictures, "libvpx-vp9", "yuv420p", options={"b": "0", "crf": "30"})
    write_pictures(folder / "mpeg2.ts", pictures, "mpeg2video", "yuv420p")
    write_pictures(folder / "motion.avi", pictures, "mjpeg", "yuvj420p")
    write_pictures(folder / "ffv1.mkv", pictures, "ffv1", "yuv420p10le")
    write_pictures(folder / "alpha.mov", pictures, "qtrle", "argb")
    for suffix in ("png", "jpg", "webp", "bmp"):
        PIL.Image.fromarray(np.tile(pictures[5], (4, 4, 1))).save(folder / f"picture.{suffix}")
    return folder


def check(films: Path, first: int, count: int) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_films", str(films), str(first), str(count)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"AV_LOG_FORCE_NOCOLOR": "1"},
    )
    lines = answer.stdout.splitlines()
    assert answer.returncode == 0, f"trial {lines[-1]}: {answer.stderr[-2000:]}"
    assert len(lines) == count
    ends = Counter(re.sub(r"\d+", "n", line.split("\t")[3]) for line in lines)
    assert ends.keys() <= {"n frames, n gaps", "SourceError behind n frames"}
    assert ends["n frames, n gaps"] > count // 4, f"most harm leaves something to see: {ends}"


def test_harmed_films_give_frames_or_a_typed_error(films: Path) -> None:
    check(films, 0, 340)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_harmed_films(films: Path, part: int) -> None:
    seed = int(os.environ.get("MEMDB_SEED", "0"))
    check(films, 1_000_000 * (seed + 1) + 4000 * part, 4000)
