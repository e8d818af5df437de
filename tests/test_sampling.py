"""Frames picked by time: slots unique and in order, and a film taken up again gives the same tail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb.ingest.sampling import sample, sample_with_gaps, slot_ns
from memdb.schemas.errors import BudgetError, SourceError
from memdb.schemas.frames import DecodedFrame, Frame, Image
from memdb.schemas.recording import Gap

_TIMES = st.lists(st.integers(0, 20_000_000_000), unique=True, max_size=60).map(sorted)
_RATES = st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0, 7.5, 29.97, 1000.0])


def _decoded(times_ns: list[int], shown: list[int] | None = None) -> Iterator[DecodedFrame]:
    """Frames whose picture is their time, noting in `shown` which were converted."""
    for pts_ns in times_ns:

        def image(pts_ns: int = pts_ns) -> Image:
            if shown is not None:
                shown.append(pts_ns)
            return np.frombuffer(pts_ns.to_bytes(12, "little"), np.uint8).reshape(2, 2, 3)

        yield DecodedFrame(pts_ns, image)


def _plain(frame: Frame) -> tuple[int, int, int, bytes]:
    return frame.number, frame.start_ns, frame.end_ns, frame.image.tobytes()


@given(_TIMES, _RATES)
def test_the_first_frame_of_every_slot_that_has_one(times_ns: list[int], fps: float) -> None:
    shown: list[int] = []
    frames = list(sample(_decoded(times_ns, shown), fps))

    period = round(1e9 / fps)
    first_of: dict[int, int] = {}
    for pts_ns in times_ns:
        first_of.setdefault(pts_ns // period, pts_ns)
    assert [f.start_ns for f in frames] == list(first_of.values())
    assert [f.end_ns for f in frames] == [(slot + 1) * period for slot in first_of]
    assert [f.number for f in frames] == list(range(len(frames)))
    assert shown == [f.start_ns for f in frames], "only picked frames are converted"
    assert [f.image.tobytes()[:8] for f in frames] == [f.start_ns.to_bytes(8, "little") for f in frames]
    for before, after in pairwise(frames):
        assert before.start_ns < before.end_ns <= after.start_ns


@given(_TIMES, _RATES, st.data())
def test_a_film_taken_up_again_gives_the_same_tail(
    times_ns: list[int], fps: float, data: st.DataObject
) -> None:
    whole = list(sample(_decoded(times_ns), fps))
    done = data.draw(st.integers(0, len(whole)))
    after_ns = whole[done - 1].start_ns if done else -1

    shown: list[int] = []
    tail = list(sample(_decoded(times_ns, shown), fps, after_ns=after_ns, number=done))

    assert [_plain(f) for f in tail] == [_plain(f) for f in whole[done:]]
    assert shown == [f.start_ns for f in whole[done:]]


def _with_gaps(times_ns: list[int], long_ns: int) -> Iterator[DecodedFrame | Gap]:
    """The frames, with a gap wherever two are further apart than that."""
    last_ns: int | None = None
    for frame in _decoded(times_ns):
        if last_ns is not None and frame.pts_ns - last_ns > long_ns:
            yield Gap(last_ns + 1, frame.pts_ns, "why")
        last_ns = frame.pts_ns
        yield frame


@given(_TIMES, _RATES, st.integers(1, 3_000_000_000), st.data())
def test_gaps_stand_between_slots_and_come_again(
    times_ns: list[int], fps: float, long_ns: int, data: st.DataObject
) -> None:
    whole = list(sample_with_gaps(_with_gaps(times_ns, long_ns), fps))
    frames = [item for item in whole if isinstance(item, Frame)]
    plain = [_plain(frame) for frame in sample(_with_gaps(times_ns, long_ns), fps)]
    assert [_plain(frame) for frame in frames] == plain
    assert plain == [_plain(frame) for frame in sample(_decoded(times_ns), fps)], "gaps change no frame"
    given = [item for item in _with_gaps(times_ns, long_ns) if isinstance(item, Gap)]
    ends = [frame.end_ns for frame in frames]
    expected = []
    for gap in given:  # what is left of it behind the slots that were taken before it
        start_ns = max(
            [gap.start_ns, *(end for end, f in zip(ends, frames, strict=True) if f.start_ns < gap.end_ns)]
        )
        if start_ns < gap.end_ns:
            expected.append(Gap(start_ns, gap.end_ns, "why"))
    assert [item for item in whole if isinstance(item, Gap)] == expected
    for before, after in pairwise(whole):
        assert before.end_ns <= after.start_ns

    done = data.draw(st.integers(0, len(frames)))
    after_ns = frames[done - 1].start_ns if done else -1
    again = list(sample_with_gaps(_with_gaps(times_ns, long_ns), fps, after_ns=after_ns, number=done))
    place = whole.index(frames[done - 1]) + 1 if done else 0
    assert [i if isinstance(i, Gap) else _plain(i) for i in again] == [
        i if isinstance(i, Gap) else _plain(i) for i in whole[place:]
    ]


def test_a_gap_without_an_end_passes_at_once() -> None:
    def decoded() -> Iterator[DecodedFrame | Gap]:
        yield from _decoded([0])
        yield Gap(40_000_000, 40_000_000, "lost")
        raise AssertionError("nobody asked for more")

    items = sample_with_gaps(decoded(), 1.0)
    assert isinstance(next(items), Frame)
    assert next(items) == Gap(40_000_000, 40_000_000, "lost")


def test_a_frame_is_given_before_the_next_is_decoded() -> None:
    asked: list[int] = []

    def decoded() -> Iterator[DecodedFrame]:
        for frame in _decoded([0, 400_000_000, 1_000_000_000]):
            asked.append(frame.pts_ns)
            yield frame

    frames = sample(decoded(), 1.0)
    assert next(frames).end_ns == 1_000_000_000
    assert asked == [0]
    assert next(frames).start_ns == 1_000_000_000


def test_the_next_frame_of_a_slot_stands_for_one_without_a_picture() -> None:
    def broken() -> Image:
        raise SourceError("a broken picture")

    first, second, third = _decoded([0, 300_000_000, 1_000_000_000])
    frames = list(sample(iter([DecodedFrame(first.pts_ns, broken), second, third]), 1.0))
    assert [(f.number, f.start_ns, f.end_ns) for f in frames] == [
        (0, 300_000_000, 1_000_000_000),
        (1, 1_000_000_000, 2_000_000_000),
    ]


@pytest.mark.parametrize("fps", [0.0, -1.0, 1000.5, 1e-300, math.nan, math.inf, -math.inf])
def test_absurd_rates_are_refused_at_the_call(fps: float) -> None:
    with pytest.raises(BudgetError, match="sample_fps"):
        sample(_decoded([0]), fps)


def test_slots_of_everyday_rates() -> None:
    assert [slot_ns(fps) for fps in (0.5, 1.0, 3.0, 1000.0)] == [
        2_000_000_000,
        1_000_000_000,
        333_333_333,
        1_000_000,
    ]
