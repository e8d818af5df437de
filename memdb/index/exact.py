"""Exact search over representative keys, and the rule by which every backend settles on the same answer.

A backend finds candidates with its own fp32 arithmetic, whose sums depend on the order in which they are
added. `settle` then scores the candidates row by row in fp64 and orders them by score, the lower row first
among equals. A backend hands over every row that its rounding could have misplaced (`slack`), so the answer
does not depend on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from memdb.schemas.errors import ModelError
from memdb.schemas.search import KeyHits

Sim = Literal["dot", "cos"]
Allowed = slice | npt.NDArray[np.bool_] | None  # rows [start, stop), a mask (n,), or every row
Keys = npt.NDArray[np.float16]

_CHUNK_ROWS = 2048  # copies in fp32 stay small: 4 MB at 512 dimensions
_FP32_EPS = float(np.finfo(np.float32).eps)
_FP32_MAX = float(np.finfo(np.float32).max)


class KeyIndex(ABC):
    """The keys of one layer, ready to be searched.

    `sim="dot"` scores by inner product. `sim="cos"` divides both sides by their length first: keys in fp32,
    rounded to fp16 once when the index is built (every backend sees the same fp16 values), the query in fp32.
    A key of length 0 scores 0. A key with a value that is not finite is never found.
    """

    value_bytes = 2  # what one value of a key takes in memory

    def __init__(self, keys: Keys, *, sim: Sim = "dot") -> None:
        assert keys.ndim == 2, keys.shape
        assert keys.dtype == np.float16, keys.dtype
        self.sim: Sim = sim
        self._largest = np.zeros(keys.shape[1], np.float16)  # (d,) largest absolute value a dimension
        self._odd_rows = np.zeros(0, np.int64)  # rows with a value that is not finite
        self._room = np.zeros((0, keys.shape[1]), np.float16)
        self.count = 0
        self._start(keys.shape[1])
        self.extend(keys)

    @classmethod
    def build(cls, keys: Keys, *, sim: Sim = "dot") -> Self:
        """An index over keys (n, d) fp16. Row i is found as i."""
        return cls(keys, sim=sim)

    def extend(self, keys: Keys) -> None:
        """Add keys (m, d) as the rows that follow."""
        assert keys.shape[1] == len(self._largest), (keys.shape, len(self._largest))
        self.room(len(keys))[:] = keys
        self.take()

    def room(self, rows: int) -> Keys:
        """Room for so many keys (rows, d), to be filled: they become the rows that follow with `take`."""
        self._room = self._make_room(rows)
        return self._room

    def take(self) -> None:
        """Let the keys count that `room` was filled with."""
        keys = self._room
        if self.sim == "cos":
            unit_length(keys, out=keys)
        largest = _largest(keys)
        if not np.isfinite(largest).all():
            odd = np.flatnonzero(~np.isfinite(keys).all(axis=1))
            self._odd_rows = np.concatenate([self._odd_rows, odd + self.count])
            keys[odd] = 0
            largest = _largest(keys)
        self._largest = np.maximum(self._largest, largest)
        self._add(keys)
        self.count += len(keys)
        self._room = keys[:0]

    def search(self, query: npt.NDArray[np.float32], k: int, allowed: Allowed = None) -> KeyHits:
        """The k best of the allowed rows for a query (d,), or all of them where they are fewer.

        Raises ModelError for a query that is not finite.
        """
        rows, scores = self.best(query, k, allowed)
        return KeyHits(rows, scores.astype(np.float32))

    def best(
        self, query: npt.NDArray[np.float32], k: int, allowed: Allowed = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The same with scores in fp64, in which several searches compare exactly."""
        query = np.ascontiguousarray(query, np.float32)
        assert query.shape == self._largest.shape, (query.shape, self._largest.shape)
        if self.sim == "cos":
            length = float(np.linalg.norm(query.astype(np.float64)))
            query = (query / length).astype(np.float32) if length else query
        allowed, rows = self._allow(allowed)
        k = min(k, rows)
        if k <= 0:
            return np.zeros(0, np.int64), np.zeros(0)
        # Twice the largest error of an fp32 sum of d products, whatever its order.
        reach = float(np.abs(query).astype(np.float64) @ self._largest.astype(np.float64))
        if not reach < _FP32_MAX:
            raise ModelError(
                "the query holds values that are not finite, or so large that its scores are not"
            )
        slack = 2.0 * len(query) * _FP32_EPS * reach
        return self._settle(self._candidates(query, k, slack, allowed, rows), query, k)

    def _allow(self, allowed: Allowed) -> tuple[Allowed, int]:
        """The allowed rows in their simplest form, and how many they are."""
        if isinstance(allowed, slice):
            start, stop, step = allowed.indices(self.count)
            assert step == 1, allowed
            allowed = slice(start, max(start, stop))
        if len(self._odd_rows):
            mask = np.zeros(self.count, bool)
            mask[allowed if allowed is not None else slice(None)] = True
            mask[self._odd_rows] = False
            allowed = mask
        if isinstance(allowed, np.ndarray):
            assert allowed.shape == (self.count,), (allowed.shape, self.count)
            rows = np.flatnonzero(allowed)
            if len(rows) == 0:
                return slice(0, 0), 0
            if rows[-1] - rows[0] + 1 == len(rows):
                allowed = slice(int(rows[0]), int(rows[-1]) + 1)
            else:
                return allowed, len(rows)
        if allowed is None or (allowed.start == 0 and allowed.stop == self.count):
            return None, self.count
        return allowed, allowed.stop - allowed.start

    def _settle(
        self, rows: npt.NDArray[np.int64], query: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        scores = np.empty(len(rows))
        for at in range(0, len(rows), _CHUNK_ROWS):
            # A sum along the last axis adds each row's products in one fixed order: equal keys get equal scores.
            keys = self._keys(rows[at : at + _CHUNK_ROWS]).astype(np.float64)
            scores[at : at + len(keys)] = (keys * query.astype(np.float64)).sum(axis=1)
        return best_of(rows, scores, k)

    @abstractmethod
    def _start(self, size: int) -> None:
        """Make ready for keys of `size` dimensions."""

    @abstractmethod
    def _make_room(self, rows: int) -> Keys:
        """(rows, d) behind the keys that are there."""

    @abstractmethod
    def _add(self, keys: Keys) -> None:
        """Add the keys of the room, finite by now, and of length 1 for `cos`."""

    @abstractmethod
    def _keys(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        """(len(rows), d): the keys as they were added."""

    @abstractmethod
    def _candidates(
        self, query: npt.NDArray[np.float32], k: int, slack: float, allowed: Allowed, rows: int
    ) -> npt.NDArray[np.int64]:
        """Every allowed row whose score is within `slack` of the k-th best, in any order; more are welcome.

        1 <= k <= rows, the count of allowed rows.
        """


class ExactIndex(KeyIndex):
    """Every allowed key against the query, in NumPy."""

    def _start(self, size: int) -> None:
        self._all: Keys = np.zeros((0, size), np.float16)

    def _make_room(self, rows: int) -> Keys:
        self._grown = np.empty((self.count + rows, self._all.shape[1]), np.float16)
        self._grown[: self.count] = self._all
        return self._grown[self.count :]

    def _add(self, keys: Keys) -> None:
        self._all = self._grown

    def _keys(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        return self._all[rows]

    def _candidates(
        self, query: npt.NDArray[np.float32], k: int, slack: float, allowed: Allowed, rows: int
    ) -> npt.NDArray[np.int64]:
        window = allowed if isinstance(allowed, slice) else slice(0, self.count)
        scores = np.empty(window.stop - window.start, np.float32)
        for at in range(0, len(scores), _CHUNK_ROWS):
            chunk = self._all[window][at : at + _CHUNK_ROWS]
            scores[at : at + len(chunk)] = chunk.astype(np.float32) @ query
        if isinstance(allowed, np.ndarray):
            scores[~allowed] = -np.inf
        kth = float(np.partition(scores, len(scores) - k)[len(scores) - k])
        return np.flatnonzero(scores >= kth - slack).astype(np.int64) + window.start


def best_of(
    rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The k best rows with their scores, best first, the lower row first among equals."""
    best = np.lexsort((rows, -scores))[:k]
    return rows[best], scores[best]


def _largest(keys: Keys) -> npt.NDArray[np.float16]:
    """(d,): the largest absolute value a dimension of (n, d). fp16 of one sign sorts like an integer."""
    bits = keys.view(np.uint16)
    negative = np.full(
        keys.shape[1], 0x8000, np.uint16
    )  # as unsigned the largest is the largest negative value
    positive = np.zeros(keys.shape[1], np.int16)  # and as signed the largest positive one
    for at in range(0, len(bits), _CHUNK_ROWS):
        chunk = bits[at : at + _CHUNK_ROWS]  # both passes over it while it is in the cache
        np.maximum(negative, chunk.max(axis=0), out=negative)
        np.maximum(positive, chunk.view(np.int16).max(axis=0), out=positive)
    largest: Keys = np.maximum(negative - np.uint16(0x8000), positive.view(np.uint16)).view(np.float16)
    return largest


def unit_length(keys: Keys, *, out: Keys | None = None) -> Keys:
    """Keys (n, d) divided by their length in fp32 and rounded to fp16; keys of length 0 stay."""
    out = np.empty(keys.shape, np.float16) if out is None else out
    for at in range(0, len(keys), _CHUNK_ROWS):
        chunk = keys[at : at + _CHUNK_ROWS].astype(np.float32)
        lengths = np.sqrt((chunk * chunk).sum(axis=1, keepdims=True))
        with np.errstate(invalid="ignore"):  # a key that is not finite stays so, and is left out later
            out[at : at + len(chunk)] = chunk / np.where(lengths == 0, 1, lengths)
    return out
