"""Hostile segments, catalogs and exported recordings through the public calls."""

from __future__ import annotations

import shutil

from memdb.database import CATALOG
from memdb.store import Store
from memdb.transfer import import_recording
from tools.trust.fuzz_input import EXPORT, Input
from tools.trust.hostile_records import hostile_records, put_together, take_apart
from tools.trust.hostile_rows import hostile_rows
from tools.trust.hostile_values import mangled

WAL = f"{CATALOG}-wal"


def segment(given: Input) -> None:
    """A segment from a hostile writer; half the time the catalog is lost as well and made anew from it."""
    given.copy()
    file = given.one_of("segments/*.seg")
    hostile = given.chance.random() < 0.85
    data = (
        hostile_records(take_apart(file), given.chance)
        if hostile
        else mangled(file.read_bytes(), given.chance)
    )
    file.write_bytes(data)
    how = given.chance.randrange(3)
    if how == 0:
        (given.path / CATALOG).unlink()
        (given.path / WAL).unlink()
    elif how == 1:
        given.ask_all()
        given.write_on()
    given.mend()


def beyond(given: Input) -> None:
    """A hostile segment that the catalog does not know: readers take it in, and the next writer."""
    given.copy()
    files = sorted(given.path.glob("segments/*.seg"))
    file = given.chance.choice(files)
    records = take_apart(file)
    data = hostile_records(records, given.chance)
    if given.chance.random() < 0.5:
        data = put_together(records, given.chance) + data
    newest = max(int(path.stem[33:]) for path in files if path.name[:32] == file.name[:32])
    (file.parent / f"{file.name[:32]}-{newest + 1:06d}.seg").write_bytes(data)
    given.ask_all()
    given.write_on()


def catalog(given: Input) -> None:
    given.copy()
    file = given.path / given.chance.choice((CATALOG, CATALOG, WAL))
    if given.chance.random() < 0.75:
        hostile_rows(given.path / CATALOG, given.chance)
    else:
        file.write_bytes(mangled(file.read_bytes(), given.chance))
    given.ask_all()
    if given.chance.random() < 0.5:
        given.write_on()
    else:
        given.mend()


def export(given: Input) -> None:
    source = given.folder / EXPORT
    target = given.folder / "fuzzed.export"
    chance = given.chance
    if chance.random() < 0.85:
        target.write_bytes(hostile_records(take_apart(source), chance))
    else:
        target.write_bytes(mangled(source.read_bytes(), chance))
    shutil.rmtree(given.path, ignore_errors=True)
    with given.typed("import"), Store.open(given.path, create=True, write=True) as store:
        import_recording(store, target)
    given.ask_all()
