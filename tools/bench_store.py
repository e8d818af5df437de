"""The store beside the bare disk: the same bytes, offsets and lengths, through memdb and through pwrite and preadv.

    python -m tools.bench_store --folder DIR [--rounds 9] [--tokens 50,196] [--json] [--out FILE.json]

7B shape: 28 layers, 4 KV heads of 128, units of 16 frames, int4, packed before the clock starts; each unit with its
representative keys, caption, vector and key frame. Both sides use one file layout, one reused buffer and one
fdatasync a unit, and take turns; a figure is the median over the rounds of raw time / memdb's time in that round.

write  one unit after another through Store.writer(...).append, against pwrite and fdatasync of the same records
cold   64 blocks of all layers, the page cache dropped before each side
warm   the same with everything in the page cache; memdb verifies every slice

Reads are of one set of blocks for all layers (known beforehand: memdb reads several layers at a time, the raw side
everything at once) and of 28 different sets (both sides layer by layer, as a question cannot know a layer's blocks
before it ran the one below). The raw side reads runs that were planned and merged before the clock started:
`threads` with as many threads as the reader has, `alone` in the calling thread. The mark is against `threads`; the
ratio to the faster of the two stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from memdb.index.page_writer import index_recording
from memdb.query.stored import Readings, StoredKV
from memdb.reader import SliceReader
from memdb.schemas.units import Unit
from memdb.store import Store
from tools import seven_b

BLOCKS = 64
THREADS = 4
MARKS = {"write": 0.8, "cold": 0.9, "warm": 0.7}
Sets = list[npt.NDArray[np.int64]]  # a layer each: rows of the key table, ascending
Run = tuple[int, int, int]  # file, offset, length


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are medians over the rounds, `low` and `high` the ends of the ratio."""

    what: str
    tokens: int
    sets: str
    mbytes: float
    memdb_ms: float
    raw_ms: float
    ratio: float
    low: float
    high: float
    alone_ms: float | None  # the raw side in one thread
    ratio_best: float | None  # against the faster raw side
    mark: float | None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where the stores are made; a temporary folder by default"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", default="50,196", help="tokens a frame")
    parser.add_argument("--units", type=int, default=32, help="units of 16 frames that the reads choose from")
    parser.add_argument("--write-units", type=int, default=8, help="units that a round of writing takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON document in place of the table")
    parser.add_argument("--out", type=Path, help="a file for the JSON document")
    args = parser.parse_args()
    rows: list[Row] = []
    notes: dict[str, object] = machine()
    say = (lambda _: None) if args.json else print
    for tokens in (int(text) for text in args.tokens.split(",")):
        with tempfile.TemporaryDirectory(prefix="bench-store-", dir=args.folder) as folder:
            bench = Bench(Path(folder), tokens, args.rounds, args.seed)
            for row in bench.run(args.units, args.write_units):
                say(line(row) if rows else f"{notes}\n{HEAD}\n{line(row)}")
                rows.append(row)
            notes[f"cold_{tokens}"] = bench.dropped()
            notes[f"unpack_{tokens}"] = bench.unpacked
            say(f"{tokens} tokens: {bench.dropped()}")
            say(f"{tokens} tokens: {bench.unpacked}")
    document = {"machine": notes, "rows": [asdict(row) for row in rows]}
    if args.json:
        print(json.dumps(document))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


HEAD = (
    "what   tokens sets            MB  memdb ms    raw ms  ratio (low-high)    alone ms  to best raw   mark"
)


def line(row: Row) -> str:
    alone = f"{row.alone_ms:>9.2f} {row.ratio_best:>12.2f}" if row.alone_ms is not None else " " * 22
    mark = "" if row.mark is None else f">= {row.mark}: {'met' if row.ratio >= row.mark else 'MISSED'}"
    return (
        f"{row.what:<6} {row.tokens:>6} {row.sets:<10} {row.mbytes:>8.1f} {row.memdb_ms:>9.2f} {row.raw_ms:>9.2f}"
        f"  {row.ratio:>5.2f} ({row.low:.2f}-{row.high:.2f}) {alone}   {mark}"
    )


def machine() -> dict[str, object]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": THREADS,
    }


