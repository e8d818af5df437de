"""Key frames of an answer's evidence, written for people to look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from memdb.schemas.answer import Answer
from memdb.schemas.errors import CorruptionError, UsageError
from memdb.schemas.times import format_time
from memdb.store import Store


def save_frames(store: Store, answer: Answer, folder: Path) -> Answer:
    """Write `<recording>-<HH.MM.SS>.jpg` into `folder` for each unit of the evidence.

    Returns the answer with the paths in its evidence; a key frame that is damaged becomes a warning, and one that
    was forgotten since the answer is none. Raises UsageError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _save(store, answer, folder)
    except OSError as error:
        raise UsageError(
            f"cannot write key frames into {folder}: {error.strerror}: name another folder"
        ) from None


def _save(store: Store, answer: Answer, folder: Path) -> Answer:
    evidence, warnings = [], list(answer.warnings)
    for item in answer.evidence:
        try:
            row = store.unit(store.recording(item.recording).id, item.unit)
        except UsageError:  # the recording was forgotten as a whole, and perhaps begun anew
            evidence.append(item)
            continue
        path = folder / f"{item.recording}-{format_time(row.start_ns / 1e9).replace(':', '.')}.jpg"
        try:
            jpeg = store.read_keyframe(row)
        except CorruptionError as error:
            warnings.append(f"the key frame of {item.recording} at {item.start_s:g} s is damaged: {error}")
            jpeg = None
        if jpeg is not None:
            path.write_bytes(jpeg)
            item = replace(item, keyframe=str(path))
        evidence.append(item)
    return replace(answer, evidence=tuple(evidence), warnings=tuple(warnings))
