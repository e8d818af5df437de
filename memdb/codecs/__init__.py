"""How keys and values become bytes. A codec is a small file; this dict is all there is to know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memdb.schemas.errors import RecipeError

if TYPE_CHECKING:
    from memdb.codecs.base import Codec

NAMES = ("raw", "fp16", "bf16", "int8", "int4", "oqm", "oqm2")


def codec(name: str) -> Codec:
    """The codec of that name. Raises RecipeError for an unknown one."""
    from memdb.codecs.affine import CHANNEL, Affine
    from memdb.codecs.plain import Plain

    codecs: dict[str, Codec] = {
        "raw": Plain("raw", None),
        "fp16": Plain("fp16", "float16"),
        "bf16": Plain("bf16", "bfloat16"),
        "int8": Affine("int8", bits=8),
        "int4": Affine("int4", bits=4),
        "oqm": Affine("oqm", bits=4, values_over=CHANNEL),
        "oqm2": Affine("oqm2", bits=2, values_over=CHANNEL),
    }
    if name not in codecs:
        raise RecipeError(f"unknown codec {name!r}: choose one of {', '.join(NAMES)}")
    return codecs[name]
