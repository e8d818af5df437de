"""Queues between threads: order, bounds, errors and ends, in both directions."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from memdb.ingest.queues import Sink, Stream


class Fault(Exception):
    pass


def counted(count: int, seen: list[int]) -> Iterator[int]:
    for number in range(count):
        seen.append(number)
        yield number


def failing(count: int) -> Iterator[int]:
    yield from range(count)
    raise Fault


def is_alive(name: str) -> bool:
    return any(thread.name == name for thread in threading.enumerate())


def wait_until(condition: object) -> None:
    assert callable(condition)
    pause = threading.Event()
    for _ in range(10_000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_a_stream_gives_everything_in_order(ahead: int) -> None:
    stream = Stream(range(50), ahead=ahead, name="test-stream")
    assert list(stream) == list(range(50))
    assert not stream.stopped
    stream.close()


def test_a_stream_goes_ahead_as_far_as_it_may() -> None:
    """With one item in the reader's hands: `ahead` in the queue, and one that waits to get in."""
    seen: list[int] = []
    stream = Stream(counted(50, seen), ahead=3, name="test-stream")
    reader = iter(stream)
    for taken in range(1, 20):
        assert next(reader) == taken - 1
        wait_until(lambda taken=taken: len(seen) == taken + 3 + 1)
    threading.Event().wait(0.05)
    assert len(seen) == 19 + 3 + 1, "and no further"
    stream.close()
    assert not is_alive("test-stream")


def test_an_error_comes_after_the_items_before_it() -> None:
    stream = Stream(failing(3), ahead=10, name="test-stream")
    got: list[int] = []
    with pytest.raises(Fault):
        got.extend(stream)
    assert got == [0, 1, 2]
    stream.close()


def test_a_closed_stream_ends_its_thread_though_nobody_reads() -> None:
    stream = Stream(iter(int, 1), ahead=2, name="test-stream")
    stream.close()
    assert not is_alive("test-stream")


def test_a_stopped_stream_gives_no_more() -> None:
    stop = threading.Event()
    stream = Stream(range(50), ahead=10, name="test-stream", stop=stop)
    got = []
    for item in stream:
        got.append(item)
        if item == 4:
            stop.set()
    assert got == [0, 1, 2, 3, 4]
    assert stream.stopped
    stream.close()


def test_a_reader_that_waits_is_woken_by_the_stop() -> None:
    """A camera that is silent: nothing comes, and Ctrl-C ends the ingest all the same."""
    silent, stop = threading.Event(), threading.Event()

    def camera() -> Iterator[int]:
        yield 1
        silent.wait()

    stream = Stream(camera(), ahead=2, name="test-stream", stop=stop)
    timer = threading.Timer(0.05, stop.set)
    timer.start()
    assert list(stream) == [1]
    assert stream.stopped
    silent.set()
    stream.close()
    timer.join()


def test_a_stream_that_came_to_its_end_was_not_stopped() -> None:
    stop = threading.Event()
    stream = Stream(range(3), ahead=10, name="test-stream", stop=stop)
    assert list(stream) == [0, 1, 2]
    stop.set()
    assert not stream.stopped
    stream.close()


def test_a_sink_works_in_order_and_finishes() -> None:
    done: list[int] = []
    sink = Sink(done.append, ahead=2, name="test-sink")
    for number in range(50):
        sink.put(number)
    sink.finish()
    assert done == list(range(50))
    assert not is_alive("test-sink")


def test_a_sink_holds_its_feeder_back() -> None:
    """While one item is worked on, `ahead` wait and the next put blocks."""
    free, begun = threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.set()
        free.wait()

    sink = Sink(work, ahead=2, name="test-sink")
    sink.put(0)
    begun.wait()
    sink.put(1)
    sink.put(2)
    through = threading.Event()

    def feed() -> None:
        sink.put(3)
        through.set()

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert not through.wait(0.3)
    free.set()
    feeder.join()
    assert through.is_set()
    sink.finish()


def test_an_error_of_the_work_reaches_who_puts_and_who_finishes() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 3:
            raise Fault
        done.append(item)

    sink = Sink(work, ahead=1, name="test-sink")

    def feed() -> None:
        for number in range(1000):
            sink.put(number)

    with pytest.raises(Fault):
        feed()
    with pytest.raises(Fault):
        sink.finish()
    assert done == [0, 1, 2], "nothing is worked on after an error"
    assert not is_alive("test-sink")


def test_a_sink_whose_work_failed_last_says_so_at_the_end() -> None:
    def work(item: int) -> None:
        raise Fault

    sink = Sink(work, ahead=5, name="test-sink")
    sink.put(1)
    with pytest.raises(Fault):
        sink.finish()
