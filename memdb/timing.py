"""Where the time goes: a stopwatch with a lap per stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Laps:
    """Milliseconds by stage. Stages that nest are both counted; `sync` waits for a GPU before the clock is read."""

    def __init__(self, sync: Callable[[], None] | None = None) -> None:
        self.ms: dict[str, float] = {}
        self._sync = sync
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._sync is not None:
                self._sync()
            self.add(stage, (time.perf_counter() - start) * 1e3)

    def add(self, stage: str, ms: float) -> None:
        self.ms[stage] = self.ms.get(stage, 0.0) + ms

    @property
    def total_ms(self) -> float:
        """Milliseconds since this stopwatch was made."""
        return (time.perf_counter() - self._start) * 1e3
