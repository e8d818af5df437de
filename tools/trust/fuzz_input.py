"""One input of the fuzzing campaign: a copy of the store, what is fed to it, and what went wrong."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memdb.repair import repair
from memdb.schemas.errors import MemdbError
from memdb.stats import stats
from memdb.store import Store
from tools.trust.answers import answers
from tools.trust.look import verify_any
from tools.trust.runner import Runner
from tools.trust.script import Op
from tools.trust.units import Stream

EXPORT = "lobby.export"  # the file of one exported recording, beside the ground


class Input:
    """One input: the store's copy, what is fed to it, and what went wrong."""

    def __init__(self, folder: Path, seed: int, number: int) -> None:
        self.folder = folder
        self.path = folder / "fuzzed.memdb"
        self.chance = random.Random(f"{seed}/{number} fuzz")
        self.wrong: list[str] = []

    def copy(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.folder / "ground.memdb", self.path)

    def one_of(self, pattern: str) -> Path:
        return self.chance.choice(sorted(file for file in self.path.glob(pattern) if file.stat().st_size))

    @contextmanager
    def typed(self, what: str) -> Iterator[None]:
        try:
            yield
        except MemdbError:
            pass
        except Exception as error:
            frame = error.__traceback__
            places = []
            while frame is not None:
                if "/memdb/" in (name := frame.tb_frame.f_code.co_filename) or "/schemas/" in name:
                    places.append(f"{Path(name).name}:{frame.tb_lineno}")
                frame = frame.tb_next
            self.wrong.append(f"{what}: {type(error).__name__}: {error!s:.120} at {' '.join(places[-3:])}")

    def ask_all(self) -> None:
        """Every public call that reads."""
        with self.typed("verify"):
            verify_any(self.path)
        with self.typed("answers"):
            answers(self.path, on_error=self._untyped)
        with self.typed("stats"), Store.open(self.path) as store:
            stats(store)

    def _untyped(self, what: str, error: Exception) -> None:
        with self.typed(what):
            raise error

    def write_on(self) -> None:
        """What a writer does when it opens: it rolls forward; then it appends, indexes and closes."""
        units = 0
        with self.typed("store"), Store.open(self.path) as store:
            row = next((row for row in store.recordings() if row.name == "door"), None)
            units = row.units if row else 0
        with self.typed("write"), Runner(self.path) as runner:
            for op in (Op("append", self._door, units, 1), Op("pages", self._door), Op("captions")):
                runner.do(op)

    @property
    def _door(self) -> Stream:
        seed = int((self.folder / "seed").read_text())
        return Stream(seed, "door", 0, "raw")

    def mend(self) -> None:
        with self.typed("repair"):
            repair(self.path)
            self.ask_all()
