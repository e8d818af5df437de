"""What a model's folder says of itself in `memdb.json`: what it knows, which settings fit it, what its files are.

    {"name": "...", "note": "for films that are not of its world", "joint": "joint.safetensors",
     "recipes": {"hybrid": ["unit.frames=8", "retrieve.blocks=32"]},
     "sha256": {"model.safetensors": "...", "tokenizer.json": "..."}}

Every entry may be left out, and so may the file: a checkpoint as it is published has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from memdb.recipes import RECIPES, adjusted
from memdb.schemas.errors import ModelError, RecipeError
from memdb.schemas.recipe import Recipe

NAME = "memdb.json"
_BYTES_MAX = 1 << 16
_ENTRIES = {"name", "note", "joint", "recipes", "sha256"}
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelSheet:
    """`recipes`: settings by recipe, as --set takes them, that fit this model; what a user sets goes over them.

    `note`: what an answer says about films that are not of the model's world, "" where it knows them all.
    `joint`: weights of a head that puts clips and questions into one space. `sha256`: of the files beside it, by name.
    """

    name: str = ""
    note: str = ""
    joint: str = ""
    recipes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    def fitted(self) -> dict[str, Recipe]:
        """Every recipe with the settings that fit this model. Raises ModelError for settings that no recipe takes."""
        found = dict(RECIPES)
        for name, settings in self.recipes.items():
            if name not in RECIPES:
                raise ModelError(
                    f"the model's {NAME} fits settings to a recipe {name!r}, which this memdb has not "
                    f"({', '.join(RECIPES)}): update memdb, or take the entry out"
                )
            try:
                found[name] = adjusted(RECIPES[name], settings=settings)
            except RecipeError as error:
                raise ModelError(f"{unfit(name)}: {error}") from None
        return found


PLAIN = ModelSheet()


def unfit(recipe: str) -> str:
    """How a message begins about settings that a recipe does not take."""
    return f"what the model's {NAME} sets in recipe {recipe!r} does not fit this memdb (update it, or take it out)"


def read_sheet(folder: Path) -> ModelSheet:
    """The sheet of a model's folder; an empty one where there is none. Raises ModelError for one that is none."""
    path = folder / NAME
    try:
        with path.open("rb") as file:
            data = file.read(_BYTES_MAX + 1)
    except FileNotFoundError:
        return PLAIN
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): copy the model's folder again") from None
    try:
        if len(data) > _BYTES_MAX:
            raise ValueError(f"it is longer than {_BYTES_MAX} bytes")
        return _sheet(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no sheet of a model ({error}): copy the model's folder again") from None


def check_files(folder: Path, sheet: ModelSheet) -> None:
    """Raises ModelError where a file that the sheet names is missing or not what it was."""
    for name, wanted in sheet.sha256.items():
        path = folder / name
        try:
            found = _sha256(path)
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}): {_MEND}") from None
        if found != wanted:
            raise ModelError(f"{path} is damaged or of another model (its sha256 is not in {NAME}): {_MEND}")


def write_sheet(folder: Path, sheet: ModelSheet) -> None:
    """Write the sheet of a model's folder, with the digests of its weights and tokenizer as they are now."""
    files = sorted([*folder.glob("*.safetensors"), folder / "tokenizer.json"])
    data = {
        "name": sheet.name,
        "note": sheet.note,
        "joint": sheet.joint,
        "recipes": {name: list(settings) for name, settings in sheet.recipes.items()},
        "sha256": {path.name: _sha256(path) for path in files},
    }
    kept = {name: value for name, value in data.items() if value}
    (folder / NAME).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


_MEND = "copy the model's folder again"


def _sheet(data: object) -> ModelSheet:
    """Raises ValueError for what is none."""
    if not isinstance(data, dict):
        raise ValueError("it holds no table")
    if unknown := sorted(set(data) - _ENTRIES):
        raise ValueError(f"unknown entry {unknown[0]!r}: known are {', '.join(sorted(_ENTRIES))}")
    recipes, sha256 = _table(data, "recipes"), _table(data, "sha256")
    joint = _text(data.get("joint", ""), "joint")
    for name in (*sha256, *([joint] if joint else [])):
        if Path(name).name != name or not name.isprintable():  # zeros and lone surrogates name no file
            raise ValueError(f"{name!r} is no name of a file beside it")
    settings = {name: _texts(value, name) for name, value in recipes.items()}
    digests = {name: _text(value, name) for name, value in sha256.items()}
    name, note = (_text(data.get(entry, ""), entry) for entry in ("name", "note"))
    return ModelSheet(name, note, joint, settings, digests)


def _table(data: Mapping[str, object], name: str) -> dict[str, object]:
    value = data.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{name!r} is no table")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or "\n" in value:
        raise ValueError(f"{name!r} is no line of text")
    return value


def _texts(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"the settings of {name!r} are no list")
    return tuple(_text(item, name) for item in value)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
