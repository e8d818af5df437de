"""A caption over a clip's visual tokens, after the recurrent tokens of past clips (rLiVS, arXiv 2510.17364).

The language model reads [init | memory, newline | clip, newline | prompt] from scratch and decodes greedily.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from memdb.ingest.encode.base import ClipSeen, Said, no_kv
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.models.cache import CacheContext
from memdb.models.decode import greedy, prefill
from memdb.models.places import LINE, place
from memdb.models.protocol import VideoModel
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class CaptionOverClip:
    """`prompt`: what the model is asked. `tokens_max`: length of a caption (paper: 1,024).

    `encoder`: of caption vectors; `input-embeddings` is the paper's, the mean of the model's own.
    """

    prompt: str = "Describe what is happening in this video."
    tokens_max: int = 256
    encoder: str = "input-embeddings"

    def __post_init__(self) -> None:
        at_least("caption.tokens_max", self.tokens_max, 1)

    def recurrent(self, reduce: object) -> Recurrent | None:
        return reduce if isinstance(reduce, Recurrent) else None

    def say(self, model: VideoModel, clip: ClipSeen, recurrent: Recurrent | None, *, profile: str) -> Said:
        newline = model.frame_separator()
        memory = [*clip.queue, newline] if clip.queue else []
        head = model.embed(clip.init_ids)
        start = len(head) + sum(len(part) for part in memory)
        context = CacheContext(model.rotary, no_kv(model), [None] * model.shape.layers)
        if recurrent is not None:
            # The released code forgets the newline behind the memory and reads one token early.
            early = 1 if profile == "code" and clip.queue else 0
            context.probe = recurrent.probe(
                model.shape.layers, start - early, start - early + len(clip.tokens)
            )
        prompt = model.embed(model.prompt_ids(self.prompt))
        if clip.placing != LINE:
            # Recurrent tokens stand as text does: where they were in their frames is lost, as in the paper.
            sizes = np.array([start, *clip.frames, len(newline) + len(prompt)])
            visual = np.array([False, *[True] * len(clip.frames), False])
            places = place(clip.placing, 0, sizes, visual, model.device)
            context.place_next([places] * model.shape.layers)
        whole = [head, *memory, clip.tokens, newline, prompt]
        scores = prefill(model, torch.cat(whole), context)
        ids = tuple(greedy(model, scores, context, self.tokens_max))
        return Said(ids, model.decode_text(ids).strip(), context.probe.mean() if context.probe else None)
