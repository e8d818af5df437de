"""A caption over a clip's KV, which is there already: no visual token is prefilled for it (ours).

The context is [init | the clip's blocks, consecutive | recurrent tokens | prompt]. What is stored as KV was
computed before and does not depend on any caption. Recurrent tokens stand as text does: where they were in their
frames is lost, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memdb.ingest.encode.base import ClipSeen, Said
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.models.cache import CacheContext
from memdb.models.decode import greedy, prefill
from memdb.models.places import LINE, place_frames
from memdb.models.protocol import VideoModel
from memdb.schemas.params import at_least


@dataclass(frozen=True)
class CaptionOverBlocks:
    """`prompt`, `tokens_max`, `encoder` as in CaptionOverClip; `clips`, `share`, `layers` as in Recurrent."""

    prompt: str = "Describe what is happening in this video."
    tokens_max: int = 48
    encoder: str = "all-MiniLM-L6-v2"
    clips: int = 4
    share: float = 0.0625
    layers: str = "4/28,8/28,13/28,19/28"

    def __post_init__(self) -> None:
        at_least("caption.tokens_max", self.tokens_max, 1)
        Recurrent(self.clips, self.share, self.layers)

    def recurrent(self, reduce: object) -> Recurrent | None:
        return Recurrent(self.clips, self.share, self.layers) if self.clips else None

    def say(self, model: VideoModel, clip: ClipSeen, recurrent: Recurrent | None, *, profile: str) -> Said:
        assert clip.kv is not None, "rule R15 sees to it"
        start = clip.init[0].tokens
        places = None
        if clip.placing != LINE:
            places = [place_frames(clip.placing, start, clip.frames, model.device)] * model.shape.layers
        context = CacheContext(model.rotary, clip.init, clip.kv, places=places)
        if recurrent is not None:
            context.probe = recurrent.probe(model.shape.layers, start, start + len(clip.tokens))
        prompt = model.embed(model.prompt_ids(self.prompt))
        scores = prefill(model, torch.cat([*clip.queue, prompt]), context)
        ids = tuple(greedy(model, scores, context, self.tokens_max))
        return Said(ids, model.decode_text(ids).strip(), context.probe.mean() if context.probe else None)
