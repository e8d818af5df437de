"""Opening and searching the representative keys of a long recording: cold, and on a connection that has them open.

    python -m tools.bench_keys --folder DIR [--hours 1,10,100] [--rounds 5] [--backend faiss] [--json] [--out FILE.json]

28 layers of 512 values a block, a block a second: 3,600 blocks an hour. A store with a real catalog; units of 16 blocks
whose KV is a stub, as a search does not read it; keys in pages, clustered as scenes are. A search is what a question
with mode kv does in all layers: the 64 best blocks of each for a query of its own.

cold   every file of the store out of the page cache; the store is opened, the key table, and all layers are searched
warm   the same again on the connection that has it open

Where keys take more than the machine has room for, hours are measured on fewer layers: the table says how many.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memdb.index.key_search import KeySearch, default_backend
from memdb.index.key_table import KeyTable
from memdb.index.page_writer import PageWriter
from memdb.index.pages import PageUnit, page_path
from memdb.schemas.units import SLICE_DTYPE, PackedKV, Unit
from memdb.store import Store
from tools import seven_b
from tools.bench_store import is_resident, machine

KEY_SIZE = seven_b.KV_HEADS * seven_b.HEAD_SIZE
BLOCKS, CLUSTERS = 64, 256
STUB_BYTES = 64
PAGE_UNITS = 16
BATCH_UNITS = 64


@dataclass(frozen=True)
class Row:
    hours: float
    blocks: int
    layers: int
    gbytes: float  # of keys
    open_ms: float
    cold_ms: float  # opening and searching all layers
    cold_high_ms: float
    warm_ms: float  # median
    warm_high_ms: float
    anon_mb: float  # memory of this process that no file is behind, after the searches


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--hours", default="1,10,100")
    parser.add_argument("--layers", type=int, default=seven_b.LAYERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-rounds", type=int, default=9)
    parser.add_argument("--backend", default=default_backend())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    if not args.json:
        print(f"{machine()}, backend {args.backend}\n{HEAD}")
    for hours in (float(text) for text in args.hours.split(",")):
        with tempfile.TemporaryDirectory(prefix="bench-keys-", dir=args.folder) as folder:
            row = bench(Path(folder), hours, args.layers, args.rounds, args.warm_rounds, args.backend)
        rows.append(row)
        if not args.json:
            print(line(row))
    document = {"machine": machine(), "backend": args.backend, "rows": [asdict(row) for row in rows]}
    if args.json:
        print(json.dumps(document))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


HEAD = "  hours    blocks layers    GB keys   open ms   cold ms (worst)    warm ms (worst)   anon MB"


def line(row: Row) -> str:
    return (
        f"{row.hours:>7g} {row.blocks:>9,} {row.layers:>6} {row.gbytes:>10.2f} {row.open_ms:>9.1f} "
        f"{row.cold_ms:>9.0f} ({row.cold_high_ms:.0f}) {row.warm_ms:>10.1f} ({row.warm_high_ms:.1f}) "
        f"{row.anon_mb:>9.0f}"
    )


def bench(folder: Path, hours: float, layers: int, rounds: int, warm_rounds: int, backend: str) -> Row:
    units = max(1, round(hours * 3600 / seven_b.UNIT_FRAMES))
    path = folder / "store"
    make(path, units, layers)
    queries = np.random.default_rng(1).standard_normal((layers, KEY_SIZE), np.float32)
    search_once(path, queries, backend, 0)  # imports, and FAISS's threads
    cold: list[tuple[float, float]] = []
    for _ in range(rounds):
        drop(path)
        cold.append(search_once(path, queries, backend, 0)[:2])
    _, _, warm, anon = search_once(path, queries, backend, warm_rounds)
    blocks = units * seven_b.UNIT_FRAMES
    return Row(
        hours,
        blocks,
        layers,
        blocks * layers * KEY_SIZE * 2 / 1e9,
        statistics.median(open_ms for open_ms, _ in cold),
        statistics.median(whole_ms for _, whole_ms in cold),
        max(whole_ms for _, whole_ms in cold),
        statistics.median(warm),
        max(warm),
        anon / 1e6,
    )


def search_once(
    path: Path, queries: npt.NDArray[np.float32], backend: str, again: int
) -> tuple[float, float, list[float], int]:
    """Milliseconds to open, to open and search, and of each further search; anonymous bytes at the end."""
    started = time.perf_counter()
    with Store.open(path) as store:
        recording = store.recordings()[0]
        with KeyTable.open(store, recording.id) as table:
            open_ms = (time.perf_counter() - started) * 1e3
            search = KeySearch(table, backend=backend)
            run(search, queries)
            whole_ms = (time.perf_counter() - started) * 1e3
            warm = []
            for _ in range(again):
                started = time.perf_counter()
                table.refresh()
                run(search, queries)
                warm.append((time.perf_counter() - started) * 1e3)
            return open_ms, whole_ms, warm, anonymous_bytes()


def run(search: KeySearch, queries: npt.NDArray[np.float32]) -> None:
    rows = np.ones(len(search.table), bool)
    for layer, query in enumerate(queries):
        found = search.search(layer, query, BLOCKS, rows=rows)
        assert len(found.rows) == min(BLOCKS, len(search.table))


# The store


def make(path: Path, units: int, layers: int) -> None:
    """A recording of so many units, and the pages of its keys."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((CLUSTERS, layers, KEY_SIZE), np.float32)
    spec = replace(seven_b.spec("film", 50, layers=layers), caption_encoder="")
    with Store.open(path, create=True, write=True) as store:
        with store.writer(spec) as writer:
            for first in range(0, units, BATCH_UNITS):
                writer.append(
                    [stub(number, layers) for number in range(first, min(first + BATCH_UNITS, units))]
                )
            recording_id = writer.recording.id
        with PageWriter(page_path(store, recording_id), recording_id) as pages:
            for batch in batches(units, PAGE_UNITS):
                pages.append([page_unit(number, layers, centres, random) for number in batch])
    for file in files(path):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def stub(number: int, layers: int) -> Unit:
    """A unit whose slices are a few bytes each: a key search never looks at them."""
    frames = seven_b.UNIT_FRAMES
    slices = np.zeros(layers * frames, SLICE_DTYPE)
    slices["layer"], slices["block"] = np.divmod(np.arange(len(slices)), frames)
    slices["tokens"], slices["scale_bytes"] = 50, 2
    slices["offset"] = np.arange(len(slices)) * STUB_BYTES
    slices["raw_bytes"] = slices["stored_bytes"] = STUB_BYTES
    slices["xxh3"] = STUB_XXH3
    payload = np.zeros(len(slices) * STUB_BYTES, np.uint8)
    blocks = seven_b.block_table(number, frames, 50, 1.0)
    start_ns, end_ns = int(blocks["start_ns"][0]), int(blocks["end_ns"][-1])
    return Unit(number, start_ns, end_ns, 0, blocks, PackedKV(payload, slices, b""), None, None, None)


