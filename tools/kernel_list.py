"""The kernels that can be run alone, with their arrays. One entry a kernel; `tools/kernels.md` is written from it.

A kernel is added by a function here, from arrays to arrays, and a row in KERNELS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memdb.index.mean_key import fold
from memdb.query.retrieve.mmr import mmr_order, within_budget
from memdb.retain.attention import attention_rows, importance
from memdb.retain.pages import Pages, page_keys, page_scores
from memdb.retain.prototypes import prototypes
from memdb.retain.select_kv import exact_counts, guidance_scores, top_blocks
from memdb.retain.select_kv_code import code_compress_counts, code_retrieve_counts
from memdb.retain.tar_van import TarVan
from memdb.retain.tar_van_code import code_choice
from memdb.retain.template import Template
from memdb.retain.view import LayerView
from memdb.retain.vision_sink import VisionSink
from memdb.schemas.errors import UsageError
from memdb.schemas.units import BlockKind
from tools import kernel_reduce

Array = npt.NDArray[Any]
FLOATS, INTS, BOOLS, BYTES = "float16/32/64", "int64", "bool", "uint8"


@dataclass(frozen=True)
class Spec:
    """One array: its kind, its shape as letters, and its value where it may be left out.

    No letters are a single number; "..." in front of them stands for any sizes.
    """

    kind: str
    shape: str
    default: float | int | bool | None = None
    optional: bool = False

    @property
    def open(self) -> bool:
        return self.shape.startswith("...")

    @property
    def letters(self) -> list[str]:
        """A letter for each size, those that are any left out."""
        return [letter for letter in self.shape.split() if letter != "..."]


@dataclass(frozen=True)
class Kernel:
    """`run` takes the inputs by name, arrays as tensors and single numbers as Python's, and gives the outputs."""

    about: str
    run: Callable[..., dict[str, Tensor | Array]]
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]


def _rows(scores: Tensor, blocks: Tensor | None) -> list[Tensor]:
    """Scores (L, T) -> a vector a layer; layers may hold fewer than T blocks."""
    if blocks is None:
        return list(scores)
    if len(blocks) and not 1 <= int(blocks.min()) <= int(blocks.max()) <= scores.shape[1]:
        raise UsageError(f"blocks = {blocks.tolist()}: give 1 to {scores.shape[1]} of each layer")
    return [row[: int(count)] for row, count in zip(scores, blocks, strict=True)]


def _chosen(scores: Tensor, rows: list[Tensor], counts: list[int]) -> dict[str, Tensor | Array]:
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for layer, places in enumerate(top_blocks(rows, counts)):
        kept[layer, places] = True
    return {"counts": torch.tensor(counts), "kept": kept}


def _select_kv_compress(
    scores: Tensor, keep: float, band: float, stable: bool, blocks: Tensor | None = None
) -> dict[str, Tensor | Array]:
    rows = _rows(scores, blocks)
    return _chosen(scores, rows, code_compress_counts(rows, keep, band, stable=stable))


def _select_kv_retrieve(
    scores: Tensor, retrieve: int, band: float, stable: bool, blocks: Tensor | None = None
) -> dict[str, Tensor | Array]:
    rows = _rows(scores, blocks)
    return _chosen(scores, rows, code_retrieve_counts(rows, retrieve, band, stable=stable))


def _select_kv_exact(
    scores: Tensor, total: int, z_scores: bool, blocks: Tensor | None = None
) -> dict[str, Tensor | Array]:
    rows = _rows(scores, blocks)
    return _chosen(scores, rows, exact_counts(rows, total, z_scores=z_scores))


def _guidance_scores(q: Tensor, keys: Tensor) -> dict[str, Tensor | Array]:
    return {sim: guidance_scores(q, keys, sim) for sim in ("dot", "cos")}


def _tar_van_code(
    k: Tensor, v: Tensor, frame_tokens: int, frames_kept: int, **options: Any
) -> dict[str, Any]:
    return {"kept": code_choice(k, v, frame_tokens, frames_kept, **options)}


def _view(
    k: Tensor,
    v: Tensor,
    position: Tensor,
    frame: Tensor,
    patch: Tensor,
    grid: tuple[int, int],
    received: Tensor | None = None,
    prototype: Tensor | None = None,
) -> LayerView:
    kind = torch.full((len(frame),), int(BlockKind.FRAME))
    if prototype is not None:
        kind[prototype] = int(BlockKind.PROTOTYPE)
    return LayerView(k, v, position, frame, patch, kind, grid, received)


