"""Mutated and hostile files through the public calls: typed errors only, within bounds of memory and time.

    python -m tools.trust.fuzz [--seed N] [--trials N] [--target NAME]

Inputs are made from a finished store: flipped, cut, chunks doubled and swapped, and, as a hostile writer would,
wrong lengths, numbers and tables under right checksums, frames that unpack to a gibibyte, JSON that nests
without end. A child process feeds them (tools/trust/fuzz_child.py), 2 GiB above what it takes when it begins. What
is not one of memdb's own errors, a crash or a hang counts as lost.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from memdb.transfer import export_recording
from tools.trust.fuzz_child import TARGETS
from tools.trust.fuzz_input import EXPORT
from tools.trust.ground import make_ground
from tools.trust.outcome import Outcome, table

ROOT = Path(__file__).resolve().parents[2]
# For one input, which takes a fraction of a second; a repair that has to tell of LOST_MAX lost units, and questions to
# what it leaves, take a minute on a machine that does nothing else.
HANG_S = 240.0
_STDERR_LINES = 3


def sample(seed: int, trials: int, folder: Path) -> Outcome:
    """`trials` inputs, of one kind after another, in one process."""
    _prepare(seed, folder)
    return _target(",".join(TARGETS), seed, trials, folder)


def _prepare(seed: int, folder: Path) -> None:
    ground = make_ground(seed, folder)
    (folder / "seed").write_text(str(seed))
    export_recording(ground.path, "lobby", folder / EXPORT)


def run(
    seed: int,
    trials: int,
    folder: Path,
    *,
    targets: Sequence[str] = tuple(TARGETS),
    tell: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """`trials` inputs of each kind, a row a kind. `tell` gets what was found as soon as a kind is done."""
    _prepare(seed, folder)
    return [_told(_target(name, seed, trials, folder), tell) for name in targets]


def _told(outcome: Outcome, tell: Callable[[str], None]) -> Outcome:
    for line in outcome.details:
        tell(line)
    return outcome


def _target(name: str, seed: int, trials: int, folder: Path) -> Outcome:
    outcome = Outcome(f"fuzzed: {name}")
    with outcome.timed():
        number = 0
        while number < trials:
            number = _batch(outcome, name, seed, number, trials, folder)
    return outcome


def _batch(outcome: Outcome, name: str, seed: int, first: int, trials: int, folder: Path) -> int:
    """Feed inputs from `first` on until the child ends; the number of the next one."""
    words = [str(folder), name, str(seed), str(first), str(trials - first)]
    done = first
    with subprocess.Popen(
        [sys.executable, "-m", "tools.trust.fuzz_child", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        errors: list[str] = []
        reading = threading.Thread(target=errors.extend, args=(process.stderr,))
        reading.start()
        hung = _alarm(process)
        for line in process.stdout:
            said, _, rest = line.strip().partition(" ")
            hung.cancel()
            hung = _alarm(process)
            if said == "bad":
                outcome.loses(f"{name}, seed {seed}, input {rest}")
            elif said == "done":
                outcome.trials += 1
                done += 1
        hung.cancel()
        code = process.wait()
        reading.join()
    if done < trials:
        last = " ".join(line.strip() for line in errors[-_STDERR_LINES:])
        what = "hung" if code == -9 else f"ended with {code}"
        outcome.trials += 1
        outcome.loses(f"{name}, seed {seed}, input {done}: the process {what}: {last:.300}")
        done += 1
    return done


def _alarm(process: subprocess.Popen[str]) -> threading.Timer:
    """Ends the child where one input takes too long."""
    timer = threading.Timer(HANG_S, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _print(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--target", action="append", choices=tuple(TARGETS), default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(
            given.seed, given.trials, Path(folder), targets=given.target or tuple(TARGETS), tell=_print
        )
    print(table(outcomes))
    return int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
