"""Pictures of every depth, layout and size come as 8-bit RGB; of several tracks always the same one is read."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from memdb.ingest.sources import VideoFile, open_source
from memdb.ingest.sources.base import PICTURE_PX_MAX, on_black
from memdb.schemas.errors import SourceError, UsageError
from memdb.schemas.frames import DecodedFrame, Image
from memdb.store import Store
from tests.film_cases import (
    CORNERS,
    WIDTH,
    numbered_picture,
    shown_corners,
    write_film,
    write_pictures,
    write_tracks,
)
from tests.h264_cases import endless_film
from tests.run_cases import command, small_spec

RED, GREEN = (200, 40, 90), (30, 180, 60)


def halves(height: int, width: int, dtype: type = np.uint8, factor: int = 1) -> npt.NDArray[Any]:
    """The upper half red, the lower green."""
    picture = np.empty((height, width, 3), dtype)
    picture[: height // 2], picture[height // 2 :] = (np.array(c) * factor for c in (RED, GREEN))
    return picture


def frames(what: Any, **kwargs: Any) -> tuple[VideoFile, list[Image]]:
    with open_source(what, **kwargs) as source:
        found = [item.image() for item in source.frames() if isinstance(item, DecodedFrame)]
        assert isinstance(source, VideoFile)
        return source, found


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "size"),
    [
        ("odd.mkv", "ffv1", "yuv420p", (37, 51)),
        ("odd.mp4", "libx264", "yuv444p", (37, 51)),
        ("odd.webm", "libvpx-vp9", "yuv420p", (37, 51)),
        ("odd.avi", "mpeg4", "yuv420p", (37, 51)),
        ("small.mkv", "ffv1", "yuv444p", (13, 9)),
        ("thin.mkv", "ffv1", "yuv444p", (601, 3)),
        ("ten.mkv", "ffv1", "yuv420p10le", (40, 64)),
        ("ten.mov", "prores_ks", "yuv422p10le", (40, 64)),
        ("ten-rgb.mkv", "ffv1", "gbrp10le", (40, 64)),
        ("sixteen.mkv", "ffv1", "rgb48le", (37, 51)),
        ("full.avi", "mjpeg", "yuvj420p", (40, 64)),
        ("packed.mkv", "rawvideo", "yuyv422", (40, 64)),
    ],
)
def test_every_layout_of_pixels_is_shown_in_its_colours(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, size: tuple[int, int]
) -> None:
    wide = {"mjpeg": {"q": "2"}, "libx264": {"crf": "4"}, "libvpx-vp9": {"crf": "4", "b": "0"}}
    path = write_pictures(tmp_path / name, [halves(*size)] * 3, codec, pix_fmt, options=wide.get(codec))
    source, found = frames(path)
    assert len(found) == 3
    assert (source.info.height, source.info.width) == size
    for image in found:
        assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
        assert (
            np.abs(image[: size[0] // 2 - 4].astype(int) - RED).max() <= 8
        )  # chroma is smooth at the border
        assert np.abs(image[size[0] // 2 + 4 :].astype(int) - GREEN).max() <= 8


@pytest.mark.parametrize("colorspace", [1, 5, 9], ids=["bt709", "bt601", "bt2020"])
@pytest.mark.parametrize("color_range", [1, 2], ids=["limited", "full"])
def test_the_matrix_and_the_range_that_a_film_names_are_used(
    tmp_path: Path, colorspace: int, color_range: int
) -> None:
    path = write_pictures(
        tmp_path / "film.mkv",
        [halves(40, 64)],
        "ffv1",
        "yuv444p",
        colorspace=colorspace,
        color_range=color_range,
    )
    image = frames(path)[1][0]
    assert np.abs(image.astype(int) - halves(40, 64)).max() <= 4


def see_through(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Red, opaque in the upper third, half there in the middle, and not there at the bottom."""
    picture = np.zeros((height, width, 4), np.uint8)
    picture[:] = (*RED, 255)
    picture[height // 3 : 2 * height // 3, :, 3] = 128
    picture[2 * height // 3 :, :, 3] = 0
    return picture


def check_on_black(image: Image, tolerance: int = 3) -> None:
    third = image.shape[0] // 3
    for row, share in ((third // 2, 1.0), (third + third // 2, 128 / 255), (2 * third + third // 2, 0.0)):
        assert np.abs(image[row].astype(int) - np.array(RED) * share).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("rgba.mov", "qtrle", "argb"),
        ("rgba.mkv", "ffv1", "bgra"),
        ("yuva.mkv", "ffv1", "yuva444p"),
        ("ten.mov", "prores_ks", "yuva444p10le"),
        ("png.mov", "png", "rgba"),
    ],
)
def test_what_is_transparent_shows_black(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    """Not the colour that happens to be stored where nothing is to be seen."""
    path = write_pictures(tmp_path / name, [see_through(48, 64)] * 2, codec, pix_fmt, layout="rgba")
    for image in frames(path)[1]:
        assert image.shape == (48, 64, 3)
        check_on_black(image, 6 if codec == "prores_ks" else 3)


def test_transparent_pictures_of_a_folder_show_black(tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(see_through(48, 64))
    picture.save(tmp_path / "1.png")
    picture.save(tmp_path / "2.webp", lossless=True, exact=True)
    grey = PIL.Image.fromarray(see_through(48, 64)[:, :, [0, 3]], "LA")
    grey.save(tmp_path / "3.png")
    palette = PIL.Image.new("P", (8, 8), 0)
    palette.putpalette([250, 0, 0, 0, 250, 0])
    palette.putpixel((0, 0), 1)
    palette.save(tmp_path / "4.png", transparency=0)
    with open_source(tmp_path) as source:
        one, two, three, four = (item.image() for item in source.frames() if isinstance(item, DecodedFrame))
    check_on_black(one)
    check_on_black(two)
    assert [int(three[row, 0, 0]) for row in (0, 47)] == [RED[0], 0]
    assert [tuple(four[0, x]) for x in (0, 1)] == [(0, 250, 0), (0, 0, 0)]


def test_an_upright_picture_with_alpha_stays_upright(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stored = PIL.Image.fromarray(numbered_picture(5)).transpose(PIL.Image.Transpose.ROTATE_90)
    stored.convert("RGBA").save(tmp_path / "1.png", exif=exif)
    with open_source(tmp_path) as source:
        image = next(item.image() for item in source.frames() if isinstance(item, DecodedFrame))
    assert image.shape[1] == WIDTH
    assert shown_corners(image) == CORNERS


def test_black_is_laid_under_exactly() -> None:
    alpha, colour = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    picture = np.stack([colour, colour, colour, alpha], -1).astype(np.uint8)
    exact = np.rint(colour * alpha / 255)
    assert np.array_equal(on_black(picture), np.stack([exact] * 3, -1))


# --- several tracks


def grey(images: Sequence[Image]) -> set[int]:
    return {round(float(image.mean()) / 40) - 1 for image in images}


SMALL, LARGE = (64, 48), (128, 96)


@pytest.mark.parametrize(
    ("suffix", "sizes", "default", "read"),
    [
        ("mkv", [SMALL, LARGE], None, 1),
        ("mkv", [LARGE, SMALL], None, 0),
        ("mkv", [SMALL, SMALL, SMALL], None, 0),
        ("mkv", [SMALL, LARGE, SMALL], 2, 2),
        ("mp4", [SMALL, LARGE], None, 0),  # its first track is marked as the one to play
        ("ts", [SMALL, LARGE, LARGE], None, 1),
    ],
)
def test_of_several_tracks_the_best_is_read_and_said(
    tmp_path: Path, suffix: str, sizes: list[tuple[int, int]], default: int | None, read: int
) -> None:
    path = write_tracks(tmp_path / f"film.{suffix}", sizes, default=default)
    source, found = frames(path)
    assert len(found) == 10
    assert grey(found) == {read}
    assert (source.info.width, source.info.height) == sizes[read]
    assert f"of {len(sizes)} video tracks number {read} " in source.warnings[0]
    assert len(source.warnings) == 1


@pytest.mark.parametrize("track", [0, 1])
def test_a_track_can_be_named(tmp_path: Path, track: int) -> None:
    path = write_tracks(tmp_path / "film.mkv", [SMALL, LARGE])
    source, found = frames(path, track=track)
    assert grey(found) == {track}
    same = source.info.identity == open_source(path).info.identity
    assert same == (track == 1), "another track is another film; the best one, named, is the same"


@pytest.mark.parametrize("track", [-1, 1])
def test_a_track_that_is_not_there_is_a_usage_error(tmp_path: Path, track: int) -> None:
    with pytest.raises(UsageError, match="numbered 0 to 0"):
        open_source(write_film(tmp_path / "film.mp4", [0, 40]), track=track)


def test_by_the_command_each_track_is_a_recording_of_its_own(tmp_path: Path) -> None:
    """Two cameras in one file: front and back go into two recordings, and neither goes on with the other."""
    path, store = write_tracks(tmp_path / "film.mkv", [SMALL, LARGE]), tmp_path / "s.memdb"
    words = ["ingest", str(path), "--store", str(store), "--model", small_spec(tmp_path), "--recipe", "rekv"]
    words += ["--sample-fps", "25", "--set", "encode.chunk_frames=4", "--device", "cpu"]
    assert command(*words, "--recording", "back").code == 0
    front = command(*words, "--recording", "front", "--track", "0")
    assert front.code == 0
    assert "number 0 (64 x 48) is read and not 1 (128 x 96)" in front.err
    mixed = command(*words, "--recording", "back", "--track", "0")
    assert (mixed.code, "another film" in mixed.err) == (1, True)
    assert command(*words, "--recording", "third", "--track", "2").code == 2
    with Store.open(store) as found:
        for name, colour in (("front", 0), ("back", 1)):
            rows = found.units(found.recording(name).id)
            assert len(rows) == 10
            jpeg = found.read_keyframe(rows[0])
            assert grey([np.asarray(PIL.Image.open(io.BytesIO(jpeg or b"")))]) == {colour}


def test_a_folder_has_no_tracks(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    with pytest.raises(UsageError, match="only films have"):
        open_source(tmp_path, track=0)


# --- sizes that are only claimed


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims that size, with a kilobyte of it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_made(tmp_path: Path, side: int) -> None:
    (tmp_path / "1.png").write_bytes(png_of(side, side))
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "2.png")
    with open_source(tmp_path) as source:
        first, second = (item for item in source.frames() if isinstance(item, DecodedFrame))
        with pytest.raises(SourceError, match=r"is not read|exceeds limit"):
            first.image()
        assert second.image().shape == (8, 8, 3)
    assert "1.png" in source.warnings[0]


_PEAK = """
import sys
from pathlib import Path
import av
from memdb.ingest.sources import open_source
from memdb.schemas.errors import SourceError
def peak_kib():  # not ru_maxrss, which a child takes over from a big parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
before = peak_kib()
try:
    with open_source(sys.argv[1]) as source:
        print(sum(1 for _ in source.frames()))
except SourceError as error:
    print(error)
print(peak_kib() - before)
"""


@pytest.mark.parametrize("suffix", ["h264", "mkv", "mp4", "avi"])
@pytest.mark.parametrize("side", [16_000, 60_000])
def test_a_film_that_claims_to_be_huge_takes_no_memory(tmp_path: Path, suffix: str, side: int) -> None:
    """Not even in ffmpeg, which decodes the first pictures when it opens a film: 1.2 GB for 16,000 x 16,000."""
    path = endless_film(tmp_path / f"film.{suffix}", side, side)
    assert side * side > PICTURE_PX_MAX
    answer = subprocess.run([sys.executable, "-c", _PEAK, path], capture_output=True, text=True, check=True)
    said, peak_kib = answer.stdout.strip().rsplit("\n", 1)
    assert path.name in said
    assert int(peak_kib) < 200_000
