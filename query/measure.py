"""The figures of the cost model, measured by running the stages themselves on this machine and this store."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from memdb.models.cache import CacheContext
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.query.cost import Costs
from memdb.query.retrieve.topk import Rows
from memdb.query.scope import Opened
from memdb.query.stored import Readings
from memdb.schemas.errors import CorruptionError

REPEATS = 3
CONTEXTS = (64, 1024)  # remembered tokens
FORWARDS = (1, 64)  # new tokens
BLOCKS = 8  # of one layer's read; scattered, as retrieval scatters them


def measure(
    model: VideoModel, kv: Opened | None, embed: Callable[[], object], captions: Callable[[], object]
) -> Costs:
    """Time each stage; medians of a few runs. `embed` and `captions` run theirs once.

    Raises CorruptionError where what is to be read cannot be, or not in time.
    """
    base, token, pair = _forwards(model)
    read_base = read_block = unpack = search = 0.0
    if kv is not None and len(kv.usable_blocks):
        read_base, read_block, unpack = _reads(model, kv)
        search = _search(model, kv)
    return Costs(
        forward_base=base,
        forward_token=token,
        forward_pair=pair,
        read_base=read_base,
        read_block=read_block,
        unpack_token=unpack,
        search_layer=search,
        embed=_median_ms(embed, model),
        captions=_median_ms(captions, model),
    )


def _forwards(model: VideoModel) -> tuple[float, float, float]:
    """Least squares of base + token * T + pair * T * C over a few forwards; nothing below zero."""
    rows, times = [], []
    shape = model.shape
    for C in CONTEXTS:
        remembered = torch.zeros(shape.kv_heads, C, shape.head_size, dtype=model.dtype, device=model.device)
        for T in FORWARDS:
            embeddings = model.embed([min(model.stop_ids, default=0)] * T)
            # One long-lived cache: what a forward adds to it is small beside C.
            context = CacheContext(
                model.rotary,
                [LayerKV(remembered, remembered)] * shape.layers,
                [None] * shape.layers,
            )

            def run(embeddings: torch.Tensor = embeddings, context: CacheContext = context) -> None:
                model.logits(model.forward(embeddings, context)[-1:])

            rows.append((1.0, float(T), float(T * C)))
            times.append(_median_ms(run, model))
    design, ms = np.asarray(rows), np.asarray(times)
    solved = np.linalg.lstsq(design, ms, rcond=None)[0]
    base, token, pair = (max(0.0, float(value)) for value in solved)
    return max(base, 1e-3), token, pair


def _reads(model: VideoModel, kv: Opened) -> tuple[float, float, float]:
    """Base and slope of one layer's read over the number of blocks, and codes to tensors a token."""
    usable = np.flatnonzero(kv.blocks & kv.kv.table.holds(0))  # not every layer keeps every block
    if not len(usable):
        return 0.0, 0.0, 0.0
    many = usable[np.unique(np.linspace(0, len(usable) - 1, min(BLOCKS, len(usable))).astype(np.intp))]

    def read(rows: Rows) -> tuple[float, float]:
        readings = Readings()
        started = time.perf_counter()
        kv.kv.read(0, rows, model.device, model.dtype, readings)
        _wait(model)
        whole = (time.perf_counter() - started) * 1e3
        if readings.bad:
            raise CorruptionError(readings.bad[0])
        return readings.read_ms, max(0.0, whole - readings.read_ms)

    one = statistics.median(read(many[:1])[0] for _ in range(REPEATS))
    several = [read(many) for _ in range(REPEATS)]
    some = statistics.median(ms for ms, _ in several)
    unpack = statistics.median(ms for _, ms in several) / max(1, int(kv.kv.tokens(many).sum()))
    slope = max(0.0, (some - one) / max(1, len(many) - 1))
    return max(0.0, one - slope), slope, unpack


def _search(model: VideoModel, kv: Opened) -> float:
    """Ranking the keys of one layer, once they are in memory."""
    query = np.ones(kv.kv.table.key_size, np.float32)
    return _median_ms(lambda: kv.kv.search.search(0, query, 1, rows=kv.blocks), model)


def _median_ms(run: Callable[[], object], model: VideoModel) -> float:
    run()  # the first time pays for what later ones find ready
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        _wait(model)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def _wait(model: VideoModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
