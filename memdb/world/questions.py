"""Questions about a recording, with answers that follow from its plan, and the spans that hold the evidence.

A thing is named by as few attributes as single it out in the whole recording, never by the one that is asked for.
Answers are words of the vocabulary; nothing in a question's wording gives its answer away.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations as subsets

from memdb.world.scenes import Scene
from memdb.world.vocabulary import COLOURS, DIGITS, MOTIONS, PLACES, SHAPES, SIZES, TEXTURES

KINDS = ("gist", "detail", "place", "motion", "count", "order", "when", "now", "absent")
ABSENT = "not seen"
WHEN_SLACK_S = 2.0
COUNT_SCENES = (3, 6)  # scenes of a span that is counted over, the last excluded
COUNT_SPAN_S_MAX = 60

# Wordings: the first ones are for every split, those behind the bar only for test.
_WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (
        (
            "what colour was the {ref}?",
            "which colour did the {ref} have?",
            "tell me the colour of the {ref}.",
        ),
        ("what was the colour of the {ref}?",),
    ),
    "shape": (
        ("what shape was the {ref}?", "which shape did the {ref} have?", "tell me the shape of the {ref}."),
        ("what was the shape of the {ref}?",),
    ),
    "digit": (
        (
            "what digit was on the {ref}?",
            "which digit did the {ref} carry?",
            "tell me the digit on the {ref}.",
        ),
        ("what was the digit on the {ref}?",),
    ),
    "texture": (
        (
            "what pattern was on the {ref}?",
            "which pattern did the {ref} have?",
            "tell me the pattern of the {ref}.",
        ),
        ("what was the pattern on the {ref}?",),
    ),
    "beside": (
        (
            "what colour was the {thing} beside the {ref}?",
            "which colour did the {thing} beside the {ref} have?",
            "tell me the colour of the {thing} beside the {ref}.",
        ),
        ("what was the colour of the {thing} beside the {ref}?",),
    ),
    "place": (
        ("where was the {ref}?", "in which place was the {ref}?", "tell me the place of the {ref}."),
        ("what was the place of the {ref}?",),
    ),
    "motion": (
        ("how did the {ref} move?", "which way did the {ref} move?", "tell me how the {ref} moved."),
        ("what way did the {ref} move?",),
    ),
    "count": (
        (
            "how many times was {what} seen between {start} and {end}?",
            "between {start} and {end}, how many times was {what} seen?",
        ),
        ("how often was {what} seen between {start} and {end}?",),
    ),
    "order": (
        (
            "which was seen first, the {a} or the {b}?",
            "what came first, the {a} or the {b}?",
            "tell me which came first, the {a} or the {b}.",
        ),
        ("what was seen first, the {a} or the {b}?",),
    ),
    "when": (
        ("when was the {ref} seen?", "at what time was the {ref} seen?", "tell me when the {ref} was seen."),
        ("what time was the {ref} seen?",),
    ),
    "now": (
        ("what is seen now?", "what is in view right now?", "tell me what is in view now."),
        ("which thing is in view now?",),
    ),
}
_NAMES = ("size", "colour", "shape", "motion", "place")
_MOVED = {"still": "that stayed still", "grows": "that grew", "shrinks": "that shrank"}
_SUBSETS = tuple(tuple(pick) for length in range(2, 6) for pick in subsets(_NAMES, length))


@dataclass(frozen=True)
class Question:
    """`answer` as words; `when` answers are right anywhere in a span, give or take WHEN_SLACK_S.

    `about`: which attribute is asked for (detail has three). `spans`: where the evidence lies, in seconds; none
    where the thing is absent. `at_s`: the moment at which it is asked (kind `now`), else the end. `choices`: how
    many answers a guess has to choose from.
    """

    kind: str
    about: str
    text: str
    answer: str
    spans: tuple[tuple[int, int], ...]
    choices: int
    at_s: int | None = None

    def is_right(self, said: str) -> bool:
        """Whether an answer is right: the same words, or a time in the true span."""
        said = said.strip().rstrip(".").lower()
        if self.about == "when" and self.spans:
            at_s = seconds_of(said)
            return at_s is not None and any(
                start - WHEN_SLACK_S <= at_s <= end + WHEN_SLACK_S for start, end in self.spans
            )
        return said == self.answer


def clock(seconds: float) -> str:
    """Whole seconds as HH:MM:SS."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}"


