"""What kind of question it is: by rules where words decide, else by the nearest of some examples."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# First rule that matches wins. Each is a word or two that leave little doubt.
RULES: tuple[tuple[str, str], ...] = (
    ("now", r"\b(right now|currently|at the moment|at this moment|just now|is there now|now)\b"),
    ("count", r"\b(how many|how often|number of times|count)\b"),
    ("when", r"\b(when|what time|at which time|how long ago|which minute|since when)\b"),
    ("order", r"\b(before|after|first|last|then|next|earlier|later|in which order|sequence)\b"),
    (
        "gist",
        r"\b(summar\w*|overview|overall|in general|what happens|what happened|what is happening|describe)\b",
    ),
    ("place", r"\b(where|which room|which place|location|background)\b"),
    ("motion", r"\b(mov\w+|direction|speed|fast|slow\w*|turn\w*|walk\w*|run\w*|rotat\w*)\b"),
    (
        "detail",
        r"\b(colou?r|digit|number|letter|text|written|sign|badge|label|read|wear\w*|texture|pattern|logo|exactly|"
        r"which)\b",
    ),
)
EXAMPLES: dict[str, tuple[str, ...]] = {
    "gist": ("What is this video about?", "Tell me what went on.", "Give me the main events."),
    "detail": (
        "What was printed on the shirt?",
        "What kind of hat did he have on?",
        "What brand was the cup?",
    ),
    "place": ("In what part of the building was that?", "What surrounded the car?"),
    "motion": ("How did the ball travel?", "Was the dog going left or right?"),
    "count": ("Did more than one person enter?", "Was it several or a single visitor?"),
    "order": ("What did she do prior to leaving?", "What followed the knock at the door?"),
    "when": ("At what point did the lights go out?", "How far into the recording did it begin?"),
    "now": ("What is in view at present?", "Who is standing there?"),
    "absent": ("Was there ever a dog?", "Did anybody come by at all?", "Is there any trace of smoke?"),
}
Embed = Callable[[str], npt.NDArray[np.float32]]


def by_rules(text: str) -> tuple[str, str]:
    """(kind, why) by the rules alone; what none decides is detail, the kind whose plan keeps the most."""
    for kind, pattern in RULES:
        found = re.search(pattern, text, re.IGNORECASE)
        if found:
            return kind, f"the question says {found.group(0)!r}, which asks for {kind}"
    return "detail", "no rule matches the question, so it is treated as one for detail"


class KindOf:
    """Tells the kind of a question: by the rules, else by the nearest example. `embed` gives unit vectors."""

    def __init__(self, embed: Embed) -> None:
        self._embed = embed
        self._examples: tuple[list[str], npt.NDArray[np.float32]] | None = None

    def prepare(self) -> None:
        """Embed the examples, once, before a question's clock runs."""
        if self._examples is None:
            pairs = [(kind, self._embed(text)) for kind, texts in EXAMPLES.items() for text in texts]
            self._examples = [kind for kind, _ in pairs], np.stack([vector for _, vector in pairs])

    def __call__(self, text: str) -> tuple[str, str]:
        """(kind, why)."""
        if any(re.search(pattern, text, re.IGNORECASE) for _, pattern in RULES):
            return by_rules(text)
        self.prepare()
        assert self._examples is not None
        kinds, vectors = self._examples
        scores = vectors @ self._embed(text)
        best = int(np.argmax(scores))
        return kinds[best], f"the question is most like one for {kinds[best]} (cosine {scores[best]:.2f})"
