"""All campaigns against the store, at full size, and the table of what they found.

    python -m tools.soak [--seed N] [--only NAME ...] [--scale 1.0] [--out FILE.md]

Sizes are chosen so that all of it, with the tests marked soak behind it (make soak), takes less than 90 minutes
on 2 cores. Exit code 1 where anything was lost, or wrong without a report, or a campaign broke off.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.trust.outcome import Outcome, table
from tools.trust.pool import WORKERS, hush

# Seed, scale, an empty folder: one outcome, or one for each part.
Campaign = Callable[[int, float, Path], Outcome | list[Outcome]]


def _size(full: int, scale: float, least: int = 1) -> int:
    return max(least, round(full * scale))


def _kills(seed: int, scale: float, folder: Path) -> Outcome:
    from tools.trust import kills

    return kills.run(seed, _size(KILLS, scale), folder)


def _power(seed: int, scale: float, folder: Path) -> Outcome:
    """After every step of every protocol; with a scale below 1, a share of these cuts."""
    from tools.trust import power

    return power.run(seed, 0 if scale >= 1 else _size(POWER_CUTS, scale), folder)


def _without_sync(seed: int, scale: float, folder: Path) -> Outcome:
    """Every sync in turn; with a scale below 1, every so many."""
    from tools.trust import without_sync

    texts = [why.text for why in without_sync.whys()]
    step = 1 if scale >= 1 else max(1, round(1 / scale))
    only = () if step == 1 else texts[seed % step :: step] or texts[:1]
    return without_sync.run(seed, folder, only=only)


def _flips(seed: int, scale: float, folder: Path) -> list[Outcome]:
    from tools.trust import flips

    return flips.run_spread(seed, _size(FLIPS, scale), folder)


def _fuzz(seed: int, scale: float, folder: Path) -> list[Outcome]:
    """The inputs are fed by processes of their own: a thread for each."""
    from tools.trust import fuzz

    def one(target: str) -> list[Outcome]:
        home = folder / target.replace(" ", "-")
        home.mkdir()
        return fuzz.run(seed, _size(FUZZ, scale), home, targets=[target])

    with ThreadPoolExecutor(WORKERS) as threads:
        return [outcome for found in threads.map(one, fuzz.TARGETS) for outcome in found]


def _crowd(seed: int, scale: float, folder: Path) -> Outcome:
    from tools.trust import crowd

    return crowd.run(seed, max(CROWD_MIN_S, CROWD_S * scale), folder)


KILLS = 200
POWER_CUTS = 5900  # about as many as an exhaustive run has
FLIPS = 200  # of each class of files
FUZZ = 500  # of each kind of input
CROWD_S, CROWD_MIN_S = 600.0, 5.0
CAMPAIGNS: dict[str, Campaign] = {
    "kills": _kills,
    "power": _power,
    "without_sync": _without_sync,
    "flips": _flips,
    "fuzz": _fuzz,
    "crowd": _crowd,
}


@dataclass
class Soak:
    """One run of the campaigns."""

    outcomes: list[Outcome]
    broken: list[str]

    @property
    def ok(self) -> bool:
        return not self.broken and all(outcome.ok for outcome in self.outcomes)


def soak(
    seed: int, scale: float, names: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> Soak:
    """Run campaigns one after another; one that breaks off does not keep the others from running."""
    done = Soak([], [])
    for name in names:
        say(f"{name} ...")
        began_s = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(prefix=f"memdb-{name}-", ignore_cleanup_errors=True) as folder:
                found = CAMPAIGNS[name](seed, scale, Path(folder))
        except Exception as error:  # whatever it is, the others are still to be run
            done.broken.append(name)
            found = Outcome(f"{name}: broke off: {type(error).__name__}")
            found.tell(traceback.format_exc())
            found.seconds = time.perf_counter() - began_s
        for outcome in found if isinstance(found, list) else [found]:
            done.outcomes.append(outcome)
            for line in outcome.details:
                say(f"  {line}")
            say(
                f"{outcome.test}: {outcome.trials} trials, {outcome.lost} lost, {outcome.silent} silent, "
                f"{outcome.seconds:.0f} s"
            )
    return done


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=sorted(CAMPAIGNS), default=list(CAMPAIGNS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.scale <= 0:
        parser.error("--scale must be above 0")

    hush()

    def say(line: str) -> None:
        print(line, flush=True)

    done = soak(given.seed, given.scale, given.only, say)
    text = f"Seed {given.seed}, scale {given.scale:g}.\n\n{table(done.outcomes)}\n"
    say(f"\n{text}")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")
    return 0 if done.ok else 1


if __name__ == "__main__":
    sys.exit(main())
