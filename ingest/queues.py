"""Bounded queues between threads that carry errors along and close in both directions."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()
_POLL_S = 0.1


class Stream(Generic[T]):
    """Runs an iterable in a thread of its own, at most `ahead` items before its reader.

    An exception there is raised here, after the items that came before it. `close` ends the thread. Once `stop`
    is set the reader gets no more items, also where it waits for one; `stopped` says that it was cut off so.
    """

    def __init__(
        self, items: Iterable[T], *, ahead: int, name: str, stop: threading.Event | None = None
    ) -> None:
        self.stopped = False
        self._stop = stop or threading.Event()
        self._queue: queue.Queue[object] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(items,), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if item is _END:
                break
            yield item  # type: ignore[misc]
        else:
            self.stopped = True
            return
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:  # it is raised again in the reader's thread
            self._error = error
        self._put(_END)

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False


class Sink(Generic[T]):
    """Hands items to a function in a thread of its own, at most `ahead` of them waiting.

    The first exception of the function ends its thread and is raised by the next `put` or by `finish`.
    """

    def __init__(self, work: Callable[[T], None], *, ahead: int, name: str) -> None:
        self._queue: queue.Queue[object] = queue.Queue(maxsize=ahead)
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        while self._error is None:
            try:
                self._queue.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                continue
        raise self._error

    def finish(self) -> None:
        """Wait until everything that was put is done."""
        while self._thread.is_alive() and self._error is None:
            try:
                self._queue.put(_END, timeout=_POLL_S)
                break
            except queue.Full:
                continue
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not _END:
                self._work(item)  # type: ignore[arg-type]
                del item  # units and states are large, and the next may be long in coming
        except BaseException as error:  # it is raised again in the thread that puts
            self._error = error
