"""Which stages may stand together (methods.md 3.3), checked when a recipe is composed.

One rule no recipe can break, because of how every recipe runs: a quantisation group is a block, which closes with its
unit and is padded where it does not fill its last byte (R16). Nor can R12 be broken by keys that are stored: they are
computed at compute precision, before a codec sees them.
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


_EXACT = ("raw", "fp16", "bf16")  # codecs that give keys back as they were, or rounded once to 16 bits

RULES: tuple[Rule, ...] = (
    Rule(
        "R1",
        lambda r: r.retrieve.method in ("topk", "layer_adaptive", "groups", "external") and not r.keeps_kv,
        "retrieval of blocks reads KV slices, and this recipe writes none: set write to a codec, "
        "or retrieve to mmr",
    ),
    Rule(
        "R4",
        lambda r: r.profile == "code" and r.retain.method == "tar_van",
        "the released code keeps other tokens in every KV head, and neither keep sets nor positions can follow that: "
        "take profile paper or fixed; the code's own choice runs by python -m tools.run_kernel tar_van_code",
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
        "R14b",
        lambda r: r.retrieve.method == "external" and r.index.method != "frame_embedding",
        "external retrieval gives one list of frames for all layers, by embeddings of frames that nothing here keeps: "
        "set index = 'frame_embedding', or retrieve = 'topk'",
    ),
    Rule(
        "R14c",
        lambda r: r.index.method == "frame_embedding" and r.encode.method != "window",
        "embeddings of frames find whole frames for all layers, past what each layer of a bounded memory keeps: set "
        "encode = 'window', or index = 'mean_key' with retrieve = 'all'",
    ),
    Rule(
        "R14d",
        lambda r: r.retrieve.method == "mmr" and r.keeps_kv,
        "caption retrieval reads captions alone, and no question could read the KV that is stored: set retrieve = "
        "'topk', whose caption_tokens adds captions, or begin with base = 'rlivs'",
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
        lambda r: r.has_memory and r.retain.method in ("all", "select_kv"),
        "chunks are encoded against a compressed memory, which nothing here compresses: set retain to a method with "
        "budget_tokens, or encode = 'window'",
    ),
    Rule(
        "R8c",
        lambda r: not r.has_memory and r.retain.method not in ("all", "select_kv"),
        "a bounded memory is what the next chunk is encoded against: set encode = 'chunk', or retain = 'all'",
    ),
    Rule(
        "R18b",
        lambda r: r.retain.method == "select_kv" and r.encode.method != "segment",
        "SelectKV scores the frames of a segment by a guidance prompt that reads the segment: set encode = 'segment', "
        "or retain = 'all'",
    ),
    Rule(
        "R5b",
        lambda r: (
            r.encode.method == "segment"
            and r.encode.params.get("summary") is not False
            and r.reduce.method == "ctr"
        ),
        "a summary is the mean of frames place by place, and CTR leaves each frame other places: set encode.summary = "
        "false, or reduce = 'identity'",
    ),
    Rule(
        "R10b",
        lambda r: (r.retrieve.method in ("all", "pages")) != r.has_memory,
        "retrieve all and pages read a bounded memory, as it was when the question was asked, and only that may be "
        "read of one (R20): set both encode = 'chunk' and retrieve = 'all' or 'pages', or neither",
    ),
    Rule(
        "R2",
        lambda r: (r.rebuild.method in ("original", "restored", "yarn")) != r.has_memory,
        "original positions are those of encode chunk, which sees tokens where they stand in the stream; a window has "
        "places of its own: set both encode = 'chunk' and rebuild = 'original', 'restored' or 'yarn', or neither",
    ),
    Rule(
        "R12",
        lambda r: r.retrieve.method == "pages" and r.write.method not in _EXACT,
        "page keys are made of what is stored, when a question comes, and this codec rounds it: set write to raw, fp16 "
        "or bf16, or retrieve = 'all' and index = 'mean_key'",
    ),
    Rule(
        "R12b",
        lambda r: (r.retrieve.method == "pages") != (r.index.method == "page_key"),
        "pages are found by page keys, and by nothing else: set both retrieve = 'pages' and index = 'page_key', or "
        "neither",
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
        lambda r: (r.index.method == "caption") == r.keeps_kv,
        "index caption belongs to recipes without KV, and every other index to stored KV: change one of the two",
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
