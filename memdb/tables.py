"""Tables of the catalog and their columns with their types, in the order in which a row's checksum covers them.

The order is part of the format: new columns go to the end, with a migration.
"""

from __future__ import annotations

COLUMNS: dict[str, tuple[str, ...]] = {
    "meta": ("key", "value"),
    "recordings": (
        "id",
        "name",
        "created_ns",
        "spec",
        "units",
        "start_ns",
        "watermark_ns",
        "last_commit",
        "segments",
        "gaps",
        "epochs",
        "ends",
        "kv_bytes",
        "keys_bytes",
        "captions_bytes",
        "keyframes_bytes",
        "tombstones",
        "replaced",
        "generation",
        "kv_from_unit",
    ),
    "segments": ("recording", "sequence", "name", "end_bytes", "footer_hash", "role", "units"),
    "units": (
        "recording",
        "number",
        "commit_id",
        "segment",
        "offset",
        "length",
        "start_ns",
        "end_ns",
        "epoch",
        "digest",
        "layers",
        "block_count",
        "caption_tokens",
        "parts",
        "blocks",
        "slices",
        "revision",
        "codec",
        "first_digest",
        "kept_ppm",
    ),
    "gaps": ("recording", "number", "start_ns", "end_ns", "reason"),
    "epochs": ("recording", "number", "epoch", "first_unit", "reason"),
    "ends": ("recording", "number", "media_end_ns", "units"),
    "tombstones": ("recording", "number", "start_ns", "end_ns", "below_unit", "at_ns"),
    "replaced": ("recording", "sequence", "name"),  # files that wait for their removal
    "forgotten": ("recording", "at_ns"),  # whole recordings: nothing of them may come back
}
KEYS: dict[str, tuple[str, ...]] = {
    table: {"meta": ("key",), "recordings": ("id",), "forgotten": ("recording",)}.get(table, names[:2])
    for table, names in COLUMNS.items()
}
COLUMNS: dict[str, tuple[str, ...]] = {table: tuple(columns) for table, columns in _TYPES.items()}
# The types that the values of a row may have, in the order of its columns: SQLite keeps to none of those declared.
ROW_TYPES: dict[str, frozenset[tuple[type, ...]]] = {
    table: frozenset(product(*columns.values())) for table, columns in _TYPES.items()
}
