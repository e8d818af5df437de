"""A store in memory with the few methods that derived tiers read, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from memdb.schemas.errors import CorruptionError, UsageError
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE, BlockKind, Caption

RECORDING = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32
ENCODER = "a-test-encoder"
SECOND_NS = 1_000_000_000


@dataclass(frozen=True, eq=False)
class FakeRow:
    recording_id: str
    number: int
    commit_id: int
    start_ns: int
    end_ns: int
    has_caption: bool
    caption_tokens: int | None
    blocks: Any
    slices: Any
    segment: str = "fake"
    offset: int = 0
    layers: int = 0  # L of the keys, 0 without


@dataclass
class FakeStore:
    path: Path
    rows: list[FakeRow] = field(default_factory=list)
    keys: dict[tuple[str, int], Any] = field(default_factory=dict)
    captions: dict[tuple[str, int], Caption] = field(default_factory=dict)
    damaged: set[tuple[str, int]] = field(default_factory=set)
    encoders: dict[str, str] = field(default_factory=lambda: {RECORDING: ENCODER, OTHER: ENCODER})
    tombstones: dict[str, list[Tombstone]] = field(default_factory=dict)
    caption_reads: int = 0

    def add(
        self,
        *,
        recording_id: str = RECORDING,
        keys: Any = None,  # (L, blocks, H*D)
        holds: Any = None,  # (L, blocks)
        text: str | None = None,
        vector: Any = None,
    ) -> FakeRow:
        number = len(self.units(recording_id))
        start_ns = number * 2 * SECOND_NS
        block_count = 0 if keys is None else keys.shape[1]
        blocks = np.zeros(block_count, BLOCK_DTYPE)
        for at in range(block_count):
            block_start_ns = start_ns + at * SECOND_NS // 4
            blocks[at] = (BlockKind.FRAME, 4 + at, block_start_ns, block_start_ns + SECOND_NS // 4, 4 * at)
        slices = np.zeros(0, SLICE_DTYPE)
        if keys is not None:
            held = np.argwhere(np.ones(keys.shape[:2], bool) if holds is None else holds)
            slices = np.zeros(len(held), SLICE_DTYPE)
            slices["layer"], slices["block"] = held.T
            self.keys[recording_id, number] = keys
        row = FakeRow(
            recording_id,
            number,
            self.last_commit() + 1,
            start_ns,
            start_ns + 2 * SECOND_NS,
            text is not None,
            len(text.split()) if text is not None else None,
            blocks,
            slices,
            layers=0 if keys is None else len(keys),
        )
        if text is not None:
            self.captions[recording_id, number] = Caption(text, (), np.asarray(vector, np.float32))
        self.rows.append(row)
        return row

    def recordings(self) -> list[Any]:
        """As many of a catalog's recordings, with as much of each, as the caption tier asks for."""
        units = Counter(row.recording_id for row in self.rows)
        return [
            SimpleNamespace(
                id=name,
                units=count,
                tombstones=tuple(self.tombstones.get(name, ())),
                spec=SimpleNamespace(caption_encoder=self.encoders.get(name)),
            )
            for name, count in units.items()
        ]

    def recording_by_id(self, recording_id: str) -> Any:
        """As much of its row as the key tables ask for."""
        keys = next(
            (keys for place, keys in self.keys.items() if place[0] == recording_id), np.zeros((0, 0, 0))
        )
        shape = SimpleNamespace(layers=keys.shape[0], kv_heads=1, head_size=keys.shape[2])
        return SimpleNamespace(
            id=recording_id,
            units=len(self.rows_of(recording_id)),
            tombstones=tuple(self.tombstones.get(recording_id, ())),
            generation=0,
            kv_from_unit=0,
            spec=SimpleNamespace(model=SimpleNamespace(shape=shape)),
        )

    def forget(self, recording_id: str, first: int, last: int) -> None:
        """The captions of units `first` to `last`: the units stay, as husks."""
        span = self.rows_of(recording_id)[first : last + 1]
        self.rows = [
            replace(row, has_caption=False, caption_tokens=None) if row in span else row for row in self.rows
        ]
        for row in span:
            self.captions.pop((recording_id, row.number), None)
        stones = self.tombstones.setdefault(recording_id, [])
        below = len(self.rows_of(recording_id))
        stones.append(Tombstone(len(stones), span[0].start_ns, span[-1].end_ns, below, 0))

    def forget_recording(self, recording_id: str) -> None:
        self.rows = [row for row in self.rows if row.recording_id != recording_id]
        self.captions = {place: said for place, said in self.captions.items() if place[0] != recording_id}

    def rows_of(self, recording_id: str) -> list[FakeRow]:
        return [row for row in self.rows if row.recording_id == recording_id]

    def unit(self, recording_id: str, number: int) -> FakeRow:
        rows = self.units(recording_id, first=number, last=number)
        if not rows:
            raise UsageError(f"no unit {number}")
        return rows[0]

    def last_commit(self) -> int:
        return self.rows[-1].commit_id if self.rows else 0

    def units_without_kv(self, recording: Any) -> list[int]:
        return []

    def units_after(
        self,
        commit_id: int,
        *,
        recording_id: str | None = None,
        captions_only: bool = False,
        limit: int | None = None,
    ) -> list[FakeRow]:
        found = [
            row
            for row in self.rows
            if row.commit_id > commit_id
            and recording_id in (None, row.recording_id)
            and (row.has_caption or not captions_only)
        ]
        return found[:limit]

    def units(
        self, recording_id: str, *, first: int | None = None, last: int | None = None, **_: None
    ) -> list[FakeRow]:
        rows = self.rows_of(recording_id)
        return [row for row in rows if (first or 0) <= row.number and (last is None or row.number <= last)]

    def read_keys(self, row: FakeRow) -> Any:
        if (row.recording_id, row.number) in self.damaged:
            raise CorruptionError(f"unit {row.number} is damaged", file="segments/fake")
        return self.keys.get((row.recording_id, row.number))

    def read_caption(self, row: FakeRow) -> Caption:
        if (row.recording_id, row.number) in self.damaged:
            raise CorruptionError(f"unit {row.number} is damaged", file="segments/fake")
        self.caption_reads += 1
        return self.captions[row.recording_id, row.number]
