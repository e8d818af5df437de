"""Time by the innermost call that is running: on a GPU by CUDA events, else by the clock."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import torch

from memdb.timing import Laps

Moment = torch.cuda.Event | float


class Meter:
    """Milliseconds by label, each moment counted to the span that was entered last and is still open."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: list[str] = ["rest"]
        self._marks: list[tuple[Moment, str]] = []  # a moment, and what runs from then on

    @contextmanager
    def span(self, label: str) -> Iterator[None]:
        self._open.append(label)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def start(self) -> None:
        """Forget what was counted so far; nothing is in flight."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks = []
        self._mark()

    def read(self) -> dict[str, float]:
        """Since `start`, by label; `rest` is what no span took."""
        self._mark()
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (begin, label), (end, _) in pairwise(self._marks):
            found[label] = found.get(label, 0.0) + _between(begin, end)
        return found

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append((time.perf_counter(), self._open[-1]))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((event, self._open[-1]))


def _between(begin: Moment, end: Moment) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(begin.elapsed_time(end))
    assert isinstance(begin, float), "one clock"
    assert isinstance(end, float), "one clock"
    return (end - begin) * 1e3


class Metered(Laps):
    """The encoder's own laps, told to the meter: vision, reduce, encode, retain, caption, index."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        with self._meter.span("rest" if stage == "pack" else stage):
            yield


@dataclass(frozen=True)
class Call:
    """A function or method and the label of its time. `when`: of its arguments, whether a call counts at all."""

    owner: Any
    name: str
    label: str
    when: Callable[..., bool] | None = None


@contextmanager
def metered(meter: Meter, found: Sequence[Call]) -> Iterator[None]:
    """The meter around every one of these calls; afterwards they are as they were."""
    with ExitStack() as stack:
        for call in found:
            wrapped = _wrapped(getattr(call.owner, call.name), call, meter)
            stack.enter_context(mock.patch.object(call.owner, call.name, wrapped))
        yield


def _wrapped(inner: Callable[..., Any], call: Call, meter: Meter) -> Callable[..., Any]:
    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if call.when is not None and not call.when(*args, **kwargs):
            return inner(*args, **kwargs)
        with meter.span(call.label):
            return inner(*args, **kwargs)

    return outer
