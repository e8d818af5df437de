"""Times: integer nanoseconds inside, seconds at the surface, HH:MM:SS for people."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from memdb.schemas.errors import BudgetError

NS_PER_S = 1_000_000_000
# MM may pass 59 only where it leads: 90:00 is an hour and a half, 1:90:00 a slip of the pen.
_CLOCK = re.compile(r"^(?:(\d+):(?=[0-5]?\d:))?(\d{1,2}):([0-5]?\d(?:\.\d+)?)$", re.ASCII)
TIME_S_MAX = 9e9  # 285 years: what nanoseconds hold in 64 bits


def to_ns(seconds: float) -> int:
    """Seconds to integer nanoseconds, rounded half to even."""
    return round(seconds * NS_PER_S)


def to_s(ns: int) -> float:
    return ns / NS_PER_S


def parse_time(text: str | float, *, started_at_ns: int | None = None) -> float:
    """Media seconds from seconds, `HH:MM:SS.mmm`, `MM:SS` or ISO 8601.

    ISO 8601 is a moment on the wall clock: it needs the recording's `started_at_ns` (nanoseconds since the
    epoch). Raises BudgetError for anything else, for negative and for non-finite times.
    """
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        seconds = _parse_text(text.strip(), started_at_ns)
    if not 0 <= seconds <= TIME_S_MAX:  # not-a-number is outside, too
        raise BudgetError(f"time {text!r} is not a time from the start on: give seconds >= 0 or HH:MM:SS")
    return seconds


def _parse_text(text: str, started_at_ns: int | None) -> float:
    clock = _CLOCK.match(text)
    if clock:
        hours, minutes, seconds = clock.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment_ns = parse_wall_clock(text)
    except BudgetError:
        raise BudgetError(
            f"time {text!r} is not understood: give seconds, HH:MM:SS.mmm or ISO 8601 (2026-11-20T08:00:00Z)"
        ) from None
    if started_at_ns is None:
        raise BudgetError(
            f"{text!r} is a moment on the wall clock, but when this recording started is not known: "
            "give seconds or HH:MM:SS, or ingest with --started-at"
        )
    return to_s(moment_ns - started_at_ns)


def parse_wall_clock(text: str) -> int:
    """ISO 8601 to nanoseconds since the epoch; a time without a zone is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BudgetError(f"{text!r} is not ISO 8601: write it like 2026-11-20T08:00:00Z") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000) * 1_000_000


def format_time(seconds: float) -> str:
    """HH:MM:SS, with milliseconds only where there are some."""
    milliseconds = round(seconds * 1000)
    whole, rest = divmod(milliseconds, 1000)
    text = f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{text}.{rest:03d}" if rest else text


def format_wall_clock(ns: int) -> str:
    return (
        datetime.fromtimestamp(ns / NS_PER_S, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )
