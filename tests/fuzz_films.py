"""Harmed films through the public call, in a process of its own: `python -m tests.fuzz_films FOLDER FIRST COUNT`.

For each trial one line: number, what was done, and how it ended. Anything but frames or an error of memdb's ends the
process; so does more memory or time than a film of this size may take. The trial that it was at is the last line.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from memdb.ingest.sources import open_source
from memdb.ingest.sources.base import LONG_SIDE_PX_MAX
from memdb.schemas.errors import MemdbError
from memdb.schemas.recording import Gap

TRIAL_S_MAX = 60  # a hang; a trial takes hundredths of a second
PEAK_BYTES_MAX = 1 << 30
_SPACE_BYTES_MAX = 6 << 30

Harm = Callable[[random.Random, bytearray], bytearray]


def _flip(choose: random.Random, data: bytearray) -> bytearray:
    """Bits anywhere, or in the head, where sizes and counts stand."""
    end = len(data) if choose.random() < 0.6 else min(len(data), 2000)
    for _ in range(choose.choice((1, 3, 30, 300))):
        data[choose.randrange(end)] ^= 1 << choose.randrange(8)
    return data


def _cut(choose: random.Random, data: bytearray) -> bytearray:
    return data[: choose.randrange(len(data))]


def _behead(choose: random.Random, data: bytearray) -> bytearray:
    return data[choose.randrange(len(data)) :]


def _repeat(choose: random.Random, data: bytearray) -> bytearray:
    low, high = sorted(choose.sample(range(len(data) + 1), 2))
    return data[:high] + data[low:high] * choose.choice((1, 5)) + data[high:]


def _swap(choose: random.Random, data: bytearray) -> bytearray:
    a, b, c, d = sorted(choose.sample(range(len(data) + 1), 4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _splice(choose: random.Random, data: bytearray) -> bytearray:
    at = choose.randrange(len(data))
    return data[:at] + choose.randbytes(choose.choice((1, 187, 5000))) + data[at:]


def _overwrite(choose: random.Random, data: bytearray) -> bytearray:
    low, high = sorted(choose.sample(range(len(data) + 1), 2))
    high = min(high, low + 5000)
    data[low:high] = choose.choice((bytes(high - low), b"\xff" * (high - low), choose.randbytes(high - low)))
    return data


def _huge(choose: random.Random, data: bytearray) -> bytearray:
    """Fields in the head that claim the most that they can."""
    for _ in range(choose.randint(1, 4)):
        at, width = choose.randrange(min(len(data) - 8, 2000)), choose.choice((2, 4, 8))
        data[at : at + width] = choose.choice((b"\xff" * width, b"\x7f" + b"\xff" * (width - 1)))
    return data


HARMS: tuple[Harm, ...] = (_flip, _flip, _cut, _behead, _repeat, _swap, _splice, _overwrite, _huge)


def _watched(path: Path) -> str:
    """How a film ended: what every caller may rely on is asserted on the way."""
    frames, gaps, last_ns = 0, 0, -1
    try:
        with open_source(path) as source:
            for item in source.frames():
                if isinstance(item, Gap):
                    assert last_ns < item.end_ns > item.start_ns >= 0
                    gaps += 1
                    continue
                assert last_ns < item.pts_ns < 1 << 62
                last_ns = item.pts_ns
                frames += 1
                assert frames < 100_000
                if frames % 7 == 1:
                    try:
                        image = item.image()
                    except MemdbError:
                        continue
                    assert image.ndim == 3
                    assert image.shape[2] == 3
                    assert 0 < max(image.shape) <= LONG_SIDE_PX_MAX
            assert source.media_end_ns is None or source.media_end_ns > last_ns
            assert len(source.warnings) <= 20
    except MemdbError as error:
        return f"{type(error).__name__} behind {frames} frames" if _is_one_line(error) else "many lines"
    return f"{frames} frames, {gaps} gaps"


def _peak_bytes() -> int:
    """The most memory that this program has held: ru_maxrss would count what its parent held before exec, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


def _is_one_line(error: MemdbError) -> bool:
    return bool(str(error)) and "\n" not in str(error)


def main(folder: Path, first: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_SPACE_BYTES_MAX, _SPACE_BYTES_MAX))
    warnings.simplefilter("error")
    films = sorted(path for path in folder.iterdir() if path.is_file())
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for number in range(first, first + count):
        choose = random.Random(number)
        film = films[number % len(films)]
        harms = [choose.choice(HARMS) for _ in range(choose.choice((1, 1, 2)))]
        data = bytearray(film.read_bytes())
        for harm in harms:
            data = harm(choose, data) if len(data) > 16 else data
        what = " ".join(harm.__name__ for harm in harms)
        print(number, film.name, what, sep="\t", end="\t", flush=True)
        is_picture = film.suffix in (".png", ".jpg", ".webp", ".bmp")
        path = work / film.name
        path.write_bytes(data)
        faulthandler.dump_traceback_later(TRIAL_S_MAX, exit=True)
        print(_watched(work if is_picture else path), flush=True)
        faulthandler.cancel_dump_traceback_later()
        path.unlink()
        peak_bytes = _peak_bytes()
        assert peak_bytes < PEAK_BYTES_MAX, f"{peak_bytes} bytes"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
