"""From a recipe to its methods, stages 1 to 6: everything that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass

from memdb import codecs
from memdb.codecs.base import Codec
from memdb.index.mean_key import MeanKey
from memdb.ingest.encode import CAPTIONERS, ENCODERS
from memdb.ingest.encode.base import Captioner
from memdb.ingest.encode.chunk import Chunk
from memdb.ingest.encode.groups import Groups
from memdb.ingest.encode.nothing import NoKV
from memdb.ingest.encode.window import SlidingWindow
from memdb.ingest.reduce import REDUCERS, Reducer
from memdb.ingest.reduce.ctr import CausalTemporal
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.ingest.units import UNITS
from memdb.ingest.units.base import UnitStage
from memdb.retain import PROBED, RETAINERS
from memdb.retain.base import Bounded
from memdb.retain.keep_all import KeepAll
from memdb.schemas.errors import RecipeError
from memdb.schemas.legality import check
from memdb.schemas.params import bare, build
from memdb.schemas.recipe import Recipe


@dataclass(frozen=True)
class IngestStages:
    unit: UnitStage
    reduce: Reducer
    encode: SlidingWindow | Groups | Chunk | NoKV
    captioner: Captioner
    recurrent: Recurrent | None
    retain: KeepAll | Bounded
    index: MeanKey
    codec: Codec | None
    profile: str

    def check_frames(self, frame_tokens: int) -> None:
        """Whether frames of so many tokens suit these stages. Raises RecipeError."""
        group_tokens = frame_tokens
        if isinstance(self.reduce, CausalTemporal):
            group_tokens = self.reduce.kept(frame_tokens)
        if isinstance(self.encode, Groups):
            self.encode.check_group(group_tokens)
        if isinstance(self.retain, Bounded):
            least = self.retain.tokens_min(frame_tokens)
            if self.retain.budget_tokens < least:
                raise RecipeError(
                    f"retain.budget_tokens = {self.retain.budget_tokens} is too small for frames of {frame_tokens} "
                    f"tokens: give at least {least}"
                )


def compose(recipe: Recipe) -> IngestStages:
    """Raises RecipeError for unknown methods and parameters, values out of range and illegal combinations."""
    check(recipe)
    bare("write", recipe.write, (*codecs.NAMES, "none"))
    bare("index", recipe.index, ("mean_key", "caption"))
    captioner = build("caption", recipe.caption, CAPTIONERS)
    reduce: Reducer = build("reduce", recipe.reduce, REDUCERS)
    encode, retain = build("encode", recipe.encode, ENCODERS), build("retain", recipe.retain, RETAINERS)
    _check_probe(recipe, encode)
    return IngestStages(
        unit=build("unit", recipe.unit, UNITS),
        reduce=reduce,
        encode=encode,
        captioner=captioner,
        recurrent=captioner.recurrent(reduce),
        retain=retain,
        index=MeanKey(),
        codec=codecs.codec(recipe.codec) if recipe.keeps_kv else None,
        profile=recipe.profile,
    )


def _check_probe(recipe: Recipe, encode: object) -> None:
    """R18: importance comes from a probe, and a probe is for a retainer that looks at it."""
    uses = recipe.retain.method in PROBED
    if isinstance(encode, Chunk) and uses != (encode.probe != "none"):
        what = (
            "looks at the importance of a probe: set encode.probe"
            if uses
            else "looks at none: leave encode.probe"
        )
        raise RecipeError(
            f"recipe {recipe.name!r} is not legal (R18): retain {recipe.retain.method!r} {what}"
        )
