"""The planner: a pure function of question kind, budget, what is held and measured costs. No torch.

A first, honest one. For each kind of question it has an order of modes, most fitting first; it takes the first
that fits the budget, shrinking a mode's sizes before it leaves it. It explains itself, and says what it rejected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from memdb.query.cost import Asked, Costs, Holdings, predict
from memdb.schemas.errors import NoPlanFits, QuestionError
from memdb.schemas.plan import Plan, Predicted, Rejected, Sizes
from memdb.schemas.question import Budget

# Captions hold the gist, KV the detail; counting, order and times need the long view and the detail.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "gist": ("captions", "both", "kv", "recent"),
    "detail": ("kv", "both", "captions", "recent"),
    "place": ("kv", "both", "captions", "recent"),
    "motion": ("kv", "both", "captions", "recent"),
    "count": ("both", "captions", "kv", "recent"),
    "order": ("both", "captions", "kv", "recent"),
    "when": ("both", "captions", "kv", "recent"),
    "absent": ("both", "kv", "captions", "recent"),
    "now": ("recent", "kv", "both", "captions"),
}
# A mode is shrunk to an eighth before the next one is tried at full size, and to its smallest when none of them
# fits that way.
SHRINK = (1.0, 0.5, 0.25, 0.125)
SHRINK_FURTHER = (1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 1024, 0.0)
CAPTION_TOKENS_MIN = 32
ANSWER_TOKENS_MIN = 8


def plan(
    *,
    mode: str,
    kind: str,
    why: str,
    full: Sizes,
    asked: Asked,
    held: Holdings,
    costs: Costs,
    budget: Budget,
    recordings: tuple[str, ...],
) -> Plan:
    """The plan for a question. `full` are the recipe's sizes; `why` says how the kind was found.

    Raises QuestionError for a question that leaves no room in the model's context, and for a mode whose tier is
    not stored; NoPlanFits, with the nearest budget that would do, when nothing fits.
    """
    room = min(held.context_tokens_max, budget.context_tokens_max or held.context_tokens_max)
    order = PREFERENCE[kind] if mode == "auto" else (mode,)
    reasons = [why if mode == "auto" else f"mode {mode} was asked for"]
    missing = {candidate: _missing(candidate, full, held) for candidate in order}
    usable = [candidate for candidate in order if not missing[candidate]]
    if not usable:
        raise QuestionError(f"mode {order[0]} cannot answer here: {missing[order[0]]}")
    first = {candidate: _limited(candidate, full, asked, held, room) for candidate in usable}
    rejected = [
        Rejected(candidate, full, 0.0, missing[candidate]) for candidate in order if missing[candidate]
    ]

    chosen: tuple[str, Sizes, Predicted, float] | None = None
    for candidate, sizes, scale in _candidates(usable, first, held):
        predicted = predict(candidate, sizes, asked, held, costs)
        over = _over(predicted, budget, room)
        if not over:
            chosen = candidate, sizes, predicted, scale
            break
        if scale == 1.0:
            rejected.append(Rejected(candidate, sizes, predicted.total_ms, over))
    if chosen is None:
        raise _nothing_fits(usable, first, asked, held, costs, budget, room)

    taken, sizes, predicted, scale = chosen
    if mode == "auto":
        reasons.append(
            f"{taken} is the best mode for {kind} questions that is stored here and fits the budget"
        )
    if scale < 1.0:
        reasons.append(f"its sizes were shrunk to {scale:g} of the recipe's until the budget was met")
    tried = {other.mode for other in rejected}
    for candidate in usable:
        if candidate != taken and candidate not in tried:
            other = predict(candidate, first[candidate], asked, held, costs)
            rank = f"ranked behind {taken} for {kind} questions"
            rejected.append(Rejected(candidate, first[candidate], other.total_ms, rank))
    return Plan(taken, kind, sizes, predicted, tuple(reasons), tuple(rejected), recordings)


def _missing(mode: str, full: Sizes, held: Holdings) -> str:
    if held.is_span and not held.blocks and not held.captions:
        return ""  # any mode can say so
    if mode in ("kv", "both", "recent") and not held.blocks:
        return "no KV is stored up to this moment"
    if mode in ("kv", "both") and held.memory is not None and not held.memory.tokens:
        return "nothing is left of the memory of this moment"
    if mode in ("captions", "both") and not held.captions:
        return "no captions are stored up to this moment"
    if mode in ("captions", "both") and not full.caption_tokens:
        return "the recipe takes no captions (retrieve.caption_tokens = 0)"
    return ""


def _limited(mode: str, full: Sizes, asked: Asked, held: Holdings, room: int) -> Sizes:
    """The recipe's sizes, cut to what is held and to what the context has room for; a share each in `both`.

    Never less than the smallest sizes, which may then be too large: the prediction says so.
    """
    memory = held.memory if mode in ("kv", "both") else None
    blocks = min(full.blocks, held.blocks) if mode != "captions" else 0
    captions = min(full.caption_tokens, held.caption_tokens) if mode in ("captions", "both") else 0
    if mode == "both" and asked.beside_tokens:
        captions = min(captions, asked.beside_tokens)
    whole = Sizes(blocks, captions, full.answer_tokens)
    free = max(0, room - held.init_tokens - asked.prompt_tokens)
    answer = min(full.answer_tokens, max(ANSWER_TOKENS_MIN, free // 4))
    free = max(0, free - answer)
    if memory is not None:  # all of it, or another mode: what is left is for captions
        least = _scaled(whole, 0.0, held)
        captions = max(min(captions, max(0, free - memory.tokens)), least.caption_tokens)
        times = min(memory.time_tokens, max(0, free - memory.tokens - captions))
        return Sizes(memory.blocks, captions, answer, times)
    spread = asked.spread if mode != "recent" and blocks < held.blocks else 1.0
    block_tokens = max(1.0, spread * held.block_tokens + asked.stamp_tokens_block)
    wanted = blocks * block_tokens + captions
    if wanted > free:
        scale = free / wanted
        blocks, captions = int(blocks * scale), int(captions * scale)
    least = _scaled(whole, 0.0, held)
    return Sizes(max(blocks, least.blocks), max(captions, least.caption_tokens), answer)


def _candidates(
    usable: list[str], first: dict[str, Sizes], held: Holdings
) -> Iterator[tuple[str, Sizes, float]]:
    for scales in (SHRINK, SHRINK_FURTHER):
        for candidate in usable:
            for scale in scales:
                sizes = _scaled(first[candidate], scale, held)
                if held.memory is not None and candidate in ("kv", "both"):
                    sizes = replace(sizes, blocks=held.memory.blocks)
                yield candidate, sizes, scale


def _scaled(sizes: Sizes, scale: float, held: Holdings) -> Sizes:
    """Smaller sizes; what is taken at all never falls to nothing: one block, and any one of the captions."""
    one_caption = max(CAPTION_TOKENS_MIN, held.caption_tokens_longest + 1)
    return Sizes(
        blocks=max(1, int(sizes.blocks * scale)) if sizes.blocks else 0,
        caption_tokens=min(sizes.caption_tokens, max(one_caption, int(sizes.caption_tokens * scale))),
        answer_tokens=min(sizes.answer_tokens, max(ANSWER_TOKENS_MIN, int(sizes.answer_tokens * scale))),
        time_tokens=int(sizes.time_tokens * scale),
    )


def _over(predicted: Predicted, budget: Budget, room: int) -> str:
    """Which budget a prediction breaks, with figures; '' for none."""
    if budget.latency_ms_max is not None and predicted.total_ms > budget.latency_ms_max:
        return f"predicted {predicted.total_ms:.1f} ms of latency, more than {budget.latency_ms_max:g}"
    if budget.gpu_bytes_max is not None and predicted.gpu_bytes > budget.gpu_bytes_max:
        return (
            f"its context takes {predicted.gpu_bytes} bytes, more than gpu_bytes_max {budget.gpu_bytes_max}"
        )
    if budget.read_bytes_max is not None and predicted.read_bytes > budget.read_bytes_max:
        return f"it reads {predicted.read_bytes} bytes, more than read_bytes_max {budget.read_bytes_max}"
    if predicted.context_tokens > room:
        return f"its context takes {predicted.context_tokens} tokens, more than {room}"
    return ""


def _nothing_fits(
    usable: list[str],
    first: dict[str, Sizes],
    asked: Asked,
    held: Holdings,
    costs: Costs,
    budget: Budget,
    room: int,
) -> NoPlanFits:
    """The error, with the smallest budget above the one given that a mode at its smallest sizes would meet."""
    smallest = [(mode, predict(mode, _scaled(first[mode], 0.0, held), asked, held, costs)) for mode in usable]
    possible = [pair for pair in smallest if pair[1].context_tokens <= held.context_tokens_max]
    if not possible:
        raise QuestionError(
            f"the question takes {asked.prompt_tokens} tokens, and with {held.init_tokens} before it, the least "
            f"of what is remembered and an answer that is more than the model's context of "
            f"{held.context_tokens_max}: shorten it"
        )
    mode, least = min(possible, key=lambda pair: _excess(pair[1], budget))
    nearest: dict[str, float | int] = {}
    for name, value, needed in (
        ("latency_ms_max", budget.latency_ms_max, least.total_ms),
        ("gpu_bytes_max", budget.gpu_bytes_max, least.gpu_bytes),
        ("read_bytes_max", budget.read_bytes_max, least.read_bytes),
        ("context_tokens_max", budget.context_tokens_max, least.context_tokens),
    ):
        if value is not None:
            margin = 1.1 if name == "latency_ms_max" else 1  # milliseconds are a median, the others a bound
            nearest[name] = value if needed <= value else math.ceil(needed * margin)
    named = ", ".join(f"{name} {value}" for name, value in nearest.items())
    return NoPlanFits(
        f"no plan fits the budget: the nearest is mode {mode} at its smallest, and {_over(least, budget, room)}; "
        f"the nearest budget that would do is {named}",
        nearest=nearest,
    )


def _excess(predicted: Predicted, budget: Budget) -> float:
    """How many times over the budget a prediction is, where it is furthest over."""
    needs = {
        "latency_ms_max": predicted.total_ms,
        "gpu_bytes_max": predicted.gpu_bytes,
        "read_bytes_max": predicted.read_bytes,
        "context_tokens_max": predicted.context_tokens,
    }
    limits = budget.as_json()
    return max((need / limit for name, need in needs.items() if (limit := limits[name])), default=0.0)
