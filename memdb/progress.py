"""Progress lines on a terminal: of an ingest, and of work on a store."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from memdb.schemas.times import format_time


class Progress(Protocol):
    """How far an ingest is, as the pipeline tells it."""

    @property
    def media_s(self) -> float: ...
    @property
    def duration_s(self) -> float | None: ...
    @property
    def units(self) -> int: ...
    @property
    def written_bytes(self) -> int: ...


class BytesBar:
    """What is in hand, its share and the time left, on stderr: for work of which the bytes are known."""

    def __init__(self) -> None:
        self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
        self._began: tuple[str, float] | None = None

    def update(self, name: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if self._began is None or self._began[0] != name:
            self._began = name, now
        line = f"{name}: {done_bytes / 2**20:.1f} of {total_bytes / 2**20:.1f} MiB"
        if done_bytes and now > self._began[1]:
            left = (total_bytes - done_bytes) * (now - self._began[1]) / done_bytes
            line += f", {format_time(round(left))} left"
        self._live.update(Text(line))

    def __enter__(self) -> BytesBar:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)


class IngestBar:
    """Media time, share and time left where the length is known, times real time, units, bytes; on stderr."""

    def __init__(self) -> None:
        self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
        self._start: tuple[float, float] | None = None

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = now, progress.media_s
        began, began_s = self._start
        speed = (progress.media_s - began_s) / (now - began) if now > began else 0.0
        line = f"{format_time(round(progress.media_s))}"
        if progress.duration_s:
            share = min(1.0, progress.media_s / progress.duration_s)
            line += f" of {format_time(round(progress.duration_s))} ({share:.0%})"
            if speed > 0:
                left = max(0.0, progress.duration_s - progress.media_s) / speed
                line += f", {format_time(round(left))} left"
        line += f", {speed:.1f} x real time, {progress.units} units, {progress.written_bytes / 2**20:.1f} MiB"
        self._live.update(Text(line))

    def __enter__(self) -> IngestBar:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)
