"""From a question and the recordings in question to a plan, and to the recording whose KV it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV
from memdb.query import captions as caption_tier
from memdb.query import scope
from memdb.query.cost import Asked, Costs
from memdb.query.memory import Memory, memory_of
from memdb.query.plan import ANSWER_TOKENS_MIN
from memdb.query.plan import plan as make_plan
from memdb.query.retrieve.all import ActivateAll
from memdb.query.retrieve.groups import GroupTopK
from memdb.query.retrieve.layer_adaptive import LayerAdaptive
from memdb.query.retrieve.mmr import CaptionMMR
from memdb.query.retrieve.pages import MemoryPages
from memdb.query.retrieve.topk import BlockTopK
from memdb.query.scope import Opened
from memdb.query.session import Session
from memdb.query.stages import QueryStages, compose
from memdb.query.within import Within
from memdb.schemas.errors import ModelMismatch, NoPlanFits, QuestionError
from memdb.schemas.keep import Ids
from memdb.schemas.plan import Plan, Sizes
from memdb.schemas.question import Question
from memdb.schemas.times import NS_PER_S, format_time, to_ns, to_s


@dataclass(frozen=True, eq=False)
class Decided:
    """What a question will do. `chosen`: the recording whose KV is read; `ranked`: captions ranked already.

    `model`: as it rotates for that recording, by which `init` was computed.
    """

    plan: Plan
    stages: QueryStages
    model: VideoModel
    init: list[LayerKV]
    chosen: Opened | None
    ranked: list[caption_tier.Ranked] | None
    memory: Memory | None = None  # of the chosen recording, where it has one
    newest: bool = False  # the newest of each tier is read, not what resembles the question


def decide(
    session: Session,
    question: Question,
    within: Within,
    ranked: list[caption_tier.Ranked] | None,
    costs: Costs,
    warnings: list[str],
) -> Decided:
    """Choose the recording, then plan. Raises ModelMismatch, QuestionError, NoPlanFits."""
    best, ranked = _choose(within.opened, ranked, warnings)
    chosen = _own_kv(session, question, within.opened, best, warnings)
    decided = _plan(session, question, within, chosen, ranked, costs)
    if decided.memory is not None and decided.plan.mode in ("kv", "both"):
        warnings += [f"an older memory was used: {bad}; run memdb verify" for bad in decided.memory.bad]
    return decided


def plan_what_is_left(
    session: Session, question: Question, within: Within, decided: Decided, costs: Costs
) -> Decided | None:
    """The plan for the other tier, where nothing at all of a plan's own could be read. None where none fits."""
    mode = "kv" if decided.plan.mode == "captions" else "captions"
    if mode == "kv" and decided.chosen is None:
        return None
    try:
        asked = replace(question, mode=mode)
        left = _plan(session, asked, within, decided.chosen, decided.ranked, costs)
    except (NoPlanFits, QuestionError):
        return None
    why = f"nothing that mode {decided.plan.mode} needs could be read"
    return replace(left, plan=replace(left.plan, reasons=(why, *within.reasons)))


def _choose(
    opened: Sequence[Opened],
    ranked: list[caption_tier.Ranked] | None,
    warnings: list[str],
) -> tuple[Opened | None, list[caption_tier.Ranked] | None]:
    """The recording whose KV may be read: the named one, else the one with the best caption and KV."""
    usable = [one for one in opened if len(one.usable_blocks)]
    if len(usable) <= 1 or ranked is None:
        return (usable[0] if usable else None), ranked
    kept: list[caption_tier.Ranked] = []
    best: Opened | None = None
    for candidates, order in ranked:
        seen = list(order)
        kept.append((candidates, iter(seen)))
        for row, _ in seen:
            owner = opened[candidates[row].opened]
            if best is None and len(owner.usable_blocks):
                best = owner
    if best is None:
        best = max(usable, key=lambda one: (one.row.created_ns, one.row.name))
        warnings.append(
            f"several recordings hold KV and no caption says which to read: {best.row.name} was read, as the "
            "newest; name one with recording="
        )
    return best, kept


def _own_kv(
    session: Session,
    question: Question,
    opened: Sequence[Opened],
    chosen: Opened | None,
    warnings: list[str],
) -> Opened | None:
    """The recording whose KV may be read, if this model computed it. Captions are for any model."""
    if chosen is None or chosen.row.spec.model.fingerprint == session.model.identity.fingerprint:
        return chosen
    spec, here = chosen.row.spec, session.model.identity.spec
    made_by = f"{spec.model.spec!r}" + (" with other weights" if spec.model.spec == here else "")
    captions = any(len(one.usable_captions) for one in opened)
    if question.mode in ("kv", "both", "recent") or (question.mode == "auto" and not captions):
        raise ModelMismatch(
            f"the KV of {spec.name!r} was computed by {made_by} and means nothing to {here!r}: ask "
            "with that model" + (", or with mode captions" if captions else "")
        )
    if question.mode == "auto":
        warnings.append(f"the KV here was computed by {made_by}, so {here!r} reads captions only")
    return None


