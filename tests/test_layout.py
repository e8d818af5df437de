"""The rules of the layout, read from the sources: who may import whom, and what the package holds."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import memdb

ROOT = Path(__file__).parents[1]
FOLDERS = ("memdb", "ingest", "query", "schemas")
# The top: these three tie ingest and query together, inside functions, so that `import memdb` stays light.
TOP = {"memdb/client.py", "memdb/cli.py", "memdb/__main__.py"}
SPEAKERS = {"memdb/cli.py", "memdb/demo.py", "memdb/__main__.py"}  # the files that may print


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere under `node`, `from a import b` as `a` and `a.b`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def eager_imports(tree: ast.Module) -> Iterator[str]:
    """Imports that run when the module is imported: outside functions and `if TYPE_CHECKING`."""
    todo: list[ast.AST] = [tree]
    while todo:
        for child in ast.iter_child_nodes(todo.pop()):
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from imports(child)
            elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not typing_only:
                todo.append(child)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def breaches(paths: list[Path], *forbidden: str) -> list[str]:
    """`file: import` for every import, lazy ones too, of a forbidden package."""
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in imports(tree_of(path))
        if under(name, *forbidden)
    ]


def test_there_is_something_to_check() -> None:
    assert len(sources(*FOLDERS)) > 40


def test_schemas_import_schemas_only() -> None:
    own = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources("schemas")
        for name in imports(tree_of(path))
        if under(name, "memdb") and not under(name, "memdb.schemas")
    ]
    assert own == []
    assert breaches(sources("schemas"), "torch", "transformers", "lancedb", "faiss", "av") == []


def test_memdb_imports_neither_ingest_nor_query() -> None:
    kept = [path for path in sources("memdb") if str(path.relative_to(ROOT)) not in TOP]
    assert breaches(kept, "memdb.ingest", "memdb.query") == []


def test_the_top_imports_them_inside_functions() -> None:
    for name in sorted(TOP):
        eager = list(eager_imports(tree_of(ROOT / name)))
        assert [found for found in eager if under(found, "memdb.ingest", "memdb.query")] == [], name


def test_ingest_and_query_never_import_each_other() -> None:
    assert breaches(sources("ingest"), "memdb.query") == []
    assert breaches(sources("query"), "memdb.ingest") == []
    assert breaches(sources("ingest", "query"), *(name[:-3].replace("/", ".") for name in TOP)) == []


def test_no_file_imports_the_bare_names() -> None:
    assert breaches(sources(*FOLDERS, "tests", "tools"), "ingest", "query", "schemas") == []


def test_only_the_models_import_transformers() -> None:
    others = [path for path in sources(*FOLDERS) if (ROOT / "memdb" / "models") not in path.parents]
    assert breaches(others, "transformers", "sentence_transformers", "tokenizers") == []


def test_every_folder_with_python_is_a_package_that_ships() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in sources(*FOLDERS)}
    wanted = {name if under(name, "memdb") else f"memdb.{name}" for name in found}
    assert sorted(listed) == sorted(wanted)
    for name in found:
        assert (ROOT / name.replace(".", "/") / "__init__.py").is_file(), name
    assert (ROOT / "memdb" / "py.typed").is_file()


def test_the_public_names_are_sorted_and_there() -> None:
    assert memdb.__all__ == sorted(memdb.__all__)
    for name in memdb.__all__:
        assert getattr(memdb, name) is not None
    # What type checkers are told is what is loaded at run time.
    told = [name for name in imports(tree_of(ROOT / "memdb" / "__init__.py")) if under(name, "memdb")]
    assert sorted(told) == sorted(f"{module}.{name}" for name, module in memdb._PUBLIC.items())
    assert set(memdb._PUBLIC) | {"__version__"} == set(memdb.__all__)


def test_every_all_is_sorted_and_there() -> None:
    for path in sources(*FOLDERS):
        if not any(isinstance(node, ast.Name) and node.id == "__all__" for node in ast.walk(tree_of(path))):
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        dotted = ".".join(parts if parts[0] == "memdb" else ("memdb", *parts)).removesuffix(".__init__")
        module = import_module(dotted)
        assert list(module.__all__) == sorted(module.__all__), dotted
        assert [name for name in module.__all__ if not hasattr(module, name)] == [], dotted


def test_only_the_surface_prints() -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(*FOLDERS)
        if str(path.relative_to(ROOT)) not in SPEAKERS
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    assert breaches(sources(*FOLDERS), "pickle", "shelve", "marshal", "dill", "cloudpickle") == []
    for path in sources(*FOLDERS):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile"}, f"{path}:{node.lineno}"
