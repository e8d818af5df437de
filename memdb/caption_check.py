"""The caption tables' part of `memdb verify`: damage there is no loss, but it is damage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from memdb.locks import is_held
from memdb.schemas.errors import CorruptionError
from memdb.table_files import FOLDER, CheckedFiles
from memdb.table_manifest import TableManifest, read_manifest
from memdb.verify import Problem

_DERIVED = "(derived: answers read the segments instead)"
_LOOKS = 5  # an indexer at work may switch to another folder under the first ones


def check_captions(store_path: Path) -> list[Problem | str]:
    """Problems of every file that a manifest lists, and of the manifests; a note where others lie about.

    What no manifest lists is read by nobody, and the next ingest removes it. LanceDB's hint of its newest
    version is passed over: nothing that memdb does depends on it.
    """
    for _ in range(_LOOKS):
        before = _manifests(store_path)
        found = list(_problems(store_path, before))
        if not found or _manifests(store_path) == before:
            return found
    return found


def _manifests(store_path: Path) -> dict[str, bytes | str]:
    """The bytes of each manifest, or why they cannot be read, by its name in the store."""
    read: dict[str, bytes | str] = {}
    for path in sorted((store_path / FOLDER).glob("*.manifest")):
        file = f"{FOLDER}/{path.name}"
        try:
            data = read_manifest(path, file=file)
        except CorruptionError as error:
            read[file] = str(error)
        else:
            if data is not None:
                read[file] = data
    return read


def _problems(store_path: Path, manifests: dict[str, bytes | str]) -> Iterator[Problem | str]:
    known = set(manifests)
    for file, data in manifests.items():
        try:
            if isinstance(data, str):
                raise CorruptionError(data, file=file)
            manifest = TableManifest.parse(data, file=file)
        except CorruptionError as error:
            yield Problem(file, f"{error} {_DERIVED}")
            continue
        known.add(f"{FOLDER}/{manifest.folder}")
        yield from _files(store_path, manifest)
    try:
        names = sorted(os.listdir(store_path / FOLDER))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if f"{FOLDER}/{name}" not in known:
            yield f"{FOLDER}/{name} is used by nobody: the next ingest that indexes captions removes it"


def _files(store_path: Path, manifest: TableManifest) -> Iterator[Problem | str]:
    files = CheckedFiles(store_path, manifest.folder)
    for listed in manifest.files:
        what = files.problem(listed)
        if what:
            file = f"{FOLDER}/{manifest.folder}/{listed.name}"
            yield Problem(file, f"it {what} {_DERIVED}")
    strangers = files.strangers(manifest)
    if strangers and not is_held(store_path / "locks" / "derived.lock"):  # else an indexer just wrote them
        yield (
            f"{FOLDER}/{manifest.folder}: {len(strangers)} files are used by nobody ({strangers[0]}): the next "
            "ingest removes them"
        )
