"""Time stamps between blocks: where they stand, when they are due, and how they thin out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.query.rebuild.stamps import Stamp, layer_places, stamps
from memdb.schemas.units import BLOCK_DTYPE, Table

S = 1_000_000_000


def table(count: int, seconds: float = 2.0, start_s: float = 0.0) -> Table:
    """Blocks of `seconds` each, one after another."""
    blocks = np.zeros(count, BLOCK_DTYPE)
    blocks["start_ns"] = [round((start_s + i * seconds) * S) for i in range(count)]
    blocks["end_ns"] = blocks["start_ns"] + round(seconds * S)
    return blocks


def stamped(blocks: Table, union: np.ndarray, every_ns: int, *, apart_ns: int = 0) -> list[Stamp]:
    return stamps(blocks["start_ns"][union], union, every_ns, apart_ns=apart_ns)


def rows_of(found: list[Stamp]) -> list[int]:
    return [stamp.row for stamp in found]


def test_a_stamp_stands_behind_each_run_and_every_four_seconds_within() -> None:
    union = np.array([0, 1, 2, 3, 4, 10, 20, 21])
    found = stamped(table(30), union, 4 * S)
    assert [(stamp.row, stamp.text) for stamp in found] == [
        (1, "[00:00:02]"),
        (3, "[00:00:06]"),
        (4, "[00:00:08]"),
        (10, "[00:00:20]"),
        (21, "[00:00:42]"),
    ]


def test_fractions_are_written_to_a_tenth_and_hours_go_on() -> None:
    [stamp] = stamped(table(1, start_s=100 * 3600 + 0.4567), np.array([0]), S)
    assert stamp.text == "[100:00:00.500]"


def test_nothing_retrieved_needs_no_stamp() -> None:
    assert stamped(table(3), np.array([], np.int64), S) == []


@settings(deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1), st.integers(1, 30), st.integers(0, 60))
def test_stamps_are_due_or_too_close(rows: set[int], every_s: int, apart_s: int) -> None:
    """A stretch is closed where a run ends or its next block would make it longer than `every_s`; a stamp stands
    behind each, but for those that follow another too closely."""
    union, blocks = np.array(sorted(rows)), table(100)
    found = rows_of(stamped(blocks, union, every_s * S, apart_ns=apart_s * S))
    stretches: list[list[int]] = []
    for row in sorted(rows):
        starts = not stretches or row - 1 not in rows or 2.0 * (row - stretches[-1][0]) >= every_s
        if starts:
            stretches.append([])
        stretches[-1].append(row)
    wanted: list[int] = []
    for *_, last in stretches:
        if not wanted or 2.0 * (last - wanted[-1]) >= apart_s:
            wanted.append(last)
    assert found == wanted


@settings(deadline=None)
@given(st.data())
def test_places_are_those_of_writing_one_after_another(data: st.DataObject) -> None:
    """Against a plain loop over stamps and blocks in their order."""
    count = data.draw(st.integers(1, 25))
    tokens = np.array(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)), np.int64)
    marks = sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=6)))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=len(marks), max_size=len(marks)))
    mine = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1)))), np.int64)
    start = data.draw(st.integers(0, 40))
    at, blocks, texts = start, [], []
    for row in range(count):
        if row in mine:
            blocks += range(at, at + int(tokens[row]))
            at += int(tokens[row])
        if row in marks:
            size = sizes[marks.index(row)]
            texts += range(at, at + size)
            at += size
    found = layer_places(start, mine, tokens[mine], [Stamp(row, "") for row in marks], sizes)
    assert found.blocks.tolist() == blocks
    assert found.stamps.tolist() == texts
    assert found.end == at


def test_a_stamp_behind_a_block_that_a_layer_does_not_hold_keeps_its_place() -> None:
    found = layer_places(3, np.array([0, 5]), np.array([4, 4]), [Stamp(0, ""), Stamp(2, "")], [2, 2])
    assert found.stamps.tolist() == [7, 8, 9, 10]
    assert found.blocks.tolist() == [3, 4, 5, 6, 11, 12, 13, 14]
    assert found.end == 15


@pytest.mark.parametrize("tokens", [0, 1])
def test_places_of_nothing(tokens: int) -> None:
    found = layer_places(7, np.zeros(0, np.int64), np.zeros(0, np.int64), [], [])
    assert (found.blocks.tolist(), found.stamps.tolist(), found.end) == ([], [], 7)