def seconds_of(text: str) -> float | None:
    """The seconds of an HH:MM:SS, None for anything else."""
    parts = text.split(":")
    if len(parts) != 3 or not all(part.replace(".", "", 1).isdigit() for part in parts):
        return None
    hours, minutes, seconds = (float(part) for part in parts)
    return 3600 * hours + 60 * minutes + seconds


class Asker:
    """Draws questions about one recording. `split` decides which wordings there are."""

    def __init__(self, scenes: Sequence[Scene], seed: int | str, split: str = "test") -> None:
        self.scenes = [scene for scene in scenes if not scene.empty]
        self._all = list(scenes)
        self._split = split
        self._choose = random.Random(f"questions/{split}/{seed}")  # noqa: S311
        self._seen: dict[tuple[str, ...], Counter[tuple[str, ...]]] = {}
        self._makers: dict[str, Callable[[], Question | None]] = {
            "gist": self._gist,
            "detail": self._detail,
            "place": lambda: self._attribute("place"),
            "motion": lambda: self._attribute("motion"),
            "count": self._count,
            "order": self._order,
            "when": self._when,
            "now": self._now,
            "absent": self._absent,
        }

    def ask(self, kind: str, tries: int = 200) -> Question | None:
        """One question of a kind; None where this recording has none that is unambiguous."""
        for _ in range(tries if self.scenes else 0):
            found = self._makers[kind]()
            if found is not None:
                return found
        return None

    def some(self, per_kind: int) -> list[Question]:
        """`per_kind` different questions of each kind, fewer where there are no more."""
        found: dict[tuple[str, int | None], Question] = {}
        for kind in KINDS:
            mine = 0
            for _ in range(per_kind * 5):
                question = self.ask(kind)
                if question is not None and (question.text, question.at_s) not in found:
                    found[question.text, question.at_s] = question
                    mine += 1
                if mine == per_kind:
                    break
        return list(found.values())

    def _word(self, about: str, **parts: str) -> str:
        every, held = _WORDINGS[about]
        return self._choose.choice(every + held if self._split == "test" else every).format(**parts)

    def _count_of(self, names: tuple[str, ...]) -> Counter[tuple[str, ...]]:
        if names not in self._seen:
            self._seen[names] = Counter(_values(scene, names) for scene in self.scenes)
        return self._seen[names]

    def _naming(self, scene: Scene, without: str = "") -> str | None:
        """A phrase for a scene's thing that fits no other scene, as short as one can be; None where there is none."""
        for length in range(2, 6):
            able = [
                names
                for names in _SUBSETS
                if len(names) == length
                and without not in names
                and ("shape" in names or without == "shape")
                and self._count_of(names)[_values(scene, names)] == 1
            ]
            if able:
                return phrase(scene, self._choose.choice(able))
        return None

    def _about(
        self, kind: str, about: str, answer: str, scene: Scene, choices: int, **parts: str
    ) -> Question | None:
        without = "" if about in ("beside", "digit", "texture", "when") else about
        ref = self._naming(scene, without)
        if ref is None:
            return None
        text = self._word(about, ref=ref, **parts)
        return Question(kind, about, text, answer, ((scene.start_s, scene.end_s),), choices)

    def _attribute(self, name: str) -> Question | None:
        scene = self._choose.choice(self.scenes)
        choices = {"place": len(PLACES), "motion": len(MOTIONS), "colour": len(COLOURS), "shape": len(SHAPES)}
        kind = name if name in ("place", "motion") else "gist"
        return self._about(kind, name, getattr(scene, name), scene, choices[name])

    def _gist(self) -> Question | None:
        return self._attribute(self._choose.choice(("colour", "shape")))

    def _detail(self) -> Question | None:
        scene = self._choose.choice(self.scenes)
        about = self._choose.choice(("digit", "texture", "beside"))
        if about == "digit":
            return self._about("detail", about, scene.digit, scene, len(DIGITS))
        if about == "texture":
            return self._about("detail", about, scene.texture, scene, len(TEXTURES))
        if not scene.beside:
            return None
        thing = self._choose.choice(scene.beside)
        return self._about("detail", about, thing.colour, scene, len(COLOURS), thing=thing.shape)

    def _when(self) -> Question | None:
        scene = self._choose.choice(self.scenes)
        return self._about("when", "when", clock(scene.start_s), scene, max(1, len(self._all)))

    def _count(self) -> Question | None:
        first = self._choose.randrange(len(self._all))
        part = self._all[first : first + self._choose.randrange(*COUNT_SCENES)]
        start_s, end_s = part[0].start_s, part[-1].end_s
        if end_s - start_s > COUNT_SPAN_S_MAX:
            return None
        name = self._choose.choice(("shape", "colour"))
        there = [getattr(scene, name) for scene in part if not scene.empty]
        anything = SHAPES if name == "shape" else tuple(COLOURS)
        what = self._choose.choice(there if there and self._choose.random() < 0.75 else anything)
        said = what if name == "shape" else f"{what} thing"
        said = f"{'an' if said[0] in 'aeiou' else 'a'} {said}"
        text = self._word("count", what=said, start=clock(start_s), end=clock(end_s))
        spans = tuple(
            (scene.start_s, scene.end_s) for scene in part if not scene.empty and getattr(scene, name) == what
        )
        return Question("count", name, text, str(len(spans)), spans or ((start_s, end_s),), len(part) + 1)

    def _order(self) -> Question | None:
        if len(self.scenes) < 2:
            return None
        one, other = self._choose.sample(self.scenes, 2)
        a, b = self._naming(one), self._naming(other)
        if a is None or b is None or (one.colour, one.shape) == (other.colour, other.shape):
            return None
        first = one if one.start_s < other.start_s else other
        spans = tuple((scene.start_s, scene.end_s) for scene in (one, other))
        text = self._word("order", a=a, b=b)
        return Question("order", "order", text, f"{first.colour} {first.shape}", spans, 2)

    def _now(self) -> Question | None:
        scene = self._choose.choice(self.scenes)
        at_s = self._choose.randrange(scene.start_s + 2, scene.end_s + 1)
        span = ((scene.start_s, at_s),)
        answer = f"{scene.colour} {scene.shape}"
        return Question("now", "now", self._word("now"), answer, span, len(COLOURS) * len(SHAPES), at_s)

    def _absent(self) -> Question | None:
        """Any question about one thing, of which the recording shows nothing: most resemble something that it does."""
        about = self._choose.choice(
            ("colour", "shape", "digit", "texture", "beside", "place", "motion", "when")
        )
        near = self._choose.choice(self.scenes)
        names = [name for name in _NAMES if name != about]
        pick = tuple(name for name in names if name == "shape" or self._choose.random() < 0.75)
        if len(pick) < 2:
            return None
        values = dict(zip(pick, _values(near, pick), strict=True))
        changed = self._choose.choice(pick)
        values[changed] = self._choose.choice(_RANGES[changed])
        if self._count_of(pick)[tuple(values[name] for name in pick)]:
            return None
        parts = {"ref": _phrase(values), "thing": self._choose.choice(SHAPES)}
        answers = {"beside": len(COLOURS), "when": len(self._all)}.get(about) or len(_RANGES[about])
        return Question("absent", about, self._word(about, **parts), ABSENT, (), 1 + answers)


_RANGES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "place": PLACES,
    "texture": TEXTURES,
    "digit": DIGITS,
}


def phrase(scene: Scene, names: Sequence[str]) -> str:
    """A scene's thing by some of its attributes: `small red star that moved left in the desert`."""
    return _phrase({name: getattr(scene, name) for name in names})


def _phrase(values: dict[str, str]) -> str:
    return " ".join(_words(values))


def _words(values: dict[str, str]) -> Iterator[str]:
    yield from (values[name] for name in ("size", "colour") if name in values)
    yield values.get("shape", "thing")
    if "motion" in values:
        yield _MOVED.get(values["motion"], f"that moved {values['motion']}")
    if "place" in values:
        yield f"in the {values['place']}"


def _values(scene: Scene, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(getattr(scene, name) for name in names)
