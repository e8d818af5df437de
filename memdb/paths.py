"""Where memdb keeps what is not part of a store: measured costs, digests of weight files."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_dir() -> Path:
    """`$MEMDB_CACHE_DIR`, else `$XDG_CACHE_HOME/memdb`, else `~/.cache/memdb`. Not created here.

    A user without a home, as in containers, gets a folder of their own among the temporary ones.
    """
    named = os.environ.get("MEMDB_CACHE_DIR")
    if named:
        return Path(named)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "memdb"
    try:
        return Path.home() / ".cache" / "memdb"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"memdb-{os.getuid()}"


def write_atomically(path: Path, data: bytes) -> bool:
    """Write a small file whole or not at all. False where the place cannot be written; never raises for that."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True
