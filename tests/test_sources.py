"""Sources: true times, upright pictures, and a typed error or a warning for everything that is not a film."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from film_cases import (
    CORNERS,
    HEIGHT,
    WIDTH,
    closed_port,
    numbered_picture,
    served,
    shown_corners,
    shown_number,
    stalling,
    truncated,
    with_late_track,
    write_film,
    write_tone,
)

from memdb.ingest.sampling import sample
from memdb.ingest.sources import FrameIterator, ImageFolder, VideoAddress, VideoFile, open_source, video
from memdb.ingest.sources.base import LONG_SIDE_PX_MAX
from memdb.ingest.sources.identity import file_identity
from memdb.schemas.errors import BudgetError, SourceError, UsageError
from memdb.schemas.frames import Image, SourceIdentity
from memdb.schemas.recording import check_name
from tools.films import COLOURS, plan_scenes, render_film

MS = 1_000_000
CONSTANT = [40 * i for i in range(30)]
VARIABLE = [0, 40, 50, 400, 433, 1000, 1001, 1500, 3000, 3040]


def _times_ms(what: Any, **kwargs: Any) -> list[float]:
    with open_source(what, **kwargs) as source:
        return [frame.pts_ns / MS for frame in source.frames()]


def _numbers(path: Path) -> list[int]:
    with open_source(path) as source:
        return [shown_number(frame.image()) for frame in source.frames()]


# --- times


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("pts_ms", [CONSTANT, VARIABLE], ids=["constant", "variable"])
@pytest.mark.parametrize("offset_ms", [0, 5000])
def test_times_are_those_written(tmp_path: Path, suffix: str, pts_ms: list[int], offset_ms: int) -> None:
    path = write_film(tmp_path / f"film.{suffix}", [offset_ms + pts for pts in pts_ms])
    assert _times_ms(path) == pts_ms
    assert _numbers(path) == list(range(len(pts_ms)))


def test_frames_that_are_stored_out_of_order_come_in_order(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", CONSTANT, b_frames=3)
    assert _times_ms(path) == CONSTANT
    assert _numbers(path) == list(range(30))


def test_the_recording_starts_where_the_container_does(tmp_path: Path) -> None:
    """Sound that begins a second before the first picture is part of the recording."""
    path = write_film(tmp_path / "film.mkv", [1000, 1040, 1080], audio_ms=2000)
    assert _times_ms(path) == [1000, 1040, 1080]


def test_sound_and_a_cover_picture_change_nothing(tmp_path: Path) -> None:
    plain = write_film(tmp_path / "plain.mp4", CONSTANT)
    loud = write_film(tmp_path / "loud.mp4", CONSTANT, audio_ms=1200, cover=True)
    assert _times_ms(loud) == CONSTANT
    assert _numbers(loud) == list(range(30))
    with open_source(plain) as a, open_source(loud) as b:
        first_a, first_b = next(a.frames()).image(), next(b.frames()).image()
        assert np.array_equal(first_a, first_b)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_short_films_lose_nothing_to_the_look_at_their_first_frame(tmp_path: Path, count: int) -> None:
    path = write_film(tmp_path / "film.mp4", CONSTANT[:count], b_frames=2)
    with open_source(path) as source:
        frames = [(f.pts_ns // MS, shown_number(f.image())) for f in source.frames()]
    assert frames == [(40 * i, i) for i in range(count)]
    assert source.media_end_ns == count * 40 * MS


def test_frames_without_times_are_counted(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.h264", CONSTANT)
    assert _times_ms(path) == CONSTANT


def test_the_end_is_that_of_the_last_frame(tmp_path: Path) -> None:
    for suffix in ("mp4", "mkv", "ts", "h264"):
        with open_source(write_film(tmp_path / f"film.{suffix}", CONSTANT)) as source:
            assert source.media_end_ns is None
            assert sum(1 for _ in source.frames()) == 30
            assert source.media_end_ns == 1200 * MS, suffix
            assert source.warnings == []


def test_a_second_pass_gives_the_same(tmp_path: Path) -> None:
    with open_source(write_film(tmp_path / "film.mp4", VARIABLE)) as source:
        first = [(f.pts_ns, f.image().tobytes()) for f in source.frames()]
        assert [(f.pts_ns, f.image().tobytes()) for f in source.frames()] == first


def test_a_source_that_was_closed_ends_at_the_next_frame(tmp_path: Path) -> None:
    source = open_source(write_film(tmp_path / "film.mp4", CONSTANT))
    frames = source.frames()
    next(frames)
    source.close()
    assert list(frames) == []
    with pytest.raises(SourceError, match="closed"):
        next(source.frames())


# --- pictures


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_turned_films_are_shown_upright(tmp_path: Path, rotate: int) -> None:
    """A display matrix turns the stored picture counter-clockwise, as np.rot90 does."""
    path = write_film(tmp_path / "film.mp4", CONSTANT, rotate=rotate)
    with open_source(path) as source:
        image = next(source.frames()).image()
    turned = np.rot90(numbered_picture(0), rotate // 90)
    assert image.shape == turned.shape
    assert (source.info.height, source.info.width) == image.shape[:2]
    assert shown_corners(image) == shown_corners(turned)
    assert image.flags.c_contiguous


def test_every_display_matrix_shows_each_corner_where_it_belongs() -> None:
    """All eight quarter turns and mirrors, against the matrix applied to every pixel."""
    from memdb.ingest.sources.pictures import oriented

    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for matrix in [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [
        (0, b, c, 0) for b in (1, -1) for c in (1, -1)
    ]:
        a, b, c, d = matrix
        shown = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(2) for x in range(3)}
        left, top = min(x for x, _ in shown), min(y for _, y in shown)
        result = oriented(pixels, matrix)
        assert {(x, y) for y in range(result.shape[0]) for x in range(result.shape[1])} == {
            (x - left, y - top) for x, y in shown
        }
        for (x, y), pixel in shown.items():
            assert np.array_equal(result[y - top, x - left], pixel), matrix


def test_colours_are_those_written(tmp_path: Path) -> None:
    with open_source(write_film(tmp_path / "film.mp4", [0])) as source:
        image = next(source.frames()).image()
    assert (source.info.width, source.info.height) == (WIDTH, HEIGHT)
    assert shown_corners(image) == CORNERS
    middle = np.abs(image[24:40, 16:80].astype(int) - numbered_picture(0)[24:40, 16:80])
    assert middle.max() < 24


def test_wide_pixels_widen_the_picture(tmp_path: Path) -> None:
    with open_source(write_film(tmp_path / "film.mp4", CONSTANT, aspect=Fraction(4, 3))) as source:
        assert next(source.frames()).image().shape == (HEIGHT, WIDTH * 4 // 3, 3)
        assert (source.info.width, source.info.height) == (WIDTH * 4 // 3, HEIGHT)


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    render_film(tmp_path / "large.mp4", seconds=0.1, width=3840, height=960)
    with open_source(tmp_path / "large.mp4") as source:
        assert next(source.frames()).image().shape == (480, LONG_SIDE_PX_MAX, 3)
    PIL.Image.new("RGB", (960, 3840)).save(tmp_path / "large.jpg")
    with open_source(tmp_path) as folder:
        assert next(folder.frames()).image().shape == (LONG_SIDE_PX_MAX, 480, 3)
    with open_source([np.zeros((960, 3840, 3), np.uint8)], fps=1) as frames:
        assert next(frames.frames()).image().shape == (480, LONG_SIDE_PX_MAX, 3)
        assert frames.info.width == LONG_SIDE_PX_MAX


def test_frames_that_are_not_picked_are_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memdb.ingest.sources.decoder import Decoder

    converted: list[int] = []
    plain = Decoder.rgb

    def counted(self: Decoder, picture: Any) -> Image:
        converted.append(picture.pts_ns // MS)
        return plain(self, picture)

    monkeypatch.setattr(Decoder, "rgb", counted)
    with open_source(write_film(tmp_path / "film.mp4", CONSTANT)) as source:
        picked = list(sample(source.frames(), 5.0, after_ns=400 * MS, number=3))
    assert [frame.start_ns // MS for frame in picked] == converted == [600, 800, 1000]
    assert [shown_number(frame.image) for frame in picked] == [15, 20, 25]


# --- what is known before the first frame


def test_info_of_a_film(tmp_path: Path) -> None:
    path = write_film(
        tmp_path / "..a film: ß.mp4", CONSTANT, metadata={"creation_time": "2026-11-20T08:00:00.000000Z"}
    )
    with open_source(path) as source:
        info = source.info
    assert (info.live, info.duration_ns) == (False, 1200 * MS)
    assert info.started_at_ns == 1_795_161_600 * 10**9
    assert check_name(info.name) == "a film_ _"


@pytest.mark.parametrize("moment", ["1970-01-01T00:00:00Z", "2107-01-01T00:00:00Z"])
def test_a_clock_that_was_never_set_is_not_believed(tmp_path: Path, moment: str) -> None:
    path = write_film(tmp_path / "film.mkv", CONSTANT, metadata={"creation_time": moment})
    with open_source(path) as source:
        assert source.info.started_at_ns is None


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_duration_counts_from_the_start(tmp_path: Path, suffix: str) -> None:
    path = write_film(tmp_path / f"film.{suffix}", [5000 + pts for pts in CONSTANT])
    with open_source(path) as source:
        assert source.info.duration_ns == 1200 * MS


def test_identity_is_of_the_bytes_and_not_of_the_path(tmp_path: Path) -> None:
    one = write_film(tmp_path / "one.mp4", CONSTANT)
    (tmp_path / "two.mp4").write_bytes(one.read_bytes())
    other = write_film(tmp_path / "other.mp4", CONSTANT[:-1])
    identities = [open_source(path).info.identity for path in (one, tmp_path / "two.mp4", other)]
    assert identities[0] == identities[1] != identities[2]
    assert identities[0].kind == "file"
    assert identities[0].size_bytes == one.stat().st_size


@pytest.mark.parametrize("at", [0, 2_500_000, 4_999_999])
def test_identity_of_a_large_file_looks_at_its_first_middle_and_last_part(tmp_path: Path, at: int) -> None:
    blank = bytearray(5_000_000)
    (tmp_path / "a").write_bytes(blank)
    blank[at] = 1
    (tmp_path / "b").write_bytes(blank)
    a, b = (file_identity(tmp_path / name) for name in "ab")
    assert a.size_bytes == b.size_bytes == 5_000_000
    assert a.digest != b.digest


# --- the folder


def _pictures(folder: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        PIL.Image.new("RGB", (10 + index, 20), (index * 20, 0, 0)).save(folder / name, lossless=True)


def test_a_folder_is_a_film_of_its_pictures_in_natural_order(tmp_path: Path) -> None:
    _pictures(tmp_path, ["1.png", "2.PNG", "10.bmp", "a2.webp", "a10.png"])
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "b.png").mkdir()
    source = open_source(tmp_path)
    assert isinstance(source, ImageFolder)
    frames = list(source.frames())
    assert [f.pts_ns for f in frames] == [i * 1000 * MS for i in range(5)]
    assert [(f.image().shape[1], int(f.image()[0, 0, 0])) for f in frames] == [
        (10 + i, 20 * i) for i in range(5)
    ]
    assert source.media_end_ns == source.info.duration_ns == 5000 * MS
    assert (source.info.identity.kind, source.info.width, source.info.height) == ("folder", 10, 20)
    assert _times_ms(tmp_path, fps=4) == [0, 250, 500, 750, 1000]


def test_the_identity_of_a_folder_is_its_names_and_sizes(tmp_path: Path) -> None:
    _pictures(tmp_path, ["1.png", "2.png"])
    before = open_source(tmp_path).info.identity
    assert open_source(tmp_path).info.identity == before
    (tmp_path / "2.png").rename(tmp_path / "3.png")
    after = open_source(tmp_path).info.identity
    assert (after.size_bytes, after.digest == before.digest) == (before.size_bytes, False)


def test_pictures_come_upright_and_in_colour(tmp_path: Path) -> None:
    upright = PIL.Image.fromarray(numbered_picture(5))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter, to be shown turned back
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "1.png", exif=exif)
    upright.convert("P").save(tmp_path / "2.png")
    upright.convert("RGBA").save(tmp_path / "3.png")
    PIL.Image.fromarray(np.full((HEIGHT, WIDTH), 0x80FF, np.uint16)).save(tmp_path / "4.png")
    one, two, three, grey = (frame.image() for frame in open_source(tmp_path).frames())
    assert np.array_equal(one, numbered_picture(5))
    assert shown_corners(two) == shown_corners(three) == CORNERS
    assert (grey == 0x80).all()
    assert grey.shape == (HEIGHT, WIDTH, 3)


def test_a_broken_picture_leaves_its_time_empty(tmp_path: Path) -> None:
    _pictures(tmp_path, ["1.png", "2.png", "3.jpg"])
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    with open_source(tmp_path) as source:
        frames = list(sample(source.frames(), 1.0))
    assert [(f.number, f.start_ns // MS) for f in frames] == [(0, 0), (1, 2000)]
    assert len(source.warnings) == 1
    assert source.warnings[0].startswith("2.png ")


# --- the iterator


def test_pairs_carry_their_own_times() -> None:
    pairs = [(seconds, numbered_picture(i)) for i, seconds in enumerate([0.5, 0.75, 0.75, 0.2, 2])]
    source = open_source(iter(pairs))
    assert isinstance(source, FrameIterator)
    assert (source.info.width, source.info.height) == (WIDTH, HEIGHT)
    assert (source.info.identity.kind, source.info.identity.digest) == ("frames", "")
    frames = list(source.frames())
    assert [f.pts_ns // MS for f in frames] == [500, 750, 2000]
    assert [shown_number(f.image()) for f in frames] == [0, 1, 4]
    assert source.media_end_ns == 3250 * MS
    assert len(source.warnings) == 1
    assert source.warnings[0].endswith("jumps back: 2")
    with pytest.raises(SourceError, match="once"):
        next(source.frames())


def test_arrays_stand_at_their_rate_and_are_copied() -> None:
    buffer = numbered_picture(1)

    def reused() -> Iterator[Image]:
        for number in (1, 2, 3):
            buffer[:] = numbered_picture(number)
            yield buffer

    with open_source(reused(), fps=30) as source:
        images = [(f.pts_ns, f.image()) for f in source.frames()]
    assert [pts for pts, _ in images] == [0, 33_333_333, 66_666_667]
    assert [shown_number(image) for _, image in images] == [1, 2, 3]
    assert source.media_end_ns == 66_666_667 + 33_333_334


@pytest.mark.parametrize(
    ("frames", "fps", "error", "words"),
    [
        ([], 1, SourceError, "no frames"),
        ([numbered_picture(0)], None, UsageError, "fps"),
        ([(0.0, numbered_picture(0))], 1, UsageError, "fps"),
        ([numbered_picture(0)], 0, BudgetError, "fps"),
        ([numbered_picture(0)], float("nan"), BudgetError, "fps"),
        ([numbered_picture(0)[..., 0]], 1, SourceError, r"\(64, 96\)"),
        ([numbered_picture(0).astype(np.float32)], 1, SourceError, "float32"),
        ([np.zeros((0, 5, 3), np.uint8)], 1, SourceError, "pixels"),
        (["picture.png"], 1, SourceError, "str"),
        ([(-1.0, numbered_picture(0))], None, SourceError, "seconds"),
        ([(float("nan"), numbered_picture(0))], None, SourceError, "seconds"),
        ([("1", numbered_picture(0))], None, SourceError, "seconds"),
        (b"bytes", 1, SourceError, "bytes"),
        (7, 1, SourceError, "int"),
        ("", None, SourceError, "empty path"),
    ],
)
def test_what_is_no_frame_is_refused(
    frames: Any, fps: float | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_source(frames, fps=fps)


def test_a_bad_frame_in_the_middle_is_a_typed_error() -> None:
    frames = open_source([numbered_picture(0), None], fps=1).frames()
    next(frames)
    with pytest.raises(SourceError, match="frame 1"):
        next(frames)


# --- addresses


@pytest.mark.parametrize(("name", "live"), [("film.mp4", False), ("film.ts", False), ("film.ts", True)])
def test_films_over_http(tmp_path: Path, name: str, live: bool) -> None:
    """A server without ranges hides where a transport stream ends: to us that is a live one."""
    write_film(tmp_path / name, CONSTANT)
    with served(tmp_path, ranges=not live) as address, open_source(address + name, reconnect_s=0) as source:
        assert isinstance(source, VideoAddress)
        frames = [(f.pts_ns // MS, shown_number(f.image())) for f in source.frames()]
        assert frames == [(40 * i, i) for i in range(30)]
        same_on_disk = file_identity(tmp_path / name)
        assert source.info.identity == (SourceIdentity("stream", 0, "") if live else same_on_disk)
        assert source.info.name == "127.0.0.1-film"
        assert (source.info.live, source.info.duration_ns is None) == (live, live)
        assert (source.media_end_ns, source.warnings) == (1200 * MS, [])


def test_a_stream_that_falls_silent_ends_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "READ_TIMEOUT_S", 0.4)
    film = write_film(tmp_path / "film.ts", [40 * i for i in range(200)], gop=5).read_bytes()
    answer = b"HTTP/1.0 200 OK\r\n\r\n" + film[: len(film) // 2]
    with stalling(answer) as port, VideoAddress(f"http://127.0.0.1:{port}/film.ts") as source:
        numbers = [shown_number(frame.image()) for frame in source.frames()]
    assert len(numbers) > 20
    assert numbers == list(range(len(numbers)))
    assert source.media_end_ns == len(numbers) * 40 * MS
    assert len(source.warnings) == 1
    assert "breaks off at 00:00:0" in source.warnings[0]
    assert "no answer" in source.warnings[0]


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_an_address_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(video, "OPEN_TIMEOUT_S", 0.3)
    with stalling(b"") as port:
        started_s = time.monotonic()
        with pytest.raises(SourceError, match="check the address"):
            open_source(f"{scheme}://127.0.0.1:{port}/stream")
        assert time.monotonic() - started_s < 3


@pytest.mark.parametrize("scheme", ["rtsp", "rtsps", "http", "https"])
def test_an_address_where_nobody_is(scheme: str) -> None:
    address = f"{scheme}://user:secret@127.0.0.1:{closed_port()}/live?token=secret"
    started_s = time.monotonic()
    with pytest.raises(SourceError, match="check the address") as caught:
        open_source(address)
    assert time.monotonic() - started_s < 3
    assert "secret" not in str(caught.value)
    assert "refused" in str(caught.value)


def test_an_mp4_with_its_index_at_the_end_needs_ranges(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4", [40 * i for i in range(400)], gop=1)
    with served(tmp_path, ranges=False) as address, pytest.raises(SourceError, match="index in front"):
        open_source(address + "film.mp4")


def test_an_address_without_a_film(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no film\n" * 100)
    with served(tmp_path) as address:
        with pytest.raises(SourceError, match="404"):
            open_source(address + "missing.mp4")
        with pytest.raises(SourceError, match="text"):
            open_source(address + "notes.txt")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("rtsp:///stream", "no host"),
        ("ftp://host/film.mp4", "ftp://"),
        ("http://[bad/film.mp4", "not an address"),
    ],
)
def test_addresses_that_are_none(address: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        open_source(address)


# --- bad files


@pytest.mark.parametrize("rate", [1, 0.5])
def test_a_film_carries_its_own_times(tmp_path: Path, rate: float) -> None:
    path = write_film(tmp_path / "film.mp4", CONSTANT)
    with pytest.raises(UsageError, match="fps"):
        open_source(path, fps=rate)


def _text(path: Path) -> Path:
    path.write_text("not a film\n" * 200)
    return path


def _empty(path: Path) -> Path:
    path.touch()
    return path


def _folder_of_text(path: Path) -> Path:
    path.mkdir()
    _text(path / "notes.txt")
    return path


def _folder_of_broken_pictures(path: Path) -> Path:
    path.mkdir()
    _text(path / "picture.png")
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _headless(path: Path) -> Path:
    whole = write_film(path, CONSTANT, container_options={"movflags": "+faststart"}).read_bytes()
    start = whole.index(b"mdat")
    path.write_bytes(whole[: start + 4] + bytes(len(whole) - start - 4))
    return path


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda path: path, "missing.mp4", "does not exist"),
        (lambda path: path, "n" * 5000, "cannot be read"),
        (lambda path: path, "zero\0byte.mp4", "cannot be read"),
        (_folder_of_text, "folder", "holds no pictures"),
        (_folder_of_broken_pictures, "folder", "none of its 1 pictures"),
        (_empty, "empty.mp4", "is empty"),
        (_pipe, "pipe.mp4", "not a plain file"),
        (_text, "text.mp4", "not a video"),
        (_text, "text.txt", "text file"),
        (lambda path: write_tone(path, 500), "tone.mp4", "only audio"),
        (lambda path: truncated(write_film(path, CONSTANT), 0.5), "film.mp4", "moov"),
        (_headless, "headless.mp4", "not one frame"),
    ],
)
def test_bad_input_is_a_typed_error(
    tmp_path: Path, make: Callable[[Path], Path], name: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / name)
    with pytest.raises(SourceError, match=words):
        open_source(path)
    assert capfd.readouterr() == ("", "")


@contextmanager
def _nobody() -> Iterator[None]:
    """Root may read everything: for a while be a user who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_film_or_folder_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        film, pictures = write_film(folder / "film.mp4", [0]), folder / "pictures"
        pictures.mkdir(0o000)
        film.chmod(0o000)
        with _nobody():
            with pytest.raises(SourceError, match="may not be read"):
                open_source(film)
            with pytest.raises(SourceError, match="cannot be read"):
                open_source(pictures)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_a_film_that_breaks_off_keeps_what_was_decoded(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = write_film(
        tmp_path / f"film.{suffix}",
        [40 * i for i in range(200)],
        container_options={"movflags": "+faststart"} if suffix == "mp4" else None,
    )
    cut = truncated(whole, 0.6)
    with open_source(cut) as source:
        numbers = [shown_number(frame.image()) for frame in source.frames()]
    assert 100 < len(numbers) < 140
    assert numbers == list(range(len(numbers)))
    late = suffix == "avi"  # its writer puts an empty frame before the first
    assert source.media_end_ns == (len(numbers) + late) * 40 * MS
    if suffix != "ts":  # a transport stream does not say how long it is
        assert len(source.warnings) == 1
        assert source.warnings[0].startswith(f"{cut.name} breaks off at 00:00:04.")
    assert capfd.readouterr() == ("", "")


def test_damage_in_the_middle_costs_only_the_frames_around_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_film(tmp_path / "film.mkv", [40 * i for i in range(200)], gop=5)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    path.write_bytes(data)
    with open_source(path) as source:
        numbers = {frame.pts_ns // (40 * MS): shown_number(frame.image()) for frame in source.frames()}
    assert 150 < len(numbers) < 200
    assert set(range(60)) | set(range(140, 200)) <= numbers.keys()
    assert all(numbers[place] == place for place in [*range(60), *range(140, 200)])
    assert len(source.warnings) == 1
    assert "damaged" in source.warnings[0]
    assert capfd.readouterr() == ("", "")


def test_a_track_that_appears_on_the_way_is_passed_over(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.ts", [40 * i for i in range(150)], gop=5)
    assert with_late_track(path) == 3
    with open_source(path) as source:
        times = [frame.pts_ns // (40 * MS) for frame in source.frames()]
    assert times[:90] == list(range(90))
    assert times[-1] == 149
    assert len(times) > 140


def test_a_file_whose_name_looks_like_an_address_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_film(tmp_path / "http:film.mp4", CONSTANT)
    write_film(tmp_path / "concat:a|b.mp4", CONSTANT)
    monkeypatch.chdir(tmp_path)
    for name in ("http:film.mp4", "concat:a|b.mp4"):
        assert isinstance(open_source(name), VideoFile)
        assert _times_ms(name) == CONSTANT


def test_opening_the_package_loads_no_decoder() -> None:
    code = "import sys, memdb.ingest.sources; print({'av', 'PIL', 'torch'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"


# --- rendered films


def test_a_rendered_film_shows_what_its_scenes_say(tmp_path: Path) -> None:
    scenes = render_film(tmp_path / "film.mp4", seconds=9, width=160, height=96, seed=3, scene_s=2.0)
    assert [(s.start_s, s.end_s) for s in scenes] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert scenes == plan_scenes(9, scene_s=2.0, seed=3)
    with open_source(tmp_path / "film.mp4") as source:
        frames = list(source.frames())
        assert [f.pts_ns // MS for f in frames] == [40 * i for i in range(225)]
        for scene in scenes:
            for frame in frames:
                if scene.start_s <= frame.pts_ns / 1e9 < scene.end_s and frame.pts_ns // MS % 200 == 0:
                    _check_shows(frame.image(), scene.colour, scene.background)


def _check_shows(image: Image, colour: str, background: str) -> None:
    """Nine tenths of the pixels are of the two colours, and there are some of each."""
    named = np.array(list(COLOURS.values()))
    nearest = np.abs(image[:, :, None].astype(int) - named).sum(-1).argmin(-1)
    shares = {name: float((nearest == i).mean()) for i, name in enumerate(COLOURS)}
    assert shares[colour] > 0.02
    assert shares[background] > 0.6
    assert shares[colour] + shares[background] > 0.9


def test_the_same_seed_renders_the_same_film(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        render_film(tmp_path / f"{name}.mp4", seconds=1, width=96, height=64, seed=seed)
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("rotate", [90, 180, 270])
def test_a_film_rendered_turned_is_shown_upright(tmp_path: Path, rotate: int) -> None:
    images = []
    for turn in (0, rotate):
        path = tmp_path / f"{turn}.mp4"
        render_film(path, seconds=0.2, width=160, height=96, rotate=turn, created_at="2026-11-20T08:00:00Z")
        with open_source(path) as source:
            images.append(next(source.frames()).image().astype(int))
            assert (source.info.width, source.info.height) == (160, 96)
            assert source.info.started_at_ns == 1_795_161_600 * 10**9
    assert np.abs(images[0] - images[1]).mean() < 3


@pytest.mark.parametrize(
    "wrong",
    [{"seconds": 0}, {"seconds": 1, "fps": 0}, {"seconds": 1, "width": 97}, {"seconds": 1, "rotate": 45}],
)
def test_absurd_films_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        render_film(tmp_path / "film.mp4", **wrong)
