"""mypy over the package as it installs, not as it lies in the checkout.

In the checkout, ingest/, query/ and schemas/ are no parts of memdb/, so that mypy would pass over them and
say that all is well. Here the package is installed into a temporary folder and checked there, and mypy must
have checked as many files as the four folders hold.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("memdb", "ingest", "query", "schemas")
FILES = ("pyproject.toml", "README.md", "LICENSE")
SETUPTOOLS_MIN = 77  # the build-system's, in pyproject.toml


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="memdb-types-") as scratch:
        # A copy, so that the checkout gets no build/ and no old build/ reaches the package.
        source, site = Path(scratch) / "source", Path(scratch) / "site"
        copy_sources(source)
        wanted = sum(1 for _ in source.rglob("*.py"))
        if install(source, site) != 0:
            print("check_types: the package does not build; see pip's message above", file=sys.stderr)
            return 1
        return check(site, wanted)


def copy_sources(target: Path) -> None:
    target.mkdir()
    for name in FILES:
        shutil.copy2(ROOT / name, target / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))


def install(source: Path, site: Path) -> int:
    """Install without dependencies, and without the network where this environment can build by itself."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(source)]
    if has_setuptools():
        command.append("--no-build-isolation")
    return subprocess.run(command, check=False).returncode


def has_setuptools() -> bool:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return int(version.split(".")[0]) >= SETUPTOOLS_MIN


def check(site: Path, wanted: int) -> int:
    """mypy's exit code, or 1 where it checked another number of files than `wanted`."""
    done = subprocess.run(
        [
            # A folder without Python in it, as that of the embedded model, is no module.
            *(sys.executable, "-m", "mypy", "--strict", "--no-namespace-packages", "-p", "memdb"),
            *("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")),
        ],
        cwd=site,
        env={**os.environ, "MYPYPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    found = re.search(r"(?:in|checked) (\d+) source files?", done.stdout)
    if done.returncode != 0:
        return done.returncode
    if found is None or int(found[1]) != wanted:
        print(f"check_types: mypy did not check the {wanted} files of the package", file=sys.stderr)
        return 1
    print(f"check_types: {wanted} files of the installed package")
    return 0


if __name__ == "__main__":
    sys.exit(main())
