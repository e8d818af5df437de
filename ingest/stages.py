"""From a recipe to its methods, stages 1 to 6: everything that can be refused is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from memdb import codecs
from memdb.codecs.base import Codec
from memdb.index.mean_key import MeanKey
from memdb.index.methods import INDEXED
from memdb.ingest.encode import CAPTIONERS, ENCODERS
from memdb.ingest.encode.base import Captioner, Encoder
from memdb.ingest.encode.chunk import Chunk
from memdb.ingest.encode.groups import Groups
from memdb.ingest.reduce import REDUCERS
from memdb.ingest.reduce.base import Reducer
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.ingest.units import UNITS
from memdb.ingest.units.base import UnitStage
from memdb.models.protocol import VideoModel
from memdb.models.yarn import stretched
from memdb.retain import RETAINERS
from memdb.retain.base import Bounded, Retainer
from memdb.retain.tar_van import TarVan
from memdb.schemas.errors import RecipeError
from memdb.schemas.legality import check
from memdb.schemas.params import bare, build
from memdb.schemas.recipe import Recipe, Stage
from memdb.schemas.scaling import RopeScaling, scaling_of


@dataclass(frozen=True)
class IngestStages:
    unit: UnitStage
    reduce: Reducer
    encode: Encoder
    captioner: Captioner
    recurrent: Recurrent | None
    retain: Retainer
    index: MeanKey
    codec: Codec | None
    profile: str
    scaling: RopeScaling

    def check_frames(self, frame_tokens: int, grid: tuple[int, int] | None = None) -> None:
        """Whether frames of so many tokens suit these stages. Raises RecipeError.

        grid: rows and columns of a frame, where a recording has its own.
        """
        group_tokens = self.reduce.kept(frame_tokens)
        if isinstance(self.encode, Groups):
            self.encode.check_group(group_tokens)
        squared = math.isqrt(frame_tokens) ** 2 == frame_tokens
        if isinstance(self.retain, TarVan) and self.retain.pooling != "none" and grid is None and not squared:
            raise RecipeError(
                f"the recipe is not legal (R5) on this model: TaR + VaN pools over neighbouring patches, and a "
                f"frame of {frame_tokens} tokens has no rows and columns here: set retain.pooling = 'none'"
            )
        if isinstance(self.retain, Bounded):
            least = self.retain.tokens_min(group_tokens)
            if self.retain.budget_tokens < least:
                raise RecipeError(
                    f"retain.budget_tokens = {self.retain.budget_tokens} is too small for frames of {group_tokens} "
                    f"tokens: give at least {least}"
                )


METHODS: Mapping[str, Mapping[str, type[Any]]] = {
    "unit": UNITS,
    "reduce": REDUCERS,
    "encode": ENCODERS,
    "caption": CAPTIONERS,
    "retain": RETAINERS,
    "index": INDEXED,
}


def known(recipe: Recipe) -> None:
    """Raises RecipeError for unknown methods and parameters, and values out of range, of stages 1 to 6."""
    bare("write", recipe.write, (*codecs.NAMES, "none"))
    for stage, methods in METHODS.items():
        build(stage, getattr(recipe, stage), methods)


def compose(recipe: Recipe) -> IngestStages:
    """Raises RecipeError for unknown methods and parameters, values out of range and illegal combinations."""
    known(recipe)
    check(recipe)
    captioner = build("caption", recipe.caption, CAPTIONERS)
    reduce = build("reduce", recipe.reduce, REDUCERS)
    encode, retain = build("encode", recipe.encode, ENCODERS), build("retain", recipe.retain, RETAINERS)
    _check_probe(recipe, encode, retain)
    return IngestStages(
        unit=build("unit", recipe.unit, UNITS),
        reduce=reduce,
        encode=encode,
        captioner=captioner,
        recurrent=captioner.recurrent(reduce),
        retain=retain,
        index=build("index", recipe.index, INDEXED),
        codec=codecs.codec(recipe.codec) if recipe.keeps_kv else None,
        profile=recipe.profile,
        scaling=scaling_of(recipe),
    )


def written_out(recipe: Recipe, model: VideoModel, frame_tokens: int) -> Recipe:
    """The recipe with what it leaves to the model as numbers, so that a recording says by which it was made.

    That is a budget in frames of so many tokens, and YaRN's factor and trained length.
    Raises RecipeError, and UnsupportedModel for a rotation that cannot be scaled.
    """
    retain = build("retain", recipe.retain, RETAINERS)
    if isinstance(retain, TarVan) and retain.budget_frames:
        kept = build("reduce", recipe.reduce, REDUCERS).kept(frame_tokens)
        params = {"budget_tokens": retain.budget_frames * kept, **recipe.retain.params}
        recipe = recipe.with_stage("retain", Stage("tar_van", {**params, "budget_frames": 0}))
    if recipe.rebuild.method == "yarn":
        asked = scaling_of(recipe)
        scaling = RopeScaling(
            asked.factor or model.yarn_factor, asked.trained_tokens or model.shape.context_tokens_max
        )
        stretched(model, scaling)
        recipe = recipe.with_stage("rebuild", recipe.rebuild.with_params(**asdict(scaling)))
    return recipe


def _check_probe(recipe: Recipe, encode: object, retain: object) -> None:
    """R18: importance comes from a probe, and a probe is for a retainer that looks at it."""
    uses = isinstance(retain, Bounded) and retain.hears
    if isinstance(encode, Chunk) and uses != (encode.probe != "none"):
        what = (
            "looks at the importance of a probe: set encode.probe"
            if uses
            else "looks at none: leave encode.probe"
        )
        raise RecipeError(
            f"recipe {recipe.name!r} is not legal (R18): retain {recipe.retain.method!r} {what}"
        )
