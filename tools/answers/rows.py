"""The rows of the table: how each answers, and of which kinds it is asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memdb.query.retrieve.topk import Rows
from memdb.world.questions import KINDS
from tools.answers.tap import Choice, Pick

LAST_FRAMES = 4


@dataclass(frozen=True)
class Row:
    """`mode` as Client.ask has it; `pick` and `content` as the tap has them. `other`: over another seed's recording."""

    name: str
    mode: str
    about: str
    pick: Pick | None = None
    content: str = "stored"
    other: bool = False
    kinds: tuple[str, ...] = KINDS


def last_frames(choice: Choice) -> Rows:
    return choice.held[-LAST_FRAMES:]


def uniform(choice: Choice) -> Rows:
    """As many blocks as retrieval takes, at even distances over all that was seen."""
    count = min(choice.blocks, len(choice.held))
    middles = (np.arange(count) + 0.5) * (len(choice.held) / max(1, count))
    return choice.held[middles.astype(np.int64)]


def at_random(choice: Choice) -> Rows:
    """As many blocks as retrieval takes, drawn anew for each question, the same ones in every layer."""
    draw = np.random.default_rng((choice.seed, choice.truth.number))
    count = min(choice.blocks, len(choice.held))
    return np.sort(draw.choice(choice.held, count, replace=False))


def oracle(choice: Choice) -> Rows:
    """The blocks of the true spans and no others, at most as many as retrieval takes; its own where there are none."""
    if not choice.truth.spans_s:
        return choice.rows
    blocks = choice.table.blocks[choice.held]
    starts, ends = blocks["start_ns"] / 1e9, blocks["end_ns"] / 1e9
    inside = np.zeros(len(blocks), bool)
    for start_s, end_s in choice.truth.spans_s:
        inside |= (starts < end_s) & (ends > start_s)
    rows: Rows = choice.held[inside]
    if len(rows) <= choice.blocks:
        return rows
    return rows[np.linspace(0, len(rows) - 1, choice.blocks).round().astype(np.int64)]


_CONTROL = ("detail",)
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("captions", "captions", "the caption tier alone"),
        Row("kv", "kv", "the KV tier alone"),
        Row("both", "both", "both tiers"),
        Row("auto", "auto", "what the planner chooses"),
        Row("last4", "recent", f"the last {LAST_FRAMES} frames", last_frames),
        Row("uniform", "kv", "as many frames as kv, evenly spread over all that was seen", uniform),
        Row("random", "kv", "as many frames as kv, at random", at_random),
        Row("oracle", "kv", "the frames of the true spans", oracle),
        Row("other", "kv", "control: the recording of another seed", other=True, kinds=_CONTROL),
        Row("zeroed", "kv", "control: keys and values are 0", content="zero", kinds=_CONTROL),
        Row("shuffled", "kv", "control: blocks hold what others held", content="shuffled", kinds=_CONTROL),
    )
}