def _tar_van(
    k: Tensor,
    v: Tensor,
    frame: Tensor,
    patch: Tensor,
    rows: int,
    columns: int,
    budget_tokens: int,
    tar: float,
    recent: float,
    pooling: Tensor | None = None,
) -> dict[str, Tensor | Array]:
    limits = "none" if pooling is None else ",".join(str(float(limit)) for limit in pooling)
    method = TarVan(budget_tokens, tar=tar, recent=recent, pooling=limits)
    return {"kept": method.choose(_view(k, v, torch.arange(len(frame)), frame, patch, (rows, columns)))}


def _scored(position: Tensor, frame: Tensor, received: Tensor, prototype: Tensor | None = None) -> LayerView:
    """A view for methods that look at no keys and no values."""
    T = len(position)
    blank = torch.zeros(1, T, 1)
    return _view(blank, blank, position, frame, torch.zeros(T, 2).long(), (1, 1), received, prototype)


def _vision_sink(
    importance: Tensor,
    position: Tensor,
    budget_tokens: int,
    bucket_tokens: int,
    top: float,
    frame: Tensor | None = None,
) -> dict[str, Tensor | Array]:
    method = VisionSink(budget_tokens, bucket_tokens, top)
    return {"kept": method.choose(_scored(position, position if frame is None else frame, importance))}


def _template(
    importance: Tensor, frame: Tensor, prototype: Tensor, budget_tokens: int, prototype_share: float
) -> dict[str, Tensor | Array]:
    method = Template(budget_tokens, prototype_share)
    return {"kept": method.choose(_scored(torch.arange(len(frame)), frame, importance, prototype))}


def _prototypes(k: Tensor, v: Tensor, importance: Tensor, frame: Tensor, position: Tensor) -> dict[str, Any]:
    found = prototypes(k, v, importance, frame, position)
    return {name: getattr(found, name) for name in ("k", "v", "position", "frame", "mass")}


def _attention_rows(q: Tensor, k: Tensor, scale: float) -> dict[str, Tensor | Array]:
    scale = q.shape[-1] ** -0.5 if math.isnan(scale) else scale
    return {"rows": attention_rows(q, k, scale), "importance": importance(q, k, scale)}


def _pages(q: Tensor, k: Tensor, page_tokens: int, ratio: float) -> dict[str, Tensor | Array]:
    keys = page_keys(k, page_tokens)
    chosen = Pages(page_tokens, ratio).choose(q, keys)
    return {"keys": keys, "scores": page_scores(q, keys), "chosen": chosen}


def _gqa_fold(q: Tensor, kv_heads: int) -> dict[str, Tensor | Array]:
    return {"vector": fold(q, kv_heads)}


def _mmr(
    vectors: Tensor, query: Tensor, tokens: Tensor, relevance: float, budget_tokens: int
) -> dict[str, Tensor | Array]:
    order = list(mmr_order(vectors.float().numpy(), query.float().numpy(), relevance))
    chosen = within_budget(iter(order), [int(count) for count in tokens], budget_tokens)
    return {
        "order": np.array([row for row, _ in order], np.int64),
        "cosine": np.array([cosine for _, cosine in order], np.float32),
        "chosen": np.array([row for row, _ in chosen], np.int64),
    }


_SCORES = {"scores": Spec(FLOATS, "L T"), "blocks": Spec(INTS, "L", optional=True)}
_STABLE = {"stable": Spec(BOOLS, "", False)}
_KEPT_BLOCKS = {"counts": Spec(INTS, "L"), "kept": Spec(BOOLS, "L T")}
_KEPT = {"kept": Spec(INTS, "kept")}
_QK = {"q": Spec(FLOATS, "Hq r D"), "k": Spec(FLOATS, "H T D")}
_KV = {"k": Spec(FLOATS, "H T D"), "v": Spec(FLOATS, "H T D")}

_RELEASED = {"released": Spec(BOOLS, "", True)}

