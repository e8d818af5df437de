"""Times that a question names: "between 00:10:00 and 00:11:00", "after 01:00:00", "in the last 5 minutes".

They are read by patterns of words alone. A number with a colon is a time only behind a word that says so, and only
with two digits after the colon: a score of 3:2 is none, nor is 10:30 am, which is no media time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from memdb.schemas.errors import BudgetError
from memdb.schemas.times import TIME_S_MAX, parse_time, parse_wall_clock, to_ns

AT_SLACK_S = 2.0  # "at 00:12:30" means about then
AROUND_SLACK_S = 10.0

_ISO = r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:[Zz]|[+-]\d\d:?\d\d)?"
_CLOCK = r"(?:\d{1,7}:[0-5]?\d|\d{1,2}):[0-5]\d(?:\.\d{1,9})?"
_TIME = rf"(?<![\d:.])({_ISO}|{_CLOCK})(?![\d:]|\.\d)(?!\s*[ap]\.?m\b)"
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = rf"(\d{{1,7}}(?:\.\d{{1,3}})?|an?|{'|'.join(_NUMBERS)}|fifteen|twenty|thirty)"
_UNIT_S = {"second": 1.0, "sec": 1.0, "minute": 60.0, "min": 60.0, "hour": 3600.0}
_VALUES = {"a": 1.0, "an": 1.0, "fifteen": 15.0, "twenty": 20.0, "thirty": 30.0} | {
    word: float(number) for number, word in enumerate(_NUMBERS, 1)
}

_BETWEEN = re.compile(
    rf"\b(?:between|from)\s+{_TIME}\s*(?:and|to|until|till|through|-|–)\s*{_TIME}|{_TIME}\s*(?:to|-|–)\s*{_TIME}",
    re.I,
)
_EDGE = re.compile(
    rf"\b(?:(?:in|during|within|over|of|for)\s+)?(?:the\s+)?(first|last|past|final)\s+"
    rf"(?:{_NUMBER}[\s-]+)?(seconds?|secs?|minutes?|mins?|hours?)\b",
    re.I,
)
_BEFORE = re.compile(rf"\b(?:before|until|till|up\s+to|by)\s+{_TIME}", re.I)
_AFTER = re.compile(rf"\b(?:after|since|from)\s+{_TIME}(?:\s+on(?:wards?)?\b)?", re.I)
_AT = re.compile(rf"\b(at|around|about|near)\s+{_TIME}", re.I)


@dataclass(frozen=True)
class Moment:
    """A time as it was said and seconds that are added to it. Without `said`: the newest that was seen."""

    said: str
    plus_s: float = 0.0

    def ns(self, started_at_ns: int | None, watermark_ns: int) -> int:
        """Media time, 0 at the least. Raises BudgetError for a wall clock that nothing is known of."""
        if not self.said:
            base_ns = watermark_ns
        elif "-" in self.said and started_at_ns is not None:  # it may lie before the recording
            base_ns = parse_wall_clock(self.said.upper().replace(" ", "T")) - started_at_ns
        else:
            base_ns = to_ns(parse_time(self.said, started_at_ns=started_at_ns))
        return max(0, base_ns + to_ns(self.plus_s))


@dataclass(frozen=True)
class Named:
    """The times of a question: `words` that name them, the text without those, and bounds; None for no bound."""

    words: str
    rest: str
    start: Moment | None
    end: Moment | None

    def bounds_ns(self, started_at_ns: int | None, watermark_ns: int) -> tuple[int | None, int | None]:
        """`[start, end)` in one recording. Raises BudgetError as Moment does."""
        start, end = (
            None if moment is None else moment.ns(started_at_ns, watermark_ns)
            for moment in (self.start, self.end)
        )
        return (end, start) if start is not None and end is not None and end < start else (start, end)


_Found = tuple[tuple[int, int], Moment | None, Moment | None]  # where in the text, and the bounds


def named(text: str) -> Named | None:
    """The span that a question is about, None where it names no times.

    Of several times of one form the first start and the last end count, so that nothing that is asked about is
    left out. Of several forms the first of those below is taken.
    """
    for find in (_between, _edges, _sides, _points):
        found = find(text)
        if found:
            places = [place for place, _, _ in found]
            words = " ".join(text[first:last] for first, last in places)
            starts, ends = [start for _, start, _ in found], [end for _, _, end in found]
            return Named(words, _without(text, places), _widest(starts, -1), _widest(ends, 1))
    return None


def _between(text: str) -> list[_Found]:
    found: list[_Found] = []
    for match in _BETWEEN.finditer(text):
        first, last = (said for said in match.groups() if said is not None)
        if _is_time(first) and _is_time(last):
            start, end = sorted((Moment(first), Moment(last)), key=_order)
            found.append((match.span(), start, end))
    return found


def _edges(text: str) -> list[_Found]:
    found: list[_Found] = []
    for match in _EDGE.finditer(text):
        edge, number, unit = match.groups()
        if number is None and unit.lower() not in ("minute", "hour"):
            continue  # "the first second that", "the last minutes"
        value = 1.0 if number is None else _VALUES.get(number.lower()) or float(number)
        seconds = value * _UNIT_S[unit.lower().removesuffix("s")]
        if not 0 < seconds <= TIME_S_MAX:
            continue
        if edge.lower() == "first":
            found.append((match.span(), None, Moment("0", seconds)))
        else:
            found.append((match.span(), Moment("", -seconds), None))
    return found[:1]  # the first and the last minutes together are no span


def _sides(text: str) -> list[_Found]:
    """Before one time, after another, or both."""
    before, after = (
        [match for match in pattern.finditer(text) if _is_time(match[1])] for pattern in (_BEFORE, _AFTER)
    )
    if not before and not after:
        return []
    start = min((Moment(match[1]) for match in after), key=_order, default=None)
    end = max((Moment(match[1]) for match in before), key=_order, default=None)
    if start is not None and end is not None and _order(start) >= _order(end):
        return []  # before 00:10:00 or after 00:20:00: everything but a span
    return [
        (match.span(), start, end) for match in sorted((*before, *after), key=lambda match: match.start())
    ]


def _points(text: str) -> list[_Found]:
    found: list[_Found] = []
    for match in _AT.finditer(text):
        if _is_time(match[2]):
            slack_s = AT_SLACK_S if match[1].lower() == "at" else AROUND_SLACK_S
            found.append((match.span(), Moment(match[2], -slack_s), Moment(match[2], slack_s)))
    return found


def _is_time(said: str) -> bool:
    try:
        Moment(said).ns(0, 0)
    except BudgetError:
        return False
    return True


def _order(moment: Moment) -> int:
    return moment.ns(0, 0)


def _widest(moments: Sequence[Moment | None], sign: int) -> Moment | None:
    """The least (sign -1) or the greatest (1); None, which is no bound, beats both."""
    there = [moment for moment in moments if moment is not None]
    return max(there, key=lambda moment: sign * _order(moment)) if len(there) == len(moments) else None


def _without(text: str, places: Sequence[tuple[int, int]]) -> str:
    rest, last = [], 0
    for first, end in places:
        rest.append(text[last:first])
        last = end
    return " ".join("".join([*rest, text[last:]]).split())
