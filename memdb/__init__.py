"""memdb: an embedded memory database for streaming Video-LLMs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout, ingest/, query/ and schemas/ stand beside this folder: let memdb.ingest find them there.
if (Path(__file__).parent.parent / "pyproject.toml").is_file():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memdb.client import Client as Client
    from memdb.client import connect as connect
    from memdb.schemas.answer import Answer as Answer
    from memdb.schemas.answer import Evidence as Evidence
    from memdb.schemas.errors import MemdbError as MemdbError
    from memdb.schemas.plan import Plan as Plan
    from memdb.schemas.recipe import Recipe as Recipe

_PUBLIC = {
    "Answer": "memdb.schemas.answer",
    "Client": "memdb.client",
    "Evidence": "memdb.schemas.answer",
    "MemdbError": "memdb.schemas.errors",
    "Plan": "memdb.schemas.plan",
    "Recipe": "memdb.schemas.recipe",
    "connect": "memdb.client",
}
__all__ = ["Answer", "Client", "Evidence", "MemdbError", "Plan", "Recipe", "__version__", "connect"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'memdb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
