"""A process that feeds mutated files to the public calls, under a limit of memory, and says what came of it.

    python -m tools.trust.fuzz_child FOLDER TARGET[,TARGET...] SEED FIRST COUNT

FOLDER holds the ground (tools/trust/ground.py) and one exported recording. Several
targets take turns. `begin N` before each input, `bad N
WHAT` for each untyped error, `done N` after it. A crash or a hang shows by what is missing.
"""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from tools.trust import fuzz_derived, fuzz_stores, fuzz_words
from tools.trust.answers import answers
from tools.trust.fuzz_input import Input
from tools.trust.look import verify_any

MEMORY_BYTES = 2 << 30  # above what the process takes once all is imported

TARGETS: dict[str, Callable[[Input], None]] = {
    "segments": fuzz_stores.segment,
    "segments beyond the catalog": fuzz_stores.beyond,
    "catalog": fuzz_stores.catalog,
    "exported recording": fuzz_stores.export,
    "key pages": fuzz_derived.pages,
    "states": fuzz_derived.state,
    "caption manifests": fuzz_derived.manifest,
    "policy": fuzz_words.policies,
    "recipe and policy files": fuzz_words.toml,
    "questions": fuzz_words.query,
}


def _warm(folder: Path) -> None:
    """Load what loads late, and let LanceDB start its threads, before memory is limited."""
    answers(folder / "ground.memdb")
    verify_any(folder / "ground.memdb")


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    folder, targets = Path(sys.argv[1]), sys.argv[2].split(",")
    seed, first, count = map(int, sys.argv[3:6])
    warnings.simplefilter("ignore")
    _warm(folder)
    limit_memory()
    for number in range(first, first + count):
        print(f"begin {number}", flush=True)
        given = Input(folder, seed, number)
        TARGETS[targets[number % len(targets)]](given)
        for what in given.wrong:
            line = what.replace("\n", " ").encode("ascii", "backslashreplace").decode()
            print(f"bad {number} {line}", flush=True)
        print(f"done {number}", flush=True)


if __name__ == "__main__":
    main()
