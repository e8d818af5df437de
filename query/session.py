"""What stays open between questions: key tables, the reader, init tokens, encoders, measured costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from memdb.captions import CaptionIndex
from memdb.index.key_search import default_backend
from memdb.models.caption_vectors import CaptionVectors
from memdb.models.decode import run_init
from memdb.models.frame_encoder import JOINT, load_frame_encoder, question_vector
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.models.yarn import stretched
from memdb.query import captions as caption_tier
from memdb.query import scope
from memdb.query.cost import CostFile, Costs, cost_key
from memdb.query.kinds import KindOf, by_rules
from memdb.query.measure import measure
from memdb.query.rebuild.text import around
from memdb.query.retrieve.external import External
from memdb.query.retrieve.groups import GroupTopK
from memdb.query.retrieve.layer_adaptive import LayerAdaptive
from memdb.query.retrieve.topk import BlockTopK, Rows
from memdb.query.scope import Opened
from memdb.query.stages import compose
from memdb.query.stored import Readings, StoredKV
from memdb.reader import SliceReader
from memdb.schemas.errors import CorruptionError, EncodingMismatch, QuestionError
from memdb.schemas.question import Question
from memdb.schemas.rows import RecordingRow, RecordingSpec
from memdb.schemas.scaling import PLAIN, RopeScaling, scaling_of
from memdb.store import Store

log = logging.getLogger(__name__)

KIND_ENCODER = "all-MiniLM-L6-v2"
SAMPLE_QUESTION = "What happened here, and when?"


class Session:
    """One store and one Video-LLM, as the stages of a question use them."""

    def __init__(
        self,
        store: Store,
        model: VideoModel,
        vectors: Callable[[str], CaptionVectors | None],
        reader: SliceReader | None,
        key_index: str | None,
        open_kv: Callable[..., StoredKV] = StoredKV,
    ) -> None:
        self.store, self.model = store, model
        self._vectors = vectors
        self._reader = reader or SliceReader(store)
        self._key_index = key_index or default_backend()
        self._open_kv = open_kv
        self._captions = CaptionIndex(store.path)
        self._opened: dict[str, StoredKV] = {}
        self._inits: dict[tuple[tuple[int, ...], RopeScaling], list[LayerKV]] = {}
        self._kind: KindOf | None = None

    def close(self) -> None:
        for opened in self._opened.values():
            opened.close()
        self._reader.close()

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in the context, over all layers."""
        return self.model.shape.kv_bytes(1, self.model.dtype.itemsize)

    def open(self, question: Question) -> list[Opened]:
        """The recordings in question, with everything that is committed by now. Raises QuestionError for none."""
        with self.store.snapshot():  # rows, tables and what was forgotten: all of one moment
            rows = scope.recordings_of(self.store, question)
            opened = [scope.open_scope(self._stored(row), question.at_ns) for row in rows]
        if question.at_ns is None and all(one.is_empty and one.row.tombstones for one in opened):
            names = ", ".join(repr(row.name) for row in rows)
            raise QuestionError(
                f"everything that was kept of {names} is forgotten: ask about another recording"
            )
        return opened

    def _stored(self, row: RecordingRow) -> StoredKV:
        """The KV tier of a recording: kept open, and opened anew where its key pages were made anew."""
        known = self._opened.get(row.id)
        if known is not None and known.row.generation == row.generation:
            known.row = row
            known.table.refresh()
            return known
        if known is not None:
            known.close()
        self._close_forgotten()
        stages = compose(row.spec.recipe)
        retrieve = stages.retrieve
        sim = retrieve.similarity if isinstance(retrieve, BlockTopK | LayerAdaptive | GroupTopK) else "dot"
        opened = self._open_kv(self.store, row, self._reader, backend=self._key_index, sim=sim)
        self._opened[row.id] = opened
        return opened

    def _close_forgotten(self) -> None:
        """Let go of recordings that are gone as a whole: their keys are in memory still."""
        for recording_id in self._opened.keys() - {row.id for row in self.store.recordings()}:
            self._opened.pop(recording_id).close()

    def frames_like(
        self, text: str, opened: Opened, method: External, blocks: int, readings: Readings
    ) -> Rows:
        """Rows of the key table, ascending: the frames nearest to a question, one list for all layers (R14).

        Raises EncodingMismatch where another encoder is at hand than the one that saw the frames.
        """
        spec = opened.row.spec
        encoder = load_frame_encoder(str(spec.recipe.index.params.get("encoder", JOINT)), self.model)
        if encoder.name != spec.frame_encoder:
            raise EncodingMismatch(
                f"the frames of {spec.name!r} were seen by {spec.frame_encoder!r}, and {encoder.name!r} is here: put "
                "the encoder back that was there, or ingest again under another --recording"
            )
        found = opened.kv.frames.of(opened.kv.table.blocks)
        readings.bad += found.problems
        query = question_vector(encoder, self.model, text).cpu().numpy()
        return method.select(found.vectors, query, opened.blocks & found.there, blocks)

    def init(self, spec: RecordingSpec) -> list[LayerKV]:
        """Keys and values of a recording's init prompt, computed once: it is in the recording as token ids.

        Ids are of the vocabulary of the model that encoded; another one writes the same prompt in its own.
        """
        ids, scaling = spec.init_ids, scaling_of(spec.recipe)
        if spec.model.fingerprint != self.model.identity.fingerprint:
            prompt = str(spec.recipe.encode.params.get("init_prompt", ""))
            ids, scaling = tuple(self.model.init_ids(prompt)), PLAIN
        if (ids, scaling) not in self._inits:
            context = WindowContext(self.rotated(spec).rotary, window=1 << 30)
            run_init(self.model, ids, context)
            self._inits[ids, scaling] = context.init
        return self._inits[ids, scaling]

    def rotated(self, spec: RecordingSpec) -> VideoModel:
        """The model as its contexts rotate for a recording: as that was encoded, if this model encoded it."""
        if spec.model.fingerprint != self.model.identity.fingerprint:
            return self.model
        return stretched(self.model, scaling_of(spec.recipe))

    def load_encoders(self, question: Question) -> None:
        """The encoders of the captions in question; the caller keeps them."""
        for row in scope.recordings_of(self.store, question):
            if row.spec.caption_encoder:
                self._vectors(row.spec.caption_encoder)

    def kind(self, text: str) -> tuple[str, str]:
        """The kind of a question, and why: by rules alone until `load_kinds` was called."""
        return self._kind(text) if self._kind is not None else by_rules(text)

    def load_kinds(self) -> None:
        if self._kind is None:
            examples = self._vectors(KIND_ENCODER)
            assert examples is not None, "it needs no Video-LLM"
            self._kind = KindOf(examples.of_question)
            self._kind.prepare()

    def rank(
        self, opened: Sequence[Opened], text: str, warnings: list[str], *, newest: bool = False
    ) -> list[caption_tier.Ranked]:
        """All captions in question, a list for each encoder. newest: they are taken from the last one back, so that
        nobody need read what they say.

        Where recordings of one encoder weigh relevance against novelty otherwise, the heaviest weight counts: a
        caption near the question is what most of them would rather not miss. Words count if they do for one.
        """
        head_tokens = self.head_tokens(opened)
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
            methods = [
                compose(one.row.spec.recipe).retrieve
                for one in opened
                if one.row.spec.caption_encoder == name
            ]
            ranked.append(
                caption_tier.rank(
                    self.store,
                    opened,
                    vectors,
                    self._captions,
                    text,
                    warnings,
                    relevance=max(method.relevance for method in methods),
                    words=not newest and any(method.words for method in methods),
                    head_tokens=head_tokens,
                )
            )
        return [pair for pair in ranked if pair[0]]

    def head_tokens(self, opened: Sequence[Opened]) -> int:
        """Tokens that go before a caption and behind it, at most: name and time."""
        times = any(compose(one.row.spec.recipe).rebuild.time_text_s for one in opened)
        latest = max(one.watermark_ns for one in opened)
        latest += 500_000_000 - latest % 1_000_000_000  # with a fraction, which takes more signs
        names = [one.row.name for one in opened] if len(opened) > 1 else [""]
        return max(sum(map(len, around(self.model, name, latest, latest, times=times))) for name in names)

    def room(self, question: Question) -> int:
        """Tokens that the context may hold in all, by the model and every budget."""
        budget, shape = question.budget, self.model.shape
        room = min(shape.context_tokens_max, budget.context_tokens_max or shape.context_tokens_max)
        if budget.gpu_bytes_max is not None:
            room = min(room, int(budget.gpu_bytes_max // self.token_bytes))
        return room

    def measured(self, question: Question) -> tuple[CostFile, Costs]:
        """Costs from the file that earlier questions left, else measured now."""
        identity, dtype = self.model.identity, str(self.model.dtype)
        file = CostFile(
            cost_key(
                self.store.path, self.store.store_id, identity.fingerprint, str(self.model.device), dtype
            )
        )
        costs = file.load()
        if costs is None:
            opened = self.open(question)
            kv = next((one for one in opened if len(one.usable_blocks)), None)
            if kv is not None and kv.row.spec.model.fingerprint != identity.fingerprint:
                kv = None
            names = sorted({one.row.spec.caption_encoder for one in opened} - {""})
            encoders = [found for name in names if (found := self._vectors(name)) is not None]

            def measured(kv: Opened | None) -> Costs:
                return measure(
                    self.model,
                    kv,
                    embed=lambda: [vectors.of_question(SAMPLE_QUESTION) for vectors in encoders],
                    captions=lambda: [list(order) for _, order in self.rank(opened, SAMPLE_QUESTION, [])],
                )

            try:
                costs = measured(kv)
                file.save(costs)
            except CorruptionError as error:  # a disk that fails now says nothing of later ones
                log.warning("the costs of reading KV were not measured: %s", error)
                costs = measured(None)
        return file, costs
