"""Captions as text, in time order (rLiVS, arXiv 2510.17364); with their times where the recipe wants a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memdb.models.protocol import VideoModel
from memdb.schemas.params import at_least
from memdb.schemas.times import format_time, to_s
from memdb.schemas.units import Caption


@dataclass(frozen=True)
class TextOnly:
    """`time_text_s` above 0 writes each caption's span behind it. `windowed` has no meaning for text."""

    windowed: bool = False
    time_text_s: float = 0.0

    def __post_init__(self) -> None:
        at_least("rebuild.time_text_s", self.time_text_s, 0)


@dataclass(frozen=True)
class CaptionAt:
    """A caption that goes into the context, with its span and the recording where there are several."""

    caption: Caption
    start_ns: int
    end_ns: int
    recording: str
    same_model: bool  # whether its token ids are in the vocabulary of the model that answers


def caption_ids(model: VideoModel, captions: Sequence[CaptionAt], *, times: bool, names: bool) -> list[int]:
    """Token ids of the captions, one after another, in the order given."""
    ids: list[int] = []
    for item in captions:
        head, tail = around(model, item.recording if names else "", item.start_ns, item.end_ns, times=times)
        ids += head
        ids += item.caption.token_ids if item.same_model else model.encode_text(item.caption.text)
        ids += tail
    return ids


def around(
    model: VideoModel, name: str, start_ns: int, end_ns: int, *, times: bool
) -> tuple[list[int], list[int]]:
    """The ids before and behind a caption: its recording's name before it, its span and an end of line behind.

    None without both. The span stands behind what it dates, as the stamps of stored blocks do.
    """
    head = f"{name} " if name else ""
    tail = f" [{_clock(start_ns)} - {_clock(end_ns)}]\n" if times else "\n" if name else ""
    return (model.encode_text(head) if head else [], model.encode_text(tail) if tail else [])


def _clock(ns: int) -> str:
    return format_time(round(to_s(ns), 1))
