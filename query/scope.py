"""Which recordings a question is about, and what they hold up to the moment that is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memdb import codecs
from memdb.models.load import DTYPES
from memdb.query.cost import Holdings
from memdb.query.stored import StoredKV
from memdb.schemas.errors import QuestionError
from memdb.schemas.fingerprint import ModelShape
from memdb.schemas.question import Question
from memdb.schemas.rows import RecordingRow
from memdb.schemas.units import BlockKind, Table
from memdb.store import Store


@dataclass(frozen=True, eq=False)
class Opened:
    """One recording of the question: its row, its KV tier, and what of it may be used."""

    row: RecordingRow
    kv: StoredKV
    blocks: npt.NDArray[np.bool_]  # mask of the key table's blocks
    captions: npt.NDArray[np.bool_]  # mask of its captions
    at_ns: int | None = None  # the moment as of which it may be used; None for now

    @property
    def watermark_ns(self) -> int:
        """Up to where the recording was seen, of what may be used."""
        ends = [table["end_ns"].max() for table in (self.usable_blocks, self.usable_captions) if len(table)]
        return self.clipped(int(max(ends))) if ends else 0

    def clipped(self, end_ns: int) -> int:
        """The end of a slot, or of the film where the last slot reaches beyond it."""
        return end_ns if self.row.end_ns is None else min(end_ns, self.row.end_ns)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is there that an answer could come from."""
        return not self.blocks.any() and not (self.usable_captions["tokens"] > 0).any()

    @property
    def usable_blocks(self) -> Table:
        found: Table = self.kv.table.blocks[self.blocks]
        return found

    @property
    def usable_captions(self) -> Table:
        found: Table = self.kv.table.captions[self.captions]
        return found


def recordings_of(store: Store, question: Question) -> list[RecordingRow]:
    """The recording that is named, else all that hold anything. Raises UnknownRecording, QuestionError."""
    rows = [store.recording(question.recording)] if question.recording is not None else store.recordings()
    rows = [row for row in rows if row.units]
    if not rows:
        where = f"recording {question.recording!r}" if question.recording is not None else "the store"
        raise QuestionError(f"{where} holds nothing yet: ingest first")
    return rows


def open_scope(kv: StoredKV, at_ns: int | None) -> Opened:
    """What is there at a moment. Blocks of which no token is left, and captions that were forgotten, are not."""
    blocks, captions = kv.table.blocks, kv.table.captions
    there = [blocks["tokens"] > 0, ~kv.table.captions_gone]
    if at_ns is not None:
        # The last slot may reach beyond the film: as of its end, everything of it was seen.
        end_ns = kv.row.end_ns if kv.row.end_ns is not None else np.iinfo(np.int64).max
        there[0] &= np.minimum(blocks["end_ns"], end_ns) <= at_ns
        there[1] &= np.minimum(captions["end_ns"], end_ns) <= at_ns
    return Opened(kv.row, kv, there[0], there[1], at_ns)


def holdings(
    kv: Opened | None,
    captions: Sequence[Opened],
    model: ModelShape,
    element_bytes: int,
    init_tokens: int,
    head_tokens: int,
) -> Holdings:
    """What there is to plan with: the KV of one recording, the captions of all in question.

    `head_tokens` go before each caption: its time, and the recording's name where there are several.
    """
    tokens = np.concatenate([opened.usable_captions["tokens"].astype(np.int64) for opened in captions])
    tokens = tokens[tokens > 0] + head_tokens
    own = kv.usable_blocks if kv is not None else None
    if kv is not None and own is not None and kv.row.spec.recipe.has_memory:
        # Mode recent reads nothing but frames; the memory is counted apart.
        own = own[own["kind"] != BlockKind.PROTOTYPE]
    return Holdings(
        blocks=0 if own is None else len(own),
        layers=model.layers,
        block_tokens=float(own["tokens"].mean()) if own is not None and len(own) else 0.0,
        slice_bytes=_slice_bytes(kv) if kv is not None and own is not None and len(own) else 0.0,
        captions=len(tokens),
        caption_tokens=int(tokens.sum()),
        caption_tokens_longest=int(tokens.max(initial=0)),
        kv_token_bytes=model.kv_bytes(1, element_bytes),
        init_tokens=init_tokens,
        context_tokens_max=model.context_tokens_max,
    )


def _slice_bytes(opened: Opened) -> float:
    """Bytes of one layer of one block before compression, which makes them fewer: a budget is a bound."""
    row, shape = opened.row, opened.row.spec.model.shape
    blocks = int((opened.kv.table.blocks["tokens"] > 0).sum())
    mean = row.tier_bytes.kv / max(1, blocks * shape.layers)
    longest = int(opened.usable_blocks["tokens"].max())
    codec, dtype = codecs.codec(row.spec.recipe.codec), DTYPES[row.spec.dtype]
    widths = (codec.layout(dtype, width, shape.kv_heads, longest, shape.head_size) for width in (2, 4))
    return max(mean, next((float(w.slice_bytes) for w in widths if w.slice_bytes >= mean), mean))
