"""The pipeline map as data: a row a paper, a column a stage. A paper is a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from memdb.schemas.errors import RecipeError
from memdb.schemas.legality import check
from memdb.schemas.recipe import PROFILES, Recipe, Stage, read_toml

INIT_PROMPT = "You are a helpful assistant."
CAPTION_PROMPT = "Describe what is happening in this video."

REKV = Recipe(
    name="rekv",  # arXiv 2503.00540
    unit=Stage("frame"),
    reduce=Stage("identity"),
    encode=Stage("window", {"window_tokens": 15_000, "chunk_frames": 64, "init_prompt": INIT_PROMPT}),
    caption=Stage("none"),
    write=Stage("fp16"),
    retain=Stage("all"),
    index=Stage("mean_key"),
    retrieve=Stage("topk", {"blocks": 64, "group": 1, "sim": "dot"}),
    rebuild=Stage("consecutive", {"windowed": True, "time_text_s": 0.0}),
    answer=Stage("greedy", {"tokens_max": 256}),
)
RLIVS = Recipe(
    name="rlivs",  # arXiv 2510.17364
    unit=Stage("clip", {"frames": 16, "unit_s_max": 120.0}),
    reduce=Stage("recurrent", {"clips": 16, "share": 0.0625, "layers": "4/28,8/28,13/28,19/28"}),
    encode=Stage("none", {"chunk_frames": 16, "init_prompt": INIT_PROMPT}),
    caption=Stage("clip", {"prompt": CAPTION_PROMPT, "tokens_max": 256, "encoder": "input-embeddings"}),
    write=Stage("none"),
    retain=Stage("all"),
    index=Stage("caption"),
    retrieve=Stage("mmr", {"caption_tokens": 10_000, "relevance": 0.5}),
    rebuild=Stage("text", {"windowed": False, "time_text_s": 0.0}),
    answer=Stage("greedy", {"tokens_max": 256}),
)
STREAMINGTOM = Recipe(
    name="streamingtom",  # arXiv 2510.18269
    unit=Stage("frame"),
    reduce=Stage("ctr", {"tokens": 0, "tau": 0.9, "neighbours": 7, "beta": 0.6, "dpc": "textbook"}),
    encode=Stage("groups", {"window_tokens": 4_800, "chunk_frames": 32, "init_prompt": INIT_PROMPT}),
    caption=Stage("none"),
    write=Stage("oqm"),
    retain=Stage("all"),
    index=Stage("mean_key"),
    retrieve=Stage("groups", {"budget_tokens": 12_544}),
    rebuild=Stage("consecutive", {"windowed": False, "time_text_s": 0.0}),
    answer=Stage("greedy", {"tokens_max": 256}),
)
HYBRID = Recipe(
    name="hybrid",  # ours: both tiers under one commit
    unit=Stage("clip", {"frames": 16, "unit_s_max": 120.0}),
    reduce=Stage("identity"),
    encode=Stage("window", {"window_tokens": 15_000, "chunk_frames": 16, "init_prompt": INIT_PROMPT}),
    caption=Stage(
        "blocks",
        {
            "prompt": CAPTION_PROMPT,
            "tokens_max": 48,
            "encoder": "all-MiniLM-L6-v2",
            "clips": 4,
            "share": 0.0625,
            "layers": "4/28,8/28,13/28,19/28",
        },
    ),
    write=Stage("int4"),
    retain=Stage("all"),
    index=Stage("mean_key"),
    retrieve=Stage(
        "topk", {"blocks": 64, "group": 1, "sim": "dot", "caption_tokens": 2_000, "relevance": 0.5}
    ),
    rebuild=Stage("consecutive", {"windowed": False, "time_text_s": 4.0}),
    answer=Stage("greedy", {"tokens_max": 64}),
)
LIVE_UNIT_S_MAX = 10.0
LIVE_CHUNK_FRAMES = 4
RECIPES: dict[str, Recipe] = {"rekv": REKV, "rlivs": RLIVS, "streamingtom": STREAMINGTOM, "hybrid": HYBRID}

# Where a paper and its released code differ; `fixed` is the row above.
PROFILE_CHANGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("rekv", "paper"): ("retrieve.sim=cos",),
    ("rekv", "code"): (),  # the init tokens count twice in one step: encode/window reads the profile
    # Frames of a batch see each other as they are: encode/groups reads the profile.
    ("streamingtom", "paper"): (),
    # The same, and positions are those of writing, which repeat.
    ("streamingtom", "code"): ("reduce.dpc=released", "rebuild=written"),
    ("rlivs", "paper"): ("caption.tokens_max=1024", "unit.unit_s_max=0"),
    ("rlivs", "code"): ("caption.tokens_max=1024", "unit.unit_s_max=0", "retrieve.caption_tokens=20000"),
}


def recipe(
    name: str | Path,
    *,
    profile: str | None = None,
    codec: str | None = None,
    settings: tuple[str, ...] = (),
    known: Mapping[str, Recipe] = RECIPES,
) -> Recipe:
    """A named recipe or one from a TOML file, with profile, codec and `STAGE.PARAM=VALUE` settings applied.

    `known`: the recipes by name, as a model may have fitted them to itself. Raises RecipeError for unknown names and
    for combinations that are not legal (the rule is in the message).
    """
    text = str(name)
    if text in known:
        found = known[text]
    elif text.endswith(".toml"):
        found = read_toml(Path(text), known)
    else:
        raise RecipeError(f"unknown recipe {text!r}: choose one of {', '.join(known)}, or a FILE.toml")
    return adjusted(found, profile=profile, codec=codec, settings=settings)


def adjusted(
    found: Recipe, *, profile: str | None = None, codec: str | None = None, settings: tuple[str, ...] = ()
) -> Recipe:
    """A recipe with profile, codec and settings applied, checked. Raises RecipeError."""
    if profile is not None:
        found = _with_profile(found, profile)
    if codec is not None:
        if not found.keeps_kv:
            raise RecipeError(f"recipe {found.name!r} stores no KV, so --codec {codec} has nothing to act on")
        found = found.with_stage("write", Stage(codec))
    found = found.with_settings(settings)
    check(found)
    return found


def for_live(found: Recipe, hybrid: Recipe = HYBRID) -> Recipe:
    """`hybrid` on a live source: clips close after 10 s, and batches are no longer than a clip, so that a
    question waits for neither. Other recipes, and values that were set by hand, stay as they are: those that
    differ from `hybrid`, which a model may have fitted to itself.
    """
    if found.name != hybrid.name or found.unit != hybrid.unit or found.encode != hybrid.encode:
        return found
    return found.with_stage("unit", found.unit.with_params(unit_s_max=LIVE_UNIT_S_MAX)).with_stage(
        "encode", found.encode.with_params(chunk_frames=LIVE_CHUNK_FRAMES)
    )


def _with_profile(found: Recipe, profile: str) -> Recipe:
    if profile not in PROFILES:
        raise RecipeError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    if profile != "fixed" and (found.name, profile) not in PROFILE_CHANGES:
        raise RecipeError(
            f"recipe {found.name!r} has no profile {profile!r}: it has no paper of its own to follow"
        )
    changes = PROFILE_CHANGES.get((found.name, profile), ())
    return Recipe.from_json({"profile": profile}, base=found.with_settings(changes))
