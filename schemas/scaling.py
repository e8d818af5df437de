"""How far a recipe stretches the rotation, so that a model reads beyond the positions that it was trained on (R11)."""

from __future__ import annotations

from dataclasses import dataclass

from memdb.schemas.params import at_least, build
from memdb.schemas.recipe import Recipe


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's parameters (arXiv 2309.00071); the numbers that it makes of them are in memdb/models/yarn.py.

    `factor`: positions may grow to so many times `trained_tokens`; 1 for the rotation as it is, 0 for what suits the
    model's family. `trained_tokens`: the length that the model was trained on; 0 for what its configuration says.
    Zeros are written out when a recipe meets a model, so that a recording says by which numbers it was rotated.
    """

    factor: float = 0.0
    trained_tokens: int = 0

    def __post_init__(self) -> None:
        if self.factor:
            at_least("rebuild.factor", self.factor, 1)
        at_least("rebuild.trained_tokens", self.trained_tokens, 0)

    @property
    def is_plain(self) -> bool:
        return self.factor == 1


PLAIN = RopeScaling(factor=1.0)


def scaling_of(recipe: Recipe) -> RopeScaling:
    """What a recipe rotates by, in encoding and in answering alike. Raises RecipeError for what is no scaling."""
    if recipe.rebuild.method != "yarn":
        return PLAIN
    return build("rebuild", recipe.rebuild, {"yarn": RopeScaling})
