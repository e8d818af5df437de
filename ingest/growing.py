"""A file that was longer when it was ingested again: the same film, gone on."""

from __future__ import annotations

import logging
from dataclasses import replace

from memdb.ingest.sources.base import Source
from memdb.schemas.errors import SourceMismatch
from memdb.schemas.rows import RecordingRow, RecordingSpec

log = logging.getLogger(__name__)


def grown(spec: RecordingSpec, known: RecordingRow | None, source: Source) -> RecordingSpec:
    """The spec with which the recording `known` goes on, where `source` begins with all that it was made of.

    The recording keeps the identity of its beginning, which every later length of the file is compared with.
    Raises SourceMismatch for a file of the same name that is longer and begins in another way.
    """
    if known is None or not known.units or known.spec.live or known.spec.source == spec.source:
        return spec
    before, now = known.spec.source, spec.source
    if source.continues(before):
        log.info("%s has grown from %d to %d bytes", spec.source_name, before.size_bytes, now.size_bytes)
        return replace(spec, source=before)
    same_file = (before.kind, known.spec.source_name) == (now.kind, spec.source_name)
    if same_file and before.kind == "file" and before.size_bytes < now.size_bytes:
        raise SourceMismatch(
            f"{spec.source_name} is longer than what {known.name!r} was made of, and begins in another way (recorders "
            "of mkv and mp4 write the beginning anew when they end): give another --recording, or the shorter file"
        )
    return spec


def started_at_ns(given: int | None, known: RecordingRow | None, source: Source) -> int | None:
    """The wall clock at media time 0. What is live goes on and keeps its own; for a film its container may know."""
    if given is None and known is not None and known.spec.live and source.info.live:
        return known.spec.started_at_ns
    return given if given is not None else source.info.started_at_ns
