"""What a repair says that it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from memdb.mend import Touched
from memdb.schemas.times import to_s


@dataclass(frozen=True)
class Span:
    """Units one after another that were not whole, and what became of them."""

    recording: str
    first_unit: int
    last_unit: int
    start_s: float
    end_s: float
    what: str

    def __str__(self) -> str:
        units = (
            f"unit {self.first_unit}"
            if self.first_unit == self.last_unit
            else (f"units {self.first_unit} to {self.last_unit}")
        )
        return f"{self.recording}: {units} ({self.start_s:g} to {self.end_s:g} s) {self.what}"


@dataclass(frozen=True)
class Repaired:
    """A recording as it is in the new catalog."""

    name: str
    units: int
    segments: int
    tombstones: int
    watermark_s: float


@dataclass
class RepairReport:
    recordings: list[Repaired] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # what was not whole, and what became of it
    forgotten: int = 0  # whole recordings that stay forgotten
    dropped: list[str] = field(default_factory=list)  # what was taken out of the store's view, and why
    notes: list[str] = field(default_factory=list)  # what else a user should know

    @property
    def units(self) -> int:
        return sum(recording.units for recording in self.recordings)

    def add_spans(self, recording: str, touched: Iterable[Touched]) -> None:
        """What became of units that were not whole; those side by side with one fate make one span."""
        for one in sorted(touched, key=lambda one: one.unit):
            last = self.spans[-1] if self.spans else None
            first, start_s = one.unit, to_s(one.start_ns)
            if last and (last.recording, last.last_unit + 1, last.what) == (recording, one.unit, one.fate):
                first, start_s = last.first_unit, last.start_s
                self.spans.pop()
            self.spans.append(Span(recording, first, one.unit, start_s, to_s(one.end_ns), one.fate))
