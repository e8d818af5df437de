"""The embedded model's tokenizer: small letters, whole words, and two-digit numbers, so that a time is few tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from memdb.models.tokenizer import WORDS, build_tokenizer
from memdb.world.vocabulary import COLOURS, MOTIONS, PLACES, SHAPES, SIZES, TEXTURES

_TOLD = "a an the in on of to at and or between then nothing not seen thing unknown moves moved stays stayed still"
_ASKED = (
    "what which when where how tell describe me was were is did had have carry came shown colour shape digit pattern "
    "place beside times many often first move way that grew shrank view now time video happening you are helpful "
    "assistant system user helps evidence"
)
_BEGIN = (
    "what which when where how tell describe at you system user assistant between a an the is was were who in "
    "name say"
)
NUMBERS = tuple(f"{number:02d}" for number in range(100))


def world_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that the embedded model is trained with. The ids depend on the word lists alone."""
    told = (*SIZES, *COLOURS, *SHAPES, *PLACES, *MOTIONS, *TEXTURES, *_TOLD.split(), *_ASKED.split())
    words = dict.fromkeys((*told, *WORDS, *NUMBERS, *(str(digit) for digit in range(10))))
    return build_tokenizer(words, bare=(*NUMBERS, *_BEGIN.split()), lowercase=True)
