"""A question and the budget that it may use."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from memdb.schemas.errors import BudgetError, QuestionError

MODES = ("auto", "captions", "kv", "both", "recent")
QUESTION_CHARACTERS_MAX = 100_000
LARGEST = 1 << 62


def check_text(text: str) -> str:
    """The text itself, if it is one. Raises QuestionError for bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise QuestionError("the text holds bytes that are no UTF-8: write it again") from None
    return text


@dataclass(frozen=True)
class Budget:
    """What an answer may use; None for no limit.

    latency_ms_max runs from the call of `ask`, model loaded, to the last token. gpu_bytes_max bounds the keys
    and values of the context on the device. read_bytes_max bounds what is read of stored KV.
    context_tokens_max bounds everything the model sees, answer included.
    """

    latency_ms_max: float | None = None
    gpu_bytes_max: int | None = None
    read_bytes_max: int | None = None
    context_tokens_max: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
                raise BudgetError(
                    f"{item.name} = {value!r} is no budget: give a number above 0 and up to 2^62, or leave it out"
                )

    def as_json(self) -> dict[str, float | int | None]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True)
class Question:
    """`recording` None asks all of them. `at_ns` asks as of a moment of media time: nothing later is used.

    `start_ns` and `end_ns` bound what is used to what overlaps `[start_ns, end_ns)`, whatever times the text names.
    """

    text: str
    mode: str = "auto"
    recording: str | None = None
    at_ns: int | None = None
    budget: Budget = field(default_factory=Budget)
    start_ns: int | None = None
    end_ns: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise QuestionError(f"unknown mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if not self.text.strip():
            raise QuestionError("the question is empty: ask something")
        check_text(self.text)
        if len(self.text) > QUESTION_CHARACTERS_MAX:
            raise QuestionError(
                f"the question has {len(self.text)} characters, more than {QUESTION_CHARACTERS_MAX}: shorten it"
            )
