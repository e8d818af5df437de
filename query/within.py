"""What of the recordings a question may use where it is about a span: what overlaps it, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memdb.index.key_table import overlaps
from memdb.query.scope import Opened
from memdb.query.spans import Named, named
from memdb.schemas.errors import BudgetError
from memdb.schemas.question import Question
from memdb.schemas.times import format_time, to_s


@dataclass(frozen=True)
class Within:
    """The recordings as they may be used. `text` is the question without its times: what its kind is told from.

    `is_span`: whether only a span of them is left, in which there may be nothing. `reasons` are for the plan.
    """

    opened: Sequence[Opened]
    text: str
    is_span: bool = False
    reasons: tuple[str, ...] = ()


def restrict(question: Question, opened: Sequence[Opened], warnings: list[str]) -> Within:
    """Keep what overlaps the span that is asked for, else the one that the question names; all without either.

    A block or a caption that only reaches into the span is taken whole. Mode recent looks at the newest frames
    whatever is named, with a warning.
    """
    asked = question.start_ns is not None or question.end_ns is not None
    said = None if asked else named(question.text)
    if not asked and said is None:
        return Within(opened, question.text)
    if question.mode == "recent":
        warnings.append("mode recent looks at the newest frames only, not at the times that were named")
        return Within(opened, question.text)
    kept, spans = [], []
    for one in opened:
        try:
            start_ns, end_ns = _bounds(question, said, one)
        except BudgetError as error:
            warnings.append(f"{one.row.name} was searched as a whole: {error}")
            kept.append(one)
            continue
        kept.append(_overlapping(one, start_ns, end_ns))
        spans.append(_told(start_ns, end_ns))
    if not spans:
        return Within(opened, question.text)
    span = " or ".join(dict.fromkeys(spans))
    if all(one.is_empty for one in kept):
        last = format_time(round(to_s(max(one.watermark_ns for one in opened)), 3))
        warnings.append(f"nothing is kept {span}: what was seen reaches to {last}")
    blocks, captions = (
        sum(int(one.blocks.sum()) for one in kept),
        sum(int(one.captions.sum()) for one in kept),
    )
    why = f"the question says {said.words!r}" if said is not None else "a span was asked for"
    reason = f"{why}: only what was seen {span} is used, {blocks} blocks and {captions} captions"
    return Within(kept, said.rest if said is not None else question.text, True, (reason,))


def _bounds(question: Question, said: Named | None, one: Opened) -> tuple[int | None, int | None]:
    if said is None:
        return question.start_ns, question.end_ns
    return said.bounds_ns(one.row.spec.started_at_ns, one.watermark_ns)


def _overlapping(one: Opened, start_ns: int | None, end_ns: int | None) -> Opened:
    masks = [
        mask & overlaps(table, start_ns, end_ns)
        for mask, table in ((one.blocks, one.kv.table.blocks), (one.captions, one.kv.table.captions))
    ]
    return replace(one, blocks=masks[0], captions=masks[1])


def _told(start_ns: int | None, end_ns: int | None) -> str:
    start, end = (None if ns is None else format_time(round(to_s(ns), 3)) for ns in (start_ns, end_ns))
    if start is None:
        return f"before {end}"
    return f"from {start} on" if end is None else f"from {start} to {end}"
