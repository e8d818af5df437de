"""Network file systems, and file systems whose locks do not hold, are refused before anything is written."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from memdb import network
from memdb.network import check_locks_hold, file_system
from memdb.schemas.errors import StoreError
from memdb.store import Store
from tests.store_cases import fill, new_store

MOUNTS = """\
22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:50 / /srv rw,relatime - xfs /dev/sdb rw
31 30 0:51 / /srv/share rw,relatime shared:7 - nfs4 server:/share rw,vers=4.2
32 22 0:52 / /mnt/with\\040space rw - cifs //server/x rw
33 22 0:53 / /srv/over rw - ext4 /dev/sdc rw
34 22 0:54 / /srv/over rw - fuse.sshfs me@there: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/srv/y", "xfs"),
        ("/srv/share", "nfs4"),
        ("/srv/share/a/b", "nfs4"),
        ("/srv/shared", "xfs"),
        ("/mnt/with space/s", "cifs"),
        ("/srv/over/s", "fuse.sshfs"),
    ],
)
def test_the_file_system_of_a_folder_is_that_of_its_longest_mount(
    tmp_path: Path, path: str, kind: str
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(Path(path), mounts) == kind


def test_a_network_file_system_is_refused(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 1 0:1 / / rw - ext4 /dev/root rw\n2 1 0:2 / {tmp_path} rw - nfs4 server:/x rw\n")
    with pytest.raises(StoreError, match=r"network file system \(nfs4\).*local disk"):
        check_locks_hold(tmp_path, mounts=mounts)


def test_where_a_second_lock_is_given_the_store_is_refused_for_writing_and_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
    real = fcntl.flock
    monkeypatch.setattr(network.fcntl, "flock", lambda fd, how: None)
    with pytest.raises(StoreError, match="no working locks"):
        Store.open(store.path, write=True)
    with pytest.raises(StoreError, match="no working locks"):
        new_store(tmp_path / "another")
    with Store.open(store.path) as reader:
        assert reader.recording("lobby").units == 2
    monkeypatch.setattr(network.fcntl, "flock", real)
    Store.open(store.path, write=True).close()
    assert not list((store.path / "locks").glob("probe-*"))
