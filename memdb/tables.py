"""Tables of the catalog and their columns with their types, in the order in which a row's checksum covers them.

The order is part of the format: new columns go to the end, with a migration.
"""

from __future__ import annotations

from itertools import product

_NULL = type(None)
_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "meta": {"key": (str,), "value": (int, str)},
    "recordings": {
        "id": (str,),
        "name": (str,),
        "created_ns": (int,),
        "spec": (str,),
        "units": (int,),
        "start_ns": (int,),
        "watermark_ns": (int,),
        "last_commit": (int,),
        "segments": (int,),
        "gaps": (int,),
        "epochs": (int,),
        "ends": (int,),
        "kv_bytes": (int,),
        "keys_bytes": (int,),
        "captions_bytes": (int,),
        "keyframes_bytes": (int,),
        "tombstones": (int,),
        "replaced": (int,),
        "generation": (int,),
        "kv_from_unit": (int,),
        "keep_sets_bytes": (int,),
    },
    "segments": {
        "recording": (str,),
        "sequence": (int,),
        "name": (str,),
        "end_bytes": (int,),
        "footer_hash": (bytes,),
        "role": (str,),
        "units": (int,),
    },
    "units": {
        "recording": (str,),
        "number": (int,),
        "commit_id": (int,),
        "segment": (str,),
        "offset": (int,),
        "length": (int,),
        "start_ns": (int,),
        "end_ns": (int,),
        "epoch": (int,),
        "digest": (bytes,),
        "layers": (int,),
        "block_count": (int,),
        "caption_tokens": (int, _NULL),
        "parts": (bytes,),
        "blocks": (bytes,),
        "slices": (bytes,),
        "revision": (int,),
        "codec": (str,),
        "first_digest": (bytes,),
        "kept_ppm": (int,),
    },
    "gaps": {"recording": (str,), "number": (int,), "start_ns": (int,), "end_ns": (int,), "reason": (str,)},
    "epochs": {
        "recording": (str,),
        "number": (int,),
        "epoch": (int,),
        "first_unit": (int,),
        "reason": (str,),
    },
    "ends": {"recording": (str,), "number": (int,), "media_end_ns": (int,), "units": (int,)},
    "tombstones": {
        "recording": (str,),
        "number": (int,),
        "start_ns": (int,),
        "end_ns": (int,),
        "below_unit": (int,),
        "at_ns": (int,),
        "first": (int,),  # it stands in the place of all from this number to its own
    },
    # Files that wait for their removal.
    "replaced": {"recording": (str,), "sequence": (int,), "name": (str,)},
    # Whole recordings: nothing of them may come back.
    "forgotten": {"recording": (str,), "at_ns": (int,)},
}
COLUMNS: dict[str, tuple[str, ...]] = {table: tuple(columns) for table, columns in _TYPES.items()}
KEYS: dict[str, tuple[str, ...]] = {
    table: {"meta": ("key",), "recordings": ("id",), "forgotten": ("recording",)}.get(table, names[:2])
    for table, names in COLUMNS.items()
}
# The types that the values of a row may have, in the order of its columns: SQLite keeps to none of those declared.
ROW_TYPES: dict[str, frozenset[tuple[type, ...]]] = {
    table: frozenset(product(*columns.values())) for table, columns in _TYPES.items()
}
