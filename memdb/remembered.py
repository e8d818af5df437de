"""What a catalog that is to be made anew still says, row by row, wherever a row's own checksum is right.

The segments are the truth, and a repair needs nothing else. But where a record is damaged there, the row that was
made of it may be whole: then nothing is lost, and what was forgotten stays so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from memdb import policy_seal
from memdb.applying import EVENTS, RecordingState
from memdb.believed import LOST_MAX
from memdb.database import CATALOG, Database, Value
from memdb.records import Record, encode
from memdb.schemas.errors import CorruptionError, FormatVersionError, StoreError
from memdb.schemas.format import FORMAT_VERSION
from memdb.schemas.rows import NOT_WHAT_IT_SAYS, RecordingSpec, UnitRow

_NUMBERS = {
    table: f"SELECT number FROM {table} WHERE recording = ? ORDER BY number"  # noqa: S608
    for table, _, _ in EVENTS.values()
}
logger = logging.getLogger(__name__)


class Remembered:
    """An old catalog, whatever is left of it. Nothing of it may be."""

    def __init__(self, path: Path) -> None:
        """`path` is the file. Raises FormatVersionError where it says that a newer memdb wrote it."""
        self._database: Database | None = None
        if path.is_file() and path.stat().st_size:
            with suppress(StoreError):
                self._database = Database(path, write=False)
        try:
            found = self._meta("format")
            if isinstance(found, int) and found > FORMAT_VERSION:
                raise FormatVersionError(
                    f"the store has format {found}, this memdb repairs up to {FORMAT_VERSION}: install a newer "
                    "memdb-video"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    @property
    def store_id(self) -> str | None:
        found = self._meta("store_id")
        return found if isinstance(found, str) else None

    def recording(self, recording_id: str) -> tuple[RecordingSpec, int] | None:
        """How a recording is made, and when it was begun."""
        state = self._state(recording_id)
        if state is None:
            return None
        try:
            return RecordingSpec.from_json(json.loads(state.spec)), state.created_ns
        except NOT_WHAT_IT_SAYS:
            return None

    def forgotten_at_ns(self, recording_id: str) -> int | None:
        """When a recording was forgotten as a whole, None where nothing says so."""
        rows = self._select("forgotten", "WHERE recording = ?", (recording_id,))
        return int(rows[0][1] or 0) if rows else None

    def events(self, recording_id: str) -> list[Record]:
        """Gaps, epochs, ends and tombstones as records of no file."""
        found: list[Record] = []
        for kind, (table, integers, texts) in EVENTS.items():
            for row in self._each(table, recording_id):
                if cast("int", row[1]) < 0:
                    continue
                meta = dict(zip((*integers, *texts), row[2:], strict=True))
                found.append(encode(kind, cast("int", row[1]), meta, offset=0, previous=b"")[1])
        return found

    def unit_count(self, recording_id: str) -> int:
        """How many units were acknowledged at least, where about as many rows are left."""
        state = self._state(recording_id)
        if state is None or self._database is None:
            return 0
        try:
            [(rows,)] = self._database.execute(
                "SELECT count(*) FROM units WHERE recording = ?", (recording_id,)
            )
        except StoreError:
            return 0
        return state.units if 0 <= state.units <= int(rows or 0) + LOST_MAX else 0

    @property
    def policies(self) -> list[str]:
        """The digests of what policy.json may be, none where nobody knows."""
        return str(self._meta(policy_seal.KEY) or "").split()

    def generation(self, recording_id: str) -> int:
        """Of the key pages, 0 where nobody knows."""
        state = self._state(recording_id)
        return state.generation if state else 0

    def unit(self, recording_id: str, number: int) -> UnitRow | None:
        for values in self._select("units", "WHERE recording = ? AND number = ?", (recording_id, number)):
            row = UnitRow(*cast("tuple[Any, ...]", values))
            with suppress(CorruptionError):
                row.check()
                return row
        return None

    def _state(self, recording_id: str) -> RecordingState | None:
        rows = self._select("recordings", "WHERE id = ?", (recording_id,))
        return RecordingState(*cast("tuple[Any, ...]", rows[0])) if rows else None

    def _meta(self, key: str) -> Value:
        rows = self._select("meta", "WHERE key = ?", (key,))
        return rows[0][1] if rows else None

    def _each(self, table: str, recording_id: str) -> Iterator[tuple[Value, ...]]:
        """The rows of a table that are whole: one that is damaged hides none of the others."""
        if self._database is None:
            return
        try:
            numbers = self._database.execute(_NUMBERS[table], (recording_id,))
        except StoreError:
            return
        for (number,) in numbers:
            yield from self._select(table, "WHERE recording = ? AND number = ?", (recording_id, number))

    def _select(self, table: str, tail: str, parameters: tuple[Value, ...]) -> list[tuple[Value, ...]]:
        if self._database is None:
            return []
        try:
            return self._database.select(table, tail, parameters)
        except StoreError as error:
            logger.debug("%s has nothing to say: %s", CATALOG, error)
            return []
