"""The files of a caption table against those that its manifest lists: sizes, checksums, strangers.

What LanceDB wrote it never changes, only adds to and removes. So each file is hashed once, when the manifest
that first lists it is made, and by each process that reads the table when it first opens it; after that only
where its size, time or inode are others than before.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64

from memdb.files import remove_folder, unlink
from memdb.schemas.errors import CorruptionError
from memdb.table_manifest import ListedFile, TableManifest

FOLDER = "captions.lance"
# Where LanceDB notes its newest version. It is replaced at will and so cannot be listed: searches open a
# version by its number, and whoever adds to a table removes the note first.
HINT = "_versions/latest_version_hint.json"
_CHUNK_BYTES = 1 << 20
# A file that was changed so shortly ago may change again within the same tick of the file system's clock.
_TICK_NS = 50_000_000


@dataclass(frozen=True)
class _Seen:
    """How a file looked when it was hashed, and what came out."""

    device: int
    inode: int
    size_bytes: int
    changed_ns: int
    xxh3: str

    def still(self, found: os.stat_result) -> bool:
        return (self.device, self.inode, self.size_bytes, self.changed_ns) == (
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
        )


class CheckedFiles:
    """The files of one table's folder, as this process knows them. Not thread-safe."""

    def __init__(self, store_path: Path, folder: str) -> None:
        self.path = store_path / FOLDER / folder
        self._file = f"{FOLDER}/{folder}"  # as messages name it
        self._seen: dict[str, _Seen] = {}

    def check(self, manifest: TableManifest, *, anew: bool = False) -> None:
        """Compare every listed file: by a look where it was hashed before, unless `anew`, else byte by byte.

        Raises CorruptionError for the first that differs.
        """
        for listed in manifest.files:
            problem = self.problem(listed, anew=anew)
            if problem:
                file = f"{self._file}/{listed.name}"
                raise CorruptionError(f"{file} {problem}", file=file)

    def problem(self, listed: ListedFile, *, anew: bool = False) -> str:
        """What is wrong with a file; "" if nothing is."""
        path = f"{self.path}/{listed.name}"
        try:
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode):
                return "is no file"
            if found.st_size != listed.size_bytes:
                return f"has {found.st_size} bytes, {listed.size_bytes} were written"
            seen = self._seen.get(listed.name)
            if anew or seen is None or not seen.still(found):
                seen = self._hashed(path, listed.name)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return "" if seen.xxh3 == listed.xxh3 else "is damaged: its bytes differ from what was written"

    def listed(self, before: TableManifest | None) -> tuple[ListedFile, ...]:
        """All files that are there now, for a new manifest. Only those that `before` does not list are hashed.

        Raises CorruptionError where one that it lists is gone, OSError.
        """
        known = {file.name: file for file in before.files} if before else {}
        names = sorted(self._names())
        lost = sorted(set(known) - set(names))
        if lost:
            file = f"{self._file}/{lost[0]}"
            raise CorruptionError(f"{file} is missing", file=file)
        return tuple(known.get(name) or self._new(name) for name in names)

    def strangers(self, manifest: TableManifest) -> list[str]:
        """Files that lie there and that nothing vouches for: a killed indexer wrote them. Raises OSError."""
        return sorted(set(self._names()) - {file.name for file in manifest.files})

    def remove_strangers(self, manifest: TableManifest) -> bool:
        """Take the table back to what its manifest lists; whether that took anything. Raises OSError."""
        found = self.strangers(manifest)
        for name in found:
            unlink(self.path / name)
        if found:
            self.remove_hint()
        return bool(found)

    def remove_hint(self) -> None:
        unlink(self.path / HINT)

    def _names(self) -> Iterator[str]:
        top = len(str(self.path)) + 1
        for root, _, names in os.walk(str(self.path)):
            inside = f"{root[top:]}/" if len(root) > top else ""
            yield from (inside + name for name in names if inside + name != HINT)

    def _new(self, name: str) -> ListedFile:
        seen = self._hashed(f"{self.path}/{name}", name)
        return ListedFile(name, seen.size_bytes, seen.xxh3)

    def _hashed(self, path: str, name: str) -> _Seen:
        """Read a file. It is remembered as seen only if it can be told from a later one by its time."""
        total = xxh3_64()
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as source:
            before = os.fstat(source.fileno())
            chunk = bytearray(min(_CHUNK_BYTES, before.st_size + 1))
            while count := source.readinto(chunk):
                total.update(memoryview(chunk)[:count])
        seen = _Seen(before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, total.hexdigest())
        self._seen.pop(name, None)
        if time.time_ns() - before.st_mtime_ns > _TICK_NS:
            self._seen[name] = seen
        return seen


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it. Raises OSError."""
    if path.is_symlink() or path.is_file():
        unlink(path)
        return
    for root, folders, names in os.walk(path, topdown=False):
        for name in names:
            unlink(Path(root) / name)
        for name in folders:
            remove_tree(Path(root) / name)  # empty by now, or a link
    remove_folder(path)
