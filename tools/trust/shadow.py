"""A file system as a power cut leaves it: what no sync reached may be there, in part or not at all.

Contents and lengths of a file are safe after a sync of the file; its name is safe after a sync of its folder.
Until then every write may have come through whole, in some of its 512-byte sectors, or not at all; a length
may have grown over zeros or whatever lay there; and every new name, rename and removal may or may not be.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from memdb.files import Step

SECTOR_BYTES = 512


@dataclass
class Inode:
    """A file: what is safe of it, and what was written since."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # offset and bytes, or a new length

    def current(self) -> bytes:
        content = bytearray(self.durable)
        for offset, data in self.pending:
            _put(content, offset, data)
        return bytes(content)

    def sync(self) -> None:
        self.durable, self.pending = self.current(), []


@dataclass
class Folder:
    """A folder: the names that are safe, and the changes since, in their order."""

    durable: dict[str, Inode | Folder] = field(default_factory=dict)
    current: dict[str, Inode | Folder] = field(default_factory=dict)
    # Each a name that begins to stand for something, or (None) for nothing; a rename is both at once.
    pending: list[tuple[tuple[str, Inode | Folder | None], ...]] = field(default_factory=list)

    def change(self, *names: tuple[str, Inode | Folder | None]) -> None:
        self.pending.append(names)
        _rename(self.current, names)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.current), []

    @classmethod
    def of(cls, path: Path, without: Collection[str] = ()) -> Folder:
        """A folder of the disk, all of it safe."""
        found = cls()
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.name not in without:
                inside = Path(entry.path)
                found.durable[entry.name] = cls.of(inside) if entry.is_dir() else Inode(inside.read_bytes())
        found.current = dict(found.durable)
        return found


class Shadow:
    """What a power cut would leave of everything under `root`, step after step."""

    def __init__(self, root: Path, top: Folder, ignored: str = "") -> None:
        """`top`: what is safe at first. `ignored`: syncs of this reason do nothing."""
        self._root = root
        self._ignored = ignored
        self.top = top

    def see(self, step: Step) -> None:
        """Take account of a step that was made."""
        if step.path == self._root:
            if step.what == "sync_folder" and step.name != self._ignored:
                self.top.sync()
            return
        folder, name = self._folder(step.path.parent), step.path.name
        node = folder.current.get(name)
        if step.what == "create":
            folder.change((name, Inode()))
        elif step.what == "make_folder":
            folder.change((name, Folder()))
        elif step.what in ("unlink", "remove_folder"):
            if node is not None:
                folder.change((name, None))
        elif step.what == "replace" and step.target is not None and node is not None:
            assert step.target.parent == step.path.parent, "a rename from folder to folder"
            folder.change((step.target.name, node), (name, None))
        elif step.what == "write" and isinstance(node, Inode):
            node.pending.append((step.offset, step.data))
        elif step.what == "truncate" and isinstance(node, Inode):
            node.pending.append((step.offset, None))
        elif step.what in ("sync", "sync_folder") and step.name != self._ignored and node is not None:
            node.sync()

    def folder(self, path: Path) -> Folder | None:
        """The folder at a path, None where there is none."""
        found: Inode | Folder | None = self.top
        for name in path.relative_to(self._root).parts:
            found = found.current.get(name) if isinstance(found, Folder) else None
        return found if isinstance(found, Folder) else None

    def _folder(self, path: Path) -> Folder:
        found = self.folder(path)
        assert found is not None, f"{path} was not made through memdb/files.py"
        return found


@dataclass(frozen=True)
class Cut:
    """How a power cut treats what is pending: shares of names, of writes, and of torn ones among these."""

    names: float
    writes: float
    torn: float
    garbage: float  # share of lengths that grew over garbage instead of zeros


CUTS = {
    "nothing": Cut(0, 0, 0, 0),
    "everything": Cut(1, 1, 0, 0),
    "names without contents": Cut(1, 0, 0, 0.5),
    "names with garbage": Cut(1, 0, 0, 1),
    "contents without names": Cut(0, 1, 0, 0),
    "torn": Cut(1, 1, 1, 0.5),
    "some": Cut(0.5, 0.5, 0.3, 0.5),
    "some names": Cut(0.5, 1, 0, 0),
}


class Crash:
    """Writes one of the directories that a power cut may leave."""

    def __init__(self, cut: Cut, chance: random.Random) -> None:
        self._cut, self._chance = cut, chance

    def write(self, folder: Folder, path: Path) -> None:
        path.mkdir(exist_ok=True)
        entries = dict(folder.durable)
        for names in folder.pending:
            if self._happens(self._cut.names):
                _rename(entries, names)
        for name, node in entries.items():
            if isinstance(node, Folder):
                self.write(node, path / name)
            else:
                (path / name).write_bytes(self.content(node))

    def content(self, inode: Inode) -> bytes:
        """What is found in a file."""
        content = bytearray(inode.durable)
        longest = len(content)
        for offset, data in inode.pending:
            longest = max(longest, offset + len(data or b""))
            if self._happens(self._cut.writes):
                _put(content, offset, self._torn(content, offset, data))
        if len(content) < longest and self._happens(0.5):
            missing = self._chance.randint(1, longest - len(content))
            content += self._chance.randbytes(missing) if self._happens(self._cut.garbage) else bytes(missing)
        return bytes(content)

    def _torn(self, content: bytearray, offset: int, data: bytes | None) -> bytes | None:
        """Some sectors of a write; in place of the others what was there before, zeros or garbage."""
        if data is None or not self._happens(self._cut.torn):
            return data
        pieces, at = [], 0
        while at < len(data):
            end = min(len(data), at + SECTOR_BYTES - (offset + at) % SECTOR_BYTES)
            piece = data[at:end]
            if not self._happens(0.5):
                old = bytes(content[offset + at : offset + end])
                rest = len(piece) - len(old)
                piece = old + (self._chance.randbytes(rest) if self._happens(0.5) else bytes(rest))
            pieces.append(piece)
            at = end
        return b"".join(pieces)

    def _happens(self, share: float) -> bool:
        return self._chance.random() < share


def _put(content: bytearray, offset: int, data: bytes | None) -> None:
    """A write, or with None a new length."""
    end = offset + len(data or b"")
    if len(content) < end:
        content += bytes(end - len(content))
    if data is None:
        del content[offset:]
    else:
        content[offset:end] = data


def _rename(entries: dict[str, Inode | Folder], names: tuple[tuple[str, Inode | Folder | None], ...]) -> None:
    for name, node in names:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node
