"""Figures from outcomes: accuracy by kind, the mean over kinds, recall, latency, and codecs in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from memdb.world.questions import ABSENT, KINDS
from tools.answers.job import Outcome

PAST = tuple(kind for kind in KINDS if kind != "now")


@dataclass(frozen=True)
class Line:
    """One row of the table. Accuracies are shares; None where no such question was asked."""

    row: str
    codec: str
    asked: int
    by_kind: dict[str, float]
    macro: float | None  # over all kinds
    macro_error: float | None  # its standard error
    past: float | None  # over all kinds but now
    recall: float | None  # of the true spans, of the questions that have one
    recall_kv: float | None
    recall_captions: float | None
    called_absent: float | None  # of the questions that can be answered
    context_tokens: float
    p50_ms: float
    p95_ms: float
    errors: int


def lines(outcomes: Sequence[Outcome]) -> list[Line]:
    """A line for each codec and row, in the order in which they were asked."""
    names = dict.fromkeys((found.codec, found.row) for found in outcomes)
    return [
        line([found for found in outcomes if (found.codec, found.row) == (codec, row)])
        for codec, row in names
    ]


def line(mine: Sequence[Outcome]) -> Line:
    kinds = [kind for kind in KINDS if any(found.kind == kind for found in mine)]
    groups = {kind: [found.right for found in mine if found.kind == kind] for kind in kinds}
    by_kind = {kind: sum(rights) / len(rights) for kind, rights in groups.items()}
    past = [by_kind[kind] for kind in PAST if kind in by_kind]
    whole = set(kinds) == set(KINDS)
    variances = [by_kind[kind] * (1 - by_kind[kind]) / len(groups[kind]) for kind in kinds]
    there = [found for found in mine if found.kind != "absent"]
    times = [found.latency_ms for found in mine if not found.error]
    return Line(
        row=mine[0].row,
        codec=mine[0].codec,
        asked=len(mine),
        by_kind=by_kind,
        macro=_mean(by_kind.values()) if whole else None,
        macro_error=math.sqrt(sum(variances)) / len(kinds) if whole else None,
        past=_mean(past) if whole else None,
        recall=_mean(found.recall for found in mine),
        recall_kv=_mean(found.recall_kv for found in mine),
        recall_captions=_mean(found.recall_captions for found in mine),
        called_absent=_mean(is_absent(found.said) for found in there),
        context_tokens=_quantile([found.context_tokens for found in mine if not found.error], 0.5),
        p50_ms=_quantile(times, 0.5),
        p95_ms=_quantile(times, 0.95),
        errors=sum(bool(found.error) for found in mine),
    )


def is_absent(said: str) -> bool:
    return said.strip().rstrip(".").lower() == ABSENT


def chances(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """By kind, how often a guess among the possible answers is right. Of `absent` there is one answer only."""
    one = {(found.seed, found.number): found for found in outcomes}.values()
    means = {kind: _mean(1 / found.choices for found in one if found.kind == kind) for kind in KINDS}
    return {kind: mean for kind, mean in means.items() if mean is not None}


@dataclass(frozen=True)
class Pair:
    """The same questions over two codecs. `difference`: in accuracy, second less first, as a share."""

    row: str
    first: str
    second: str
    both_right: int
    only_first: int
    only_second: int
    neither: int
    p: float  # of so uneven a split or a more uneven one, were the codecs equal

    @property
    def asked(self) -> int:
        return self.both_right + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        return (self.only_second - self.only_first) / self.asked


def pairs(outcomes: Sequence[Outcome], codecs: Sequence[str]) -> list[Pair]:
    """The first codec against each of the others, in every row that was asked over both."""
    rights = {(found.codec, found.row, found.seed, found.number): found.right for found in outcomes}
    found_pairs = []
    for row in dict.fromkeys(found.row for found in outcomes):
        for second in codecs[1:]:
            places = [
                key[2:] for key in rights if key[:2] == (second, row) and (codecs[0], row, *key[2:]) in rights
            ]
            if not places:
                continue
            seen = [(rights[codecs[0], row, *place], rights[second, row, *place]) for place in places]
            only_first, only_second = seen.count((True, False)), seen.count((False, True))
            found_pairs.append(
                Pair(
                    row,
                    codecs[0],
                    second,
                    seen.count((True, True)),
                    only_first,
                    only_second,
                    seen.count((False, False)),
                    sign_test(only_first, only_second),
                )
            )
    return found_pairs


def sign_test(a: int, b: int) -> float:
    """Two-sided probability of a split at least as uneven as a : b by fair coins (McNemar, exact)."""
    n = a + b
    tail = sum(math.comb(n, k) for k in range(min(a, b) + 1))
    return min(1.0, 2 * tail / (1 << n))


AGES_S = (60, 300, 900, 1800, 3600, 3 * 3600, 10 * 3600)


def by_age(mine: Iterable[Outcome]) -> list[tuple[float, float, int]]:
    """(age up to which, mean recall, questions) of the questions that have a span, by the age of its evidence."""
    found = [(one.age_s, one.recall) for one in mine if one.recall is not None]
    low, rows = -math.inf, []
    for high in AGES_S:
        inside = [recall for age_s, recall in found if low < age_s <= high]
        if inside:
            rows.append((float(high), sum(inside) / len(inside), len(inside)))
        low = high
    return rows


def _mean(values: Iterable[float | bool | None]) -> float | None:
    there = [float(value) for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else math.nan
