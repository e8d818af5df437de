"""Eight who read and four who write, one who forgets and compacts, one who copies, all at once on one store.

Every answer must be right for what was acknowledged when it was asked; nobody may hang, or grow in memory or
in open files once warm; and in the end the store holds what was acknowledged, and nothing that was forgotten.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memdb.store import Store
from tools.trust.check import check
from tools.trust.crowd_log import Log, model_of
from tools.trust.crowd_worker import LOCK_UP_S
from tools.trust.outcome import Outcome

ROOT = Path(__file__).resolve().parents[2]
READERS, WRITERS = 8, 4
WARM_SHARE = 0.4  # of the time; what a process holds by then, it may hold
GROWTH_MIN_S = (
    60.0  # below, a process is hardly warm, and only the files that it has open are held to a bound
)
# Beyond: the noise of an allocator, of the caches of SQLite and LanceDB as they fill.
GROWTH_SHARE = 0.15
GROWTH_BYTES = 16 << 20
GROWTH_FILES = 8
_START_S = 300.0  # of so many processes on a busy machine


@dataclass(frozen=True)
class Ended:
    """How a process ended: what it said, or why it said nothing."""

    role: str
    said: dict[str, object]
    trouble: str = ""


def run(
    seed: int, seconds: float, folder: Path, *, readers: int = READERS, writers: int = WRITERS
) -> Outcome:
    """Let the crowd go on for so long. A trial is one operation of one process."""
    outcome = Outcome(f"crowd: {readers} readers, {writers} writers, {round(seconds)} s")
    folder.mkdir(parents=True, exist_ok=True)
    Store.open(folder / "s.memdb", create=True, write=True).close()
    log = Log(folder / "crowd.log", seed)
    roles = [f"writer{number}" for number in range(writers)] + ["tender", "copier"]
    roles += [f"reader{number}" for number in range(readers)]
    with outcome.timed():
        ended = _run_all(folder, roles, seed, seconds)
        for one in ended:
            _judge(outcome, one, seconds)
        _tell(outcome, ended)
        findings, _ = check(folder / "s.memdb", [model_of(log.now())])
        for what in findings.lost:
            outcome.loses(f"in the end: {what}")
        for what in findings.silent:
            outcome.is_silent(f"in the end: {what}")
    return outcome


def _run_all(folder: Path, roles: Sequence[str], seed: int, seconds: float) -> list[Ended]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.trust.crowd_worker", str(folder), role, str(seed), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for role in roles
    ]
    limit_s = seconds + _START_S + LOCK_UP_S
    found: dict[str, Ended] = {}

    def wait(role: str, process: subprocess.Popen[str]) -> None:
        try:
            said, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            said, errors = process.communicate()
        if process.returncode == 0:
            found[role] = Ended(role, json.loads(said))
        else:
            found[role] = Ended(role, {}, f"ended with {process.returncode}: {errors.strip()[-1500:]}")

    threads = [threading.Thread(target=wait, args=pair) for pair in zip(roles, processes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[role] for role in roles]


def _judge(outcome: Outcome, one: Ended, seconds: float) -> None:
    if one.trouble:
        outcome.loses(f"{one.role} {one.trouble}")
        return
    counts, wrong = one.said["counts"], one.said["wrong"]
    assert isinstance(counts, dict)
    assert isinstance(wrong, list)
    outcome.trials += sum(counts.values())
    for what in wrong:
        outcome.is_silent(what)
    if not counts:
        outcome.loses(f"{one.role} came to nothing")
    files = _grown(one.said["open_files"])
    if files is not None and files[1] > files[0] + GROWTH_FILES:
        outcome.loses(f"{one.role} had {files[0]:.0f} files open, then {files[1]:.0f}")
    memory = _grown(one.said["anonymous_bytes"])
    if (
        seconds >= GROWTH_MIN_S
        and memory is not None
        and memory[1] > memory[0] * (1 + GROWTH_SHARE) + GROWTH_BYTES
    ):
        outcome.loses(f"{one.role} grew from {memory[0] / 1e6:.0f} to {memory[1] / 1e6:.0f} MB")


def _grown(samples: object) -> tuple[float, float] | None:
    """Medians: of the time just after warm-up, and of the last fifth."""
    assert isinstance(samples, list)
    warm = int(len(samples) * WARM_SHARE)
    first, last = samples[warm : warm + len(samples) // 5], samples[-(len(samples) // 5) :]
    return (statistics.median(first), statistics.median(last)) if first and last else None


def _tell(outcome: Outcome, ended: Sequence[Ended]) -> None:
    """The longest time of each operation, and how memory went."""
    longest: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for one in ended:
        said = one.said.get("longest_s", {})
        assert isinstance(said, dict)
        for name, took_s in said.items():
            longest[name] = max(took_s, longest.get(name, 0.0))
        found = one.said.get("counts", {})
        assert isinstance(found, dict)
        counts.update(found)
        memory = _grown(one.said["anonymous_bytes"]) if one.said else None
        files = _grown(one.said["open_files"]) if one.said else None
        if memory is not None and files is not None:
            outcome.tell(
                f"{one.role}: {memory[0] / 1e6:.1f} MB warm, {memory[1] / 1e6:.1f} MB at last; "
                f"{files[0]:.0f} and {files[1]:.0f} files"
            )
    outcome.tell(
        ", ".join(f"{name} {counts[name]} (longest {longest[name]:.2f} s)" for name in sorted(counts))
    )
