"""The equality ladder: logits through store, close, reopen and rebuild beside one uncut forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memdb.models.places import place
from memdb.models.protocol import Pixels, VideoModel
from memdb.models.uncut import uncut_states
from memdb.models.yarn import stretched
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.scaling import scaling_of


@dataclass(frozen=True)
class LadderReport:
    """Differences are largest absolute ones, over all tokens of the question's prompt."""

    recipe: str
    codec: str
    frames: int
    blocks: int
    context_tokens: int
    init_tokens: int
    window_tokens: int
    window_binds: bool  # whether the context is longer than the encoding window
    largest_logit: float
    largest_difference: float
    same_next_token: bool

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest_difference / self.largest_logit

    def as_json(self) -> dict[str, object]:
        row: dict[str, object] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**row, "relative": self.relative}


def compare(
    model: VideoModel,
    spec: RecordingSpec,
    pixels: Sequence[Pixels],
    prompt_ids: Sequence[int],
    logits: Tensor,
    blocks: int,
) -> LadderReport:
    """`logits` (T, V) came through the store; the frames that went in are fed again here, uncut."""
    window = int(spec.recipe.encode.params.get("window_tokens", 15_000))  # type: ignore[arg-type]
    if spec.recipe.has_memory:  # what a memory holds is in view, however far back
        window = 1 << 30
    windowed = bool(spec.recipe.rebuild.params.get("windowed", False))
    model = stretched(model, scaling_of(spec.recipe))
    with torch.inference_mode():
        frames = model.visual_tokens(pixels)
        init, prompt = model.embed(spec.init_ids), model.embed(prompt_ids)
        whole = torch.cat((init, frames.flatten(0, 1), prompt))
        placing = model.placing(spec.sample_fps, spec.grid)
        sizes = np.array([len(init), *[frames.shape[1]] * len(frames), len(prompt)])
        visual = np.array([False, *[True] * len(frames), False])
        ids = place(placing, 0, sizes, visual, model.device).ids
        # Without `windowed` the question sees everything, whatever the window of encoding was.
        wide = 0 if windowed else len(prompt)
        states = uncut_states(
            model,
            whole,
            init_tokens=len(init),
            window=window,
            unwindowed_tail=wide,
            ids=ids,
            placing=placing,
        )
        truth = model.logits(states[-len(prompt) :])
    return LadderReport(
        recipe=spec.recipe.name,
        codec=spec.recipe.codec,
        frames=len(pixels),
        blocks=blocks,
        context_tokens=len(whole),
        init_tokens=len(init),
        window_tokens=window,
        window_binds=len(whole) > window,
        largest_logit=float(truth.abs().max()),
        largest_difference=float((logits - truth).abs().max()),
        same_next_token=bool(logits[-1].argmax() == truth[-1].argmax()),
    )
