"""A recording as a file: its captions for other programs, or all of it for another store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from memdb.caption_rows import caption_now
from memdb.schemas.errors import CorruptionError, UsageError
from memdb.schemas.rows import UnitRow
from memdb.schemas.times import format_wall_clock, to_s
from memdb.schemas.units import Caption
from memdb.store import Store
from memdb.transfer import export_recording

FORMATS = ("jsonl", "srt", "memdb")


def export(store: Store, recording: str, out: Path, format: str) -> int:
    """Write the captions in time order, whole or not at all; the number written.

    jsonl: one object a line with start_s, end_s, caption, and start_at where the wall clock is known. srt:
    numbered subtitles. memdb: all units as they are, see memdb/transfer.py. Raises UsageError,
    UnknownRecording, CorruptionError.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    if format == "memdb":
        return export_recording(store.path, recording, out).units
    row = store.recording(recording)
    if not row.spec.caption_encoder:
        raise UsageError(f"{recording!r} has no captions: its recipe {row.spec.recipe.name} keeps KV only")
    lines, count = [], 0
    for unit, caption in _captions(store, row.id):
        count += 1
        lines.append(
            _srt(count, unit, caption) if format == "srt" else _json(unit, caption, row.spec.started_at_ns)
        )
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        # Captions may hold halves of surrogate pairs: JSON has an escape for them, subtitles have not.
        lost = "replace" if format == "srt" else "backslashreplace"
        temporary.write_bytes("".join(lines).encode("utf-8", lost))
        temporary.replace(out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}: name another file with --out") from None
    return count


def _captions(store: Store, recording_id: str) -> Iterator[tuple[UnitRow, Caption]]:
    for unit in store.units(recording_id):
        if unit.has_caption:
            try:
                caption = caption_now(store, unit)
            except CorruptionError as error:
                raise CorruptionError(
                    f"{error}; nothing was written: run memdb verify to see what is damaged", file=error.file
                ) from error
            if caption is not None:  # else it was forgotten meanwhile
                yield unit, caption


def _json(unit: UnitRow, caption: Caption, started_at_ns: int | None) -> str:
    row: dict[str, object] = {
        "start_s": to_s(unit.start_ns),
        "end_s": to_s(unit.end_ns),
        "caption": caption.text,
    }
    if started_at_ns is not None:
        row["start_at"] = format_wall_clock(started_at_ns + unit.start_ns)
    return json.dumps(row, ensure_ascii=False) + "\n"


def _srt(number: int, unit: UnitRow, caption: Caption) -> str:
    text = " ".join(caption.text.split())  # a blank line would end the subtitle
    return f"{number}\n{_clock(unit.start_ns)} --> {_clock(unit.end_ns)}\n{text}\n\n"


def _clock(ns: int) -> str:
    ms = round(ns / 1e6)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d},{ms % 1000:03d}"