def page_unit(
    number: int, layers: int, centres: npt.NDArray[np.float32], random: np.random.Generator
) -> PageUnit:
    """The keys of one unit: one scene, with a little noise."""
    frames = seven_b.UNIT_FRAMES
    noise = random.standard_normal((layers, 1, KEY_SIZE), np.float32) * 0.3
    drift = np.linspace(0, 0.2, frames, dtype=np.float32)[None, :, None]
    keys = centres[number % CLUSTERS][:, None, :] + noise + drift * noise[:, :, ::-1]
    blocks = seven_b.block_table(number, frames, 50, 1.0)
    start_ns, end_ns = int(blocks["start_ns"][0]), int(blocks["end_ns"][-1])
    holds = np.ones((layers, frames), bool)
    return PageUnit(number, number + 1, start_ns, end_ns, blocks, holds, keys.astype(np.float16), 0, None)


def batches(count: int, size: int) -> Iterator[Sequence[int]]:
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def drop(path: Path) -> None:
    """Put every file of the store out of the page cache, and see to it that the keys are."""
    for file in files(path):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if file.suffix == ".pages":
            places = range(0, os.fstat(fd).st_size, max(1, os.fstat(fd).st_size // 64))
            kept = sum(is_resident(fd, offset) for offset in places)
            assert kept * 10 <= len(places), f"{kept} of {len(places)} places stayed in the page cache"
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    kbytes = next(line_.split()[1] for line_ in text.splitlines() if line_.startswith("RssAnon"))
    return int(kbytes) * 1024


def stub_xxh3() -> int:
    import xxhash

    value: int = xxhash.xxh3_64_intdigest(bytes(STUB_BYTES))
    return value


STUB_XXH3 = stub_xxh3()


if __name__ == "__main__":
    sys.exit(main())
