"""Syncs that random scripts miss seldom or never: a power cut at the one moment at which each of them is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memdb.backup import backup
from memdb.compact import compact
from memdb.database import CATALOG
from memdb.files import Step, watched
from memdb.forget import forget
from memdb.index.page_writer import index_recording
from memdb.repair import repair
from memdb.segments import reading
from memdb.store import Store
from memdb.verify import verify_path
from tests.repair_cases import Killed, put, rewrite, true_unit
from tests.store_cases import UNIT_NS, spec
from tools.trust.runner import also_watched
from tools.trust.shadow import Folder
from tools.trust.trace import STORE, Player, Recorder, Trace

SEEDS = 6  # of what becomes of the WAL
FILM = "the door of last night.mp4"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """lobby: four units. hall: two, of a film whose name is told nowhere else."""
    path = tmp_path / "home" / STORE
    path.parent.mkdir(parents=True)
    with Store.open(path, create=True, write=True) as opened:
        put(opened, "lobby", 4)
        with opened.writer(spec("hall", source_name=FILM)) as writer:
            writer.append([true_unit(0), true_unit(1)])
        yield opened


class Account:
    """Looks on from now, when everything that is there is safe."""

    def __init__(self, home: Path) -> None:
        self._trace = Trace(home, STORE, (), 0)
        self._trace.base = Folder.of(home, without=(f"{CATALOG}-shm",))
        self.watch = Recorder(self._trace)

    def cuts(self, folder: Path) -> Iterator[Path]:
        """The store after a power cut at this moment: nothing is there but what a sync reached."""
        folder.mkdir()
        for seed in range(SEEDS):
            player = Player(self._trace)
            while player.at < len(self._trace.events):
                player.step()
            player.crash(folder / str(seed), "nothing", seed)
            yield folder / str(seed) / STORE


class DiesBefore:
    def __init__(self, why: str) -> None:
        self._why = why

    def before(self, step: Step) -> None:
        if step.name == self._why:
            raise Killed

    def after(self, step: Step) -> None:
        pass


def test_a_killed_forgetting_that_a_writer_commits_is_on_the_disk(store: Store, tmp_path: Path) -> None:
    """The writer saw it committed, and would lose its file: its name was not safe yet."""
    account = Account(tmp_path / "home")
    with watched(account.watch):
        with also_watched(DiesBefore("the name of a sealed segment")), pytest.raises(Killed):
            forget(store, "lobby", start_ns=0, end_ns=UNIT_NS)
        with store.writer(spec("lobby")) as writer:
            assert len(writer.tombstones()) == 1
    for path in account.cuts(tmp_path / "cut"):
        assert verify_path(path).problems == []
        with Store.open(path) as opened:
            [unit, *_] = opened.units(opened.recording("lobby").id)
            assert not unit.has_caption


def test_an_unfinished_segment_that_is_removed_last_stays_removed(store: Store, tmp_path: Path) -> None:
    """A reader had it open when all else that held the span was removed."""
    secret = true_unit(2).keyframe
    assert secret is not None
    unfinished = rewrite(store, "lobby", seal=False)
    forget(store, "lobby", start_ns=2 * UNIT_NS, end_ns=3 * UNIT_NS)
    with reading(store.segments_path, unfinished):
        assert any(found.left for found in compact(store).recordings)
    assert files_with(secret, store.path) == [unfinished]
    account = Account(tmp_path / "home")
    with watched(account.watch):
        compact(store)
    for path in account.cuts(tmp_path / "cut"):
        assert files_with(secret, path) == []


def test_nothing_tells_of_a_forgotten_recording_after_a_compaction(store: Store, tmp_path: Path) -> None:
    """Its tombstone, which holds what its header says of it, is the last to go."""
    forget(store, "hall")
    assert files_with(FILM.encode(), store.path)
    account = Account(tmp_path / "home")
    with watched(account.watch):
        compact(store)
        assert files_with(FILM.encode(), store.path) == []
    for path in account.cuts(tmp_path / "cut"):
        assert files_with(FILM.encode(), path) == []


def test_bytes_that_were_freed_of_one_recording_stay_away(store: Store, tmp_path: Path) -> None:
    """Nothing but the removal's own sync: what a whole compaction makes safe at its end is not reached."""
    secret = true_unit(2).keyframe
    assert secret is not None
    forget(store, "lobby", start_ns=2 * UNIT_NS, end_ns=3 * UNIT_NS)
    account = Account(tmp_path / "home")
    with watched(account.watch):
        compact(store, only=store.recording("lobby").id)
        assert files_with(secret, store.path) == []
    for path in account.cuts(tmp_path / "cut"):
        assert files_with(secret, path) == []
        assert verify_path(path).problems == []


