"""A process that runs a script on a store, says what was acknowledged, and dies where it is told to.

    python -m tools.trust.stub STORE SEED LENGTH KINDS [--start I] [--die OP:STEP:WHEN]

It imports no torch and starts in 0.2 s. `--die`: kill -9 of itself in operation OP of the script, at its
STEP-th step (as memdb/files.py counts them), WHEN = before, after or torn (a write of which only a part comes
through).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from memdb.files import Step, watched
from tools.trust.runner import Runner
from tools.trust.script import script

_PAGE_BYTES = 4096
WHENS = ("before", "after", "torn")


@dataclass(frozen=True)
class Death:
    """Where a stub dies."""

    op: int
    step: int  # counted from 0 within the operation
    when: str  # one of WHENS

    def __str__(self) -> str:
        return f"{self.op}:{self.step}:{self.when}"

    @classmethod
    def parse(cls, text: str) -> Death:
        op, step, when = text.split(":")
        return cls(int(op), int(step), when)


class Reaper:
    """A Watch that counts the steps of the operation in hand, and kills the process at one of them."""

    def __init__(self, death: Death | None) -> None:
        self._death = death
        self._op = -1
        self._steps = 0

    def begin(self, op: int) -> None:
        self._op, self._steps = op, 0

    def before(self, step: Step) -> None:
        if self._is_due("torn"):
            if step.what == "write":
                _write_a_part(step)
            _die()
        if self._is_due("before"):
            _die()

    def after(self, step: Step) -> None:
        if self._is_due("after"):
            _die()
        self._steps += 1

    def _is_due(self, when: str) -> bool:
        return self._death == Death(self._op, self._steps, when)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _write_a_part(step: Step) -> None:
    """Of a segment two thirds; of other files what the system writes at once, which is up to the end of a page."""
    size = len(step.data) * 2 // 3
    if step.path.suffix != ".seg":
        size = max(0, (step.offset + size) // _PAGE_BYTES * _PAGE_BYTES - step.offset)
    fd = os.open(step.path, os.O_WRONLY)
    os.pwrite(fd, step.data[:size], step.offset)
    os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("length", type=int)
    parser.add_argument("kinds", help="operations that come once, with commas")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--die", type=Death.parse)
    given = parser.parse_args()
    kinds = [kind for kind in given.kinds.split(",") if kind]
    if "captions" in kinds:
        import lancedb  # noqa: F401  before the clock of any operation runs
    reaper = Reaper(given.die)

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if line.startswith("begin "):
            reaper.begin(int(line.split()[1]))

    with watched(reaper), Runner(given.store, say) as runner:
        runner.run(script(given.seed, given.length, kinds), given.start)
    say("end")
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
