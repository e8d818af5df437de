"""Media time only goes forward, loses no stretch of a film to its clock, and shows what is missing as gaps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb.ingest.sources.times import GAP_NS_MIN, GapsSeen, MediaTimes, Picture, later
from memdb.schemas.frames import DecodedFrame
from memdb.schemas.recording import Gap
from tests.film_cases import numbered_picture

MS, S = 10**6, 10**9
PERIOD = 40 * MS
HOUR, DAY = 3600 * S, 86_400 * S
WRAP = 2**33 * S // 90_000  # 33 bits of a 90 kHz clock


def forward(
    times_ns: Sequence[int], *, durations: bool = False, arrivals_ns: Sequence[int] | None = None
) -> tuple[MediaTimes, list[tuple[int, int]], list[Gap]]:
    """The pass, (index of the picture, its media time), and the gaps, each where it came."""
    clock = iter(arrivals_ns) if arrivals_ns is not None else None
    times = MediaTimes(PERIOD, None if clock is None else lambda: next(clock))
    pictures = [Picture(ns, PERIOD if durations else 0, index) for index, ns in enumerate(times_ns)]
    kept: list[tuple[int, int]] = []
    gaps: list[Gap] = []
    for item in times.forward(pictures):
        if isinstance(item, Gap):
            assert item.start_ns >= (kept[-1][1] if kept else 0)
            gaps.append(item)
        else:
            if gaps:
                assert item.pts_ns >= gaps[-1].end_ns, "a gap ends with the frame behind it at the latest"
            kept.append((item.frame, item.pts_ns))
    return times, kept, gaps


def film(count: int, start_ns: int = 0, period_ns: int = PERIOD) -> list[int]:
    return [start_ns + index * period_ns for index in range(count)]


@given(
    st.lists(st.integers(1, 4 * S), min_size=1, max_size=40),
    st.integers(0, DAY),
    st.booleans(),
)
def test_times_that_go_forward_stay_as_they_are(steps: list[int], start: int, live: bool) -> None:
    times_ns = [start]
    for step in steps:
        times_ns.append(times_ns[-1] + step)
    arrivals = [ns - start for ns in times_ns] if live else None
    times, kept, gaps = forward(times_ns, arrivals_ns=arrivals)
    assert kept == list(enumerate(times_ns))
    assert gaps == []
    assert times.warnings("x") == []


@given(st.lists(st.integers(-DAY, 10 * DAY), max_size=60), st.booleans(), st.booleans(), st.data())
def test_whatever_the_times_they_go_forward_and_end_somewhere(
    times_ns: list[int], durations: bool, live: bool, data: st.DataObject
) -> None:
    """No order, no scale, no clock makes it go back, stand still, or run away by more than was claimed."""
    arrivals = None
    if live:
        waits = data.draw(st.lists(st.integers(0, HOUR), min_size=len(times_ns), max_size=len(times_ns)))
        arrivals = [sum(waits[: index + 1]) for index in range(len(waits))]
    times, kept, gaps = forward(times_ns, durations=durations, arrivals_ns=arrivals)
    assert all(one < two for (_, one), (_, two) in pairwise(kept))
    assert [index for index, _ in kept] == sorted({index for index, _ in kept})
    assert len(kept) + times.left_out == len(times_ns)
    assert all(gap.end_ns - gap.start_ns >= GAP_NS_MIN for gap in gaps)
    assert all(one.end_ns <= two.start_ns for one, two in pairwise(gaps))
    if kept:
        assert times.end_ns is not None
        assert kept[-1][1] < times.end_ns
        assert times.end_ns <= (len(kept) + 1) * (DAY + HOUR) + sum(arrivals or [])
    else:
        assert times.end_ns is None


def test_a_time_that_repeats_or_goes_back_a_little_is_left_out() -> None:
    times, kept, _ = forward([0, 40 * MS, 40 * MS, 30 * MS, 80 * MS])
    assert kept == [(0, 0), (1, 40 * MS), (4, 80 * MS)]
    assert times.warnings("x") == ["x: frames left out because their time repeats or jumps back: 2"]


@pytest.mark.parametrize("first_ns", [0, 5000 * S])
def test_films_glued_together_go_on(first_ns: int) -> None:
    """The second film's clock begins anew: none of it is lost."""
    times, kept, gaps = forward([*film(100, first_ns), *film(100)])
    assert kept == [(index, first_ns + index * PERIOD) for index in range(200)]
    assert gaps == []
    assert len(times.warnings("x")) == 1
    assert "clock jumps" in times.warnings("x")[0]


def test_the_clock_of_a_transport_stream_that_ends_after_26_hours_goes_on() -> None:
    one_a_minute = [minute * 60 * S % WRAP for minute in range(3 * 1591)]
    times, kept, gaps = forward(one_a_minute)
    assert len(kept) == len(one_a_minute)
    assert times.clock_count == 2
    assert gaps[1:] == [], "only the first step cannot be compared with another"
    assert abs(kept[-1][1] - (len(one_a_minute) - 1) * 60 * S) < 3 * 60 * S


def test_a_clock_that_stands_still_costs_no_second() -> None:
    """Every frame says the same: one a second is kept, and media time goes on as the frames do."""
    _, kept, _ = forward([7 * S] * 251)
    assert [(index, ns) for index, ns in kept] == [(25 * k, 7 * S + k * S) for k in range(11)]


