"""From a stage's row of data to its method: names, types and ranges are checked here, once, for every stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from memdb.schemas.errors import RecipeError
from memdb.schemas.recipe import Stage

T = TypeVar("T")
# Counts and seconds beyond this mean a slip of the hand, and would overflow what they are multiplied with.
LARGEST = 1 << 31


def build(stage: str, row: Stage, methods: Mapping[str, type[T]]) -> T:
    """The method that `row` names, a frozen dataclass whose fields are its parameters.

    Raises RecipeError for an unknown method, an unknown parameter or a value of another type; the method's own
    `__post_init__` refuses values out of range.
    """
    if row.method not in methods:
        raise RecipeError(
            f"stage {stage!r} has no method {row.method!r}: choose one of {', '.join(sorted(methods))}"
        )
    method = methods[row.method]
    kinds = get_type_hints(method)
    known = [field.name for field in fields(method) if field.init]  # type: ignore[arg-type]
    params: dict[str, Any] = {}
    for name, value in row.params.items():
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise RecipeError(f"{stage}.{row.method} has no parameter {name!r}: its parameters are {allowed}")
        params[name] = _checked(f"{stage}.{name}", value, kinds[name])
    return method(**params)


def bare(stage: str, row: Stage, methods: Collection[str]) -> None:
    """The same check for a stage whose methods take no parameters. Raises RecipeError."""
    if row.method not in methods:
        raise RecipeError(f"stage {stage!r} has no method {row.method!r}: choose one of {', '.join(methods)}")
    if row.params:
        name = next(iter(row.params))
        raise RecipeError(f"{stage}.{row.method} has no parameter {name!r}: its parameters are none")


def _checked(where: str, value: object, kind: type) -> object:
    if isinstance(value, int | float) and abs(value) > LARGEST:
        is_short = isinstance(value, float) or abs(value) < 1e300  # a longer one is no float
        shown = f"{value:.3g}" if is_short else "a number of that length"
        raise RecipeError(f"{where} = {shown} is too large: give at most {LARGEST}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise RecipeError(f"{where} = {value!r} is not of type {kind.__name__}")
    return value


def at_least(where: str, value: float, lowest: float) -> None:
    """Raises RecipeError for a parameter below its lowest value (not-a-number is below all) and an endless one."""
    if math.isinf(value):
        raise RecipeError(f"{where} = {value!r} has no end: give a number")
    if not value >= lowest:
        raise RecipeError(f"{where} = {value!r} is too small: give at least {lowest}")


def seconds_or_none(where: str, value: float) -> None:
    """Raises RecipeError for what is neither 0 nor a millisecond at least: nothing comes more often."""
    at_least(where, value, 0)
    if 0 < value < 1e-3:
        raise RecipeError(f"{where} = {value!r} is too small: give 0 for none, or at least 0.001")


def share(where: str, value: float) -> None:
    """Raises RecipeError for a share outside (0, 1]."""
    if not 0 < value <= 1:
        raise RecipeError(f"{where} = {value!r} is no share: give more than 0 and at most 1")


def share_or_none(where: str, value: float) -> None:
    """Raises RecipeError for a share outside [0, 1]."""
    if not 0 <= value <= 1:
        raise RecipeError(f"{where} = {value!r} is no share: give 0 to 1")
