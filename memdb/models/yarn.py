"""YaRN: a rotation for positions beyond those that a model was trained on (arXiv 2309.00071).

Channels that turn many times within the trained length tell near tokens apart and stay as they are. Channels that do
not even turn once would reach angles that the model never saw, and turn `factor` times slower. Those between are
blended, linearly over the channels from 32 turns to 1. Queries and keys grow by 0.1 ln(factor) + 1, which sharpens the
softmax over a longer context. StreamMem (arXiv 2508.15717) reads its memory so, at original positions.

As in the authors' code and in transformers, the blend runs over channel numbers between whole ones; the paper's text
blends over the number of turns.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from memdb.models.protocol import VideoModel
from memdb.models.rotary import Rotary
from memdb.schemas.errors import UnsupportedModel
from memdb.schemas.scaling import RopeScaling

TURNS_FAST, TURNS_SLOW = 32, 1  # within the trained length: untouched above, fully slowed below


def stretched(model: VideoModel, scaling: RopeScaling) -> VideoModel:
    """The same model, whose contexts rotate by the scaling. Raises UnsupportedModel for a rotation that is scaled."""
    if scaling.is_plain:
        return model
    own = copy.copy(model)
    own.rotary = _rotary(model.rotary, scaling)
    return own


def yarn(inv_freq: Tensor, factor: float, trained_tokens: int) -> tuple[Tensor, float]:
    """The frequencies (R/2,) of the default rotation, slowed where they must be, and the factor of cosine and sine."""
    pairs = len(inv_freq)
    log_base = -math.log(float(inv_freq[-1])) * pairs / (pairs - 1)

    def pair_of(turns: float) -> float:  # which pair turns so often within the trained length
        return pairs * math.log(trained_tokens / (2 * math.pi * turns)) / log_base

    first = max(math.floor(pair_of(TURNS_FAST)), 0)
    last = min(math.ceil(pair_of(TURNS_SLOW)), 2 * pairs - 1)
    numbers = torch.arange(pairs, dtype=torch.float64, device=inv_freq.device)
    slowed = ((numbers - first) / max(last - first, 1e-3)).clamp(0, 1)  # (R/2,)
    return inv_freq * (1 - slowed + slowed / factor), 0.1 * math.log(factor) + 1


def is_default(rotary: Rotary) -> bool:
    """Whether frequencies fall by one ratio from 1, unscaled: the rotation that YaRN is made for."""
    found = rotary.inv_freq
    if len(found) < 2 or rotary.scaling != 1 or not 0 < float(found[-1]) < 1:
        return False
    steps = torch.arange(len(found), dtype=torch.float64, device=found.device) / (len(found) - 1)
    return bool(torch.allclose(found, found[-1] ** steps, rtol=1e-4, atol=0))


def _rotary(rotary: Rotary, scaling: RopeScaling) -> Rotary:
    """Made once: its tables are kept with the rotation that it was made of."""
    assert scaling.factor > 0 < scaling.trained_tokens, "written out when the recipe met the model"
    if scaling not in rotary.scaled:
        if not is_default(rotary):
            raise UnsupportedModel(
                "this checkpoint's rotary embedding is scaled already: set rebuild.factor = 1, which leaves it as it is"
            )
        inv_freq, grown = yarn(rotary.inv_freq, scaling.factor, scaling.trained_tokens)
        rotary.scaled[scaling] = Rotary(inv_freq, grown, rotary.sections)
    return rotary.scaled[scaling]
