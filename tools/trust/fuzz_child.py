"""A process that feeds mutated files to the public calls, under a limit of memory, and says what came of it.

    python -m tools.trust.fuzz_child FOLDER TARGET[,TARGET...] SEED FIRST COUNT

FOLDER holds the ground (tools/trust/ground.py) and one exported recording. Several
targets take turns. `begin N` before each input, `bad N
WHAT` for each untyped error, `done N` after it. A crash or a hang shows by what is missing.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from memdb import policy, recipes
from memdb.captions import CaptionIndex
from memdb.client import Client
from memdb.database import CATALOG
from memdb.folder import POLICY
from memdb.index.pages import HEADER_BYTES
from memdb.records import canonical_ascii
from memdb.repair import repair
from memdb.schemas.errors import MemdbError
from memdb.state import _HEAD, _digest
from memdb.stats import stats
from memdb.store import Store
from memdb.transfer import import_recording
from tools.trust.answers import answers
from tools.trust.hostile import (
    NUMBERS,
    Chance,
    hostile_json_file,
    hostile_records,
    hostile_rows,
    mangled,
    put_together,
    take_apart,
)
from tools.trust.look import verify_any
from tools.trust.runner import Runner
from tools.trust.script import Op
from tools.trust.units import ENCODER, VECTOR_SIZE, Stream

MEMORY_BYTES = 2 << 30  # above what the process takes once all is imported
EXPORT = "lobby.export"
WAL = f"{CATALOG}-wal"


class _Input:
    """One input: the store's copy, what is fed to it, and what went wrong."""

    def __init__(self, folder: Path, seed: int, number: int) -> None:
        self.folder = folder
        self.path = folder / "fuzzed.memdb"
        self.chance = random.Random(f"{seed}/{number} fuzz")
        self.wrong: list[str] = []

    def copy(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.folder / "ground.memdb", self.path)

    def one_of(self, pattern: str) -> Path:
        return self.chance.choice(sorted(file for file in self.path.glob(pattern) if file.stat().st_size))

    @contextmanager
    def typed(self, what: str) -> Iterator[None]:
        try:
            yield
        except MemdbError:
            pass
        except Exception as error:
            frame = error.__traceback__
            places = []
            while frame is not None:
                if "/memdb/" in (name := frame.tb_frame.f_code.co_filename) or "/schemas/" in name:
                    places.append(f"{Path(name).name}:{frame.tb_lineno}")
                frame = frame.tb_next
            self.wrong.append(f"{what}: {type(error).__name__}: {error!s:.120} at {' '.join(places[-3:])}")

    def ask_all(self) -> None:
        """Every public call that reads."""
        with self.typed("verify"):
            verify_any(self.path)
        with self.typed("answers"):
            answers(self.path, on_error=self._untyped)
        with self.typed("stats"), Store.open(self.path) as store:
            stats(store)

    def _untyped(self, what: str, error: Exception) -> None:
        with self.typed(what):
            raise error

    def write_on(self) -> None:
        """What a writer does when it opens: it rolls forward; then it appends, indexes and closes."""
        units = 0
        with self.typed("store"), Store.open(self.path) as store:
            row = next((row for row in store.recordings() if row.name == "door"), None)
            units = row.units if row else 0
        with self.typed("write"), Runner(self.path) as runner:
            for op in (Op("append", self._door, units, 1), Op("pages", self._door), Op("captions")):
                runner.do(op)

    @property
    def _door(self) -> Stream:
        seed = int((self.folder / "seed").read_text())
        return Stream(seed, "door", 0, "raw")

    def mend(self) -> None:
        with self.typed("repair"):
            repair(self.path)
            self.ask_all()


def _segment(given: _Input) -> None:
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


def _beyond(given: _Input) -> None:
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


def _catalog(given: _Input) -> None:
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


def _export(given: _Input) -> None:
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


