"""Encoder states: whole or passed over, the newest two kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.files import watched
from memdb.schemas.errors import CorruptionError, StoreError
from memdb.schemas.recording import Tombstone
from memdb.state import OlderState, StateFiles, read_state, recording_of, state_files
from tests.store_cases import Steps, fill, flip, new_store

ID, OTHER, ENCODING = "a" * 32, "b" * 32, "e" * 32


@pytest.fixture
def states(tmp_path: Path) -> StateFiles:
    return StateFiles(tmp_path, ID, ENCODING)


@settings(max_examples=25, deadline=None)
@given(payload=st.binary(max_size=500), number=st.integers(0, 9_999_999_999))
def test_a_state_comes_back_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory, payload: bytes, number: int
) -> None:
    states = StateFiles(tmp_path_factory.mktemp("state"), ID, ENCODING)
    states.save(number, payload)
    assert loaded(states, number) == (number, payload)
    assert states.load_latest(ENCODING, number - 1) is None


def loaded(states: StateFiles, at_most: int, encoding: str = ENCODING) -> tuple[int, bytes] | None:
    found = states.load_latest(encoding, at_most)
    return None if found is None else (found.unit, found.payload)


def test_the_newest_two_are_kept_and_the_newest_that_fits_is_loaded(
    states: StateFiles, tmp_path: Path
) -> None:
    StateFiles(tmp_path, OTHER, ENCODING).save(1, b"another recording's")
    for number in (4, 8, 16):
        states.save(number, b"state %d" % number)
    assert [path.name for path in states.files()] == [f"{ID}-{number:010d}.state" for number in (16, 8)]
    assert loaded(states, 100) == (16, b"state 16")
    assert loaded(states, 15) == (8, b"state 8")
    assert states.load_latest(ENCODING, 7) is None
    assert [recording_of(path) for path in state_files(tmp_path)] == [ID, ID, OTHER]


def test_every_flipped_bit_is_passed_over_with_a_warning(
    states: StateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    states.save(4, b"older")
    states.save(8, b"newer, and damaged")
    path = states.files()[0]
    for byte in range(path.stat().st_size):
        flip(path, byte, byte % 8)
        with caplog.at_level(logging.WARNING):
            assert loaded(states, 9) == (4, b"older")
        assert path.name in caplog.text
        with pytest.raises(CorruptionError) as caught:
            read_state(path)
        assert caught.value.file == f"state/{path.name}"
        caplog.clear()
        flip(path, byte, byte % 8)
    assert loaded(states, 9) == (8, b"newer, and damaged")


def test_every_torn_length_is_passed_over(states: StateFiles) -> None:
    states.save(8, b"a state")
    path = states.files()[0]
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert states.load_latest(ENCODING, 9) is None
    path.write_bytes(data + b"x")
    assert states.load_latest(ENCODING, 9) is None


def test_a_state_of_another_encoding_is_passed_over(states: StateFiles) -> None:
    states.save(8, b"a state")
    assert states.load_latest("f" * 32, 9) is None


def test_a_state_under_another_number_is_passed_over(states: StateFiles, tmp_path: Path) -> None:
    states.save(8, b"a state")
    os.rename(states.files()[0], tmp_path / f"{ID}-0000000009.state")
    assert states.load_latest(ENCODING, 9) is None


def test_a_state_under_the_name_of_another_recording_is_passed_over(
    states: StateFiles, tmp_path: Path
) -> None:
    """Both are of one encoding and one unit: nothing but the recording's id tells them apart."""
    states.save(8, b"a state")
    moved = tmp_path / f"{OTHER}-0000000008.state"
    os.rename(states.files()[0], moved)
    others = StateFiles(tmp_path, OTHER, ENCODING)
    assert others.load_latest(ENCODING, 9) is None
    with pytest.raises(CorruptionError, match=f"of recording {ID}") as caught:
        read_state(moved)
    assert caught.value.file == f"state/{moved.name}"
    assert others.remove_forgotten([]) == 1, "nobody knows what it holds"


def test_no_flipped_bit_makes_an_older_state_of_one(states: StateFiles) -> None:
    """Older ones are passed over without a word of damage."""
    states.save(8, b"a state")
    path = states.files()[0]
    for bit in range(32):
        flip(path, 8 + bit // 8, bit % 8)
        with pytest.raises(CorruptionError) as caught:
            read_state(path)
        assert not isinstance(caught.value, OlderState)
        flip(path, 8 + bit // 8, bit % 8)


def test_a_state_is_safe_before_its_name_is(states: StateFiles) -> None:
    states.save(4, b"older")
    with watched(steps := Steps()):
        states.save(8, b"newer")
    assert steps.names("write", "sync", "replace", "sync_folder") == [
        "write",
        "sync",
        "replace",
        "sync_folder",
    ]


@pytest.mark.parametrize("what", ["create", "write", "sync", "replace", "sync_folder"])
def test_a_state_that_cannot_be_saved_leaves_the_one_before(states: StateFiles, what: str) -> None:
    states.save(4, b"older")
    with (
        watched(Steps(lambda step: step.what == what)),
        pytest.raises(StoreError, match="No space left"),
    ):
        states.save(8, b"newer")
    assert loaded(states, 7) == (4, b"older")
    states.save(8, b"newer")
    assert loaded(states, 9) == (8, b"newer")


HOUR = 3_600_000_000_000


@pytest.mark.parametrize(
    ("reach_ns", "seen", "spans", "good"),
    [
        (5, 0, [(1, 5)], True),  # it reaches back to where the span ended
        (4, 0, [(1, 5)], False),
        (0, 1, [(1, 5)], True),  # it was taken after the span was forgotten, from what was left
        (0, 1, [(1, 5), (7, 9)], False),
        (9, 1, [(1, 5), (7, 9)], True),
        (0, 0, [], True),
        (HOUR, 0, [(0, 2 * HOUR)], False),  # it lies inside: a replay from it would see the rest
    ],
)
def test_a_state_that_holds_something_forgotten_is_not_used(
    states: StateFiles, reach_ns: int, seen: int, spans: list[tuple[int, int]], good: bool
) -> None:
    tombstones = [Tombstone(number, *span, 100, 0) for number, span in enumerate(spans)]
    states.save(4, b"a state", reach_ns=reach_ns, tombstones=seen)
    assert (states.load_latest(ENCODING, 9, tombstones) is not None) is good
    assert states.remove_forgotten(tombstones) == (not good)
    assert len(states.files()) == good


def test_a_damaged_state_is_removed_with_the_forgotten(states: StateFiles) -> None:
    """Nobody can say what it holds."""
    states.save(4, b"a state", reach_ns=100)
    flip(states.files()[0], 90)
    assert states.remove_forgotten([Tombstone(0, 1, 5, 100, 0)]) == 1


def test_the_store_gives_the_states_of_a_recording(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 1)
        row = store.recording("lobby")
        store.state(row.id).save(1, b"state")
        assert loaded(store.state(row.id), 1, row.spec.encoding_fingerprint) == (1, b"state")
