"""What memdb wrote at format 2, before bounded memories: it opens, takes keep sets, and its states serve on.

tests/data/format-2.tar.xz holds a store that memdb itself wrote then (commit de7c4b6), and the digests that it gave:
lobby with int4, a gap, a forgotten span; attic with raw; of each an encoder state.
"""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memdb.compact import compact
from memdb.forget import forget
from memdb.memory import remembered
from memdb.repair import repair
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.keep import KeepSet, token_ids
from memdb.state import Written
from memdb.store import Store
from memdb.verify import verify_path
from tests.age_cases import L, kv_unit
from tests.repair_cases import digests
from tests.store_cases import UNIT_NS, directory_digest
from tests.test_formats import format_on_disk, given, written

ARCHIVE = Path(__file__).parent / "data" / "format-2.tar.xz"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "format-2", filter="data")
    return tmp_path / "format-2" / "store.memdb"


def test_a_reader_finds_all_of_it_and_changes_nothing(old: Path) -> None:
    assert ARCHIVE.stat().st_size < 60_000
    assert format_on_disk(old) == 2
    before = directory_digest(old)
    assert given(old) == written(old)
    with Store.open(old) as store:
        lobby = store.recording("lobby")
        assert (lobby.units, len(lobby.tombstones), lobby.tier_bytes.keep_sets) == (6, 1, 0)
        assert all(store.read_keep(row) is None for row in store.units(lobby.id))
        assert remembered(store, lobby).keep is None
    assert verify_path(old).problems == []
    assert directory_digest(old) == before


def test_a_writer_brings_it_up_to_date_and_gives_it_keep_sets(old: Path) -> None:
    ids = token_ids(6, 0, np.arange(3))
    keep = KeepSet((ids,) * L, (np.arange(3),) * L)
    with Store.open(old, write=True) as store:
        assert format_on_disk(old) == FORMAT_VERSION
        assert given(old) == written(old)
        with store.writer(store.recording("lobby").spec) as writer:
            writer.append([replace(kv_unit(6, UNIT_NS, "int4"), keep=keep)])
        lobby = store.recording("lobby")
        found = remembered(store, lobby).keep
        assert found is not None
        assert found.same(keep)
        assert lobby.tier_bytes.keep_sets > 0
        forget(store, "lobby", start_ns=0, end_ns=UNIT_NS)
        compact(store)
    before = digests(old)
    repair(old)
    assert digests(old) == before
    assert verify_path(old).problems == []


def test_its_states_serve_on(old: Path) -> None:
    """They count no bytes, and the next one begins to."""
    with Store.open(old, write=True) as store:
        row = store.recording("attic")
        states = store.state(row.id)
        found = states.load_latest(row.spec.encoding_fingerprint, 3)
        assert found is not None
        assert (found.unit, found.payload, found.reach_ns) == (
            3,
            b"an encoder state of format 4",
            2 * UNIT_NS,
        )
        assert (found.written, states.written().ratio) == (Written(), None)
        states.save(4, b"the next", units_bytes=1_000)
        assert states.written().units_bytes == 1_000
        assert states.written().states_bytes == states.files()[0].stat().st_size
