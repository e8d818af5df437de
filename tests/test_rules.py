"""The rules R1 to R20 of what may stand together: each has somebody who holds it, and every refusal says which it was.

A rule is held in three ways: `rule NAME` in schemas/legality.py, asked when a recipe is composed; `fit NAME` in
ingest/stages.py, where stages meet each other's parameters and a model; or by construction, whose proof is a test
`FILE::NAME`. A rule without a holder fails here, and so does a holder that is gone.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from memdb.ingest import stages
from memdb.ingest.stages import compose
from memdb.recipes import recipe
from memdb.schemas.errors import RecipeError
from memdb.schemas.legality import RULES
from memdb.store import Store
from tests.memory_cases import memory_recipe
from tests.model_cases import ingest, pictures, wrapped

FOLDER = Path(__file__).parent

HELD: dict[str, tuple[str, ...]] = {
    # Per-layer retrieval reads slices of one layer.
    "R1": ("rule R1", "test_codecs.py::test_a_unit_holds_its_slices_layer_by_layer"),
    # Stored keys have no positions, and those that they had are kept beside them.
    "R2": ("rule R2", "rule R2b", "test_reference_cross.py::test_x2_rotation_is_undone"),
    # A group is a block. What is kept of it later is gathered as it is, scales included.
    "R3": (
        "test_codecs.py::test_what_is_kept_of_a_group_comes_out_bit_for_bit",
        "test_memory_store.py::test_compaction_gathers_what_the_memory_holds_where_the_policy_says_so",
    ),
    # A memory has one set a layer: sets by head are kernels only.
    "R4": (
        "rule R4",
        "test_retain_contract.py::test_exactly_the_budget_stays_in_order_of_time",
    ),
    "R5": (
        "rule R5",
        "rule R5b",
        "fit check_frames",
        "test_bounded_memory.py::test_tokens_that_ctr_left_know_the_patches_that_they_stood_at",
    ),
    "R6": ("rule R6", "test_bounded_memory.py::test_what_was_merged_of_several_frames_stands_for_no_patch"),
    # Prototypes are blocks of a kind of their own, and count.
    "R7": (
        "test_retain_tar_van.py::test_merged_tokens_stay_without_a_place_and_within_their_share",
        "test_retain_template.py::test_the_budget_holds_over_any_stream_prototypes_included",
    ),
    "R8": (
        "rule R8",
        "rule R8b",
        "rule R8c",
        "test_bounded_memory.py::test_policy_and_budget_are_part_of_the_encoding",
    ),
    # Our attention asks each layer for its own keys, places and length.
    "R9": (
        "test_contexts.py::test_a_question_sees_what_each_layer_fetches_and_leaves_nothing",
        "test_bounded_memory.py::test_layers_of_different_lengths_are_decided_each_for_itself",
    ),
    # A question has a context of its own.
    "R10": ("rule R10", "rule R10b", "test_bounded_memory.py::test_x5_a_question_changes_nothing"),
    # Consecutive places begin anew for each question, however long the stream is.
    "R11": (
        "test_yarn.py::test_r11_positions_beyond_what_the_model_reads_are_told",
        "test_reference_cross.py::test_a_stream_position_of_ten_million_gives_the_bits_of_position_zero",
    ),
    "R12": (
        "rule R12",
        "rule R12b",
        "test_rules.py::test_r12_what_blocks_are_found_by_does_not_depend_on_the_codec",
    ),
    # Keys are quantised as they are stored: without positions.
    "R13": ("test_reference_cross.py::test_a_film_that_repeats_gives_the_same_bits_ever_after",),
    "R14": (
        "rule R14",
        "rule R14b",
        "rule R14c",
        "rule R14d",
        "test_external.py::test_every_layer_reads_the_frames_that_are_nearest_and_full_recall_is_full_attention",
    ),
    "R15": ("rule R15", "test_reference_hybrid.py::test_h1_every_block_that_overlaps_a_clip_and_no_other"),
    # A group closes with its block, and a block with its unit: odd ones are padded.
    "R16": (
        "rule R16b",
        "test_reduced.py::test_an_odd_group_comes_back_from_a_store_within_half_a_step",
    ),
    "R17": (
        "test_client.py::test_a_moment_within_a_unit_uses_what_had_ended_by_then",
        "test_reference_cross.py::test_x4_the_past_does_not_depend_on_the_future",
    ),
    "R18": (
        "rule R18",
        "rule R18b",
        "fit _check_probe",
        "test_bounded_memory.py::test_what_a_probe_pays_is_the_softmax_of_its_rows",
    ),
    "R19": ("test_bounded_memory.py::test_r19_probe_text_leaves_nothing_behind",),
    # What was dropped is in no keep set, and nothing else of a memory is read.
    "R20": (
        "rule R10b",
        "test_bounded_memory.py::test_a_question_of_a_reopened_store_finds_the_encoders_own_memory",
    ),
}


def test_every_rule_has_its_number_and_a_holder() -> None:
    assert list(HELD) == [f"R{number}" for number in range(1, 21)]
    assert all(HELD.values())


@pytest.mark.parametrize("rule", HELD)
def test_whoever_holds_a_rule_is_there(rule: str) -> None:
    for holder in HELD[rule]:
        kind, _, name = holder.partition(" ")
        if kind == "rule":
            assert name in {rule.name for rule in RULES}, holder
        elif kind == "fit":
            assert hasattr(stages, name) or hasattr(stages.IngestStages, name), holder
        else:
            file, _, name = holder.partition("::")
            assert name in functions(file), holder


@lru_cache
def functions(file: str) -> frozenset[str]:
    """Tests of a file, in classes or not."""
    tree = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_rule_that_is_asked_is_one_of_the_table() -> None:
    """Those of a stage alone are S; every R of the code holds the R of the table, with a letter behind it or none."""
    for rule in RULES:
        number = re.fullmatch(r"(R\d+)[a-z]?|S\d", rule.name)
        assert number, rule.name
        if number[1]:
            assert f"rule {rule.name}" in HELD[number[1]], (
                f"name {rule.name} among the holders of {number[1]}"
            )


def test_r12_what_blocks_are_found_by_does_not_depend_on_the_codec(tmp_path: Path) -> None:
    """Representative keys and embeddings of frames come before a codec sees the keys: the same bits, in int4 as raw."""
    found = []
    for codec in ("raw", "int4", "oqm2"):
        ingest(tmp_path / codec, pictures(4), codec=codec, settings=("retrieve=external",))
        with Store.open(tmp_path / codec) as store:
            rows = store.units(store.recording("film").id)
            found.append([(store.read_keys(row), store.read_embeddings(row)) for row in rows])
    for others in found[1:]:
        for (keys, seen), (own_keys, own_seen) in zip(found[0], others, strict=True):
            assert keys is not None
            assert seen is not None
            assert np.array_equal(keys, own_keys)
            assert np.array_equal(seen, own_seen)


# What a model cannot carry, and what was typed wrong: refused when composed, with the reason


def test_r5_pooling_needs_rows_and_columns() -> None:
    """Of a model whose frames are neither a square nor a grid of the recording's own."""
    row = memory_recipe("tar_van", 90)
    compose(row).check_frames(16)
    compose(row).check_frames(15, (3, 5))
    with pytest.raises(RecipeError, match=r"not legal \(R5\).*15 tokens.*retain\.pooling = 'none'"):
        compose(row).check_frames(15)
    compose(row.with_stage("retain", row.retain.with_params(pooling="none"))).check_frames(15)
    compose(memory_recipe("uniform", 90)).check_frames(15)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('base = "uniform"\n[retain]\nbudget_tokens = 0', r"retain\.budget_tokens = 0 is too small"),
        ('base = "uniform"\n[retain]\nbudget_token = 9', r"retain\.uniform has no parameter 'budget_token'"),
        ('base = "uniform"\n[retain]\nmethod = "best"', "stage 'retain' has no method 'best'"),
        ('base = "uniform"\n[retian]\nbudget_tokens = 9', "unknown stage 'retian'"),
        ('base = "uniform"\nretain = "all"', r"is not legal \(R8b\)"),
        ('base = "uniform"\nretrieve = "topk"', r"is not legal \(R10b\)"),
        ('base = "uniform"\nindex = "frame_embedding"', r"is not legal \(R14c\)"),
        ('base = "rekv"\nretain = "recent"', r"is not legal \(R8c\)"),
        ('base = "hybrid"\nretrieve = "mmr"', r"is not legal \(R14d\)"),
        ('base = "rekv"\n[caption]\nmethod = "blocks"\nshare = 0.0', r"share = 0\.0 is no share"),
        ('base = "rekv"\n[reduce]\nmethod = "ctr"\nbeta = 1.5', r"reduce\.beta = 1\.5 is no share"),
        (
            'base = "rekv"\n[index]\nmethod = "frame_embedding"\nencoder = 3',
            r"index\.encoder = 3 is not of type str",
        ),
        ('base = "rlivs"\nretrieve = "external"', r"is not legal \(R1\)"),
    ],
)
def test_files_of_recipes_that_cannot_be_are_refused_with_the_reason(
    text: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        compose(recipe(path))


def test_a_budget_is_held_against_the_models_frames_before_anything_is_written(tmp_path: Path) -> None:
    settings = ("retain=tar_van", "retain.budget_tokens=8")
    with pytest.raises(RecipeError, match="too small for frames of 16 tokens: give at least 32"):
        ingest(tmp_path / "s", pictures(1), recipe="uniform", settings=settings)
    assert wrapped().shape.frame_tokens == 16
    with Store.open(tmp_path / "s") as store:
        assert store.recordings() == []
