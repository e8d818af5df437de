"""Recipes as data: settings, files, profiles, legality, and what a new method takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdb.client import Client, connect
from memdb.ingest import stages
from memdb.ingest.stages import compose
from memdb.ingest.units import UNITS
from memdb.query import stages as query_stages
from memdb.query.stages import compose as compose_query
from memdb.recipes import (
    HYBRID,
    LIVEVLM,
    PROFILE_CHANGES,
    RECIPES,
    REKV,
    RLIVS,
    STREAMINGTOM,
    STREAMKV,
    recipe,
)
from memdb.schemas.errors import RecipeError
from memdb.schemas.fingerprint import encoding_fingerprint
from memdb.schemas.legality import RULES, check
from memdb.schemas.params import build
from memdb.schemas.recipe import ENCODING_STAGES, PROFILES, STAGES, Recipe, Stage
from tests.memory_cases import METHODS, memory_recipe
from tests.question_cases import SMALL, House

REGISTRIES = {**stages.METHODS, **query_stages.METHODS}


# The map and the registries


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_from_what_is_registered(name: str) -> None:
    row = RECIPES[name]
    assert row.name == name
    check(row)
    compose(row)
    compose_query(row)
    for stage, registry in REGISTRIES.items():
        assert row.stage(stage).method in registry


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_of_a_recipe_is_one_of_its_method(name: str) -> None:
    for stage, registry in REGISTRIES.items():
        row = RECIPES[name].stage(stage)
        known = {field.name for field in fields(registry[row.method])}
        assert set(row.params) <= known, stage


# Their recipes come with the encoders and retainers of the same papers.
WAITING = {
    "index": {"frame_embedding"},  # and `external`: another way to ask rekv
    "retrieve": {"external"},
}


def test_every_registered_method_is_in_some_recipe() -> None:
    for stage, registry in REGISTRIES.items():
        rows = [*RECIPES.values(), *map(memory_recipe, METHODS)]  # of bounded memories none has a name yet
        profiles = [pair for pair in PROFILE_CHANGES if pair not in NO_RECIPE]
        rows += [recipe(name, profile=profile) for name, profile in profiles]
        used = {row.stage(stage).method for row in rows}
        assert used | WAITING.get(stage, set()) == set(registry), stage


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_json(name: str) -> None:
    assert Recipe.from_json(RECIPES[name].as_json()) == RECIPES[name]


# Settings


@pytest.mark.parametrize(
    ("setting", "stage", "param", "value"),
    [
        ("retrieve.blocks=16", "retrieve", "blocks", 16),
        ("retrieve.relevance = 0.25", "retrieve", "relevance", 0.25),
        ("rebuild.windowed=true", "rebuild", "windowed", True),
        ("caption.prompt=What?", "caption", "prompt", "What?"),
        ('caption.prompt="a = b"', "caption", "prompt", "a = b"),
        ("caption.prompt=a=b", "caption", "prompt", "a=b"),
        ("encode.window_tokens=15_000", "encode", "window_tokens", 15_000),
        ("caption.prompt=", "caption", "prompt", ""),
    ],
)
def test_settings_are_read_as_toml_or_as_a_word(setting: str, stage: str, param: str, value: object) -> None:
    changed = recipe("hybrid", settings=(setting,))
    found = changed.stage(stage).params[param]
    assert (found, type(found)) == (value, type(value))
    for other in STAGES:
        before = dict(HYBRID.stage(other).params)
        after = {
            name: v for name, v in changed.stage(other).params.items() if (other, name) != (stage, param)
        }
        assert after == {name: v for name, v in before.items() if (other, name) != (stage, param)}


def test_a_stage_can_be_set_as_a_whole_and_later_settings_win() -> None:
    assert recipe("hybrid", settings=("write=int8",)).codec == "int8"
    assert recipe("hybrid", settings=("unit=frame",)).unit == Stage("frame")
    twice = recipe("hybrid", settings=("unit.frames=4", "unit.frames=8"))
    assert twice.unit.params["frames"] == 8


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("retrieve.blocks", "write STAGE.PARAM=VALUE"),
        ("=4", "write STAGE.PARAM=VALUE"),
        ("retreive.blocks=4", "unknown stage 'retreive'"),
        ("retrieve.block=4", "no parameter 'block'"),
        ("retrieve.blocks=many", "is not of type int"),
        ("retrieve.blocks=true", "is not of type int"),
        ("retrieve.blocks=1.5", "is not of type int"),
        ("rebuild.windowed=1", "is not of type bool"),
        ("retrieve.blocks=0", "too small"),
        ("retrieve.blocks=[4]", "not a number"),
        ("retrieve.relevance=nan", "is no share"),
        ("unit=page", "no method 'page'"),
        ("write=int3", "choose one of raw, fp16, bf16, int8, int4, oqm, oqm2, none"),
        ("write.level=3", r"write\.int4 has no parameter 'level'"),
        ("index.heads=3", r"index\.mean_key has no parameter 'heads'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_a_way_out(setting: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        composed(setting)


def composed(setting: str, name: str = "hybrid") -> None:
    row = recipe(name, settings=(setting,))
    compose(row)
    compose_query(row)


@given(st.dictionaries(st.sampled_from(["blocks", "group"]), st.integers(1, 99)))
def test_settings_are_the_parameters_that_they_name(params: dict[str, int]) -> None:
    row = REKV.with_settings(f"retrieve.{name}={value}" for name, value in params.items())
    assert row.retrieve.params == {**REKV.retrieve.params, **params}


# Files


def toml(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_changes_its_base_stage_by_stage(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """
        base = "hybrid"
        write = "int8"
        [unit]
        frames = 8
        [retrieve]
        method = "topk"
        blocks = 32
        """,
    )
    row = recipe(path)
    assert row.name == "mine"
    assert row.codec == "int8"
    assert row.unit == Stage("clip", {"frames": 8, "unit_s_max": 120.0})  # params over the base's
    assert row.retrieve == Stage("topk", {"blocks": 32})  # a method begins anew
    unchanged = set(STAGES) - {"unit", "write", "retrieve"}
    assert all(row.stage(name) == HYBRID.stage(name) for name in unchanged)
    assert recipe(path, settings=("unit.frames=2",), codec="raw").unit.params["frames"] == 2


def test_a_method_that_is_set_like_a_parameter_is_a_method_to_the_rules() -> None:
    """`as_json` would let it take the method's own place, behind them."""
    with pytest.raises(RecipeError, match=r"not legal \(R10b\)"):
        recipe("uniform", settings=("retrieve.method=topk",))
    assert recipe("uniform", settings=("retain.method=recent",)).retain == Stage("recent")
    with pytest.raises(RecipeError, match="write STAGE=METHOD"):
        Stage("all").with_params(method="topk")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("infinipot-v", "retain.exempt=1.5"),
        ("streammem", "retain.prototype_share=-0.5"),
        ("livevlm", "retain.top=2.0"),
        ("livevlm", "retrieve.ratio=1.5"),
        ("rlivs", "retrieve.relevance=1.5"),
    ],
)
def test_a_share_that_may_be_nothing_is_named_with_its_value_and_its_range(name: str, setting: str) -> None:
    with pytest.raises(RecipeError, match=f"^{setting.replace('=', ' = ')} is no share: give 0 to 1$"):
        composed(setting, name)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("9" * 400, "too large"),
        ("9" * 5000, "cannot read '999"),
        ("[" * 5000, "cannot read"),
    ],
)
def test_values_without_end_are_refused_like_others(value: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        compose(recipe("uniform", settings=(f"retain.budget_tokens={value}",)))
    assert len(str(caught.value)) < 200


def test_a_profile_in_a_file_is_the_one_of_its_base(tmp_path: Path) -> None:
    """It would say `paper` of a recording that is none of the paper's."""
    row = recipe(toml(tmp_path, 'base = "rekv"\nprofile = "paper"\n[retrieve]\nblocks = 8'))
    assert (row.profile, row.retrieve.params["sim"], row.retrieve.params["blocks"]) == ("paper", "cos", 8)
    with pytest.raises(RecipeError, match="no code was released to follow"):
        recipe(toml(tmp_path, 'base = "livevlm"\nprofile = "code"'))


def test_any_word_may_be_typed_as_a_parameter(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no parameter 'self'"):
        compose(recipe("rekv", settings=("retain.self=1",)))
    with pytest.raises(RecipeError, match="no parameter 'self'"):
        compose(recipe(toml(tmp_path, 'base = "rekv"\n[retain]\nself = 1')))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base = ", "cannot read the recipe"),
        ('base = "soup"', "unknown base recipe 'soup'"),
        ('base = "rekv"\n[retreive]\nblocks = 1', "unknown stage 'retreive'"),
        ('base = "rekv"\nprofile = "best"', "unknown profile 'best'"),
        ('base = "rekv"\nunit = 3', "must be a method's name or a table"),
        ('base = "rekv"\n[retrieve]\nblocks = [1, 2]', "not a number"),
        ('unit = "frame"', "names no 'reduce' stage"),
        ('base = "rekv"\nwrite = "none"', "is not legal"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe(toml(tmp_path, text))


def test_names_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"choose one of {', '.join(RECIPES)}, or a FILE\.toml"):
        recipe("soup")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        recipe(tmp_path / "missing.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        recipe(tmp_path / "bytes.toml")


# Profiles and codecs

NO_RECIPE = {("infinipot-v", "code")}  # R4


def test_profiles_change_what_they_say() -> None:
    for (name, profile), changes in PROFILE_CHANGES.items():
        if (name, profile) in NO_RECIPE:
            continue
        row = recipe(name, profile=profile)
        assert row.profile == profile
        for change in changes:
            target, _, value = change.partition("=")
            stage, _, param = target.partition(".")
            assert (str(row.stage(stage).params[param]) if param else row.stage(stage).method) == value
        compose(row)
        compose_query(row)
    assert recipe("rekv", profile="fixed") == REKV
    with pytest.raises(RecipeError, match="no paper of its own"):
        recipe("hybrid", profile="paper")
    with pytest.raises(RecipeError, match=r"not legal \(R4\).*run_kernel tar_van_code"):
        recipe("infinipot-v", profile="code")
    with pytest.raises(RecipeError, match="no code was released"):
        recipe("streammem", profile="code")
    with pytest.raises(RecipeError, match="unknown profile"):
        recipe("rekv", profile="best")
    assert {profile for _, profile in PROFILE_CHANGES} | {"fixed"} == set(PROFILES)


def test_a_codec_needs_something_to_store() -> None:
    assert recipe("rekv", codec="int4").codec == "int4"
    with pytest.raises(RecipeError, match="stores no KV"):
        recipe("rlivs", codec="int4")


# Legality: each rule by one recipe that breaks it and no rule before it

MEMORY = memory_recipe()
BROKEN: dict[str, Recipe] = {
    "R1": HYBRID.with_stage("write", Stage("none")),
    "R4": replace(RECIPES["infinipot-v"], profile="code"),
    "R5": REKV.with_stage("reduce", Stage("ctr")).with_stage("retain", Stage("tar_van")),
    "R6": REKV.with_stage("unit", Stage("segment")).with_stage("retain", Stage("tar_van")),
    "S4": REKV.with_stage("encode", Stage("none")),
    "R10": RLIVS.with_stage("encode", Stage("window")),
    "R14": REKV.with_stage("retrieve", Stage("mmr")),
    "R14b": REKV.with_stage("retrieve", Stage("external")),
    "R14c": MEMORY.with_stage("index", Stage("frame_embedding")),
    "R14d": HYBRID.with_stage("retrieve", Stage("mmr")),
    "R15": RLIVS.with_stage("caption", Stage("blocks")),
    "R18": HYBRID.with_stage("reduce", Stage("recurrent")),
    "R8": HYBRID.with_stage("reduce", Stage("recurrent")).with_stage("caption", Stage("clip")),
    "R8b": MEMORY.with_stage("retain", Stage("all")),
    "R8c": REKV.with_stage("retain", Stage("recent")),
    "R18b": REKV.with_stage("retain", Stage("select_kv")),
    "R5b": STREAMKV.with_stage("reduce", Stage("ctr")),
    "R10b": MEMORY.with_stage("retrieve", Stage("topk")),
    "R2": MEMORY.with_stage("rebuild", Stage("consecutive")),
    "R12": LIVEVLM.with_stage("write", Stage("int4")),
    "R12b": LIVEVLM.with_stage("index", Stage("mean_key")),
    "R16b": STREAMINGTOM.with_stage("unit", Stage("clip")),
    "R2b": STREAMINGTOM.with_stage("rebuild", Stage("written")),
    "S1": RLIVS.with_stage("caption", Stage("none"))
    .with_stage("reduce", Stage("identity"))
    .with_stage("retrieve", Stage("none")),
    "S2": REKV.with_stage("index", Stage("caption")),
    "S3": REKV.with_stage("rebuild", Stage("text")),
}


def test_every_rule_has_a_case() -> None:
    assert list(BROKEN) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named_with_its_reason(name: str) -> None:
    [rule] = [rule for rule in RULES if rule.name == name]
    with pytest.raises(RecipeError) as caught:
        check(BROKEN[name])
    assert f"is not legal ({name}): {rule.message}" in str(caught.value)
    with pytest.raises(RecipeError):
        compose(BROKEN[name])


def test_reduced_frames_may_be_compared_patch_by_patch_where_nothing_is_pooled() -> None:
    """R5 as far as it must go: every token knows the patch that it stood at, but not its neighbours."""
    bounded = memory_recipe("tar_van").with_stage("reduce", Stage("ctr"))
    for pooling in ("0.2,0.4,0.6", "0,0,1"):
        with pytest.raises(RecipeError, match=r"not legal \(R5\).*retain.pooling = 'none'"):
            compose(bounded.with_stage("retain", bounded.retain.with_params(pooling=pooling)))
    compose(bounded.with_stage("retain", bounded.retain.with_params(pooling="none")))
    compose(bounded.with_stage("retain", Stage("uniform")))


def test_merged_frames_are_no_matter_of_the_unit_alone() -> None:
    with pytest.raises(RecipeError, match=r"not legal \(R6\)"):
        check(REKV.with_stage("reduce", Stage("merge")).with_stage("retain", Stage("tar_van")))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("unit.frames_max=3", "below unit.frames_min = 4"),
        ("unit.frames_min=0", "too small"),
        ("unit.theta=-2", "too small"),
        ("unit.unit_s_max=-1", "too small"),
        ("unit.size=1", "no parameter 'size'"),
    ],
)
def test_segments_that_cannot_be_are_refused(setting: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        compose(recipe("rekv", settings=("unit=segment", setting)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["unit=block", "unit.first_frames=0"], "too small"),
        (["unit=block", "unit.frames=0"], "too small"),
        (["reduce=merge", "reduce.delta=-2"], "too small"),
        (["reduce=merge", "reduce.delta=nan"], "too small"),
        (["reduce=merge", "reduce.unit_s_max=-1"], "too small"),
        (["reduce=ctr", "reduce.beta=0"], "no share"),
        (["reduce=ctr", "reduce.dpc=mine"], "choose one of textbook, released"),
    ],
)
def test_reductions_that_cannot_be_are_refused(settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        compose(recipe("rekv", settings=tuple(settings)))


def test_more_tokens_than_a_frame_has_are_refused_before_anything_is_written(
    house: House, tmp_path: Path
) -> None:
    settings = (*SMALL["rekv"], "reduce=ctr", "reduce.tokens=999")
    with (
        connect(tmp_path / "new.memdb") as client,
        pytest.raises(RecipeError, match="a frame of this model has"),
    ):
        client.ingest(house.film, recording="film", recipe="rekv", settings=settings)
    with connect(tmp_path / "new.memdb") as client:
        assert client.recordings() == []


def test_an_index_that_there_is_not_is_refused() -> None:
    with pytest.raises(RecipeError, match="stage 'index' has no method 'soup'"):
        compose(REKV.with_stage("index", Stage("soup")))


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_break_no_rule(name: str) -> None:
    assert [rule.name for rule in RULES if rule.broken(RECIPES[name])] == []


# The encoding fingerprint


def fingerprint(row: Recipe, **changes: Any) -> str:
    values: dict[str, Any] = {
        "model": "m",
        "init_ids": (1, 2),
        "sample_fps": 0.5,
        "seed": 0,
        "dtype": "float32",
    }
    return encoding_fingerprint(row, **(values | changes))


def test_the_fingerprint_is_of_what_decides_the_stored_tokens_and_of_nothing_else() -> None:
    base = fingerprint(HYBRID)
    assert base == fingerprint(Recipe.from_json(HYBRID.as_json()))
    for setting in ("retrieve.blocks=8", "rebuild.windowed=true", "answer.tokens_max=1", "write=raw"):
        assert fingerprint(recipe("hybrid", settings=(setting,))) == base, setting
    different = [
        fingerprint(recipe("hybrid", settings=(setting,)))
        for setting in (
            "unit.frames=8",
            "encode.window_tokens=99",
            "caption.tokens_max=7",
            "encode.chunk_frames=3",
        )
    ]
    different += [
        fingerprint(HYBRID, **change)
        for change in (
            {"model": "n"},
            {"init_ids": ()},
            {"sample_fps": 1.0},
            {"seed": 1},
            {"dtype": "bfloat16"},
        )
    ]
    assert len({base, *different}) == 1 + len(different)
    assert set(ENCODING_STAGES) < set(STAGES)


# Adding a method, as CONTRIBUTING describes it


@dataclass(frozen=True)
class Pairs:
    """Two frames a unit: one class in one file, with its parameters as fields."""

    frames: int = 2

    def extend(self, opened: Any, frame: Any) -> tuple[list[list[Any]], list[Any]]:
        unit = [*opened, frame]
        return ([unit], []) if len(unit) == self.frames else ([], unit)


def test_a_method_is_a_class_and_one_line_in_a_dict(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="choose one of block, clip, frame, segment"):
        compose(recipe("rekv", settings=("unit=pairs",)))
    monkeypatch.setitem(UNITS, "pairs", Pairs)
    monkeypatch.setitem(RECIPES, "paired", REKV.with_stage("unit", Stage("pairs")))
    assert build("unit", Stage("pairs", {"frames": 3}), UNITS) == Pairs(3)
    with pytest.raises(RecipeError, match=r"unit\.pairs has no parameter 'size'"):
        compose(recipe("paired", settings=("unit.size=3",)))
    with connect(tmp_path / "new.memdb") as client:
        client.ingest(
            house.film, recording="film", recipe="paired", settings=SMALL["rekv"], sample_fps=1.0, codec="raw"
        )
        row = client.store.recording("film")
        assert row.units == 12
        assert all(len(unit.blocks) == 2 for unit in client.store.units(row.id))
        answer = client.ask("What colour was it?")
        assert answer.plan.mode == "kv"
        assert client.verify().ok
        # Units do not touch the encoding: block by block the keys are those of frame by frame, as rekv cuts it.
        client.ingest(
            house.film, recording="frames", recipe="rekv", settings=SMALL["rekv"], sample_fps=1.0, codec="raw"
        )
        assert np.array_equal(keys_of(client, "film"), keys_of(client, "frames"))


def keys_of(client: Client, name: str) -> Any:
    """(L, blocks, H*D) of all units."""
    units = client.store.units(client.store.recording(name).id)
    return np.concatenate([client.store.read_keys(unit) for unit in units], 1)
