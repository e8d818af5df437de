"""From what a question did to the answer that is given: evidence, what was used, warnings."""

from __future__ import annotations

from collections.abc import Sequence

from memdb.models.cache import CacheContext
from memdb.models.decode import TextStream
from memdb.query import evidence
from memdb.query.bring_back import Retrieved
from memdb.query.planning import Decided
from memdb.query.scope import Opened
from memdb.query.session import Session
from memdb.query.stored import Readings
from memdb.schemas.answer import Answer, Evidence, Used
from memdb.schemas.question import Question
from memdb.schemas.scaling import scaling_of
from memdb.schemas.times import to_s


def report(
    session: Session,
    question: Question,
    opened: Sequence[Opened],
    decided: Decided,
    got: Retrieved,
    context: CacheContext,
    stream: TextStream,
    timings: dict[str, float],
    readings: Readings,
    warnings: list[str],
) -> Answer:
    """The answer, with everything that it says about itself."""
    plan, chosen, model = decided.plan, decided.chosen, session.model
    found: list[Evidence] = evidence.of_captions(got.captions)
    if chosen is not None:
        found += evidence.of_blocks(session.store, chosen, got.rows)
    tokens = max(context.lengths)
    used = Used(
        timings["total"],
        tokens * session.token_bytes,
        readings.bytes_read,
        tokens,
    )
    limit_ms = question.budget.latency_ms_max
    if limit_ms is not None and timings["total"] > limit_ms:
        warnings.append(f"late: the answer took {timings['total']:.1f} ms, more than {limit_ms:g}")
    watermark_ns = max(one.watermark_ns for one in opened)
    moment_s = None if question.at_ns is None else to_s(question.at_ns)
    lag_s = None
    if plan.mode == "recent" and chosen is not None:
        newest_s = to_s(chosen.watermark_ns)
        moment_s = newest_s if moment_s is None else moment_s
        lag_s = max(0.0, moment_s - newest_s)
    if chosen is not None and got.kv and chosen.row.spec.recipe.has_memory:
        reached, reach = max(layer.next.id for layer in context.layers), _reach(chosen)
        if reached > reach:
            warnings.append(
                f"positions reach {reached}, more than the {reach} that the model was trained on (R11): ingest with "
                "rebuild = 'yarn' and a larger rebuild.factor, or with rebuild = 'restored' and "
                "rebuild.consecutive = true, which closes the gaps"
            )
    encoded = (chosen or opened[0]).row.spec.dtype
    dtype = str(model.dtype).removeprefix("torch.")
    if chosen is not None and got.kv and encoded != dtype:
        warnings.append(f"the KV was encoded in {encoded} and the question ran in {dtype}")
    return Answer(
        text=stream.text,
        evidence=tuple(found),
        plan=plan.after(timings),
        timings_ms=timings,
        watermark_s=to_s(watermark_ns),
        used=used,
        token_ids=tuple(stream.ids),
        warnings=tuple(warnings),
        as_of_s=moment_s,
        lag_s=lag_s,
        facts={"model": model.identity.spec, "dtype": dtype, "device": str(model.device)},
    )


def _reach(opened: Opened) -> int:
    """As far as positions may go: what the model was trained on, stretched as the recording's recipe says."""
    spec = opened.row.spec
    scaling = scaling_of(spec.recipe)
    if scaling.is_plain:
        return spec.model.shape.context_tokens_max
    return int(scaling.factor * scaling.trained_tokens)