def test_pages_with_forgotten_keys_stay_removed(store: Store, tmp_path: Path) -> None:
    """Pages are made again in a file of another name: the old one is another file, and comes back as it was."""
    keys = true_unit(2).keys
    assert keys is not None
    secret = keys[0].tobytes()
    index_recording(store, store.recording("lobby").id, flush=True)
    forget(store, "lobby", start_ns=2 * UNIT_NS, end_ns=3 * UNIT_NS)
    assert any(name.endswith(".pages") for name in files_with(secret, store.path))
    account = Account(tmp_path / "home")
    with watched(account.watch):
        compact(store)
        assert files_with(secret, store.path) == []
    for path in account.cuts(tmp_path / "cut"):
        assert files_with(secret, path) == []


def test_a_state_that_holds_what_was_forgotten_stays_removed(store: Store, tmp_path: Path) -> None:
    secret = b"what the window holds of unit 2"
    states = store.state(store.recording("lobby").id)
    states.save(4, secret, reach_ns=0, tombstones=0)
    assert files_with(secret, store.path)
    account = Account(tmp_path / "home")
    with watched(account.watch):
        forget(store, "lobby", start_ns=2 * UNIT_NS, end_ns=3 * UNIT_NS)
        compact(store)
        assert files_with(secret, store.path) == []
    for path in account.cuts(tmp_path / "cut"):
        assert files_with(secret, path) == []


# Names that nothing else makes safe soon


def test_a_forgotten_recording_stays_forgotten_without_its_catalog(
    store: Store, tmp_path: Path, bare: None
) -> None:
    """The catalog knows it, too, so that its tombstone is missed by a repair alone."""
    account = Account(tmp_path / "home")
    with watched(account.watch):
        forget(store, "hall")
    for path in account.cuts(tmp_path / "cut"):
        for file in path.glob(f"{CATALOG}*"):
            file.unlink()
        repair(path)
        with Store.open(path) as opened:
            assert [row.name for row in opened.recordings()] == ["lobby"]


def test_a_new_store_is_there_once_a_unit_was_acknowledged(tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = home / STORE
    path.parent.mkdir(parents=True)
    account = Account(home)
    with watched(account.watch):
        store = Store.open(path, create=True, write=True)
        put(store, "lobby", 2)
    with store:
        for cut in account.cuts(tmp_path / "cut"):
            assert verify_path(cut).problems == []
            with Store.open(cut) as found:
                assert found.recording("lobby").units == 2


def test_a_recording_that_was_just_begun_is_whole(store: Store, tmp_path: Path) -> None:
    """Its segment holds a header and no more: no unit's sync came after."""
    account = Account(tmp_path / "home")
    with watched(account.watch):
        writer = store.writer(spec("shed"))
    with writer:
        for path in account.cuts(tmp_path / "cut"):
            assert verify_path(path).problems == []
            with Store.open(path) as opened:
                assert [row.name for row in opened.recordings()] == ["hall", "lobby", "shed"]


# Removals that a power cut may undo, for nothing comes of it


def test_a_tombstone_that_a_power_cut_brings_back_forgets_nothing_more(store: Store, tmp_path: Path) -> None:
    forget(store, "hall")
    put(store, "hall", 2)
    account = Account(tmp_path / "home")
    with watched(account.watch):
        why = "the removal of unfinished segments and of tombstones"
        with also_watched(DiesBefore(why)), pytest.raises(Killed):
            compact(store)
    for path in account.cuts(tmp_path / "cut"):
        assert files_with(FILM.encode(), path), "it is back"
        with Store.open(path, write=True) as opened:
            assert opened.recording("hall").units == 2
            assert compact(opened).left == []
        assert files_with(FILM.encode(), path) == []
        assert verify_path(path).problems == []


def test_an_empty_recording_that_a_power_cut_brings_back_is_dropped_again(
    store: Store, tmp_path: Path
) -> None:
    store.writer(spec("shed")).close()
    account = Account(tmp_path / "home")
    other = spec("shed", fingerprint="d" * 32)
    with watched(account.watch):
        died = "a new segment's header, before it is committed"
        with also_watched(DiesBefore(died)), pytest.raises(Killed):
            store.writer(other)
    for path in account.cuts(tmp_path / "cut"):
        assert len(list((path / "segments").iterdir())) == 3, "it is back"
        with Store.open(path, write=True) as opened:
            with opened.writer(other) as writer:
                writer.append([true_unit(0)])
            assert [row.name for row in opened.recordings()] == ["hall", "lobby", "shed"]
            assert opened.recording("shed").spec == other
        assert verify_path(path).problems == []


def files_with(secret: bytes, store: Path) -> list[str]:
    return sorted(path.name for path in store.rglob("*") if path.is_file() and secret in path.read_bytes())


def test_a_backup_of_a_store_without_a_policy_is_on_the_disk(store: Store, tmp_path: Path) -> None:
    """Nothing but the backup's own sync makes its catalog safe."""
    account = Account(tmp_path / "home")
    with watched(account.watch):
        backup(store.path, store.path.with_name("copy.memdb"))
    for path in account.cuts(tmp_path / "cut"):
        copy = path.with_name("copy.memdb")
        assert verify_path(copy).problems == []
        with Store.open(copy) as opened:
            assert [row.units for row in opened.recordings()] == [2, 4]
