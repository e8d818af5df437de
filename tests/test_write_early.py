"""Big units, which the disk begins to take before they are whole: the same bytes, one sync, and no half unit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memdb.files import File, watched
from memdb.schemas.errors import StoreFull
from memdb.schemas.units import Unit
from memdb.store import Store, recording_digest
from memdb.verify import verify
from tests.store_cases import Steps, new_store, pack, raw_slices, spec, unit

PIECE_BYTES = 2 << 20
SLICE_BYTES = 700_032  # not a divisor of a piece
BLOCKS = 4


def big(number: int) -> Unit:
    """More than two pieces of slices."""
    raw = raw_slices(number, BLOCKS, "int4", raw_bytes=SLICE_BYTES)
    return replace(unit(number, blocks=BLOCKS), kv=pack(raw, BLOCKS, "int4"))


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 77])
def test_a_buffer_lies_where_it_was_put_whole(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    with File(tmp_path / "file") as file:
        file.write([b"before"], 0)
        assert file.write_early(memoryview(data)[:size], 6) == 6 + size
        file.write([b"behind"], 6 + size)
        file.sync("the bytes of a test")
    assert (tmp_path / "file").read_bytes() == b"before" + data[:size] + b"behind"


def test_a_big_unit_is_what_it_would_be_in_one_piece(tmp_path: Path) -> None:
    with new_store(tmp_path) as store, store.writer(spec()) as writer:
        with watched(steps := Steps()):
            writer.append([big(0), unit(1), big(2)])
        assert [len(step.data) for step in steps.seen if step.what == "write"].count(PIECE_BYTES) >= 4
        assert [step.what for step in steps.seen if step.what in ("write", "sync")][-1] == "sync"
        assert steps.names("sync") == ["sync"]
    with Store.open(tmp_path / "lobby.memdb") as store:
        recording_digest(store, "lobby")  # compares each unit with the digest of what was handed in
        assert store.recording("lobby").units == 3
        assert verify(store).ok


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_a_disk_that_is_full_in_the_middle_costs_that_unit_alone(tmp_path: Path, piece: int) -> None:
    with new_store(tmp_path) as store:
        with store.writer(spec()) as writer:
            writer.append([big(0)])
            pieces = iter(range(100))
            full = Steps(
                lambda step: step.what == "write" and len(step.data) > 1 << 20 and next(pieces) == piece
            )
            with watched(full), pytest.raises(StoreFull):
                writer.append([big(1)])
        assert store.recording("lobby").units == 1
        with store.writer(spec()) as writer:
            assert writer.next_unit == 1
            writer.append([big(1)])
        recording_digest(store, "lobby")
        assert verify(store).ok
