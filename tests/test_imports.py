"""What is light stays light: heavy libraries load where they are used, the GPU path without the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "lancedb", "pyarrow", "faiss", "av")
SCHEMAS = sorted(f"memdb.schemas.{path.stem}" for path in (ROOT / "schemas").glob("[!_]*.py"))
LIGHT = ["memdb", *SCHEMAS, "memdb.store", "memdb.catalog", "memdb.verify", "memdb.stats"]

# On a machine that only answers: no tables, no video, no FAISS.
GPU_PATH = [
    *(
        f"memdb.{folder}.{path.stem}"
        for folder in ("models", "codecs")
        for path in sorted((ROOT / "memdb" / folder).glob("[!_]*.py"))
    ),
    *("memdb.models", "memdb.codecs", "memdb.index.pages", "memdb.index.exact", "memdb.reader"),
]
REFUSE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Refuse())
"""


def run(script: str) -> str:
    """What a fresh interpreter prints, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports_of(modules: list[str]) -> str:
    return "".join(f"import {module}\n" for module in modules)


def test_the_light_modules_load_nothing_heavy() -> None:
    script = f"""
import sys
loaded = {{}}
for module in {LIGHT!r}:
    __import__(module)
    for heavy in {HEAVY!r}:
        if heavy in sys.modules:
            loaded.setdefault(heavy, module)
print(loaded)
"""
    assert run(script) == "{}\n"  # else: the library, and the first module that brought it in


def test_the_gpu_path_needs_no_tables_no_video_no_faiss() -> None:
    blocked = ("lancedb", "pyarrow", "faiss", "av", "lance", "sentence_transformers")
    run(REFUSE.format(blocked=blocked) + imports_of(GPU_PATH))


def test_the_block_blocks() -> None:
    script = REFUSE.format(blocked=("xxhash",)) + "import xxhash"
    with pytest.raises(AssertionError, match="blocked: xxhash"):
        run(script)


def test_a_wheel_is_not_shadowed_by_the_checkout_and_finds_its_parts() -> None:
    """From the root, ./memdb is what is imported, and its parts stand beside it."""
    out = run("import memdb.ingest, memdb.query, memdb.schemas; print(memdb.ingest.__file__)")
    assert Path(out.strip()) == ROOT / "ingest" / "__init__.py"
