"""A question on one screen: scope, plan, retrieve, rebuild, answer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memdb.models.caption_vectors import CaptionVectors
from memdb.models.decode import TextStream, greedy, prefill
from memdb.models.protocol import VideoModel
from memdb.query.bring_back import bring_back
from memdb.query.context import everything, rebuild
from memdb.query.cost import CostFile, Costs
from memdb.query.planning import decide, plan_what_is_left
from memdb.query.report import report
from memdb.query.session import Session
from memdb.query.stages import compose
from memdb.query.stored import Readings, StoredKV
from memdb.query.within import restrict
from memdb.reader import SliceReader
from memdb.schemas.answer import Answer
from memdb.schemas.question import Question
from memdb.store import Store
from memdb.timing import Laps


class Engine:
    """Answers questions over one store with one Video-LLM. One question at a time."""

    def __init__(
        self,
        store: Store,
        model: VideoModel,
        vectors: Callable[[str], CaptionVectors | None],
        *,
        reader: SliceReader | None = None,
        key_index: str | None = None,
        open_kv: Callable[..., StoredKV] = StoredKV,
    ) -> None:
        """`vectors` gives the encoder of caption vectors by the name that a recording's row has; None for one that
        cannot be had, as with the input embeddings of another Video-LLM: then words rank the captions.
        `open_kv` opens the KV tier of a recording, with the arguments of StoredKV: a benchmark's own gives other
        blocks than those that were chosen.
        """
        self._session = Session(store, model, vectors, reader, key_index, open_kv)
        self._costs: tuple[CostFile, Costs] | None = None

    def close(self) -> None:
        self._session.close()

    def prepare(self, question: Question) -> None:
        """Load what is loaded once: encoders, sentence vectors of kinds, measured costs. No part of latency."""
        self._session.load_encoders(question)
        if question.mode == "auto":
            self._session.load_kinds()
        if self._costs is None:
            self._costs = self._session.measured(question)

    def ask(self, question: Question, *, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer a question. `on_text` gets the answer piece by piece as it is decided. `prepare` comes first.

        Raises QuestionError, UnknownRecording, ModelMismatch, NoPlanFits. Damage to what is stored is no error:
        the answer comes from what is whole and carries a warning.
        """
        assert self._costs is not None, "prepare comes first"
        file, costs = self._costs
        session, model = self._session, self._session.model
        laps = Laps(torch.cuda.synchronize if model.device.type == "cuda" else None)
        warnings: list[str] = []
        readings, ranked = Readings(), None
        with laps("open"):
            opened = session.open(question)
            within = restrict(question, opened, warnings)
        if len(opened) > 1:  # captions over all of them say whose KV is read
            with laps("captions"):
                ranked = session.rank(within.opened, question.text, warnings)
        with laps("plan"):
            decided = decide(session, question, within, ranked, costs, warnings)
        got = bring_back(session, within.opened, question.text, decided, laps, readings, warnings)
        left = plan_what_is_left(session, question, within, decided, costs) if got.lost else None
        if left is not None:
            warnings.append(f"{left.plan.reasons[0]}: the answer comes from mode {left.plan.mode}")
            decided = left
            got = bring_back(session, within.opened, question.text, decided, laps, readings, warnings)
        if got.lost:
            warnings.append("nothing that is stored could be read: the answer rests on the question alone")
        warnings += readings.warnings()
        plan = decided.plan
        with laps("rebuild"):
            prompt = model.prompt_ids(question.text)
            room = session.room(question) - len(prompt) - plan.sizes.answer_tokens
            context = rebuild(session, decided, got, room)
        with laps("prefill"):
            scores = prefill(model, model.embed(prompt), context)
        stream = TextStream(model)
        with laps("decode"):
            for token in greedy(model, scores, context, plan.sizes.answer_tokens):
                piece = stream.push(token)
                if on_text is not None and piece:
                    on_text(piece)
            if on_text is not None and (rest := stream.flush()):
                on_text(rest)
        timings = {**laps.ms, "total": laps.total_ms}
        if left is None:  # else some of the time went to what could not be read
            costs.learn(plan.predicted.stages_ms, timings)
            file.save(costs)
        return report(session, question, opened, decided, got, context, stream, timings, readings, warnings)

    def question_logits(self, recording: str, text: str) -> tuple[list[int], torch.Tensor, int]:
        """For the equality ladder: everything is retrieved, no time text. The prompt's ids, its logits (T, V),
        and the number of blocks that stood in the context.
        """
        session, model = self._session, self._session.model
        opened = session.open(Question(text, "kv", recording))[0]
        init = session.init(opened.row.spec)
        context = everything(session, opened, init, compose(opened.row.spec.recipe))
        ids = model.prompt_ids(text)
        with torch.inference_mode():
            logits = model.logits(model.forward(model.embed(ids), context))
        return ids, logits, int(opened.blocks.sum())
