"""From a recipe to its methods, stages 1 to 6: everything that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass

from memdb import codecs
from memdb.codecs.base import Codec
from memdb.index.mean_key import MeanKey
from memdb.ingest.encode import CAPTIONERS, ENCODERS
from memdb.ingest.encode.base import Captioner
from memdb.ingest.encode.nothing import NoKV
from memdb.ingest.encode.window import SlidingWindow
from memdb.ingest.reduce import REDUCERS, Reducer
from memdb.ingest.reduce.ctr import CausalTemporal
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.ingest.units import UNITS
from memdb.ingest.units.base import UnitStage
from memdb.retain import RETAINERS
from memdb.retain.keep_all import KeepAll
from memdb.schemas.legality import check
from memdb.schemas.params import bare, build
from memdb.schemas.recipe import Recipe


@dataclass(frozen=True)
class IngestStages:
    unit: UnitStage
    reduce: Reducer
    encode: SlidingWindow | NoKV
    captioner: Captioner
    recurrent: Recurrent | None
    retain: KeepAll
    index: MeanKey
    codec: Codec | None
    profile: str

    def check_frames(self, frame_tokens: int) -> None:
        """Whether frames of so many tokens suit these stages. Raises RecipeError."""
        if isinstance(self.reduce, CausalTemporal):
            self.reduce.kept(frame_tokens)


def compose(recipe: Recipe) -> IngestStages:
    """Raises RecipeError for unknown methods and parameters, values out of range and illegal combinations."""
    check(recipe)
    bare("write", recipe.write, (*codecs.NAMES, "none"))
    bare("index", recipe.index, ("mean_key", "caption"))
    captioner = build("caption", recipe.caption, CAPTIONERS)
    reduce: Reducer = build("reduce", recipe.reduce, REDUCERS)
    return IngestStages(
        unit=build("unit", recipe.unit, UNITS),
        reduce=reduce,
        encode=build("encode", recipe.encode, ENCODERS),
        captioner=captioner,
        recurrent=captioner.recurrent(reduce),
        retain=build("retain", recipe.retain, RETAINERS),
        index=MeanKey(),
        codec=codecs.codec(recipe.codec) if recipe.keeps_kv else None,
        profile=recipe.profile,
    )
