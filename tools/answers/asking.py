"""Every question in every row, through Client.ask."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from memdb.schemas.answer import Answer
from memdb.schemas.errors import MemdbError
from memdb.world.questions import Question
from tools.answers.ground import OTHER, Ground, drop_cache, ground
from tools.answers.job import Ingested, Job, Outcome, Tell
from tools.answers.rows import ROWS, Row
from tools.answers.tap import Truth

log = logging.getLogger(__name__)

PAIRED = ("kv", "both")  # rows in which the other codecs are asked
NO_SPANS = ("count", "absent", "now")  # kinds of which the evidence is not one place to find


def run(job: Job, tell: Tell) -> tuple[list[Outcome], list[Ingested]]:
    """Render, ingest and ask. Outcomes come in the order of seeds, codecs, rows, questions."""
    others = any(ROWS[name].other for name in job.rows)
    outcomes: list[Outcome] = []
    ingested: list[Ingested] = []
    for seed in job.seeds:
        with ground(job, seed, others, tell) as found:
            ingested += found.ingested
            for codec in job.codecs:
                rows = [ROWS[name] for name in job.rows if codec == job.codecs[0] or name in PAIRED]
                for row in rows:
                    outcomes += _row(job, found, row, codec, tell)
    return outcomes, ingested


def _row(job: Job, found: Ground, row: Row, codec: str, tell: Tell) -> Iterator[Outcome]:
    asked = [(number, one) for number, one in enumerate(found.questions) if one.kind in row.kinds]
    found.tap.turn(None, "stored")
    found.client.prepare(OTHER if row.other else codec, row.mode)
    found.tap.turn(row.pick, row.content)
    what = f"seed {found.seed}, {codec}, row {row.name}"
    for done, (number, question) in enumerate(asked):
        if job.cold:
            drop_cache(found.client.store.path)
        yield _ask(job, found, row, codec, number, question)
        tell(what, done + 1, len(asked))


def _ask(job: Job, found: Ground, row: Row, codec: str, number: int, question: Question) -> Outcome:
    """The question by its number in the recording's list, which is the same in every row."""
    tap, at_s = found.tap, question.at_s
    tap.ask(Truth(number, question.spans, at_s))
    moment_s = at_s if at_s is not None else job.length_s
    age_s = moment_s - max((end_s for _, end_s in question.spans), default=moment_s)
    answer: Answer | None = None
    error = ""
    try:
        recording = OTHER if row.other else codec
        answer = found.client.ask(question.text, recording=recording, mode=row.mode, at=at_s)
    except MemdbError as raised:  # one that cannot be answered is one that is not answered rightly
        error = f"{type(raised).__name__}: {raised}"
        log.warning("%s, %s: %s", row.name, question.text, error)
    kv, captions, either = (
        (None, None, None) if row.other or answer is None else _recalls(found, question, answer)
    )
    return Outcome(
        row=row.name,
        mode=answer.plan.mode if answer is not None else "",
        codec=codec,
        seed=found.seed,
        number=number,
        kind=question.kind,
        about=question.about,
        question=question.text,
        answer=question.answer,
        said=answer.text if answer is not None else "",
        right=answer is not None and question.is_right(answer.text),
        choices=question.choices,
        latency_ms=answer.timings_ms["total"] if answer is not None else 0.0,
        context_tokens=answer.used.context_tokens if answer is not None else 0,
        read_bytes=answer.used.read_bytes if answer is not None else 0,
        recall=either,
        recall_kv=kv,
        recall_captions=captions,
        age_s=age_s,
        at_s=at_s,
        error=error,
    )


def _recalls(
    found: Ground, question: Question, answer: Answer
) -> tuple[float | None, float | None, float | None]:
    """Shares of the true spans that stood in the context: as blocks, as captions, as either; means over layers."""
    if question.kind in NO_SPANS:
        return None, None, None
    told = [
        any(
            item.tier == "captions" and item.start_s < end_s and item.end_s > start_s
            for item in answer.evidence
        )
        for start_s, end_s in question.spans
    ]
    layers = found.tap.seen()
    kv = _mean([_mean(seen) for seen in layers]) if layers else None
    captions = _mean(told) if answer.plan.mode in ("captions", "both") else None
    either = _mean([_mean([a or b for a, b in zip(seen, told, strict=True)]) for seen in layers or [told]])
    return kv, captions, either


def _mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values)
