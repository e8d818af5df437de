"""Memory of an ingest after 2 minutes and after 10 hours of film: the same, or something grows.

    python -m tools.bench_memory --folder DIR [--hours 10] [--tokens 50] [--state-mb 64] [--json] [--out FILE.json]

An ingest as `memdb ingest` runs it, but for decoding and the model: its two halves, its writer's thread, commits, pages
of keys, the caption table, upkeep and saved states. An encoder that is a stub gives a unit of the 7B shape every 16
frames (28 layers, 4 KV heads of 128, int4, 0.5 frames/s), a copy of one that was packed before, with keys and a caption
of its own. It holds a window of `--state-mb` from the start and saves it as often as an ingest does.

Ten hours of such KV are 14 GB. So that the disk is no limit, holes are punched into the segment behind the writer where
the payloads of older units lie; nothing reads those in an ingest. Keys, captions and footers stay.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memdb.ingest.begin import indexer
from memdb.ingest.encoder_state import Counters
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.queues import Sink
from memdb.ingest.run import Run
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import PackedKV, Unit
from memdb.store import Store
from memdb.timing import Laps
from memdb.writer import RecordingWriter
from tools import seven_b
from tools.bench_keys import anonymous_bytes
from tools.bench_store import machine

SAMPLE_FPS = 0.5
FIRST_S = 120.0
SAMPLES_S = (FIRST_S, 600, 1800, 3600, 2 * 3600, 3 * 3600, 4 * 3600, 6 * 3600, 8 * 3600, 10 * 3600)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


@dataclass(frozen=True)
class Row:
    media_s: float
    units: int
    anon_mb: float
    ratio: float  # to that after 2 minutes
    open_files: int
    threads: int
    disk_mb: float
    took_s: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--unit-frames", type=int, default=seven_b.UNIT_FRAMES)
    parser.add_argument("--state-mb", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.json:
        print(f"{machine()}\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=args.folder) as folder:
        rows = bench(
            Path(folder), args.hours, args.tokens, args.unit_frames, args.state_mb << 20, not args.json
        )
    document = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    if args.json:
        print(json.dumps(document))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


HEAD = "   media s   units   anon MB  of 2 min  files  threads   disk MB    took s"


def line(row: Row) -> str:
    return (
        f"{row.media_s:>10.0f} {row.units:>7} {row.anon_mb:>9.1f} {row.ratio:>9.3f} {row.open_files:>6} "
        f"{row.threads:>8} {row.disk_mb:>9.0f} {row.took_s:>9.1f}"
    )


def bench(
    folder: Path, hours: float, tokens: int, unit_frames: int, state_bytes: int, say: bool
) -> list[Row]:
    started = time.perf_counter()
    spec = seven_b.spec("film", tokens, sample_fps=SAMPLE_FPS)
    encoder = StubEncoder(seven_b.packed(tokens, 1, frames=unit_frames)[0], unit_frames, state_bytes)
    rows: list[Row] = []
    with Store.open(folder / "store", create=True, write=True) as store, store.writer(spec) as writer:
        run = Run(store, writer, encoder, indexer(store, spec), None, None, Laps())  # type: ignore[arg-type]
        puncher = Puncher(store, writer)
        sink = Sink(run.commit, ahead=2, name="memdb-write")
        waiting = [at for at in SAMPLES_S if at <= hours * 3600]
        while waiting:
            sink.put(run.encode(encoder.frames()))
            puncher.behind()
            if encoder.media_s < waiting[0]:
                continue
            while writer.next_unit < encoder.counters.unit:
                time.sleep(0.01)
            time.sleep(0.1)  # the writer's thread is on its way back to its queue
            anon = anonymous_bytes() / 1e6
            rows.append(
                Row(
                    encoder.media_s,
                    writer.next_unit,
                    anon,
                    anon / rows[0].anon_mb if rows else 1.0,
                    len(os.listdir("/proc/self/fd")),
                    len(os.listdir("/proc/self/task")),
                    sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file()) / 1e6,
                    time.perf_counter() - started,
                )
            )
            waiting = [at for at in waiting if at > encoder.media_s]
            if say:
                print(line(rows[-1]), flush=True)
        sink.put(run.ending(flush=True))
        sink.finish()
    return rows


class StubEncoder:
    """What `Run` asks of an encoder. Each batch is a unit."""

    def __init__(self, kv: PackedKV, unit_frames: int, state_bytes: int) -> None:
        self.counters = Counters()
        self.state_bytes = state_bytes
        self._kv, self._unit_frames = kv, unit_frames
        self._window: npt.NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, state_bytes, np.uint8)

    @property
    def media_s(self) -> float:
        return self.counters.unit * self._unit_frames / SAMPLE_FPS

    @property
    def reach_ns(self) -> int:
        return max(0, self.counters.until_ns)

    def frames(self) -> list[ReadyFrame]:
        """The next batch: only their times are looked at."""
        blocks = seven_b.block_table(self.counters.unit, self._unit_frames, 1, SAMPLE_FPS)
        picture = np.zeros((1, 1, 3), np.uint8)
        times = zip(blocks["start_ns"].tolist(), blocks["end_ns"].tolist(), strict=True)
        return [ReadyFrame(0, start_ns, end_ns, picture, picture) for start_ns, end_ns in times]  # type: ignore[arg-type]

    def step(self, frames: Sequence[ReadyFrame]) -> list[Unit]:
        number = self.counters.unit
        kv = PackedKV(self._kv.payload.copy(), self._kv.slices.copy(), self._kv.raw_digest)
        self.counters.unit += 1
        self.counters.taken_ns, self.counters.until_ns = frames[-1].start_ns, frames[-1].end_ns
        return [seven_b.unit(number, kv, sample_fps=SAMPLE_FPS, random=np.random.default_rng(number))]

    def pass_over(self, frames: Sequence[ReadyFrame]) -> list[Unit]:
        raise AssertionError("nothing is forgotten here")

    def holds(self, tombstones: Sequence[Tombstone]) -> bool:
        return bool(tombstones)

    def finish(self) -> list[Unit]:
        return []

    def state(self) -> bytes:
        return self._window.tobytes()


class Puncher:
    """Gives back the disk under the payloads of units that were committed a while ago."""

    def __init__(self, store: Store, writer: RecordingWriter) -> None:
        self._store, self._writer = store, writer
        self._next = 0
        self._libc = ctypes.CDLL(None, use_errno=True)

    def behind(self, keep_units: int = 4) -> None:
        while self._next < self._writer.next_unit - keep_units:
            row = self._store.catalog.unit(self._writer.recording.id, self._next)
            fd = os.open(self._store.segments_path / row.segment, os.O_RDWR)
            offset, length = ctypes.c_long(row.payload_offset), ctypes.c_long(row.payload_bytes)
            failed = self._libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length)
            os.close(fd)
            if failed:
                raise OSError(
                    ctypes.get_errno(), "no hole can be punched: give a folder on ext4, xfs or btrfs"
                )
            self._next += 1


if __name__ == "__main__":
    sys.exit(main())