KERNELS: dict[str, Kernel] = {
    "attention_rows": Kernel(
        "Attention of probe rows over all keys, no mask, and its mean over heads and rows. `scale` is 1/sqrt(D) "
        "where it is left out (StreamMem, LiveVLM)",
        _attention_rows,
        {**_QK, "scale": Spec(FLOATS, "", math.nan)},
        {"rows": Spec("float32", "Hq r T"), "importance": Spec("float32", "T")},
    ),
    "ctr": Kernel(
        "CTR: frames to `tokens` tokens each. `before`: the raw frame before them; `jitter`: added to the density of "
        "each place, 0 where left out; `released`: the released delta, else the textbook's (StreamingTOM)",
        kernel_reduce.ctr,
        {
            "frames": Spec(FLOATS, "F N E"),
            "saliency": Spec(FLOATS, "F N"),
            "before": Spec(FLOATS, "N E", optional=True),
            "jitter": Spec(FLOATS, "F N", optional=True),
            "tokens": Spec(INTS, "", 50),
            "tau": Spec(FLOATS, "", 0.9),
            "neighbours": Spec(INTS, "", 7),
            "beta": Spec(FLOATS, "", 0.6),
            **_RELEASED,
        },
        {"tokens": Spec(FLOATS, "F G E"), "raster": Spec(INTS, "F G"), "static": Spec(BOOLS, "F N")},
    ),
    "dpc": Kernel(
        "Density peaks: which points are centres; `jitter` and `released` as in ctr (StreamingTOM)",
        kernel_reduce.dpc,
        {
            "points": Spec(FLOATS, "n E"),
            "clusters": Spec(INTS, ""),
            "neighbours": Spec(INTS, "", 7),
            "jitter": Spec(FLOATS, "n", optional=True),
            **_RELEASED,
        },
        {"centres": Spec(INTS, "clusters")},
    ),
    "gqa_fold": Kernel(
        "Mean over tokens, sum over the heads of a group: its product with a mean key equals that of repeated keys "
        "(ReKV, StreamKV)",
        _gqa_fold,
        {"q": Spec(FLOATS, "Hq r D"), "kv_heads": Spec(INTS, "")},
        {"vector": Spec("float32", "H*D")},
    ),
    "guidance_scores": Kernel(
        "Scores of blocks by the mean query of a prompt: raw product (released code) and cosine of the repeated "
        "vectors (paper) (StreamKV)",
        _guidance_scores,
        {"q": Spec(FLOATS, "Hq r D"), "keys": Spec(FLOATS, "blocks H*D")},
        {"dot": Spec("float32", "blocks"), "cos": Spec("float32", "blocks")},
    ),
    "mmr": Kernel(
        "Captions by maximal marginal relevance, and those within the token budget, in that order (rLiVS)",
        _mmr,
        {
            "vectors": Spec(FLOATS, "n E"),
            "query": Spec(FLOATS, "E"),
            "tokens": Spec(INTS, "n"),
            "relevance": Spec(FLOATS, "", 0.5),
            "budget_tokens": Spec(INTS, "", 10_000),
        },
        {"order": Spec(INTS, "n"), "cosine": Spec("float32", "n"), "chosen": Spec(INTS, "chosen")},
    ),
    "oqm_pack": Kernel(
        "Keys or values of a group to codes of 4 or 2 bits, the first token in the lowest, and a scale and a minimum "
        "a channel, all in the kind of x; codes are 0 where a scale is 0 (StreamingTOM)",
        kernel_reduce.oqm_pack,
        {"x": Spec(FLOATS, "... G D"), "bits": Spec(INTS, "", 4)},
        {
            "packed": Spec(BYTES, "... bytes D"),
            "scale": Spec(FLOATS, "... D"),
            "minimum": Spec(FLOATS, "... D"),
        },
    ),
    "oqm_unpack": Kernel(
        "Inverse of oqm_pack; `tokens`: of the group (StreamingTOM)",
        kernel_reduce.oqm_unpack,
        {
            "packed": Spec(BYTES, "... bytes D"),
            "scale": Spec(FLOATS, "... D"),
            "minimum": Spec(FLOATS, "... D"),
            "tokens": Spec(INTS, ""),
            "bits": Spec(INTS, "", 4),
        },
        {"x": Spec(FLOATS, "... G D")},
    ),
    "pages": Kernel(
        "Mean unrotated keys of pages of retained tokens, their scores, the pages that are read (LiveVLM, PaR)",
        _pages,
        {**_QK, "page_tokens": Spec(INTS, "", 16), "ratio": Spec(FLOATS, "", 0.4)},
        {
            "keys": Spec("float32", "pages H D"),
            "scores": Spec("float32", "pages"),
            "chosen": Spec(INTS, "chosen"),
        },
    ),
    "prototypes": Kernel(
        "One token a frame, weighted by importance, of unrotated keys (StreamMem)",
        _prototypes,
        {
            **_KV,
            "importance": Spec(FLOATS, "T"),
            "frame": Spec(INTS, "T"),
            "position": Spec(INTS, "T"),
        },
        {
            "k": Spec(FLOATS, "H F D"),
            "v": Spec(FLOATS, "H F D"),
            "position": Spec(INTS, "F"),
            "frame": Spec(INTS, "F"),
            "mass": Spec("float32", "F"),
        },
    ),
    "segment": Kernel(
        "Semantic segments with merging inside: units, the frames that each stands for (both included), and the "
        "number of its segment (StreamKV)",
        kernel_reduce.segment,
        {
            "features": Spec(FLOATS, "T N E"),
            "theta": Spec(FLOATS, "", 0.99),
            "frames_min": Spec(INTS, "", 4),
            "frames_max": Spec(INTS, "", 64),
        },
        {
            "units": Spec(FLOATS, "U N E"),
            "first": Spec(INTS, "U"),
            "last": Spec(INTS, "U"),
            "segment": Spec(INTS, "U"),
        },
    ),
    "select_kv_compress": Kernel(
        "SelectKV as released, compression: `keep` is the share that stays; band [max(1, int(T keep (1 - band))), "
        "min(T, int(T keep (1 + band)))]; T is the longest layer (StreamKV)",
        _select_kv_compress,
        {**_SCORES, "keep": Spec(FLOATS, "", 0.6), "band": Spec(FLOATS, "", 1.0), **_STABLE},
        _KEPT_BLOCKS,
    ),
    "select_kv_exact": Kernel(
        "SelectKV with an exact total: of scores as they are (paper, `z_scores` false) or of z-scores (fixed)",
        _select_kv_exact,
        {**_SCORES, "total": Spec(INTS, ""), "z_scores": Spec(BOOLS, "", True)},
        _KEPT_BLOCKS,
    ),
    "select_kv_retrieve": Kernel(
        "SelectKV as released, retrieval: `retrieve` blocks a layer on average; band [max(retrieve (1 - band), 1), "
        "min(retrieve (1 + band), 128)] (StreamKV)",
        _select_kv_retrieve,
        {**_SCORES, "retrieve": Spec(INTS, "", 64), "band": Spec(FLOATS, "", 0.5), **_STABLE},
        _KEPT_BLOCKS,
    ),
    "tar_van": Kernel(
        "TaR + VaN with true frames and patches, one set for all heads. `pooling`: three limits, no pooling where "
        "left out (InfiniPot-V)",
        _tar_van,
        {
            **_KV,
            "frame": Spec(INTS, "T"),
            "patch": Spec(INTS, "T 2"),
            "rows": Spec(INTS, ""),
            "columns": Spec(INTS, ""),
            "budget_tokens": Spec(INTS, ""),
            "tar": Spec(FLOATS, "", 0.5),
            "recent": Spec(FLOATS, "", 0.25),
            "pooling": Spec(FLOATS, "3", optional=True),
        },
        _KEPT,
    ),
    "tar_van_code": Kernel(
        "TaR + VaN as released, a set for each head, on keys as cached (rotated), without the system prompt. "
        "`rows`: of the patch map, for pooling (InfiniPot-V)",
        _tar_van_code,
        {
            **_KV,
            "frame_tokens": Spec(INTS, ""),
            "frames_kept": Spec(INTS, ""),
            "tar": Spec(FLOATS, "", 0.5),
            "recent": Spec(FLOATS, "", 0.25),
            "pooling": Spec(BOOLS, "", False),
            "rows": Spec(INTS, "", 14),
            "layer": Spec(INTS, "", 0),
            "layers": Spec(INTS, "", 28),
            **_STABLE,
        },
        {"kept": Spec(INTS, "H kept")},
    ),
    "template": Kernel(
        "Old and new tokens by importance, prototypes first up to their share (StreamMem)",
        _template,
        {
            "importance": Spec(FLOATS, "T"),
            "frame": Spec(INTS, "T"),
            "prototype": Spec(BOOLS, "T"),
            "budget_tokens": Spec(INTS, ""),
            "prototype_share": Spec(FLOATS, "", 0.25),
        },
        _KEPT,
    ),
    "vision_sink": Kernel(
        "The best `top` of the budget, then buckets over original positions, which ascend. Without `frame` every token "
        "is a frame of its own: of equals the newest stays (LiveVLM, VSB)",
        _vision_sink,
        {
            "importance": Spec(FLOATS, "T"),
            "position": Spec(INTS, "T"),
            "frame": Spec(INTS, "T", optional=True),
            "budget_tokens": Spec(INTS, ""),
            "bucket_tokens": Spec(INTS, "", 1),
            "top": Spec(FLOATS, "", 0.5),
        },
        _KEPT,
    ),
}


def table() -> str:
    """The list of kernels as Markdown."""
    lines = []
    for name, kernel in KERNELS.items():
        lines += [f"## {name}", "", f"{kernel.about}.", "", "| | array | kind | shape | if left out |"]
        lines.append("|---|---|---|---|---|")
        for way, specs in (("in", kernel.inputs), ("out", kernel.outputs)):
            lines += [_line(way, array, spec) for array, spec in specs.items()]
        lines.append("")
    return "\n".join(lines)


def _line(way: str, array: str, spec: Spec) -> str:
    shape = f"({spec.shape.replace(' ', ', ')})" if spec.shape else "()"
    left_out = "" if spec.default is None else "1/sqrt(D)" if spec.default != spec.default else spec.default
    return f"| {way} | {array} | {spec.kind} | {shape} | {'may be' if spec.optional else left_out} |"
