"""From a recipe to its methods, stages 7 to 9."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from memdb.query.answer import ANSWERERS, Greedy
from memdb.query.rebuild import REBUILDERS
from memdb.query.rebuild.consecutive import Consecutive
from memdb.query.rebuild.original import Original
from memdb.query.rebuild.text import TextOnly
from memdb.query.rebuild.written import Written
from memdb.query.retrieve import RETRIEVERS
from memdb.query.retrieve.all import ActivateAll
from memdb.query.retrieve.external import External
from memdb.query.retrieve.groups import GroupTopK
from memdb.query.retrieve.layer_adaptive import LayerAdaptive
from memdb.query.retrieve.mmr import CaptionMMR
from memdb.query.retrieve.pages import MemoryPages
from memdb.query.retrieve.topk import BlockTopK
from memdb.schemas.legality import check
from memdb.schemas.params import build
from memdb.schemas.recipe import Recipe, canonical


@dataclass(frozen=True)
class QueryStages:
    retrieve: BlockTopK | LayerAdaptive | GroupTopK | External | CaptionMMR | ActivateAll | MemoryPages
    rebuild: Consecutive | TextOnly | Original | Written
    answer: Greedy
    window_tokens: int | None  # the view over a long context, where the recipe keeps the window at rebuild


METHODS: Mapping[str, Mapping[str, type[Any]]] = {
    "retrieve": RETRIEVERS,
    "rebuild": REBUILDERS,
    "answer": ANSWERERS,
}


def known(recipe: Recipe) -> None:
    """Raises RecipeError for unknown methods and parameters, and values out of range, of stages 7 to 9."""
    for stage, methods in METHODS.items():
        build(stage, getattr(recipe, stage), methods)


def compose(recipe: Recipe) -> QueryStages:
    """Raises RecipeError for unknown methods and parameters, values out of range and illegal combinations: a store
    may hold what another version, or another hand, wrote.
    """
    return _composed(canonical(recipe.as_json()))


@lru_cache(maxsize=64)
def _composed(data: bytes) -> QueryStages:
    import json

    recipe = Recipe.from_json(json.loads(data))
    known(recipe)
    check(recipe)
    rebuild = build("rebuild", recipe.rebuild, REBUILDERS)
    window = recipe.encode.params.get("window_tokens", 15_000) if rebuild.windowed else None
    return QueryStages(
        retrieve=build("retrieve", recipe.retrieve, RETRIEVERS),
        rebuild=rebuild,
        answer=build("answer", recipe.answer, ANSWERERS),
        window_tokens=window if isinstance(window, int) else None,
    )
