"""What the catalog knows of policy.json, so that a file that is gone, or an older one in its place, is noticed.

    meta: policy   the digests of what may lie there: one, or two while a policy is being set

Setting one takes three steps: the catalog admits the new one beside what lies there, the file gets its place, the
catalog admits nothing else. So a process that dies in between leaves a catalog that admits what lies there,
whichever it is. (The file first, or the catalog first and once, would leave one of them without the other.)

A catalog that was made anew, or by an older memdb, knows nothing: then the policy counts that lies there.
"""

from __future__ import annotations

from pathlib import Path

import xxhash

from memdb.database import CATALOG, Database
from memdb.folder import POLICY
from memdb.schemas.errors import CorruptionError, StoreError

KEY = "policy"  # in the catalog's meta
NONE = "none"  # the digest of no file
_BYTES_MAX = 1 << 16
_TRIES = 5


def digest_of(store_path: Path) -> str:
    """Of the file as it lies there. Raises OSError."""
    try:
        with open(store_path / POLICY, "rb") as file:
            return xxhash.xxh3_128_hexdigest(file.read(_BYTES_MAX + 1))
    except FileNotFoundError:
        return NONE


def admitted(database: Database) -> list[str]:
    """The digests of what may lie there; none where the catalog knows nothing. Raises CorruptionError."""
    rows = database.select("meta", "WHERE key = ?", (KEY,))
    return str(rows[0][1]).split() if rows else []


def admit(database: Database, digests: list[str]) -> None:
    with database.writing():
        database.upsert("meta", (KEY, " ".join(dict.fromkeys(digests))))


def admit_beside(database: Database, store_path: Path, digest: str) -> None:
    """Admit one more, before it comes. Raises OSError."""
    known, there = admitted(database), digest_of(store_path)
    admit(database, [*([there] if there in known or not known else known), digest])


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
            there, known = digest_of(store_path), admitted(database)
            if not known or there in known:
                return
    finally:
        database.close()
    found = "is gone" if there == NONE else "is not the one that was set last"
    raise CorruptionError(
        f"{POLICY} {found}: set it again with memdb policy --store {store_path} --set FILE.toml", file=POLICY
    )
