"""Stage 9: how the answer is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from memdb.schemas.params import at_least


@dataclass(frozen=True)
class Greedy:
    """The most likely token, one after another. `tokens_max`: length of an answer, at most."""

    tokens_max: int = 256

    def __post_init__(self) -> None:
        at_least("answer.tokens_max", self.tokens_max, 1)


ANSWERERS: dict[str, type[Greedy]] = {"greedy": Greedy}
