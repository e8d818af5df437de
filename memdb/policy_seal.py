"""What the catalog knows of policy.json, so that a file that is gone, or an older one in its place, is noticed.

    meta: policy   SERIAL:DIGEST of what may lie there: one, or two while a policy is being set

Setting one takes three steps: the catalog admits the new one beside what lies there, the file gets its place, the
catalog admits nothing else. So a process that dies in between leaves a catalog that admits what lies there,
whichever it is. (The file first, or the catalog first and once, would leave one of them without the other.)

Policies are counted. One that lies there with a higher number than the catalog knows counts: the catalog lost its
WAL, by which nothing may be lost. A catalog that was made anew knows nothing: then what lies there counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from memdb.database import CATALOG, Database
from memdb.folder import POLICY
from memdb.schemas.errors import CorruptionError, StoreError

KEY = "policy"  # in the catalog's meta
NONE = "0:none"  # of no file
_BYTES_MAX = 1 << 16
_SERIAL_MAX = 1 << 53
_TRIES = 5


def seal_of(data: bytes) -> str:
    """SERIAL:DIGEST of a policy's bytes; serial 0 where they hold none."""
    try:
        found = json.loads(data)["serial"]
    except (ValueError, TypeError, KeyError, RecursionError):
        found = 0
    serial = found if isinstance(found, int) and 0 <= found <= _SERIAL_MAX else 0
    return f"{serial:d}:{xxhash.xxh3_128_hexdigest(data)}"


def seal_there(store_path: Path) -> str:
    """Of the file as it lies there. Raises OSError."""
    try:
        with open(store_path / POLICY, "rb") as file:
            return seal_of(file.read(_BYTES_MAX + 1))
    except FileNotFoundError:
        return NONE


def serial_of(seal: str) -> int:
    serial = seal.partition(":")[0]
    return int(serial) if serial.isdecimal() and len(serial) < 20 else 0


def next_serial(database: Database, store_path: Path) -> int:
    """A number above all that are known. Raises OSError."""
    return 1 + max(map(serial_of, [seal_there(store_path), *admitted(database)]))


def admitted(database: Database) -> list[str]:
    """The seals of what may lie there; none where the catalog knows nothing. Raises CorruptionError."""
    rows = database.select("meta", "WHERE key = ?", (KEY,))
    return str(rows[0][1]).split() if rows else []


def admit(database: Database, seals: list[str]) -> None:
    with database.writing():
        database.upsert("meta", (KEY, " ".join(dict.fromkeys(seals))))


def admit_beside(database: Database, store_path: Path, seal: str) -> None:
    """Admit one more, before it comes. Raises OSError."""
    known, there = admitted(database), seal_there(store_path)
    admit(database, [*([there] if there in known or not known else known), seal])


def check_seal(store_path: Path) -> None:
    """Whether what lies there is what was set last, as far as the catalog knows. Raises CorruptionError, OSError.

    Asked again where it is not: somebody may just be setting another one.
    """
    try:
        database = Database(store_path / CATALOG, write=False)
    except StoreError:
        return  # there is no catalog to ask, which others tell
    try:
        for _ in range(_TRIES):
            there, known = seal_there(store_path), admitted(database)
            if not known or there in known or serial_of(there) > max(map(serial_of, known)):
                return
    finally:
        database.close()
    found = "is gone" if there == NONE else "is not the one that was set last"
    raise CorruptionError(
        f"{POLICY} {found}: set it again with memdb policy --store {store_path} --set FILE.toml", file=POLICY
    )
