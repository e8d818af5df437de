"""Media time made of what films and cameras claim: it only goes forward, and what is missing shows as a gap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memdb.schemas.frames import DecodedFrame
from memdb.schemas.recording import Gap
from memdb.schemas.times import NS_PER_S, format_time, to_s

# A hole of this length goes on record. Below it lies what every film has: rates that vary, a frame that is lost.
GAP_NS_MIN = 5 * NS_PER_S
_STEPS = (
    10  # and it is this many times as long as frames are apart: a picture a minute is no film full of holes
)
# Times that go back by less are frames out of order. By more it is another clock: films glued together, a camera
# that began anew, the 33 bits of a transport stream that come to their end after 26.5 hours.
_BACK_NS = NS_PER_S
_AHEAD_NS_MAX = 86_400 * NS_PER_S  # a longer jump within a film is no time but damage
_LEAD_NS = 5 * NS_PER_S  # how far a camera's buffers may run ahead of what happens
_PACE_NS = 60 * NS_PER_S  # over how long the pace of a source is judged: clocks drift apart over days
NO_FRAMES = "the source has no frames there"
_SHOWN = 3  # jumps and gaps that a warning names one by one


@dataclass(frozen=True)
class Picture:
    """A decoded frame of ffmpeg's with its time; `duration_ns` is 0 where the film does not say."""

    pts_ns: int
    duration_ns: int
    frame: Any


