"""The pipeline map as data: a row a paper, a column a stage. A paper is a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from memdb.schemas.errors import RecipeError
from memdb.schemas.legality import check
from memdb.schemas.recipe import PROFILES, Recipe, Stage, read_toml

INIT_PROMPT = "You are a helpful assistant."
# StreamKV's system text asks for the same; the words are ours.
TRACKING_PROMPT = (
    "You are watching a video. Keep track of the people and things in it, of writing on the screen, "
    "and of what changes."
)
# What its guidance prompt asks for as well, short beside a segment of four frames.
GUIDANCE_PROMPT = (
    "Find the people and things that matter and how they change, what is done, when and why, writing and scores on "
    "the screen, counts and places, and whatever is unexpected or easily mistaken."
)
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
STREAMKV = Recipe(
    name="streamkv",  # arXiv 2511.07278
    unit=Stage("segment", {"theta": 0.99, "frames_min": 4, "frames_max": 64, "unit_s_max": 120.0}),
    reduce=Stage("identity"),
    encode=Stage(
        "segment",
        {"window_tokens": 15_000, "chunk_frames": 64, "init_prompt": TRACKING_PROMPT, "summary": True},
    ),
    caption=Stage("none"),
    write=Stage("fp16"),
    retain=Stage("select_kv", {"keep": 0.6, "mode": "fixed", "prompt": GUIDANCE_PROMPT}),
    index=Stage("mean_key"),
    retrieve=Stage("layer_adaptive", {"blocks": 64, "mode": "fixed", "band": 0.5, "local_blocks": 0}),
    rebuild=Stage("consecutive", {"windowed": False, "time_text_s": 0.0}),
    answer=Stage("greedy", {"tokens_max": 256}),
)
LIVEVLM = Recipe(
    name="livevlm",  # arXiv 2505.15269, version 2
    # Ours, because no source gives a value: frames a clip, probe_tokens, top, short_frames. A probe of 16 rows is half
    # as long as SnapKV's observation window (arXiv 2404.14469); with 32 the retainer costs 6 % of the encoding.
    unit=Stage("clip", {"frames": 8, "unit_s_max": 120.0}),
    reduce=Stage("identity"),
    encode=Stage(
        "chunk", {"chunk_frames": 8, "init_prompt": INIT_PROMPT, "probe": "recent", "probe_tokens": 16}
    ),
    caption=Stage("none"),
    write=Stage("fp16"),
    retain=Stage(
        "vision_sink", {"budget_tokens": 12_288, "bucket_tokens": 1, "top": 0.5, "short_frames": 32}
    ),
    index=Stage("page_key"),
    retrieve=Stage("pages", {"page_tokens": 16, "ratio": 0.4, "blocks": 64}),
    rebuild=Stage("restored", {"consecutive": False}),
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
INFINIPOT_V = Recipe(
    name="infinipot-v",  # arXiv 2506.15745
    unit=Stage("block", {"first_frames": 32, "frames": 8, "unit_s_max": 120.0}),
    reduce=Stage("identity"),
    encode=Stage("chunk", {"chunk_frames": 8, "init_prompt": INIT_PROMPT}),
    caption=Stage("none"),
    write=Stage("fp16"),
    retain=Stage("tar_van", {"budget_frames": 24, "tar": 0.5, "recent": 0.25, "pooling": "0.2,0.4,0.6"}),
    index=Stage("mean_key"),
    retrieve=Stage("all"),
    rebuild=Stage("original"),
    answer=Stage("greedy", {"tokens_max": 256}),
)
STREAMMEM = Recipe(
    name="streammem",  # arXiv 2508.15717
    unit=Stage("clip", {"frames": 8, "unit_s_max": 120.0}),
    reduce=Stage("merge", {"delta": 0.95, "unit_s_max": 120.0}),
    encode=Stage("chunk", {"chunk_frames": 8, "init_prompt": INIT_PROMPT, "probe": "template"}),
    caption=Stage("none"),
    write=Stage("fp16"),
    retain=Stage("template", {"budget_tokens": 6144, "prototype_share": 0.25}),
    index=Stage("mean_key"),
    retrieve=Stage("all"),
    rebuild=Stage("yarn", {"factor": 0.0, "trained_tokens": 0}),  # zeros: the model's own
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
        "topk",
        {
            "blocks": 64,
            "group": 1,
            "sim": "dot",
            "caption_tokens": 2_000,
            "relevance": 0.5,
            "words": True,
            "newest_now": True,
        },
    ),
    rebuild=Stage("consecutive", {"windowed": False, "time_text_s": 4.0}),
    answer=Stage("greedy", {"tokens_max": 64}),
)
LIVE_UNIT_S_MAX = 10.0
LIVE_CHUNK_FRAMES = 4
RECIPES: dict[str, Recipe] = {
    "rekv": REKV,
    "streamkv": STREAMKV,
    "infinipot-v": INFINIPOT_V,
    "streammem": STREAMMEM,
    "livevlm": LIVEVLM,
    "streamingtom": STREAMINGTOM,
    "rlivs": RLIVS,
    "hybrid": HYBRID,
}

# What every memory must beat at the same budget (H4): no paper's, no row of the map, and known by name all the same.
_CONTROL = replace(
    REKV,
    unit=Stage("clip", {"frames": 8, "unit_s_max": 120.0}),
    encode=Stage("chunk", {"chunk_frames": 8, "init_prompt": INIT_PROMPT}),
    retrieve=Stage("all"),
    rebuild=Stage("original"),
)
_HELD = ("budget_tokens", "short_frames")  # what says how much a memory holds, whatever it is that it holds
CONTROLS: dict[str, Recipe] = {
    name: replace(_CONTROL, name=name, retain=Stage(name, {"budget_tokens": 6144}))
    for name in ("uniform", "recent")
}

# Where a paper and its released code differ; `fixed` is the row above.
PROFILE_CHANGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("rekv", "paper"): ("retrieve.sim=cos",),
    ("rekv", "code"): (),  # the init tokens count twice in one step: encode/window reads the profile
    # What the paper drops in its main table is 60 %; it names no band, and one as wide as can be hardly binds.
    ("streamkv", "paper"): (
        "unit.unit_s_max=0",
        "retain.keep=0.4",
        "retain.mode=paper",
        "retrieve.blocks=8",
        "retrieve.mode=paper",
        "retrieve.band=1.0",
    ),
    # Its init tokens count twice in one step, as those of rekv.
    ("streamkv", "code"): (
        "unit.unit_s_max=0",
        "retain.mode=code",
        "retrieve.mode=code",
        "retrieve.local_blocks=8",
    ),
    ("infinipot-v", "paper"): ("unit.unit_s_max=0",),
    ("infinipot-v", "code"): ("unit.unit_s_max=0", "retain.pooling=none"),  # rule R4 says why it cannot be
    ("streammem", "paper"): ("unit.unit_s_max=0", "reduce.unit_s_max=0"),
    ("livevlm", "paper"): ("unit.unit_s_max=0",),
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
    checked: bool = True,
) -> Recipe:
    """A named recipe or one from a TOML file, with profile, codec and `STAGE.PARAM=VALUE` settings applied.

    `known`: the recipes by name, as a model may have fitted them to itself. `checked`: see `adjusted`. Raises
    RecipeError for unknown names and for combinations that are not legal (the rule is in the message).
    """
    text, named = str(name), {**CONTROLS, **known}
    if text in named:
        found = named[text]
    elif text.endswith(".toml"):
        found = read_toml(Path(text), named, _with_profile)
    else:
        raise RecipeError(
            f"unknown recipe {text!r}: choose one of {', '.join(known)}, or a FILE.toml; "
            f"as controls there are {', '.join(CONTROLS)}"
        )
    return adjusted(found, profile=profile, codec=codec, settings=settings, checked=checked)


def control(found: Recipe, method: str) -> Recipe:
    """A recipe with a bounded memory, with a control in the place of what its paper keeps: all else is equal.

    So it is also without the probe, which a control does not look at. Raises RecipeError where there is no budget.
    """
    if method not in CONTROLS:
        raise RecipeError(f"unknown control {method!r}: choose one of {', '.join(CONTROLS)}")
    budget = found.retain.params.get("budget_tokens")
    if not found.has_memory or not budget:
        raise RecipeError(
            f"recipe {found.name!r} has no budget that a control could have too: set encode = 'chunk' and "
            "retain.budget_tokens"
        )
    kept = {name: found.retain.params[name] for name in _HELD if name in found.retain.params}
    encode = {name: value for name, value in found.encode.params.items() if not name.startswith("probe")}
    return replace(
        found,
        name=f"{found.name}-{method}",
        encode=Stage("chunk", encode),
        retain=Stage(method, kept),
    )


def adjusted(
    found: Recipe,
    *,
    profile: str | None = None,
    codec: str | None = None,
    settings: tuple[str, ...] = (),
    checked: bool = True,
) -> Recipe:
    """A recipe with profile, codec and settings applied. checked: whether by the rules of legality; who composes it
    next has them checked there, after names that nobody knows. Raises RecipeError.
    """
    if profile is not None:
        found = _with_profile(found, profile)
    if codec is not None:
        if not found.keeps_kv:
            raise RecipeError(f"recipe {found.name!r} stores no KV, so --codec {codec} has nothing to act on")
        found = found.with_stage("write", Stage(codec))
    found = _indexed(found.with_settings(settings))
    if checked:
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


def _indexed(found: Recipe) -> Recipe:
    """External retrieval reads embeddings of frames: the index keeps them, without a word, beside the keys."""
    if found.retrieve.method != "external" or found.index.method != "mean_key":
        return found
    return found.with_stage("index", Stage("frame_embedding", found.index.params))


def _with_profile(found: Recipe, profile: str) -> Recipe:
    if profile not in PROFILES:
        raise RecipeError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    if profile != "fixed" and (found.name, profile) not in PROFILE_CHANGES:
        of_a_paper = any(name == found.name for name, _ in PROFILE_CHANGES)
        why = "no code was released to follow" if of_a_paper else "it has no paper of its own to follow"
        raise RecipeError(f"recipe {found.name!r} has no profile {profile!r}: {why}")
    changes = PROFILE_CHANGES.get((found.name, profile), ())
    return Recipe.from_json({"profile": profile}, base=found.with_settings(changes))
