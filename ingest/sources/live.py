"""A live source that outlives its connections: lost, it is tried again, and what was missed is a gap."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator

from memdb.ingest.sources.address import VideoAddress
from memdb.ingest.sources.base import Source
from memdb.ingest.sources.times import later, told, told_time
from memdb.ingest.sources.video import clock_ns
from memdb.schemas.errors import BudgetError, MemdbError
from memdb.schemas.frames import DecodedFrame
from memdb.schemas.recording import Gap
from memdb.schemas.times import NS_PER_S

log = logging.getLogger(__name__)

RECONNECT_S = 300.0  # a camera that begins anew takes a minute or two, a router a little longer
_SET_NS = 10 * NS_PER_S  # clocks that are kept right by others move by less
RETRY_S_MIN, RETRY_S_MAX = 1.0, 60.0  # between two tries: doubled each time, up to the second


class Reconnecting(Source):
    """Connections to one camera, one after another, as one source.

    The times of each begin anew. They go on behind the last frame of the one before, by as much as passed between
    that frame and the call that found the camera again, on a clock that no one sets: the wall clock takes no part.
    When a connection is lost a Gap without an end says so at once, so that what was seen before is kept before
    anything else happens; its whole length follows with the next frame. Given up for good where nobody was there
    for `patience_s`.
    """

    def __init__(self, first: VideoAddress, patience_s: float, now_ns: Callable[[], int] = clock_ns) -> None:
        self._first, self._patience_s, self._now_ns = first, patience_s, now_ns
        self._closed = threading.Event()
        self._now: VideoAddress = first
        self._wait_s = RETRY_S_MIN
        self._seen_ns = self._end_ns = 0  # of the last frame: when it came, and where it ends in media time
        self._called_ns = 0  # when the connection that is there was asked for: its time 0
        self._lost = self._missed_ns = 0
        self._wall_ahead_ns = time.time_ns() - now_ns()
        self.info = first.info
        self.warnings: list[str] = []
        self.media_end_ns: int | None = None
        self.growing = False

    def frames(self) -> Iterator[DecodedFrame | Gap]:
        connection: VideoAddress | None = self._first
        self.warnings, self.media_end_ns = [], None
        self._lost = self._missed_ns = self._end_ns = 0
        begin_ns = 0
        while connection is not None:
            self._now = connection
            began_ns = self._now_ns()
            yield from self._watched(connection, begin_ns)
            connection.close()
            if connection.lost_by is None or self._closed.is_set():
                break
            if self._now_ns() - began_ns > RETRY_S_MAX * NS_PER_S:
                self._wait_s = RETRY_S_MIN
            yield Gap(self._end_ns, self._end_ns, connection.lost_by)
            connection = self._connected_again(connection)
            if connection is not None:
                gap = self._gap(connection)
                begin_ns = gap.end_ns
                yield gap
        self.media_end_ns = self._end_ns
        self._warn(connection)

    def close(self) -> None:
        self._closed.set()
        self._now.close()

    def _watched(self, connection: VideoAddress, begin_ns: int) -> Iterator[DecodedFrame | Gap]:
        """The frames of one connection, from media time `begin_ns` on."""
        self._seen_ns = self._now_ns()
        for item in later(connection.frames(), begin_ns):
            if self._closed.is_set():
                return
            self._seen_ns = self._now_ns()
            yield item
        self._end_ns = begin_ns + (connection.media_end_ns or 0)
        for warning in connection.warnings:
            log.warning("%s", warning)
            if not self._lost and connection.lost_by is None:
                self.warnings.append(warning)

    def _connected_again(self, lost: VideoAddress) -> VideoAddress | None:
        log.warning("%s is lost at %s: trying again", lost.label, told_time(self._end_ns))
        self._lost += 1
        lost_ns = self._now_ns()
        while True:
            left_s = self._patience_s - (self._now_ns() - lost_ns) / NS_PER_S
            if left_s <= 0 or self._closed.wait(min(self._wait_s, left_s)):
                return None
            self._wait_s = min(2 * self._wait_s, RETRY_S_MAX)
            self._called_ns = self._now_ns()
            try:
                return lost.again()
            except MemdbError as error:
                log.info("%s", error)

    def _gap(self, connection: VideoAddress) -> Gap:
        passed_ns = max(1, self._called_ns - self._seen_ns)
        gap = Gap(self._end_ns, self._end_ns + passed_ns, "the source was not connected")
        self._missed_ns += passed_ns
        log.warning("%s is back: nothing was seen from %s", connection.label, told(gap))
        return gap

    def _warn(self, connection: VideoAddress | None) -> None:
        label = self._first.label
        found = self._lost - (connection is None)
        if found:
            self.warnings.append(
                f"{label}: connections lost and found again: {found}; nothing was seen for "
                f"{told_time(self._missed_ns)} in all, which is on record as gaps"
            )
        set_ns = time.time_ns() - self._now_ns() - self._wall_ahead_ns
        if abs(set_ns) > _SET_NS:
            self.warnings.append(
                f"the wall clock was set {'ahead' if set_ns > 0 else 'back'} by {told_time(abs(set_ns))} meanwhile: "
                "media time went on without it, so moments on the wall clock are off by that from there"
            )
        if connection is None and not self._closed.is_set():
            self.warnings.append(
                f"{label} is gone since {told_time(self._end_ns)} and did not come back within "
                f"{self._patience_s:g} s: run the same command again when it is there"
            )


def checked_patience(seconds: float) -> float:
    """`seconds` itself: 0 for none, infinity for ever. Raises BudgetError otherwise."""
    if math.isnan(seconds) or seconds < 0:
        raise BudgetError(f"reconnect_s {seconds!r} is no time to wait: give seconds, 0 for none or inf")
    return seconds