class MediaTimes:
    """One pass over a source's pictures: their times, made to go forward, and the gaps between them.

    - A time that repeats or goes back a little: the frame is left out.
    - A time far ahead or back waits for the next frame. If that stands where time was, the odd one is damaged and
      is left out.
    - Times that go back for good, or stand still for a second's worth of frames: another clock began, and time
      goes on from there.
    - Times that go ahead for good: nothing was seen in between, and a long stretch of it comes as a Gap.

    `now_ns`, for live sources: a clock that no one sets. A camera that sends at the pace of the world cannot be
    ahead of it: when its times jump further than time has passed, its clock was set, and nothing was lost.
    """

    def __init__(self, period_ns: int, now_ns: Callable[[], int] | None = None) -> None:
        self.left_out = 0
        self.clock_count = 0
        self._clocks: list[int] = []  # where another clock began: the first few
        self._now_ns = now_ns
        self._period_ns = self._step_ns = period_ns
        self._offset_ns = 0  # from the source's times to media time
        self._apart_ns: tuple[int, ...] = ()  # the last two distances between frames, gaps or not
        self._stuck_ns = 0  # frames left out since the last one that was taken, as time
        self._taken = 0
        self._last_ns = self._end_ns = self._arrived_ns = self._lead_ns = 0

    @property
    def end_ns(self) -> int | None:
        """Where the last frame ends; None before the first."""
        return self._end_ns if self._taken else None

    def forward(self, pictures: Iterable[Picture]) -> Iterator[Picture | Gap]:
        held: tuple[Picture, int] | None = None
        for picture in pictures:
            arrived_ns = self._now_ns() if self._now_ns is not None else 0
            fits = self._fits(picture)
            if held is not None:
                if fits:
                    self.left_out += 1
                else:
                    yield from self._take(*held)
                    fits = self._fits(picture)
                held = None
            if fits:
                yield from self._take(picture, arrived_ns)
            else:
                held = picture, arrived_ns
        if held is not None:
            if self._taken > 1:  # nothing speaks for it, and with its time the film might seem hours longer
                self.left_out += 1
            else:
                yield from self._take(*held)

    def _fits(self, picture: Picture) -> bool:
        """Whether a frame stands about where time is: not far back, and not behind a hole."""
        at_ns = picture.pts_ns + self._offset_ns
        return not self._taken or (at_ns > self._last_ns - _BACK_NS and not self._leaves_gap(at_ns))

    def _leaves_gap(self, at_ns: int) -> bool:
        return at_ns - self._end_ns >= max(GAP_NS_MIN, _STEPS * min(self._apart_ns, default=0))

    def _take(self, picture: Picture, arrived_ns: int) -> Iterator[Picture | Gap]:
        at_ns = picture.pts_ns + self._offset_ns
        waited_ns = arrived_ns - self._arrived_ns
        if not self._taken:
            if not -_BACK_NS < at_ns <= _AHEAD_NS_MAX:
                at_ns = self._other_clock(picture, 0)
            at_ns = max(0, at_ns)
        elif at_ns <= self._last_ns:
            self._stuck_ns += self._period_ns
            if max(self._last_ns - at_ns, self._stuck_ns) < _BACK_NS:
                self.left_out += 1
                return
            at_ns = self._other_clock(picture, self._after(waited_ns))
        elif self._is_beyond_belief(at_ns - self._last_ns, waited_ns):
            at_ns = self._other_clock(picture, self._after(waited_ns))
        if self._taken:
            apart_ns = at_ns - self._last_ns
            if self._leaves_gap(at_ns):
                yield Gap(self._end_ns, at_ns, NO_FRAMES)
            else:
                self._step_ns = apart_ns
            self._apart_ns = (*self._apart_ns[-1:], apart_ns)
            self._keep_pace(apart_ns, waited_ns)
        self._taken += 1
        self._stuck_ns = 0
        self._last_ns, self._arrived_ns = at_ns, arrived_ns
        self._end_ns = at_ns + (min(picture.duration_ns, _AHEAD_NS_MAX) or self._step_ns)
        yield replace(picture, pts_ns=at_ns)

    def _after(self, waited_ns: int) -> int:
        """Where a frame stands whose own time says nothing."""
        usual_ns = min(self._apart_ns, default=self._step_ns)
        return self._last_ns + max(usual_ns, self._stuck_ns, waited_ns)

    def _is_beyond_belief(self, step_ns: int, waited_ns: int) -> bool:
        if step_ns > _AHEAD_NS_MAX:
            return True
        if self._now_ns is None or self._lead_ns > _LEAD_NS:  # no camera: it sends faster than things happen
            return False
        return step_ns - waited_ns > max(_LEAD_NS, _STEPS * self._step_ns)

    def _keep_pace(self, step_ns: int, waited_ns: int) -> None:
        self._lead_ns += step_ns - waited_ns - self._lead_ns * min(step_ns, _PACE_NS) // _PACE_NS

    def _other_clock(self, picture: Picture, at_ns: int) -> int:
        self._offset_ns = at_ns - picture.pts_ns
        self.clock_count += 1
        if len(self._clocks) < _SHOWN:
            self._clocks.append(at_ns)
        return at_ns

    def warnings(self, label: str) -> list[str]:
        found = []
        if self.left_out:
            found.append(
                f"{label}: frames left out because their time repeats or jumps back: {self.left_out}"
            )
        if self.clock_count:
            places = _listed([told_time(at_ns) for at_ns in self._clocks], self.clock_count)
            found.append(f"{label}: its clock jumps at {places}: media time goes on from there")
        return found


class GapsSeen:
    """The gaps of one pass, for its warning."""

    def __init__(self) -> None:
        self._count = self._all_ns = 0
        self._first: list[Gap] = []

    def add(self, gap: Gap) -> Gap:
        self._count += 1
        self._all_ns += gap.end_ns - gap.start_ns
        if len(self._first) < _SHOWN:
            self._first.append(gap)
        return gap

    def warnings(self, label: str) -> list[str]:
        if not self._count:
            return []
        places = _listed([told(gap) for gap in self._first], self._count)
        return [f"{label}: nothing to see from {places}, in all {told_time(self._all_ns)}"]


def later(items: Iterator[DecodedFrame | Gap], by_ns: int) -> Iterator[DecodedFrame | Gap]:
    """The same, that much later."""
    for item in items:
        if isinstance(item, Gap):
            yield replace(item, start_ns=item.start_ns + by_ns, end_ns=item.end_ns + by_ns)
        else:
            yield replace(item, pts_ns=item.pts_ns + by_ns)


def told(gap: Gap) -> str:
    return f"{told_time(gap.start_ns)} to {told_time(gap.end_ns)}"


def told_time(ns: int) -> str:
    return format_time(to_s(ns))


def _listed(places: Sequence[str], count: int) -> str:
    rest = f" and {count - len(places)} times more" if count > len(places) else ""
    return ", ".join(places) + rest
