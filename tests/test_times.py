"""Times: read as people write them, printed as people read them, exact inside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb.schemas.errors import BudgetError
from memdb.schemas.times import (
    TIME_S_MAX,
    format_time,
    format_wall_clock,
    parse_time,
    parse_wall_clock,
    to_ns,
    to_s,
)

EIGHT = "2026-11-20T08:00:00Z"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0.0),
        (12.5, 12.5),
        ("12.5", 12.5),
        (" 7 ", 7.0),
        ("1e3", 1000.0),
        ("00:00:00", 0.0),
        ("01:02:03", 3723.0),
        ("1:02:03.250", 3723.25),
        ("90:00", 5400.0),
        ("2:05", 125.0),
        ("100:00:00", 360_000.0),
    ],
)
def test_times_that_are_understood(text: str | float, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "-1",
        -0.5,
        "nan",
        float("nan"),
        "inf",
        float("inf"),
        "1e300",
        2 * TIME_S_MAX,
        "1:2:3:4",
        "1:90:00",
        "1:00:60",
        "0:75",
        "01:02:",
        ":30",
        "1:-2",
        "12:30 pm",
        "٣:٠٠",
    ],
)
def test_times_that_are_not(text: str | float) -> None:
    with pytest.raises(BudgetError, match="HH:MM:SS"):
        parse_time(text)


def test_the_wall_clock_counts_from_the_start_of_the_recording() -> None:
    started = parse_wall_clock(EIGHT)
    assert parse_time("2026-11-20T08:01:00Z", started_at_ns=started) == 60.0
    assert parse_time("2026-11-20T10:00:00.5+02:00", started_at_ns=started) == 0.5
    assert parse_time("2026-11-20T08:00:01", started_at_ns=started) == 1.0  # without a zone: UTC
    with pytest.raises(BudgetError, match="from the start on"):
        parse_time("2026-11-20T07:59:59Z", started_at_ns=started)
    with pytest.raises(BudgetError, match="is not known"):
        parse_time(EIGHT)
    with pytest.raises(BudgetError, match="ISO 8601"):
        parse_wall_clock("yesterday")


@given(st.integers(0, 500 * 3600 * 1000))
def test_what_is_printed_is_read_back(ms: int) -> None:
    text = format_time(ms / 1000)
    assert to_ns(parse_time(text)) == ms * 1_000_000
    assert ("." in text) == bool(ms % 1000)


@given(st.integers(0, 4_000_000_000_000))
def test_the_wall_clock_is_read_back(ms: int) -> None:
    assert parse_wall_clock(format_wall_clock(ms * 1_000_000)) == ms * 1_000_000


@given(st.integers(0, 10**15))
def test_nanoseconds_survive_the_surface(ns: int) -> None:
    """Eleven days at nanoseconds: what a float of seconds holds."""
    assert to_ns(to_s(ns)) == ns


def test_rounding_never_prints_a_sixtieth_second() -> None:
    assert format_time(59.9999) == "00:01:00"
    assert format_time(3599.9996) == "01:00:00"
    assert format_time(0.0004) == "00:00:00"
    assert format_time(1.5) == "00:00:01.500"
