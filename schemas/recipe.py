"""A recipe is one choice per pipeline stage, as data; a paper is a recipe."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from memdb.schemas.errors import RecipeError

Value = str | int | float | bool | None
PROFILES = ("paper", "code", "fixed")
# The stages that decide what is stored: they make the encoding fingerprint. The rest is chosen at question time.
ENCODING_STAGES = ("unit", "reduce", "encode", "caption", "retain")
_FILE_BYTES_MAX = 1 << 16  # of a TOML file
STAGES = ("unit", "reduce", "encode", "caption", "write", "retain", "index", "retrieve", "rebuild", "answer")


@dataclass(frozen=True)
class Stage:
    """One method and its parameters. Parameters that are not named keep the method's defaults."""

    method: str
    params: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # It would take the method's own place in `as_json`, behind the rules' back.
        if "method" in self.params:
            raise RecipeError(f"'method' is no parameter of {self.method!r}: write STAGE=METHOD")

    def with_params(self, /, **params: Value) -> Stage:
        return Stage(self.method, {**self.params, **params})

    def as_json(self) -> dict[str, object]:
        return {"method": self.method, **dict(sorted(self.params.items()))}


@dataclass(frozen=True)
class Recipe:
    name: str
    unit: Stage
    reduce: Stage
    encode: Stage
    caption: Stage
    write: Stage
    retain: Stage
    index: Stage
    retrieve: Stage
    rebuild: Stage
    answer: Stage
    profile: str = "fixed"

    def stage(self, name: str) -> Stage:
        if name not in STAGES:
            raise RecipeError(f"unknown stage {name!r}: the stages are {', '.join(STAGES)}")
        found: Stage = getattr(self, name)
        return found

    @property
    def keeps_kv(self) -> bool:
        return self.write.method != "none"

    @property
    def keeps_captions(self) -> bool:
        return self.caption.method != "none"

    @property
    def has_memory(self) -> bool:
        """Whether chunks are encoded against a bounded memory, so that keep sets say what is held."""
        return self.encode.method == "chunk"

    @property
    def reads_back(self) -> bool:
        """Whether the encoder sees older tokens as they are stored, so that the codec decides what is encoded."""
        return self.encode.method == "groups"

    @property
    def codec(self) -> str:
        return self.write.method

    def with_stage(self, name: str, stage: Stage) -> Recipe:
        self.stage(name)
        changes: dict[str, Stage] = {name: stage}
        return replace(self, **changes)  # type: ignore[arg-type]

    def with_settings(self, settings: Iterable[str]) -> Recipe:
        """Apply `STAGE.PARAM=VALUE` or `STAGE=METHOD`, as `--set` takes them. Values are read as TOML.

        `STAGE.method=METHOD`, as a file would have it, is `STAGE=METHOD`.
        """
        recipe = self
        for setting in settings:
            target, sign, text = setting.partition("=")
            stage_name, _, param = target.strip().partition(".")
            if not sign or not stage_name:
                raise RecipeError(f"cannot read {setting!r}: write STAGE.PARAM=VALUE or STAGE=METHOD")
            stage = recipe.stage(stage_name)
            value = _value(text.strip())
            if param and param != "method":
                recipe = recipe.with_stage(stage_name, stage.with_params(**{param: value}))
            else:
                recipe = recipe.with_stage(stage_name, Stage(str(value)))
        return recipe

    def as_json(self) -> dict[str, object]:
        stages = {name: self.stage(name).as_json() for name in STAGES}
        return {"name": self.name, "profile": self.profile, **stages}

    @classmethod
    def from_json(cls, data: Mapping[str, object], *, base: Recipe | None = None) -> Recipe:
        """Inverse of `as_json`; with `base`, stages that are not named come from there."""
        known = {"name", "profile", "base", *STAGES}
        unknown = sorted(set(data) - known)
        if unknown:
            raise RecipeError(f"unknown stage {unknown[0]!r}: the stages are {', '.join(STAGES)}")
        stages: dict[str, Stage] = {}
        for name in STAGES:
            row = data.get(name)
            if row is None:
                if base is None:
                    raise RecipeError(
                        f"the recipe names no {name!r} stage: add it, or name a base = 'RECIPE'"
                    )
                stages[name] = base.stage(name)
                continue
            if isinstance(row, str):
                row = {"method": row}
            if not isinstance(row, Mapping):
                raise RecipeError(f"stage {name!r} must be a method's name or a table, not {row!r}")
            params = {str(key): _scalar(name, value) for key, value in row.items() if key != "method"}
            if "method" in row:
                stages[name] = Stage(str(row["method"]), params)
            elif base is not None:
                stages[name] = base.stage(name).with_params(**params)
            else:
                raise RecipeError(f"stage {name!r} names no method")
        profile = str(data.get("profile", base.profile if base else "fixed"))
        if profile not in PROFILES:
            raise RecipeError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
        return cls(name=str(data.get("name", base.name if base else "custom")), profile=profile, **stages)


def encoding_stages(recipe: Recipe) -> tuple[str, ...]:
    """The stages that decide what is encoded: the codec is one where the encoder reads back what was stored."""
    return (*ENCODING_STAGES, "write") if recipe.reads_back else ENCODING_STAGES


def read_toml(
    path: Path, bases: Mapping[str, Recipe], with_profile: Callable[[Recipe, str], Recipe]
) -> Recipe:
    """A recipe from a TOML file: `base = "hybrid"`, then a table per stage that differs.

    A `profile` is the base's, as `--profile` would take it, and the tables go over it.
    """
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise RecipeError(f"{path} is too long for a recipe: a few tables are enough")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    base_name = data.get("base")
    if base_name is not None and (not isinstance(base_name, str) or base_name not in bases):
        raise RecipeError(f"unknown base recipe {base_name!r}: the recipes are {', '.join(sorted(bases))}")
    data.setdefault("name", path.stem)
    if base_name is None:
        return Recipe.from_json(data)
    base = bases[base_name]
    if "profile" in data:
        base = with_profile(base, str(data["profile"]))
    return Recipe.from_json(data, base=base)


def canonical(data: object) -> bytes:
    """The one byte form of JSON data, for digests."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _value(text: str) -> Value:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets without end
        raise RecipeError(f"cannot read {text[:40]!r}...: give a number, a word or a truth value") from None
    return _scalar(text, value)


def _scalar(where: str, value: object) -> Value:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise RecipeError(f"{where!r}: {value!r} is not a number, a word or a truth value")
