"""Original positions, rotated by YaRN where they outgrow what the model was trained on (StreamMem, arXiv 2508.15717).

An hour at 0.5 frames a second and 196 tokens a frame reaches position 350,000; LLaVA-OneVision was trained on 32,768
(R11). The encoder meets its memory at such positions as well, so it rotates by the same numbers: they are part of the
encoding fingerprint and stand in the recording's recipe. What is stored stays unrotated.
"""

from __future__ import annotations

from dataclasses import dataclass

from memdb.query.rebuild.original import Original
from memdb.schemas.scaling import RopeScaling


@dataclass(frozen=True)
class Yarn(RopeScaling, Original):
    """`factor`: 0 for the paper's of the model's family (8 for LLaVA-OneVision, 2 for Qwen2-VL, 1 for Qwen2.5-VL);
    with 1 it is `original`. `trained_tokens`: see RopeScaling.
    """
