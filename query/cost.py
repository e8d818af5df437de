"""What a plan costs on this machine: a handful of measured figures and the sums over them. No torch.

Each stage's figure is measured by running it (query/measure.py), and corrected by what questions really took:
per stage, the ratio of actual to predicted, as a running mean.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from memdb.paths import cache_dir, write_atomically
from memdb.schemas.plan import MemorySize, Predicted, Sizes

log = logging.getLogger(__name__)

NEWS_WEIGHT = 0.3  # of the newest ratio in the running mean
RATIO_BOUNDS = (0.1, 50.0)  # one question in a swapping machine shall not rule out a mode for ever


@dataclass(frozen=True)
class Holdings:
    """What the recordings in question hold, as far as costs go. Sizes a block are means."""

    blocks: int = 0
    layers: int = 0
    block_tokens: float = 0.0
    slice_bytes: float = 0.0  # one layer of one block, at most
    captions: int = 0
    caption_tokens: int = 0  # of all captions, with the times and names that go before them
    caption_tokens_longest: int = 0  # of the longest
    kv_token_bytes: int = 0  # keys and values of one token over all layers, at the dtype of the question
    init_tokens: int = 0
    context_tokens_max: int = 1 << 62  # of the model
    memory: MemorySize | None = (
        None  # of a recording that has a bounded one; the blocks are for mode recent then
    )
    is_span: bool = False  # only what lies in a span that was named: that nothing does is an answer, too


@dataclass
class Costs:
    """Milliseconds. A forward of T tokens against C remembered ones takes base + token * T + pair * T * C."""

    forward_base: float
    forward_token: float
    forward_pair: float
    read_base: float  # one layer's read, whatever its size
    read_block: float  # and each block of it
    unpack_token: float  # one token of one layer: codes to rotated keys
    search_layer: float  # ranking a layer's keys
    embed: float  # the vector of a question
    captions: float  # ranking captions
    ratios: dict[str, float] = field(default_factory=dict)

    def forward(self, tokens: float, context: float) -> float:
        return self.forward_base + self.forward_token * tokens + self.forward_pair * tokens * context

    def corrected(self, stage: str, ms: float) -> float:
        return ms * self.ratios.get(stage, 1.0)

    def learn(self, predicted: Mapping[str, float], actual: Mapping[str, float]) -> None:
        """Correct the stages by what they took. Both are per stage, `predicted` with the present correction."""
        low, high = RATIO_BOUNDS
        for stage, ms in predicted.items():
            if ms <= 0 or stage not in actual:
                continue
            before = self.ratios.get(stage, 1.0)
            news = min(high, max(low, before * actual[stage] / ms))
            self.ratios[stage] = (1 - NEWS_WEIGHT) * before + NEWS_WEIGHT * news


@dataclass(frozen=True)
class Asked:
    """The sizes of a question, in tokens: alone, and with the prompt around it."""

    question_tokens: int
    prompt_tokens: int
    stamp_tokens_block: float = 0.0  # of time text, a block
    passes: int = 1  # over the layers, until it is known what each of them brings back
    spread: float = 1.0  # blocks of the layer that brings back most, over the mean
    beside_tokens: int = 0  # of captions that `both` reads at most; 0 for as many as captions alone


def predict(mode: str, sizes: Sizes, asked: Asked, held: Holdings, costs: Costs) -> Predicted:
    """What `mode` at `sizes` would take: pure arithmetic over the measured figures."""
    uses_kv = mode in ("kv", "both", "recent")
    uses_captions = mode in ("captions", "both")
    memory = held.memory if mode in ("kv", "both") else None
    blocks = min(sizes.blocks, held.blocks) if uses_kv else 0
    captions = min(sizes.caption_tokens, held.caption_tokens) if uses_captions else 0
    kv_tokens = blocks * held.block_tokens
    ranks = uses_kv and mode != "recent" and memory is None
    passes = asked.passes if ranks and blocks < held.blocks else 1  # where all is taken, one pass is enough
    longest = blocks if passes == 1 else min(held.blocks, math.floor(blocks * asked.spread))
    read_bytes = passes * blocks * held.layers * held.slice_bytes
    if memory is not None:
        blocks = longest = memory.blocks
        kv_tokens, read_bytes = float(memory.tokens), float(memory.read_bytes)
    stamp_tokens = blocks * asked.stamp_tokens_block if memory is None else float(sizes.time_tokens)
    context = held.init_tokens + kv_tokens
    stages: dict[str, float] = {}
    if uses_captions:
        stages["captions"] = costs.embed + costs.captions
    if uses_kv:
        fetch = held.layers * (costs.read_base + costs.read_block * blocks + costs.unpack_token * kv_tokens)
        if mode != "recent" and (memory is None or memory.chosen):
            fetch += held.layers * costs.search_layer + costs.forward(asked.question_tokens, context)
        stages["retrieve"] = passes * fetch
    texts = stamp_tokens + captions
    stages["rebuild"] = costs.forward(texts, context) if texts else 0.0
    if stamp_tokens:  # with stamps everything moves, and is rotated again
        stages["rebuild"] += held.layers * costs.unpack_token * kv_tokens
    context += texts
    stages["prefill"] = costs.forward(asked.prompt_tokens, context)
    stages["decode"] = sizes.answer_tokens * costs.forward(
        1, context + asked.prompt_tokens + sizes.answer_tokens / 2
    )
    context += (longest - blocks) * held.block_tokens
    total_tokens = math.ceil(context + asked.prompt_tokens + sizes.answer_tokens - 1e-6)
    return Predicted(
        stages_ms={stage: costs.corrected(stage, ms) for stage, ms in stages.items()},
        gpu_bytes=total_tokens * held.kv_token_bytes,
        read_bytes=math.ceil(read_bytes),
        context_tokens=total_tokens,
    )


class CostFile:
    """Where measured costs outlive a process: outside every store, so that a question changes none."""

    def __init__(self, key: str) -> None:
        self._path = cache_dir() / "costs" / f"{key}.json"

    def load(self) -> Costs | None:
        try:
            data = json.loads(self._path.read_bytes())
            ratios = {str(stage): float(ratio) for stage, ratio in data.pop("ratios").items()}
            costs = Costs(**{str(name): float(ms) for name, ms in data.items()}, ratios=ratios)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            return None
        figures = [*(ms for ms in vars(costs).values() if isinstance(ms, float)), *ratios.values()]
        return costs if all(math.isfinite(ms) and ms >= 0 for ms in figures) else None

    def save(self, costs: Costs) -> None:
        if not write_atomically(self._path, json.dumps(asdict(costs), indent=1).encode()):
            log.info(
                "measured costs cannot be kept in %s; they are measured again next time", self._path.parent
            )


def cost_key(path: Path, store_id: str, model_fingerprint: str, device: str, dtype: str) -> str:
    """One file a store, model, device and dtype: reading costs belong to the disk that the store lies on."""
    from memdb.schemas.fingerprint import digest_of

    return digest_of(
        {"store": store_id, "path": str(path), "model": model_fingerprint, "device": device, "dtype": dtype}
    )