def _plan(
    session: Session,
    question: Question,
    within: Within,
    chosen: Opened | None,
    ranked: list[caption_tier.Ranked] | None,
    costs: Costs,
) -> Decided:
    opened = within.opened
    spec = (chosen or opened[0]).row.spec
    stages = compose(spec.recipe)
    init = session.init(spec)
    head_tokens = session.head_tokens(opened)
    shape, element_bytes = session.model.shape, session.model.dtype.itemsize
    held = scope.holdings(chosen, opened, shape, element_bytes, init[0].tokens, head_tokens)
    ids, prompt_tokens = (
        session.model.encode_text(question.text),
        len(session.model.prompt_ids(question.text)),
    )
    memory = None
    if chosen is not None and isinstance(stages.retrieve, ActivateAll | MemoryPages):
        least = prompt_tokens + min(stages.answer.tokens_max, ANSWER_TOKENS_MIN)
        memory = memory_of(session.store, chosen, session.room(question) - init[0].tokens - least)
        pages = stages.retrieve if isinstance(stages.retrieve, MemoryPages) else None
        size = memory.size(chosen, pages)
        held = replace(held, memory=replace(size, time_tokens=_time_tokens(session, stages, chosen, memory)))
    held = replace(held, is_span=within.is_span)
    kind, why = session.kind(within.text)
    # The recording whose KV is read need not be one that has captions: rekv beside rlivs.
    spoken = [compose(one.row.spec.recipe).retrieve for one in opened if len(one.usable_captions)]
    asked = Asked(
        question_tokens=len(ids),
        prompt_tokens=prompt_tokens,
        stamp_tokens_block=_stamp_tokens(session, stages, chosen),
        passes=2 if isinstance(stages.retrieve, LayerAdaptive) else 1,
        spread=stages.retrieve.spread if isinstance(stages.retrieve, LayerAdaptive) else 1.0,
        beside_tokens=max((each.beside_tokens or each.caption_tokens for each in spoken), default=0),
    )
    full = Sizes(
        blocks=_blocks(stages, chosen),
        caption_tokens=max((each.caption_tokens for each in spoken), default=0),
        answer_tokens=stages.answer.tokens_max,
    )
    plan = make_plan(
        mode=question.mode,
        kind=kind,
        why=why,
        full=full,
        asked=asked,
        held=held,
        costs=costs,
        budget=question.budget,
        recordings=tuple(one.row.name for one in opened),
    )
    newest = plan.mode == "recent" or (
        kind == "now" and isinstance(stages.retrieve, BlockTopK) and stages.retrieve.newest_now
    )
    reasons = plan.reasons + within.reasons
    if newest and plan.mode != "recent":
        reasons += ("it is about this moment: the newest that is stored is read (retrieve.newest_now)",)
    plan = replace(plan, reasons=reasons)
    return Decided(plan, stages, session.rotated(spec), init, chosen, ranked, memory, newest)


def _blocks(stages: QueryStages, chosen: Opened | None) -> int:
    """Blocks a layer, by the recipe."""
    retrieve = stages.retrieve
    if isinstance(retrieve, CaptionMMR):
        return 0
    if isinstance(retrieve, GroupTopK):
        own = chosen.usable_blocks["tokens"] if chosen is not None else None
        return retrieve.groups(int(own.max()) if own is not None and len(own) else 1)
    return retrieve.blocks


def _stamp_tokens(session: Session, stages: QueryStages, chosen: Opened | None) -> float:
    """Tokens of time text a block: about one stamp every `time_text_s` of blocks that stand together."""
    every_s = stages.rebuild.time_text_s
    if not every_s or chosen is None or not len(chosen.usable_blocks):
        return 0.0
    blocks = chosen.usable_blocks
    share = min(1.0, to_s(int(blocks[0]["end_ns"] - blocks[0]["start_ns"])) / every_s)
    return share * _longest_stamp(session, blocks["start_ns"])


def _time_tokens(session: Session, stages: QueryStages, chosen: Opened, memory: Memory) -> int:
    """Tokens of the times that would be written into a memory, at most: no two within `time_text_s`."""
    if not stages.rebuild.time_text_s or not any(len(own.rows) for own in memory.layers):
        return 0
    rows = np.unique(np.concatenate([own.rows for own in memory.layers]))
    starts_ns = np.unique(chosen.kv.table.blocks["start_ns"][rows])
    apart = int(starts_ns[-1] - starts_ns[0]) // to_ns(stages.rebuild.time_text_s) + 1
    return min(apart, len(starts_ns)) * _longest_stamp(session, starts_ns)


def _longest_stamp(session: Session, starts_ns: Ids) -> int:
    """Tokens of a time as text, as long as it gets: with a fraction, which takes more signs, if any start has one."""
    latest_s = to_s(int(starts_ns.max())) // 1
    if (starts_ns % NS_PER_S).any():
        latest_s += 0.5
    return len(session.model.encode_text(f"[{format_time(latest_s)}]"))
