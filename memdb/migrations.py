"""The catalog's format, as ordered, named steps. A step once released is never changed; add one instead.

Format n is what steps 1 to n make. Writers bring an older catalog up to date in one transaction; readers, who
change nothing, do the same to a copy in memory. Rows carry checksums over their columns, so that a step that
adds columns verifies each row as it was and closes it anew.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Added:
    """A new last column. `value` is SQL over the row's other columns."""

    table: str
    column: str
    type: str
    value: str


@dataclass(frozen=True)
class Migration:
    name: str
    statements: tuple[str, ...] = ()
    columns: tuple[Added, ...] = ()


_TABLES = Migration(
    "tables of recordings, segments and units",
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value, checksum INTEGER NOT NULL) WITHOUT ROWID",
        """CREATE TABLE recordings (
            id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_ns INTEGER NOT NULL, spec TEXT NOT NULL,
            units INTEGER NOT NULL, start_ns INTEGER NOT NULL, watermark_ns INTEGER NOT NULL,
            last_commit INTEGER NOT NULL, segments INTEGER NOT NULL, gaps INTEGER NOT NULL,
            epochs INTEGER NOT NULL, ends INTEGER NOT NULL, kv_bytes INTEGER NOT NULL,
            keys_bytes INTEGER NOT NULL, captions_bytes INTEGER NOT NULL, keyframes_bytes INTEGER NOT NULL,
            checksum INTEGER NOT NULL) WITHOUT ROWID""",
        """CREATE TABLE segments (
            recording TEXT NOT NULL REFERENCES recordings (id), sequence INTEGER NOT NULL, name TEXT NOT NULL,
            end_bytes INTEGER NOT NULL, footer_hash BLOB NOT NULL, checksum INTEGER NOT NULL,
            PRIMARY KEY (recording, sequence)) WITHOUT ROWID""",
        """CREATE TABLE units (
            recording TEXT NOT NULL REFERENCES recordings (id), number INTEGER NOT NULL,
            commit_id INTEGER NOT NULL, segment TEXT NOT NULL,
            offset INTEGER NOT NULL, length INTEGER NOT NULL,
            start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, epoch INTEGER NOT NULL, digest BLOB NOT NULL,
            layers INTEGER NOT NULL, block_count INTEGER NOT NULL, caption_tokens INTEGER,
            parts BLOB NOT NULL, blocks BLOB NOT NULL, slices BLOB NOT NULL, checksum INTEGER NOT NULL,
            PRIMARY KEY (recording, number))""",
        """CREATE TABLE gaps (
            recording TEXT NOT NULL REFERENCES recordings (id), number INTEGER NOT NULL,
            start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, reason TEXT NOT NULL,
            checksum INTEGER NOT NULL,
            PRIMARY KEY (recording, number)) WITHOUT ROWID""",
        """CREATE TABLE epochs (
            recording TEXT NOT NULL REFERENCES recordings (id), number INTEGER NOT NULL,
            epoch INTEGER NOT NULL, first_unit INTEGER NOT NULL, reason TEXT NOT NULL,
            checksum INTEGER NOT NULL,
            PRIMARY KEY (recording, number)) WITHOUT ROWID""",
        """CREATE TABLE ends (
            recording TEXT NOT NULL REFERENCES recordings (id), number INTEGER NOT NULL,
            media_end_ns INTEGER NOT NULL, units INTEGER NOT NULL, checksum INTEGER NOT NULL,
            PRIMARY KEY (recording, number)) WITHOUT ROWID""",
    ),
)

_REVISIONS = Migration(
    "units that are written anew, spans that are forgotten",
    (
        """CREATE TABLE tombstones (
            recording TEXT NOT NULL REFERENCES recordings (id), number INTEGER NOT NULL,
            start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, below_unit INTEGER NOT NULL,
            at_ns INTEGER NOT NULL, first INTEGER NOT NULL, checksum INTEGER NOT NULL,
            PRIMARY KEY (recording, number)) WITHOUT ROWID""",
        """CREATE TABLE replaced (
            recording TEXT NOT NULL REFERENCES recordings (id), sequence INTEGER NOT NULL, name TEXT NOT NULL,
            checksum INTEGER NOT NULL,
            PRIMARY KEY (recording, sequence)) WITHOUT ROWID""",
        """CREATE TABLE forgotten (
            recording TEXT PRIMARY KEY, at_ns INTEGER NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID""",
    ),
    (
        Added("recordings", "tombstones", "INTEGER NOT NULL DEFAULT 0", "0"),
        Added("recordings", "replaced", "INTEGER NOT NULL DEFAULT 0", "0"),
        Added("recordings", "generation", "INTEGER NOT NULL DEFAULT 0", "0"),
        Added("recordings", "kv_from_unit", "INTEGER NOT NULL DEFAULT 0", "0"),
        Added("segments", "role", "TEXT NOT NULL DEFAULT 'stream'", "'stream'"),
        Added(
            "segments",
            "units",
            "INTEGER NOT NULL DEFAULT 0",
            "(SELECT count(*) FROM units WHERE recording = segments.recording AND segment = segments.name)",
        ),
        Added("units", "revision", "INTEGER NOT NULL DEFAULT 0", "0"),
        Added("units", "codec", "TEXT NOT NULL DEFAULT ''", "''"),
        Added("units", "first_digest", "BLOB NOT NULL DEFAULT x''", "digest"),
        Added("units", "kept_ppm", "INTEGER NOT NULL DEFAULT 1000000", "1000000"),
    ),
)

_MEMORIES = Migration(
    "keep sets of bounded memories",
    columns=(Added("recordings", "keep_sets_bytes", "INTEGER NOT NULL DEFAULT 0", "0"),),
)

MIGRATIONS: list[Migration] = [_TABLES, _REVISIONS, _MEMORIES]