def _pages(given: _Input) -> None:
    """Headers with other sizes under right checksums, tables too."""
    given.copy()
    file = given.one_of("keys/*.pages")
    data = bytearray(file.read_bytes())
    if given.chance.random() < 0.3:
        file.write_bytes(mangled(bytes(data), given.chance))
    else:
        at = given.chance.randrange(24, HEADER_BYTES - 8, 4)
        width = given.chance.choice((4, 8))
        data[at : at + width] = (given.chance.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        if given.chance.random() < 0.5:  # and sizes that fit it
            _fit_page(data, given.chance)
        head = bytes(data[: HEADER_BYTES - 8])
        data[HEADER_BYTES - 8 : HEADER_BYTES] = xxhash.xxh3_64_intdigest(head).to_bytes(8, "little")
        file.write_bytes(data)
    given.ask_all()
    given.write_on()


def _fit_page(data: bytearray, chance: Chance) -> None:
    """Let a page be as long as its header says, and its tables' checksum right."""
    from memdb.index.pages import _HEADER, PageHeader

    fields = list(_HEADER.unpack(bytes(data[: _HEADER.size])))
    header = PageHeader(fields[1].hex(), *fields[2:10], *fields[12:14])
    if chance.random() < 0.5 and header.page_bytes < 1 << 26:
        data += bytes(max(0, header.page_bytes - len(data)))
    tables = bytes(data[HEADER_BYTES : HEADER_BYTES + min(header.tables_bytes, len(data))])
    fields[11:13] = [header.page_bytes % (1 << 64), xxhash.xxh3_64_intdigest(tables)]
    data[: _HEADER.size] = _HEADER.pack(*fields)


def _state(given: _Input) -> None:
    given.copy()
    file = given.one_of("state/*.state")
    data = file.read_bytes()
    fields = list(_HEAD.unpack(data[: _HEAD.size]))
    name_end = _HEAD.size + fields[2]
    name, payload = data[_HEAD.size : name_end], data[name_end + 16 :]
    if given.chance.random() < 0.3:
        file.write_bytes(mangled(data, given.chance))
    else:
        at = given.chance.randrange(1, len(fields))
        bits = 32 if at in (1, 2) else 63
        number = given.chance.choice(NUMBERS) % (1 << bits)
        fields[at] = number.to_bytes(16, "little") if isinstance(fields[at], bytes) else number
        name = mangled(name, given.chance) if given.chance.random() < 0.3 else name
        head = _HEAD.pack(*fields)
        file.write_bytes(head + name + _digest(head + name, payload) + payload)
    given.ask_all()
    given.write_on()


def _manifest(given: _Input) -> None:
    """The list of a caption table's files, with a right checksum."""
    given.copy()
    file = given.one_of("captions.lance/*.manifest")
    text = file.read_bytes()[:-17]

    def seal(data: bytes) -> bytes:
        data = data.rstrip(b"\n") + b"\n"
        return data + xxhash.xxh3_64_hexdigest(data).encode() + b"\n"

    file.write_bytes(hostile_json_file(text, given.chance, seal))
    given.ask_all()
    given.write_on()


def _policy(given: _Input) -> None:
    given.copy()
    file = given.path / POLICY

    def seal(data: bytes) -> bytes:
        try:
            table = json.loads(data)
            table["xxh3"] = xxhash.xxh3_128_hexdigest(canonical_ascii(table["policy"]))
            return canonical_ascii(table)
        except (ValueError, TypeError, KeyError, RecursionError):
            return data

    file.write_bytes(hostile_json_file(file.read_bytes(), given.chance, seal))
    with given.typed("policy"):
        policy.read_policy(given.path)
    with given.typed("verify"):
        verify_any(given.path)
    with given.typed("compact"), Store.open(given.path, write=True) as store:
        from memdb.compact import compact

        compact(store)


_POLICY_TOML = b"""store_bytes_max = "40 GB"
when_full = "forget-oldest"
[[age]]
after = "7 d"
codec = "int4"
[[age]]
after = "30 d"
retainer = "uniform"
keep = 0.5
[[age]]
after = "365 d"
keep = "captions"
"""
_RECIPE_TOML = b"""base = "hybrid"
name = "mine"
[unit]
method = "clip"
frames = 8
unit_s_max = 60.0
[write]
method = "int8"
[retrieve]
method = "topk"
blocks = 32
group = 1
sim = "dot"
"""
_BOMBS = (
    b"x = " + b"[" * 100_000,
    b"x = " + b"[" * 5000 + b"]" * 5000,
    b"x = " + b"{a=" * 2000 + b"1" + b"}" * 2000,
    b"[" + b"a." * 20_000 + b"b]\nc=1",
    b"blocks = " + b"9" * 5000,
    b"frames = 1e999999",
    b"unit_s_max = nan",
    b"x = 0x" + b"f" * 200_000,
    b"x = 9999-99-99T99:99:99Z",
    b"\xff\xfe\x00\x00",
    b"x = '''" + b"a" * 200_000,
    b"[[age]]\n" * 5000,
)


def _toml(given: _Input) -> None:
    """Recipes and policies that a user names."""
    chance = given.chance
    for text, read in (
        (_RECIPE_TOML, lambda file: recipes.recipe(file)),
        (_POLICY_TOML, lambda file: policy.read_toml(file)),
    ):
        lines = text.splitlines(keepends=True)
        match chance.randrange(4):
            case 0:
                data = mangled(text, chance)
            case 1:
                chance.shuffle(lines)
                data = b"".join(lines)
            case 2:
                at = chance.randrange(len(lines) + 1)
                data = b"".join([*lines[:at], chance.choice(_BOMBS), b"\n", *lines[at:]])
            case _:
                key = chance.choice([line.split(b"=")[0] for line in lines if b"=" in line])
                value = chance.choice(
                    (*(str(number).encode() for number in NUMBERS), b"nan", b"[]", b'""', b"{}")
                )
                data = b"".join(
                    key + b"=" + value + b"\n" if line.startswith(key) else line for line in lines
                )
        file = given.folder / "fuzzed.toml"
        file.write_bytes(data)
        with given.typed(f"{data[:60]!r}"):
            read(file)


def _query(given: _Input) -> None:
    """Odd questions to a whole store."""
    chance, path = given.chance, given.folder / "ground.memdb"
    number = chance.choice(NUMBERS)
    other = chance.choice((number, float(number), float("nan"), float("inf"), -0.0))
    text = chance.choice(("star", "\ud800", "x" * 100_000, '"', "a OR b", "star " * 5000, "\x00", "'; DROP"))
    vector = chance.choice((np.full(VECTOR_SIZE, other), np.zeros(3), np.zeros((2, 2)), np.zeros(0)))
    with given.typed("open"), Store.open(path) as store:
        index = CaptionIndex(path)
        with given.typed(f"search limit {number}"):
            index.search(store, ENCODER, text=text, limit=min(number, 1 << 62))
        with given.typed("search by vector"):
            index.search(store, ENCODER, text=text, vector=vector.astype(np.float32))
        with given.typed(f"search from {number}"):
            index.search(store, ENCODER, text="star", start_ns=number, end_ns=chance.choice(NUMBERS))
        with given.typed("recording"):
            store.recording(text)
        with given.typed("unit"):
            store.unit(store.recordings()[0].id, number)
        with given.typed("digest"):
            Client(store).digest(text, tier=text)


TARGETS: dict[str, Callable[[_Input], None]] = {
    "segments": _segment,
    "segments beyond the catalog": _beyond,
    "catalog": _catalog,
    "exported recording": _export,
    "key pages": _pages,
    "states": _state,
    "caption manifests": _manifest,
    "policy": _policy,
    "recipe and policy files": _toml,
    "questions": _query,
}


def _warm(folder: Path) -> None:
    """Load what loads late, and let LanceDB start its threads, before memory is limited."""
    answers(folder / "ground.memdb")
    verify_any(folder / "ground.memdb")


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    folder, targets = Path(sys.argv[1]), sys.argv[2].split(",")
    seed, first, count = map(int, sys.argv[3:6])
    warnings.simplefilter("ignore")
    _warm(folder)
    limit_memory()
    for number in range(first, first + count):
        print(f"begin {number}", flush=True)
        given = _Input(folder, seed, number)
        TARGETS[targets[number % len(targets)]](given)
        for what in given.wrong:
            line = what.replace("\n", " ").encode("ascii", "backslashreplace").decode()
            print(f"bad {number} {line}", flush=True)
        print(f"done {number}", flush=True)


if __name__ == "__main__":
    main()
