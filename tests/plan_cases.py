"""Costs, holdings and budgets for tests of the planner: fixed ones, and hypothesis strategies for any."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from memdb.query.cost import Asked, Costs, Holdings
from memdb.query.plan import plan
from memdb.schemas.plan import KINDS, Plan, Sizes
from memdb.schemas.question import Budget

# Round figures: 1 ms a forward, 0.1 ms a block and layer, and so on.
COSTS = Costs(
    forward_base=1.0,
    forward_token=0.01,
    forward_pair=1e-5,
    read_base=0.2,
    read_block=0.1,
    unpack_token=0.001,
    search_layer=0.05,
    embed=5.0,
    captions=2.0,
)
HELD = Holdings(
    blocks=500,
    layers=4,
    block_tokens=16.0,
    slice_bytes=2048.0,
    captions=40,
    caption_tokens=1200,
    caption_tokens_longest=35,
    kv_token_bytes=4096,
    init_tokens=12,
    context_tokens_max=32_768,
)
FULL = Sizes(blocks=64, caption_tokens=1000, answer_tokens=64)
ASKED = Asked(question_tokens=7, prompt_tokens=15, stamp_tokens_block=2.0)


def planned(
    budget: Budget | None = None, *, mode: str = "auto", kind: str = "detail", **changes: Any
) -> Plan:
    values: dict[str, Any] = {
        "full": FULL,
        "asked": ASKED,
        "held": HELD,
        "costs": COSTS,
        "why": "the test says so",
        "recordings": ("lobby",),
    }
    return plan(mode=mode, kind=kind, budget=budget or Budget(), **(values | changes))


def figures(low: float = 0.0, high: float = 20.0) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


costs = st.builds(
    Costs,
    forward_base=figures(1e-3),
    forward_token=figures(0, 1),
    forward_pair=figures(0, 1e-3),
    read_base=figures(),
    read_block=figures(0, 5),
    unpack_token=figures(0, 0.1),
    search_layer=figures(0, 5),
    embed=figures(),
    captions=figures(0, 100),
    ratios=st.dictionaries(
        st.sampled_from(["captions", "retrieve", "rebuild", "prefill", "decode"]), figures(0.1, 50)
    ),
)


@st.composite
def holdings(draw: st.DrawFn) -> Holdings:
    """Something is held: blocks, captions or both."""
    blocks = draw(st.integers(0, 5000))
    captions = draw(st.integers(0 if blocks else 1, 300))
    longest = draw(st.integers(1, 80)) if captions else 0
    total = captions and max(longest, draw(st.integers(captions, captions * longest)))
    return Holdings(
        blocks=blocks,
        layers=draw(st.integers(1, 28)),
        block_tokens=draw(figures(1, 200)) if blocks else 0.0,
        slice_bytes=draw(figures(64, 1e5)) if blocks else 0.0,
        captions=captions,
        caption_tokens=total,
        caption_tokens_longest=longest,
        kv_token_bytes=draw(st.integers(64, 60_000)),
        init_tokens=draw(st.integers(0, 40)),
        context_tokens_max=draw(st.integers(1024, 40_000)),
    )


asked = st.builds(
    Asked,
    question_tokens=st.integers(1, 60),
    prompt_tokens=st.integers(60, 200),
    stamp_tokens_block=figures(0, 12),
)
sizes = st.builds(
    Sizes,
    blocks=st.integers(1, 256),
    caption_tokens=st.integers(0, 20_000),
    answer_tokens=st.integers(1, 256),
)
kinds = st.sampled_from(KINDS)


def limits(low: int, high: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(low, high)


budgets = st.builds(
    Budget,
    latency_ms_max=limits(1, 20_000),
    gpu_bytes_max=limits(1, 1 << 31),
    read_bytes_max=limits(1, 1 << 30),
    context_tokens_max=limits(1, 30_000),
)
