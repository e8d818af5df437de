"""Refuse to write where locks between machines do not hold: two writers would take each other for dead."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from memdb.schemas.errors import StoreError

# File systems that other machines write too, by the names that the kernel gives them.
NETWORK = frozenset(
    [
        "9p",
        "afs",
        "ceph",
        "cifs",
        "coda",
        "gfs",
        "gfs2",
        "glusterfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs3",
        "nfs4",
    ]
    + ["ocfs2", "smb2", "smb3", "smbfs", "virtiofs"]
    + [f"fuse.{name}" for name in ("glusterfs", "gvfsd-fuse", "rclone", "s3fs", "sshfs")]
)
_MOUNTS = Path("/proc/self/mountinfo")


def check_locks_hold(folder: Path, *, mounts: Path = _MOUNTS) -> None:
    """Raises StoreError where `folder` lies on a network file system, or where a lock does not keep others out."""
    kind = file_system(folder, mounts)
    if kind in NETWORK:
        raise StoreError(
            f"{folder} lies on a network file system ({kind}), where locks do not keep two writers apart: put "
            "the store on a local disk, and copy it with memdb backup"
        )
    if not _locks_hold(folder):
        raise StoreError(f"{folder}: its file system has no working locks: put the store on a local disk")


def file_system(folder: Path, mounts: Path = _MOUNTS) -> str:
    """The type of the file system that holds `folder`, "" where the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    path, found, longest = str(folder.resolve()), "", -1
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].encode("utf-8", "surrogateescape").decode("unicode_escape", "replace")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:  # of mounts over each other the last one counts
            found, longest = rest.split()[0], len(point)
    return found


def _locks_hold(folder: Path) -> bool:
    """Take a lock twice, by two openings of one file: the second must fail."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder / "locks", prefix="probe-") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            second = os.open(file.name, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(second)
            return False
    except OSError:
        return False
