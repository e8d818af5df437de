"""A tap on the KV tier: what a row of the benchmark reads in place of what retrieval chose, and a note of it.

The product's own path runs unchanged: retrieval chooses blocks, layer by layer; here another set of rows may be put
in their place, or other content, just before they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memdb.index.key_table import KeyTable
from memdb.models.window import LayerKV
from memdb.query.retrieve.topk import Rows
from memdb.query.stored import Readings, StoredKV

Spans = tuple[tuple[float, float], ...]
CONTENTS = ("stored", "zero", "shuffled")


@dataclass(frozen=True)
class Truth:
    """What is true of the question in hand: where its evidence lies, and the moment that is asked about."""

    number: int = 0
    spans_s: Spans = ()
    at_s: float | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """What a pick has to choose from: `rows` that retrieval chose, `held` all that the layer holds by then."""

    layer: int
    rows: Rows
    held: Rows
    table: KeyTable
    truth: Truth
    blocks: int  # that the recipe retrieves
    seed: int


Pick = Callable[[Choice], Rows]


@dataclass
class Tap:
    """`taken`: of each layer the blocks whose content stood in the context of the last question."""

    seed: int = 0
    blocks: int = 0  # that the recipe retrieves
    pick: Pick | None = None
    content: str = "stored"
    truth: Truth = field(default_factory=Truth)
    taken: dict[int, Rows] = field(default_factory=dict)
    table: KeyTable | None = None  # of the recording that was read last

    def turn(self, pick: Pick | None, content: str) -> None:
        assert content in CONTENTS
        self.pick, self.content = pick, content

    def ask(self, truth: Truth) -> None:
        self.truth, self.taken, self.table = truth, {}, None

    def seen(self) -> list[list[bool]]:
        """For each layer that was read, of which true spans at least one block stood in the context."""
        if self.table is None:
            return []
        blocks = self.table.blocks
        found = []
        for rows in self.taken.values():
            starts, ends = blocks["start_ns"][rows] / 1e9, blocks["end_ns"][rows] / 1e9
            found.append(
                [bool(((starts < end_s) & (ends > start_s)).any()) for start_s, end_s in self.truth.spans_s]
            )
        return found


class TappedKV(StoredKV):
    def __init__(self, *args: Any, tap: Tap, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tap = tap
        self._order = np.zeros(0, np.int64)

    def read(
        self,
        layer: int,
        rows: Rows,
        device: torch.device,
        dtype: torch.dtype,
        readings: Readings,
        sizes: npt.NDArray[np.int64] | None = None,
    ) -> tuple[LayerKV | None, Rows]:
        tap = self._tap
        if tap.pick is not None:
            assert sizes is None, "a pick chooses whole blocks, and a memory holds tokens"
            held = np.flatnonzero(self._layer_holds(layer))
            choice = Choice(layer, rows, held, self.table, tap.truth, tap.blocks, tap.seed)
            rows = tap.pick(choice)
        content = self._shuffled()[rows] if tap.content == "shuffled" else rows
        found, whole = super().read(layer, content, device, dtype, readings, sizes)
        tap.taken[layer], tap.table = whole, self.table
        if tap.content == "zero" and found is not None:
            found = LayerKV(torch.zeros_like(found.k), torch.zeros_like(found.v))
        if tap.content == "shuffled":
            assert len(whole) == len(rows), "the benchmark's own store is whole"
            whole = rows  # their times and places, with the content of others
        return found, whole

    def _layer_holds(self, layer: int) -> npt.NDArray[np.bool_]:
        at_s = self._tap.truth.at_s
        held = self.table.holds(layer) & (self.table.blocks["tokens"] > 0)
        if at_s is None:
            return held
        there: npt.NDArray[np.bool_] = held & (self.table.blocks["end_ns"] <= round(at_s * 1e9))
        return there

    def _shuffled(self) -> Rows:
        """Each block's place to another block, the same for all layers and questions."""
        if len(self._order) != len(self.table):
            assert len(set(self.table.blocks["tokens"].tolist())) == 1, "blocks of one size change places"
            self._order = np.random.default_rng(self._tap.seed).permutation(len(self.table))
        return self._order
