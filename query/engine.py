"""A question on one screen: scope, plan, retrieve, rebuild, answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from memdb.captions import CaptionIndex
from memdb.index.key_search import default_backend
from memdb.index.mean_key import fold
from memdb.models.cache import CacheContext, RetrievalContext
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.decode import TextStream, greedy, prefill, run_init
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.query import captions as caption_tier
from memdb.query import evidence, scope
from memdb.query.cost import Asked, CostFile, Costs, cost_key
from memdb.query.kinds import KindOf, by_rules
from memdb.query.measure import measure
from memdb.query.plan import plan as make_plan
from memdb.query.rebuild.consecutive import Consecutive
from memdb.query.rebuild.text import CaptionAt, around, caption_ids
from memdb.query.retrieve.topk import BlockTopK, Rows, newest
from memdb.query.scope import Opened
from memdb.query.stages import QueryStages, compose
from memdb.query.stored import Readings, StoredKV
from memdb.reader import SliceReader
from memdb.schemas.answer import Answer, Evidence, Used
from memdb.schemas.errors import CorruptionError, ModelMismatch
from memdb.schemas.plan import Plan, Sizes
from memdb.schemas.question import Question
from memdb.schemas.times import to_s
from memdb.store import Store
from memdb.timing import Laps

KIND_ENCODER = "all-MiniLM-L6-v2"
SAMPLE_QUESTION = "What happened here, and when?"


@dataclass
class Retrieved:
    """What a question brought back. `cache` is the rebuilt context where retrieval made it already."""

    rows: list[Rows] = field(default_factory=list)
    kv: list[LayerKV | None] = field(default_factory=list)
    cache: CacheContext | None = None
    captions: list[tuple[caption_tier.Picked, CaptionAt]] = field(default_factory=list)
    caption_ids: list[int] = field(default_factory=list)  # of all of them, with times and names between


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
    ) -> None:
        """`vectors` gives the encoder of caption vectors by the name that a recording's row has; None for one that
        cannot be had, as with the input embeddings of another Video-LLM: then words rank the captions.
        """
        self.store, self.model = store, model
        self._vectors = vectors
        self._reader = reader or SliceReader(store)
        self._key_index = key_index or default_backend()
        self._captions = CaptionIndex(store.path)
        self._opened: dict[str, StoredKV] = {}
        self._inits: dict[tuple[int, ...], list[LayerKV]] = {}
        self._costs: tuple[CostFile, Costs] | None = None
        self._kind: KindOf | None = None

    def close(self) -> None:
        for opened in self._opened.values():
            opened.close()
        self._reader.close()

    def prepare(self, question: Question) -> None:
        """Load what is loaded once: encoders, sentence vectors of kinds, measured costs. No part of latency."""
        rows = scope.recordings_of(self.store, question)
        names = sorted({row.spec.caption_encoder for row in rows} - {""})
        encoders = [found for name in names if (found := self._vectors(name)) is not None]
        if question.mode == "auto" and self._kind is None:
            examples = self._vectors(KIND_ENCODER)
            assert examples is not None, "it needs no Video-LLM"
            self._kind = KindOf(examples.of_question)
            self._kind.prepare()
        if self._costs is None:
            self._costs = self._measured(question, encoders)

    def ask(self, question: Question, *, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer a question. `on_text` gets the answer piece by piece as it is decided.

        Raises QuestionError, UnknownRecording, ModelMismatch, NoPlanFits. Damage to what is stored is no error:
        the answer comes from what is whole and carries a warning.
        """
        laps = Laps(torch.cuda.synchronize if self.model.device.type == "cuda" else None)
        warnings: list[str] = []
        readings = Readings()
        with laps("open"):
            opened = self._open(question)
            ranked: list[caption_tier.Ranked] | None = None
        if len(opened) > 1:  # captions over all of them say whose KV is read
            with laps("captions"):
                ranked = self._rank(opened, question.text, warnings)
        with laps("plan"):
            chosen, ranked = self._choose(opened, ranked, warnings)
            chosen = self._own_kv(question, opened, chosen, warnings)
            plan, stages, init = self._plan(question, opened, chosen)
        got = Retrieved()
        if plan.mode in ("captions", "both"):
            with laps("captions"):
                self._caption_context(opened, ranked, question.text, plan, stages, got, warnings)
        if plan.mode != "captions" and chosen is not None:
            with laps("retrieve"):
                self._retrieve(question, plan, stages, chosen, init, got, readings)
        warnings += _damage(readings)
        with laps("rebuild"):
            prompt = self.model.prompt_ids(question.text)
            room = self._room(question) - len(prompt) - plan.sizes.answer_tokens
            context = self._rebuild(plan, stages, chosen, init, got, room)
        stream = TextStream(self.model)
        with laps("prefill"):
            scores = prefill(self.model, self.model.embed(prompt), context)
        with laps("decode"):
            for token in greedy(self.model, scores, context, plan.sizes.answer_tokens):
                piece = stream.push(token)
                if on_text is not None and piece:
                    on_text(piece)
            if on_text is not None and (rest := stream.flush()):
                on_text(rest)
        timings = {**laps.ms, "total": laps.total_ms}
        return self._answer(question, plan, opened, chosen, got, context, stream, timings, readings, warnings)

    # Scope and plan

    def _open(self, question: Question) -> list[Opened]:
        found = []
        for row in scope.recordings_of(self.store, question):
            known = self._opened.get(row.id)
            if known is None:
                stages = compose(row.spec.recipe)
                sim = stages.retrieve.sim if isinstance(stages.retrieve, BlockTopK) else "dot"
                known = StoredKV(self.store, row, self._reader, backend=self._key_index, sim=sim)
                self._opened[row.id] = known
            else:
                known.row = row
                known.table.refresh()
            found.append(scope.open_scope(known, question.at_ns))
        return found

    def _choose(
        self,
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
        self, question: Question, opened: Sequence[Opened], chosen: Opened | None, warnings: list[str]
    ) -> Opened | None:
        """The recording whose KV may be read, if this model computed it. Captions are for any model."""
        if chosen is None or chosen.row.spec.model.fingerprint == self.model.identity.fingerprint:
            return chosen
        spec, here = chosen.row.spec, self.model.identity.spec
        captions = any(len(one.usable_captions) for one in opened)
        if question.mode in ("kv", "both", "recent") or (question.mode == "auto" and not captions):
            raise ModelMismatch(
                f"the KV of {spec.name!r} was computed by {spec.model.spec!r} and means nothing to {here!r}: ask "
                "with that model" + (", or with mode captions" if captions else "")
            )
        if question.mode == "auto":
            warnings.append(
                f"the KV here was computed by {spec.model.spec!r}, so {here!r} reads captions only"
            )
        return None

    def _plan(
        self, question: Question, opened: Sequence[Opened], chosen: Opened | None
    ) -> tuple[Plan, QueryStages, list[LayerKV]]:
        spec = (chosen or opened[0]).row.spec
        stages = compose(spec.recipe)
        own = spec.model.fingerprint == self.model.identity.fingerprint
        # Ids are of the vocabulary of the model that encoded; another one writes the same prompt in its own.
        prompt = str(spec.recipe.encode.params.get("init_prompt", ""))
        init = self._init(spec.init_ids if own else tuple(self.model.init_ids(prompt)))
        head_tokens = self._head_tokens(opened)
        shape, element_bytes = self.model.shape, self.model.dtype.itemsize
        held = scope.holdings(chosen, opened, shape, element_bytes, init[0].tokens, head_tokens)
        kind, why = self._kind(question.text) if self._kind is not None else by_rules(question.text)
        ids = self.model.encode_text(question.text)
        asked = Asked(
            question_tokens=len(ids),
            prompt_tokens=len(self.model.prompt_ids(question.text)),
            stamp_tokens_block=self._stamp_tokens(stages, chosen),
        )
        assert self._costs is not None, "prepare comes first"
        retrieve = stages.retrieve
        # The recording whose KV is read need not be one that has captions: rekv beside rlivs.
        spoken = [compose(one.row.spec.recipe).retrieve for one in opened if len(one.usable_captions)]
        full = Sizes(
            blocks=retrieve.blocks if isinstance(retrieve, BlockTopK) else 0,
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
            costs=self._costs[1],
            budget=question.budget,
            recordings=tuple(one.row.name for one in opened),
        )
        return plan, stages, init

    def _stamp_tokens(self, stages: QueryStages, chosen: Opened | None) -> float:
        """Tokens of time text a block, at most: one stamp a block, or one every `time_text_s`."""
        every_s = stages.rebuild.time_text_s
        if not every_s or chosen is None or not len(chosen.usable_blocks):
            return 0.0
        first = chosen.usable_blocks[0]
        share = min(1.0, to_s(int(first["end_ns"] - first["start_ns"])) / every_s)
        return share * len(self.model.encode_text("[00:00:00]"))

    def _head_tokens(self, opened: Sequence[Opened]) -> int:
        """Tokens that go before a caption and behind it, at most: name and time."""
        times = any(compose(one.row.spec.recipe).rebuild.time_text_s for one in opened)
        latest = max(one.watermark_ns for one in opened)
        latest += 500_000_000 - latest % 1_000_000_000  # with a fraction, which takes more signs
        names = [one.row.name for one in opened] if len(opened) > 1 else [""]
        return max(sum(map(len, around(self.model, name, latest, latest, times=times))) for name in names)

    def _room(self, question: Question) -> int:
        """Tokens that the context may hold in all, by the model and every budget."""
        budget, shape = question.budget, self.model.shape
        room = min(shape.context_tokens_max, budget.context_tokens_max or shape.context_tokens_max)
        if budget.gpu_bytes_max is not None:
            room = min(room, int(budget.gpu_bytes_max // shape.kv_bytes(1, self.model.dtype.itemsize)))
        return room

    # Retrieve and rebuild

    def _rank(
        self, opened: Sequence[Opened], text: str, warnings: list[str], relevance: float = 0.5
    ) -> list[caption_tier.Ranked]:
        """All captions in question, a list for each encoder."""
        head_tokens = self._head_tokens(opened)
        ranked = []
        for name in sorted({one.row.spec.caption_encoder for one in opened} - {""}):
            vectors = self._vectors(name)
            if vectors is None:
                warnings.append(
                    f"captions were ranked by words: their vectors are of {name}, which only the model that made "
                    "them can compare with a question"
                )
                ranked.append(
                    caption_tier.rank_by_words(
                        self.store, opened, name, self._captions, text, head_tokens=head_tokens
                    )
                )
                continue
            ranked.append(
                caption_tier.rank(
                    self.store,
                    opened,
                    vectors,
                    self._captions,
                    text,
                    relevance=relevance,
                    head_tokens=head_tokens,
                )
            )
        return [pair for pair in ranked if pair[0]]

    def _caption_context(
        self,
        opened: Sequence[Opened],
        ranked: list[caption_tier.Ranked] | None,
        text: str,
        plan: Plan,
        stages: QueryStages,
        got: Retrieved,
        warnings: list[str],
    ) -> None:
        """The captions that are read, as ids in time order, within the plan's share of the context."""
        if ranked is None:
            ranked = self._rank(opened, text, warnings, stages.retrieve.relevance)
        picked = caption_tier.pick(ranked, plan.sizes.caption_tokens)
        found = caption_tier.read(self.store, opened, picked, self.model.identity.fingerprint, warnings)
        several = len({at.recording for _, at in found}) > 1
        times = bool(stages.rebuild.time_text_s)
        ids = [caption_ids(self.model, [at], times=times, names=several) for _, at in found]
        # Another model writes a caption in more or fewer tokens than the one that said it.
        while sum(map(len, ids)) > plan.sizes.caption_tokens:
            worst = min(range(len(found)), key=lambda index: found[index][0].score)
            del found[worst], ids[worst]
        if not found:
            warnings.append("no caption fits into the plan's share of the context")
        got.captions, got.caption_ids = found, [token for own in ids for token in own]

    def _retrieve(
        self,
        question: Question,
        plan: Plan,
        stages: QueryStages,
        chosen: Opened,
        init: list[LayerKV],
        got: Retrieved,
        readings: Readings,
    ) -> None:
        """Blocks layer by layer: the newest ones, or those that the question's own queries choose."""
        blocks, kv, model = plan.sizes.blocks, chosen.kv, self.model
        retrieve = stages.retrieve
        assert isinstance(retrieve, BlockTopK), "rule R1 sees to it"

        def fetch(layer: int, rows: Rows) -> LayerKV | None:
            found, whole = kv.read(layer, rows, model.device, model.dtype, readings)
            got.rows.append(whole)
            got.kv.append(found)
            return found

        if plan.mode == "recent":
            for layer in range(model.shape.layers):
                fetch(layer, newest(kv.search, layer, chosen.blocks, blocks))
            return

        def fetch_best(layer: int, q: torch.Tensor) -> LayerKV | None:
            query = fold(q, model.shape.kv_heads).cpu().numpy()
            return fetch(layer, retrieve.select(kv.search, layer, query, chosen.blocks, blocks))

        context = RetrievalContext(model.rotary, init, fetch_best, window=stages.window_tokens)
        with torch.inference_mode():
            model.forward(model.embed(model.encode_text(question.text)), context)
        got.cache = context

    def _rebuild(
        self,
        plan: Plan,
        stages: QueryStages,
        chosen: Opened | None,
        init: list[LayerKV],
        got: Retrieved,
        room: int,
    ) -> CacheContext:
        """[init | blocks in time order, with times | captions in time order, with times], in at most `room` tokens."""
        if got.kv and chosen is not None:
            if isinstance(stages.rebuild, Consecutive) and (stages.rebuild.time_text_s or got.cache is None):
                longest = max(0 if kv is None else kv.tokens for kv in got.kv)
                context = stages.rebuild.rebuild(
                    self.model,
                    init,
                    chosen.kv.table.blocks,
                    got.rows,
                    got.kv,
                    stages.window_tokens,
                    stamp_tokens_max=max(0, room - init[0].tokens - longest - len(got.caption_ids)),
                )
            else:
                assert got.cache is not None
                context = got.cache
        else:
            context = CacheContext(self.model.rotary, init, [None] * len(init), window=stages.window_tokens)
        if got.caption_ids:
            with torch.inference_mode():
                self.model.forward(self.model.embed(got.caption_ids), context)
        return context

    def _init(self, ids: tuple[int, ...]) -> list[LayerKV]:
        """Keys and values of an init prompt, computed once: it is in the recording as token ids."""
        if ids not in self._inits:
            context = WindowContext(self.model.rotary, window=1 << 30)
            run_init(self.model, ids, context)
            self._inits[ids] = context.init
        return self._inits[ids]

    def question_logits(self, recording: str, text: str) -> tuple[list[int], torch.Tensor, int]:
        """For the equality ladder: everything is retrieved, no time text. The prompt's ids, its logits (T, V),
        and the number of blocks that stood in the context.
        """
        opened = self._open(Question(text, "kv", recording))[0]
        stages = compose(opened.row.spec.recipe)
        init, readings, got = self._init(opened.row.spec.init_ids), Readings(), Retrieved()
        everything = np.flatnonzero(opened.blocks)
        for layer in range(self.model.shape.layers):
            found, rows = opened.kv.read(layer, everything, self.model.device, self.model.dtype, readings)
            got.kv.append(found)
            got.rows.append(rows)
        if readings.bad:
            raise CorruptionError(_damage(readings)[0])
        context = CacheContext(self.model.rotary, init, got.kv, window=stages.window_tokens)
        ids = self.model.prompt_ids(text)
        with torch.inference_mode():
            logits = self.model.logits(self.model.forward(self.model.embed(ids), context))
        return ids, logits, len(everything)

    # Answer

    def _answer(
        self,
        question: Question,
        plan: Plan,
        opened: Sequence[Opened],
        chosen: Opened | None,
        got: Retrieved,
        context: CacheContext,
        stream: TextStream,
        timings: dict[str, float],
        readings: Readings,
        warnings: list[str],
    ) -> Answer:
        found: list[Evidence] = evidence.of_captions(got.captions)
        if chosen is not None:
            found += evidence.of_blocks(self.store, chosen, got.rows)
        tokens = max(context.lengths)
        used = Used(
            timings["total"],
            tokens * self.model.shape.kv_bytes(1, self.model.dtype.itemsize),
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
        encoded = (chosen or opened[0]).row.spec.dtype
        dtype = str(self.model.dtype).removeprefix("torch.")
        if chosen is not None and got.kv and encoded != dtype:
            warnings.append(f"the KV was encoded in {encoded} and the question ran in {dtype}")
        assert self._costs is not None
        file, costs = self._costs
        costs.learn(plan.predicted.stages_ms, timings)
        file.save(costs)
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
            facts={"model": self.model.identity.spec, "dtype": dtype, "device": str(self.model.device)},
        )

    def _measured(self, question: Question, encoders: Sequence[CaptionVectors]) -> tuple[CostFile, Costs]:
        """Costs from the file that earlier questions left, else measured now."""
        identity, dtype = self.model.identity, str(self.model.dtype)
        file = CostFile(
            cost_key(
                self.store.path, self.store.store_id, identity.fingerprint, str(self.model.device), dtype
            )
        )
        costs = file.load()
        if costs is None:
            opened = self._open(question)
            kv = next((one for one in opened if len(one.usable_blocks)), None)
            if kv is not None and kv.row.spec.model.fingerprint != identity.fingerprint:
                kv = None
            costs = measure(
                self.model,
                kv,
                embed=lambda: [vectors.of_question(SAMPLE_QUESTION) for vectors in encoders],
                captions=lambda: [list(order) for _, order in self._rank(opened, SAMPLE_QUESTION, [])],
            )
            file.save(costs)
        return file, costs


def _damage(readings: Readings) -> list[str]:
    """One warning for everything that could not be read."""
    if not readings.bad:
        return []
    first = "; ".join(readings.bad[:3])
    more = f" and {len(readings.bad) - 3} more" if len(readings.bad) > 3 else ""
    return [f"damaged blocks were left out: {first}{more}; run memdb verify"]
