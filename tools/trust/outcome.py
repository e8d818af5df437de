"""What a campaign found, and the table of all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

DETAILS_MAX = 40
_TOLD_EACH = 3


@dataclass
class Outcome:
    """The result of one campaign.

    lost: an acknowledged unit, state or event that is missing or differs, something forgotten that is back, a
    store that does not open or go on. silent: a wrong answer, digest or search result without any report.
    """

    test: str
    trials: int = 0
    lost: int = 0
    silent: int = 0
    seconds: float = 0.0
    details: list[str] = field(
        default_factory=list
    )  # of each loss and silence, and what else is worth telling

    @property
    def ok(self) -> bool:
        return self.lost == 0 and self.silent == 0

    def loses(self, what: str) -> None:
        self.lost += 1
        self.tell(f"lost: {what}")

    def is_silent(self, what: str) -> None:
        self.silent += 1
        self.tell(f"silent: {what}")

    def take(self, what: str, lost: Sequence[str], silent: Sequence[str]) -> None:
        """Count what one trial found, and tell it in one line."""
        self.lost += len(lost)
        self.silent += len(silent)
        if lost or silent:
            found = [*(f"lost: {one}" for one in lost), *(f"silent: {one}" for one in silent)]
            more = f"; and {len(found) - _TOLD_EACH} more" if len(found) > _TOLD_EACH else ""
            self.tell(f"{what}: {'; '.join(found[:_TOLD_EACH])}{more}")

    def tell(self, what: str) -> None:
        if len(self.details) < DETAILS_MAX:
            self.details.append(what)

    @contextmanager
    def timed(self) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began_s

    def add(self, other: Outcome) -> None:
        """Count another part of the same campaign."""
        self.trials += other.trials
        self.lost += other.lost
        self.silent += other.silent
        for what in other.details:
            self.tell(what)


def table(outcomes: Iterable[Outcome]) -> str:
    """As Markdown."""
    lines = ["| test | trials | lost | silent | time |", "|---|---:|---:|---:|---:|"]
    for found in outcomes:
        minutes, seconds = divmod(round(found.seconds), 60)
        took = f"{minutes} min {seconds:02d} s" if minutes else f"{found.seconds:.1f} s"
        lines.append(f"| {found.test} | {found.trials} | {found.lost} | {found.silent} | {took} |")
    return "\n".join(lines)
