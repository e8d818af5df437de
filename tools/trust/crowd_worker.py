"""One process of a crowd, told its role: it works until its time is over, then says what it found.

    python -m tools.trust.crowd_worker FOLDER ROLE SEED SECONDS

It prints one line of JSON: wrong answers, the longest time of each operation, and samples of its anonymous
memory and open files. An operation that hangs ends the process with a trace of where it hung.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from memdb.schemas.errors import MemdbError
from tools.trust.crowd_log import Log
from tools.trust.model import clear_caches

LOCK_UP_S = 120.0
_WRONG_MAX = 12
_SAMPLE_S = 0.25


@dataclass
class Found:
    """What one process has to say."""

    role: str
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    longest_s: dict[str, float] = field(default_factory=dict)
    anonymous_bytes: list[int] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)


class Worker:
    """The frame of all roles: a clock, a watchdog, and samples."""

    def __init__(self, folder: Path, role: str, seed: int, seconds: float) -> None:
        self.folder, self.path = folder, folder / "s.memdb"
        self.found = Found(role)
        self.seed = seed
        self.random = random.Random(f"{seed} {role}")
        self.log = Log(folder / "crowd.log", seed)
        self._end_s = time.monotonic() + seconds
        self._sampled_s = 0.0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._end_s and len(self.found.wrong) < _WRONG_MAX

    def wrong(self, what: str) -> None:
        self.found.wrong.append(f"{self.found.role}: {what}")

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Time it, watch over it, take its errors for wrong answers."""
        faulthandler.dump_traceback_later(LOCK_UP_S, exit=True)
        began_s = time.monotonic()
        try:
            yield
        except (MemdbError, OSError) as error:
            self.wrong(f"{name}: {type(error).__name__}: {error}")
        finally:
            faulthandler.cancel_dump_traceback_later()
        took_s = time.monotonic() - began_s
        self.found.counts[name] += 1
        self.found.longest_s[name] = max(took_s, self.found.longest_s.get(name, 0.0))
        self._sample()

    def _sample(self) -> None:
        now_s = time.monotonic()
        if now_s - self._sampled_s >= _SAMPLE_S:
            self._sampled_s = now_s
            clear_caches()
            self.found.anonymous_bytes.append(anonymous_bytes())
            self.found.open_files.append(len(os.listdir("/proc/self/fd")))


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def main() -> None:
    from tools.trust.crowd_readers import read
    from tools.trust.crowd_writers import back_up, tend, write

    roles: dict[str, Callable[[Worker], None]] = {
        "reader": read,
        "writer": write,
        "tender": tend,
        "copier": back_up,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("role")
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float)
    given = parser.parse_args()
    import lancedb  # noqa: F401  before the clock runs

    worker = Worker(given.folder, given.role, given.seed, given.seconds)
    roles[given.role.rstrip("0123456789")](worker)
    sys.stdout.write(json.dumps(vars(worker.found)) + "\n")
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
