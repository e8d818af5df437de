"""The marks that the issue set, beside what a run reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tools.answers.job import Outcome
from tools.answers.score import Line, chances, lines, pairs

_POINT = 0.01


@dataclass(frozen=True)
class Mark:
    what: str
    reached: float  # in percent, points, milliseconds or standard errors
    wanted: float
    least: bool  # whether `wanted` is a floor, not a ceiling

    @property
    def is_reached(self) -> bool:
        return self.reached >= self.wanted if self.least else self.reached <= self.wanted

    def __str__(self) -> str:
        sign = "at least" if self.least else "at most"
        verdict = "reached" if self.is_reached else "NOT reached"
        return f"{self.what}: {self.reached:.1f}, {sign} {self.wanted:g} wanted: {verdict}"


def marks(outcomes: Sequence[Outcome], codecs: Sequence[str]) -> list[Mark]:
    """Those for which the rows that they compare were asked, over the first of the codecs, and codecs in pairs."""
    by_row = {line.row: line for line in lines(outcomes) if line.codec == codecs[0]}
    both, kv, captions = (by_row.get(name) for name in ("both", "kv", "captions"))
    result: list[Mark] = []

    def add(what: str, reached: float | None, wanted: float, *, least: bool = True) -> None:
        if reached is not None:
            result.append(Mark(what, reached, wanted, least))

    if both is not None:
        add("both, macro average, %", _percent(both.macro), 90)
        add(
            "both above the last four frames, past, points",
            _above(both.past, _of(by_row, "last4", "past")),
            40,
        )
        add(
            "both above uniform sampling, macro, points",
            _above(both.macro, _of(by_row, "uniform", "macro")),
            10,
        )
        add("absent said when absent, both, %", _percent(both.by_kind.get("absent")), 90)
        add("called absent though it was there, both, %", _percent(both.called_absent), 5, least=False)
        add("an answer, both, p50, ms", both.p50_ms, 400, least=False)
        add("an answer, both, p95, ms", both.p95_ms, 800, least=False)
    if kv is not None:
        add("true span in the context, kv, %", _percent(kv.recall_kv), 90)
    if kv is not None and captions is not None:
        add(
            "kv above captions on detail, points",
            _above(kv.by_kind.get("detail"), captions.by_kind.get("detail")),
            25,
        )
        add(
            "captions above kv on gist, points",
            _above(captions.by_kind.get("gist"), kv.by_kind.get("gist")),
            0,
        )
    chance = chances(outcomes).get("detail")
    for name in ("other", "zeroed", "shuffled"):
        if name in by_row and chance is not None:
            errors = _errors_above(by_row[name], chance)
            add(f"control {name}, detail above chance, standard errors", errors, 2, least=False)
    for pair in pairs(outcomes, codecs):
        what = f"{pair.first} and {pair.second} apart, {pair.row}, points"
        add(what, abs(pair.difference) / _POINT, 1, least=False)
    return result


def _errors_above(line: Line, chance: float) -> float:
    """How far a control is above chance, in standard errors of chance over as many questions."""
    return (line.by_kind["detail"] - chance) / math.sqrt(chance * (1 - chance) / line.asked)


def _of(by_row: dict[str, Line], row: str, figure: str) -> float | None:
    found: float | None = getattr(by_row[row], figure) if row in by_row else None
    return found


def _percent(share: float | None) -> float | None:
    return None if share is None else share / _POINT


def _above(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else (one - other) / _POINT
