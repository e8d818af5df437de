"""Whether ageing may believe the clock. It is the one thing in a store that destroys by itself.

The catalog remembers when ageing last looked at the clock. A clock that stands before that has jumped back, and
ages nothing. One that stands more than 31 days behind it may have jumped ahead: then somebody has to say that
so much time has passed indeed (`memdb compact --age-now`). So a jump costs at most 31 days of ageing too early,
never years; a store that nobody touched for longer asks once.
"""

from __future__ import annotations

import time

from memdb.catalog import Catalog
from memdb.database import CATALOG
from memdb.policy import Policy, write_policy
from memdb.schemas.times import NS_PER_S, format_wall_clock
from memdb.store import Store

LEAP_NS = 31 * 86_400 * NS_PER_S
_WRITE_AFTER_NS = 3600 * NS_PER_S  # the moment is written down at most once an hour
_KEY = "aged_ns"  # in the catalog's meta


def doubt(catalog: Catalog, now_ns: int) -> str:
    """Why ageing must not go by this moment, "" where it may."""
    known = catalog.database.select("meta", "WHERE key = ?", (_KEY,))
    last_ns = known[0][1] if known else None
    if not isinstance(last_ns, int):
        return "nothing is aged, for it is not known when that was last done: confirm with memdb compact --age-now"
    now, last = format_wall_clock(now_ns), format_wall_clock(last_ns)
    if now_ns < last_ns:
        return f"nothing is aged: the clock says {now}, and ageing last ran at {last}: set the clock"
    if now_ns - last_ns > LEAP_NS:
        return (
            f"nothing is aged: the clock says {now}, and ageing last ran at {last}: if the clock is right, "
            "confirm with memdb compact --age-now"
        )
    return ""


def believe(catalog: Catalog, now_ns: int, *, confirmed: bool = False) -> None:
    """Write down that ageing goes by this moment: every hour, or because somebody confirmed it."""
    with catalog.database.writing():
        known = catalog.database.select("meta", "WHERE key = ?", (_KEY,))
        last_ns = known[0][1] if known else None
        if confirmed or not isinstance(last_ns, int) or now_ns - last_ns > _WRITE_AFTER_NS:
            catalog.database.upsert("meta", (_KEY, now_ns))


def set_policy(store: Store, policy: Policy, *, now_ns: int | None = None) -> None:
    """Put a policy in place. Whoever sets it answers for the clock of this moment. Raises StoreError."""
    write_policy(store.path, policy)
    catalog = Catalog(store.path / CATALOG, write=True)
    try:
        believe(catalog, time.time_ns() if now_ns is None else now_ns, confirmed=True)
    finally:
        catalog.close()
