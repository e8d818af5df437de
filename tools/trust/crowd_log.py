"""What the processes of a crowd tell one another: what they are about to do, and what was acknowledged.

One file, a line each, appended at once: whoever reads it before a question knows what the answer must hold,
and whoever reads it again after the answer knows what it may hold.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from memdb.digest import recording_hash
from memdb.schemas.rows import RecordingSpec
from tools.trust.model import Kept, Model, Span, running_hash
from tools.trust.units import Stream

_BELOW = 1 << 40  # spans end where units are acknowledged already, so that later ones never touch them
Key = tuple[str, int]  # name and life


@dataclass(frozen=True)
class Life:
    """One recording, from its first unit until it is forgotten as a whole."""

    stream: Stream
    begun_units: int = 0
    units: int = 0  # acknowledged
    begun_spans: tuple[Span, ...] = ()
    spans: int = 0  # of these, acknowledged
    is_going: bool = False
    is_gone: bool = False
    states: tuple[tuple[int, int], ...] = ()  # unit and spans that were known, of each that was saved

    def kept(self, spans: int) -> Kept:
        """As it is once so many spans are forgotten."""
        return Kept(self.stream, self.units, list(self.begun_spans[:spans]), states=dict(self.states))


class Log:
    """The file, and what it has said so far."""

    def __init__(self, path: Path, seed: int) -> None:
        self._seed = seed
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self._offset = 0
        self._lives: dict[Key, Life] = {}

    def say(self, *words: object) -> None:
        os.write(self._fd, json.dumps(words).encode() + b"\n")

    def now(self) -> dict[Key, Life]:
        """All lives as of this moment, in the order in which they began."""
        while data := os.pread(self._fd, 1 << 20, self._offset):
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                self._hear(json.loads(line))
            if not whole:
                break
        return dict(self._lives)

    def _hear(self, words: list[object]) -> None:
        what, name, life = words[:3]
        assert isinstance(name, str)
        assert isinstance(life, int)
        numbers = [int(str(word)) for word in words[3:]]
        found = self._lives.get((name, life)) or Life(stream_of(self._seed, name, life))
        if what == "will append":
            found = replace(found, begun_units=max(found.begun_units, numbers[0]))
        elif what == "appended":
            found = replace(found, units=numbers[0])
        elif what == "will forget":
            span = Span(numbers[0], numbers[1], _BELOW)
            found = replace(found, begun_spans=(*found.begun_spans, span))
        elif what == "forgot":
            found = replace(found, spans=len(found.begun_spans))
        elif what == "saved":
            found = replace(found, states=(*found.states, (numbers[0], numbers[1]))[-2:])
        elif what == "will forget all":
            found = replace(found, is_going=True)
        else:
            assert what == "forgot all", what
            found = replace(found, is_gone=True)
        self._lives[name, life] = found


def stream_of(seed: int, name: str, life: int) -> Stream:
    """Recordings of both kinds of codec: every second is raw."""
    return Stream(seed, name, life, "raw" if int(name[-1]) % 2 else "int4")


@dataclass(frozen=True)
class Between:
    """What may be seen of one life by a question that began with `before` and ended with `after`."""

    before: Life
    after: Life

    @property
    def may_be_missing(self) -> bool:
        return self.after.is_going or not self.before.units

    @property
    def may_be_there(self) -> bool:
        return not self.before.is_gone

    def keeps(self) -> list[Kept]:
        """With as many spans forgotten as there may have been."""
        return [self.after.kept(spans) for spans in range(self.before.spans, len(self.after.begun_spans) + 1)]

    def digests(self) -> set[str]:
        """Of the whole recording."""
        found = set()
        for kept in self.keeps():
            units = [kept.digest_of(number) for number in range(self.after.begun_units)]
            found |= {recording_hash(units[:count]) for count in range(self.before.units, len(units) + 1)}
        return found


class Moments(dict[Key, Between]):
    """All lives between two readings of the log."""

    def __init__(self, before: dict[Key, Life], after: dict[Key, Life]) -> None:
        super().__init__(
            {key: Between(before.get(key, Life(life.stream)), life) for key, life in after.items()}
        )


def life_of(spec: RecordingSpec) -> int:
    """Which life of its name a recording is: `units.spec` puts it behind the seed."""
    return int(spec.source.digest[8:])


def model_of(lives: dict[Key, Life]) -> Model:
    """What must be there in the end, when nothing is under way."""
    model = Model(bare=False)
    for life in lives.values():
        kept = life.kept(len(life.begun_spans))
        for units in range(max(kept.states, default=0)):
            running_hash(life.stream, units)  # it recurses: step by step it need not
        if life.is_gone:
            model.gone.append(kept)
        elif life.units:
            model.kept[life.stream.name] = kept
    return model