class Bench:
    """Everything for one number of tokens a frame, in one folder."""

    def __init__(self, folder: Path, tokens: int, rounds: int, seed: int) -> None:
        self.folder, self.tokens, self.rounds = folder, tokens, rounds
        self.random = np.random.default_rng((seed, tokens))
        self.spec = seven_b.spec("film", tokens)
        self.resident: list[float] = []  # share of the pages that were still there when a cold side began
        self.unpacked: dict[str, float] = {}
        self._payloads = seven_b.packed(tokens, 2)

    def run(self, units: int, write_units: int) -> Iterator[Row]:
        made = list(seven_b.units(self._payloads, 0, max(units, write_units)))
        yield self.write(made[:write_units])
        with self.filled(made[:units]) as store, reads(store, self.spec.name) as kv:
            raw = RawReader(store, kv)
            try:
                for sets in ("shared", "different"):
                    yield self.read("cold", sets, kv, raw)
                for sets in ("shared", "different"):
                    yield self.read("warm", sets, kv, raw)
                self.unpack(kv)
            finally:
                raw.close()

    def dropped(self) -> str:
        left = max(self.resident, default=0.0)
        return (
            f"page cache dropped before each cold side: at most {100 * left:.1f} % of sampled pages were left"
        )

    # Writing

    def write(self, units: Sequence[Unit]) -> Row:
        pairs = []
        records: list[tuple[int, bytes]] = []  # offset and bytes, as the first round's store wrote them
        for index in range(self.rounds + 1):  # the first warms up and gives the raw side its bytes
            own = self.folder / f"write-{index}"
            if records and index % 2:
                raw_ms = self._write_raw(own, records)
                memdb_ms = self._write_store(own, units, None)
            else:
                memdb_ms = self._write_store(own, units, None if records else records)
                raw_ms = self._write_raw(own, records)
            if index:
                pairs.append((memdb_ms, raw_ms, None))
        return self._row("write", "-", sum(len(data) for _, data in records), pairs)

    def _write_store(
        self, path: Path, units: Sequence[Unit], records: list[tuple[int, bytes]] | None
    ) -> float:
        with Store.open(path, create=True, write=True) as store:
            with store.writer(self.spec) as writer:
                started = time.perf_counter()
                for unit in units:
                    writer.append([unit])
                ms = (time.perf_counter() - started) * 1e3
            rows = store.units(store.recording(self.spec.name).id)
            if records is not None:
                whole = (store.segments_path / rows[0].segment).read_bytes()
                records += [(row.offset, whole[row.offset : row.offset + row.length]) for row in rows]
        remove(path)
        return ms

    def _write_raw(self, path: Path, records: Sequence[tuple[int, bytes]]) -> float:
        path.mkdir()
        fd = os.open(path / "raw", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.pwrite(fd, bytes(records[0][0]), 0)
        os.fsync(fd)
        started = time.perf_counter()
        for offset, data in records:
            done = 0
            while done < len(data):
                done += os.pwrite(fd, memoryview(data)[done:], offset + done)
            os.fdatasync(fd)
        ms = (time.perf_counter() - started) * 1e3
        os.close(fd)
        remove(path)
        return ms

    # Reading

    @contextmanager
    def filled(self, units: Sequence[Unit]) -> Iterator[Store]:
        with Store.open(self.folder / "read", create=True, write=True) as store:
            with store.writer(self.spec) as writer:
                for unit in units:
                    writer.append([unit])
            index_recording(store, store.recording(self.spec.name).id, flush=True)
        with Store.open(self.folder / "read") as store:
            yield store

    def read(self, what: str, sets: str, kv: StoredKV, raw: RawReader) -> Row:
        triples = []
        for index in range(self.rounds + 1):  # the first warms up what a question finds warm: rows, buffers
            chosen = self._choose(sets, len(kv.table))
            together = sets == "shared"
            runs = raw.plan(kv, chosen, together)
            sides: list[Callable[[], float]] = [
                lambda c=chosen, t=together: timed(lambda: fetch(kv, c, t)),
                lambda r=runs: timed(lambda: raw.read(r)),
                lambda r=runs: timed(lambda: raw.read_alone(r)),
            ]
            fetch(kv, chosen, together)  # rows of the catalog are looked up once, then remembered
            ms = [0.0] * len(sides)
            for turn in range(len(sides)):
                side = (turn + index) % len(sides)
                if what == "cold":
                    self.resident.append(raw.drop(runs))
                else:
                    raw.touch(runs)
                ms[side] = sides[side]()
            if index:
                triples.append((ms[0], ms[1], ms[2]))
        size = sum(length for layer in runs for _, _, length in layer)
        return self._row(what, sets, size, triples)

    def _choose(self, sets: str, blocks: int) -> Sets:
        def one() -> npt.NDArray[np.int64]:
            return np.sort(self.random.choice(blocks, BLOCKS, replace=False))

        return [one()] * seven_b.LAYERS if sets == "shared" else [one() for _ in range(seven_b.LAYERS)]

    def unpack(self, kv: StoredKV) -> None:
        """Packed bytes to tensors ready for attention, and a whole read with it, layer by layer, warm."""
        cpu, readings = torch.device("cpu"), Readings()
        rows = self._choose("different", len(kv.table))
        whole, read = [], []
        for _ in range(4):
            readings.read_ms = 0.0
            whole.append(
                timed(
                    lambda: [
                        kv.read(layer, own, cpu, seven_b.DTYPE, readings) for layer, own in enumerate(rows)
                    ]
                )
            )
            read.append(readings.read_ms)
        out_bytes = seven_b.shape(self.tokens).kv_bytes(BLOCKS * self.tokens, seven_b.DTYPE.itemsize)
        unpack_ms = statistics.median(whole[1:]) - statistics.median(read[1:])
        self.unpacked = {
            "read_ms": round(statistics.median(read[1:]), 2),
            "unpack_ms": round(unpack_ms, 2),
            "tensors_mb": round(out_bytes / 1e6, 1),
            "unpack_mb_per_s": round(out_bytes / 1e3 / unpack_ms),
        }

    def _row(
        self, what: str, sets: str, size: int, rounds: Sequence[tuple[float, float, float | None]]
    ) -> Row:
        ratios = sorted(raw / own for own, raw, _ in rounds)
        alone = [alone for _, _, alone in rounds if alone is not None]
        return Row(
            what,
            self.tokens,
            sets,
            round(size / 1e6, 1),
            statistics.median(own for own, _, _ in rounds),
            statistics.median(raw for _, raw, _ in rounds),
            statistics.median(ratios),
            ratios[0],
            ratios[-1],
            statistics.median(alone) if alone else None,
            statistics.median(min(raw, one) / own for own, raw, one in rounds if one is not None)
            if alone
            else None,
            MARKS[what],
        )


def fetch(kv: StoredKV, sets: Sets, together: bool) -> None:
    """The read of a question: verified, before unpacking."""
    readings = Readings()
    with kv.reader.pinned():
        if together:
            for _ in kv.fetch_together(sets, readings):
                pass
        else:
            for layer, rows in enumerate(sets):
                kv.fetch([layer], [rows], readings)
    assert not readings.bad, readings.bad[:3]


@contextmanager
def reads(store: Store, name: str) -> Iterator[StoredKV]:
    with SliceReader(store, threads=THREADS) as reader:
        kv = StoredKV(store, store.recording(name), reader, backend="exact", sim="dot")
        yield kv
        kv.close()


class RawReader:
    """preadv of runs that are known beforehand, into one reused buffer."""

    def __init__(self, store: Store, kv: StoredKV) -> None:
        self._files: dict[str, int] = {}
        self._folder = store.segments_path
        self._buffer = memoryview(bytearray(0))
        self._threads = ThreadPoolExecutor(THREADS)

    def plan(self, kv: StoredKV, sets: Sets, together: bool) -> list[list[Run]]:
        """Reads of merged runs in the order of the file: one for all layers, or one a layer."""
        layers = list(range(len(sets)))
        groups = [(layers, sets)] if together else [([layer], [rows]) for layer, rows in enumerate(sets)]
        found = []
        for own, rows in groups:
            runs: list[Run] = []
            pieces = kv.pieces(own, rows)
            for row in np.sort(pieces.table, order=("file", "offset")):
                fd = self._open(pieces.names.files[row["file"]].segment)
                offset, length = int(row["offset"]), int(row["stored_bytes"])
                if runs and (fd, offset) == (runs[-1][0], runs[-1][1] + runs[-1][2]):
                    runs[-1] = (fd, runs[-1][1], runs[-1][2] + length)
                else:
                    runs.append((fd, offset, length))
            found.append(runs)
        size = max(sum(length for _, _, length in runs) for runs in found)
        if len(self._buffer) < size:
            self._buffer = memoryview(bytearray(size))
        return found

    def read(self, groups: list[list[Run]]) -> None:
        for runs in groups:
            share = -(-len(runs) // THREADS)
            at, waiting = 0, []
            for first in range(0, len(runs), share):
                own = runs[first : first + share]
                waiting.append(self._threads.submit(self._stretch, own, at))
                at += sum(length for _, _, length in own)
            wait(waiting)
            for future in waiting:
                future.result()

    def touch(self, groups: list[list[Run]]) -> None:
        """Bring everything into the page cache through a buffer of neither side: both find their own equally cold."""
        own, self._buffer = self._buffer, memoryview(bytearray(len(self._buffer)))
        self.read_alone(groups)
        self._buffer = own

    def read_alone(self, groups: list[list[Run]]) -> None:
        for runs in groups:
            self._stretch(runs, 0)

    def _stretch(self, runs: list[Run], at: int) -> None:
        for fd, offset, length in runs:
            done = os.preadv(fd, [self._buffer[at : at + length]], offset)
            assert done == length
            at += length

    def drop(self, groups: list[list[Run]]) -> float:
        """Put the files out of the page cache; the share of sampled places that stayed."""
        for fd in self._files.values():
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        places = [(fd, offset) for runs in groups for fd, offset, _ in runs]
        sample = places[:: max(1, len(places) // 64)]
        kept = sum(is_resident(fd, offset) for fd, offset in sample) / len(sample)
        for fd in self._files.values():  # what looking brought back
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return kept

    def close(self) -> None:
        self._threads.shutdown()
        for fd in self._files.values():
            os.close(fd)

    def _open(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._files[name]


def is_resident(fd: int, offset: int) -> bool:
    """Whether a byte of a file lies in the page cache."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def remove(folder: Path) -> None:
    """Delete a folder of files, at most one level deep."""
    import shutil

    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