@pytest.mark.parametrize("odd_ns", [HOUR, 20 * S, -30 * S, WRAP, 1 << 62])
@pytest.mark.parametrize("place", [1, 2, 50])
def test_one_damaged_time_costs_one_frame(odd_ns: int, place: int) -> None:
    times_ns = film(100, 60 * S)
    times_ns[place] += odd_ns
    times, kept, gaps = forward(times_ns)
    assert kept == [(index, 60 * S + index * PERIOD) for index in range(100) if index != place]
    assert (gaps, times.left_out, times.clock_count) == ([], 1, 0)


def test_a_damaged_time_at_the_end_makes_no_film_of_hours() -> None:
    times, kept, gaps = forward([*film(50), 20 * HOUR])
    assert (len(kept), gaps, times.end_ns) == (50, [], 2 * S)


def test_a_stretch_without_frames_is_a_gap() -> None:
    times, kept, gaps = forward([*film(50), *film(50, 60 * S)])
    assert len(kept) == 100
    assert [(gap.start_ns, gap.end_ns) for gap in gaps] == [(2 * S, 60 * S)]
    assert times.warnings("x") == []
    seen = GapsSeen()
    assert [seen.add(gap) for gap in gaps] == gaps
    assert seen.warnings("x") == ["x: nothing to see from 00:00:02 to 00:01:00, in all 00:00:58"]
    for _ in range(5):
        seen.add(gaps[0])
    assert seen.warnings("x")[0].endswith("00:01:00 and 3 times more, in all 00:05:48")


def test_a_short_stretch_is_none() -> None:
    assert forward([*film(50), *film(50, 2 * S + GAP_NS_MIN - 1)])[2] == []
    assert len(forward([*film(50), *film(50, 2 * S + GAP_NS_MIN)])[2]) == 1


def test_a_picture_a_minute_is_no_film_full_of_gaps() -> None:
    _, kept, gaps = forward(film(100, 0, 60 * S))
    assert len(kept) == 100
    assert len(gaps) <= 1, "only the first step cannot be compared with another"


def test_a_frame_that_is_shown_for_long_leaves_no_gap() -> None:
    times = MediaTimes(PERIOD)
    shown = [Picture(0, PERIOD, 0), Picture(PERIOD, 60 * S, 1), Picture(PERIOD + 60 * S, PERIOD, 2)]
    assert list(times.forward(shown)) == shown


def test_a_lone_frame_between_two_gaps_hides_neither() -> None:
    _, kept, gaps = forward([*film(50), 30 * S, *film(50, 60 * S)])
    assert len(kept) == 101
    assert [gap.end_ns for gap in gaps] == [30 * S, 60 * S]


def test_nobody_believes_in_days_within_a_film() -> None:
    _, kept, gaps = forward([*film(50), *film(50, 400 * DAY)])
    assert kept[50][1] == 50 * PERIOD
    assert gaps == []


@pytest.mark.parametrize("jump_ns", [3 * HOUR, -3 * HOUR, 30 * S])
def test_the_clock_of_a_camera_that_is_set_tears_nothing(jump_ns: int) -> None:
    """Its times jump by hours between two frames that came 40 ms apart: nothing was missed."""
    times_ns = [*film(100, 4 * HOUR), *film(100, 4 * HOUR + 100 * PERIOD + jump_ns)]
    times, kept, gaps = forward(times_ns, arrivals_ns=film(200))
    assert [ns - kept[0][1] for _, ns in kept] == film(200)
    assert (gaps, times.clock_count) == ([], 1)


def test_a_camera_that_saw_nothing_for_a_minute_leaves_a_gap() -> None:
    times_ns = [*film(100), *film(100, 60 * S)]
    _, kept, gaps = forward(times_ns, arrivals_ns=times_ns)
    assert [ns for _, ns in kept] == times_ns
    assert [(gap.start_ns, gap.end_ns) for gap in gaps] == [(4 * S, 60 * S)]


def test_a_camera_that_begins_anew_after_a_while_leaves_that_while() -> None:
    """Its clock begins at 0 again, 8 s after its last frame: as much is missing."""
    arrivals = [*film(100), *film(100, 12 * S)]
    _, kept, gaps = forward([*film(100, 500 * S), *film(100)], arrivals_ns=arrivals)
    assert [ns - kept[0][1] for _, ns in kept] == arrivals
    assert [(gap.start_ns - kept[0][1], gap.end_ns - kept[0][1]) for gap in gaps] == [(4 * S, 12 * S)]


def test_a_film_that_is_sent_faster_than_it_happened_keeps_its_gaps() -> None:
    times_ns = [*film(1000), *film(100, 120 * S)]
    _, kept, gaps = forward(times_ns, arrivals_ns=[ns // 50 for ns in times_ns])
    assert [ns for _, ns in kept] == times_ns
    assert len(gaps) == 1


def test_clocks_that_drift_apart_for_days_are_not_taken_for_a_fast_film() -> None:
    """100 ppm fast: ahead by 8 s after a day, and a clock that is set then is still seen."""
    arrivals = film(3000, 0, 60 * S)
    times_ns = [ns * 10_001 // 10_000 for ns in arrivals]
    _, kept, gaps = forward(
        [*times_ns, times_ns[-1] + 5 * HOUR, times_ns[-1] + 5 * HOUR + 60 * S],
        arrivals_ns=[*arrivals, arrivals[-1] + 60 * S, arrivals[-1] + 120 * S],
    )
    assert len(gaps) <= 1
    assert kept[-1][1] - kept[-3][1] < 200 * S


def test_a_shift_moves_frames_and_gaps_alike() -> None:
    frame = DecodedFrame(3 * S, lambda: numbered_picture(0))
    assert list(later(iter([Gap(S, 2 * S, "why"), frame]), 10)) == [
        Gap(S + 10, 2 * S + 10, "why"),
        DecodedFrame(3 * S + 10, frame.image),
    ]
