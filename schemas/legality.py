"""Which stages may stand together (methods.md 3.3), checked when a recipe is composed.

Two rules no recipe can break, because of how every recipe runs: representative keys are computed from keys at compute
precision, before a codec sees them (R12); and a quantisation group is a block, which closes with its unit and is padded
where it does not fill its last byte (R16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memdb.schemas.errors import RecipeError
from memdb.schemas.recipe import Recipe


@dataclass(frozen=True)
class Rule:
    """A rule, when it is broken, and what the user reads then."""

    name: str
    broken: Callable[[Recipe], bool]
    message: str


RULES: tuple[Rule, ...] = (
    Rule(
        "R1",
        lambda r: r.retrieve.method in ("topk", "groups") and not r.keeps_kv,
        "per-layer retrieval reads KV slices, and this recipe writes none: set write to a codec, "
        "or retrieve to mmr",
    ),
    Rule(
        "R5",
        lambda r: (
            r.reduce.method == "ctr"
            and r.retain.method == "tar_van"
            and r.retain.params.get("pooling") != "none"
        ),
        "TaR + VaN pools over neighbouring patches, and CTR leaves a choice of patches without neighbours: set "
        "retain.pooling = 'none', or reduce = 'identity'",
    ),
    Rule(
        "R6",
        lambda r: _merges(r) and r.retain.method == "tar_van",
        "a merged frame has no single time, and TaR + VaN asks for one: set reduce = 'identity' and unit = 'block', or "
        "retain to another method",
    ),
    Rule(
        "S4",
        lambda r: r.encode.method == "none" and r.keeps_kv,
        "a codec is named, but stage encode gives no KV to write: set encode = 'window', or write = 'none'",
    ),
    Rule(
        "R10",
        lambda r: r.encode.method != "none" and not r.keeps_kv,
        "stage encode computes KV that nothing stores: set write to a codec, or encode = 'none'",
    ),
    Rule(
        "R14",
        lambda r: r.retrieve.method == "mmr" and not r.keeps_captions,
        "caption retrieval needs captions: set caption to a method, or retrieve = 'topk'",
    ),
    Rule(
        "R15",
        lambda r: r.caption.method == "blocks" and not r.keeps_kv,
        "captions over blocks read the clip's KV: set write to a codec, or caption = 'clip'",
    ),
    Rule(
        "R18",
        lambda r: r.reduce.method == "recurrent" and r.caption.method != "clip",
        "recurrent tokens are chosen by the attention of a caption over the clip: set caption = 'clip', "
        "or reduce = 'identity'",
    ),
    Rule(
        "R8",
        lambda r: r.reduce.method == "recurrent" and r.keeps_kv,
        "a recurrent prefix would change the hidden states of stored KV: use caption = 'blocks', which keeps it "
        "out of them",
    ),
    Rule(
        "R8b",
        lambda r: r.has_memory and r.retain.method == "all",
        "chunks are encoded against a compressed memory, which nothing here compresses: set retain to a method with "
        "budget_tokens, or encode = 'window'",
    ),
    Rule(
        "R8c",
        lambda r: not r.has_memory and r.retain.method != "all",
        "a bounded memory is what the next chunk is encoded against: set encode = 'chunk', or retain = 'all'",
    ),
    Rule(
        "R10b",
        lambda r: (r.retrieve.method == "all") != r.has_memory,
        "retrieve all activates a bounded memory, as it was when the question was asked, and only that may be "
        "activated of one (R20): set both encode = 'chunk' and retrieve = 'all', or neither",
    ),
    Rule(
        "R2",
        lambda r: (r.rebuild.method == "original") != r.has_memory,
        "original positions are those of encode chunk, which sees tokens where they stand in the stream; a window has "
        "places of its own: set both encode = 'chunk' and rebuild = 'original', or neither",
    ),
    Rule(
        "R16b",
        lambda r: r.reads_back and r.unit.method != "frame",
        "encode groups sees each frame as its own unit stores it: set unit = 'frame', or encode = 'window'",
    ),
    Rule(
        "R2b",
        lambda r: r.rebuild.method == "written" and not (r.reads_back and r.profile == "code"),
        "positions as written are those of StreamingTOM's released code: set encode = 'groups' and profile = 'code', "
        "or rebuild = 'consecutive'",
    ),
    Rule(
        "S1",
        lambda r: not r.keeps_kv and not r.keeps_captions,
        "the recipe keeps neither captions nor KV: nothing could be asked of it",
    ),
    Rule(
        "S2",
        lambda r: (r.index.method == "mean_key") != r.keeps_kv,
        "index mean_key belongs to stored KV, and index caption to recipes without: change one of the two",
    ),
    Rule(
        "S3",
        lambda r: (r.rebuild.method == "text") != (not r.keeps_kv),
        "rebuild text belongs to recipes without KV, consecutive to those with: change one of the two",
    ),
)


def _merges(recipe: Recipe) -> bool:
    return recipe.reduce.method == "merge" or recipe.unit.method == "segment"


def check(recipe: Recipe) -> None:
    """Raises RecipeError with the first rule that the recipe breaks."""
    for rule in RULES:
        if rule.broken(recipe):
            raise RecipeError(f"recipe {recipe.name!r} is not legal ({rule.name}): {rule.message}")
