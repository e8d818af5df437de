"""Trials that do not know of each other, in processes of their own: one on every core."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

WORKERS = 2
Given = TypeVar("Given")
Found = TypeVar("Found")


def spread(trial: Callable[[Given], Found], given: Iterable[Given]) -> list[Found]:
    """What `trial` finds for each of `given`, in their order; whoever is free takes the next one.

    `trial` is a function of a module. What it keeps in a cache lives as long as its process, which is spawned
    for this call.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context, initializer=hush) as processes:
        return list(processes.map(trial, given))


def hush() -> None:
    """Keep warnings of damage done on purpose from the terminal; whoever listens to the logger hears them."""
    logger = logging.getLogger("memdb")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


@contextmanager
def hushed() -> Iterator[None]:
    """The same, for a while."""
    logger = logging.getLogger("memdb")
    handlers, propagate = list(logger.handlers), logger.propagate
    hush()
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
