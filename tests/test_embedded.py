"""A model with a sheet, as the embedded one has: whole or refused, fitted settings, and a note on other films."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import memdb
from memdb.models import load
from memdb.models.joint import random_head
from memdb.models.load import load_model
from memdb.models.random_llava import random_llava, save_random_llava
from memdb.models.sheet import ModelSheet, read_sheet, write_sheet
from memdb.recipes import RECIPES, for_live
from memdb.repair import repair
from memdb.schemas.errors import ModelError, ModelMismatch, ModelNotFound, RecipeError
from memdb.schemas.rows import RecordingSpec
from memdb.world.films import render
from memdb.world.scenes import plan
from tools.films import render_film

NOTE = "this model knows one world only: name another with --model"
SETTINGS = (
    "unit.frames=4",
    "encode.window_tokens=512",
    "retrieve.caption_tokens=300",
    "caption.tokens_max=2",
)
SHEET = ModelSheet(
    name="tiny", note=NOTE, recipes={"hybrid": (*SETTINGS, "caption.encoder=input-embeddings")}
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random_llava(tmp_path_factory.mktemp("made") / "embedded", seed=4)
    write_sheet(folder, SHEET)
    return folder


@pytest.fixture
def embedded(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that `embedded` means."""
    folder = Path(shutil.copytree(made, tmp_path / "embedded"))
    monkeypatch.setattr(load, "EMBEDDED", folder)
    return folder


def test_the_embedded_model_is_that_of_the_folder(embedded: Path) -> None:
    model = load_model("embedded", device="cpu")
    assert model.identity.spec == "embedded"
    assert model.identity.fingerprint == load_model(str(embedded), device="cpu").identity.fingerprint
    assert model.sheet == replace(SHEET, sha256=read_sheet(embedded).sha256)
    assert set(model.sheet.sha256) == {"model.safetensors", "tokenizer.json"}


def test_shards_and_the_joint_head_lie_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package has it: bf16 in shards with an index, and weights beside them that are no part of the network."""
    folder = save_random_llava(tmp_path / "embedded", seed=4)
    network, _ = random_llava(seed=4, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="4MB")
    head = random_head(network.config.text_config.hidden_size, 0, torch.device("cpu"))
    save_file(head.state_dict(), folder / "joint.safetensors")
    write_sheet(folder, ModelSheet(joint="joint.safetensors"))
    monkeypatch.setattr(load, "EMBEDDED", folder)
    model = load_model("embedded", device="cpu")
    assert model.joint is not None
    assert model.joint.name == head.name
    sheet = model.sheet
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert list(sheet.sha256) == ["joint.safetensors", *shards, "tokenizer.json"]
    assert sheet.joint == "joint.safetensors"
    for name in ("joint.safetensors", shards[-1]):
        flip(folder / name)
        with pytest.raises(ModelError, match=f"{name} is damaged"):
            load_model("embedded", device="cpu")
        flip(folder / name)
    (folder / shards[0]).unlink()
    with pytest.raises(ModelError, match=f"{shards[0]} cannot be read"):
        load_model("embedded", device="cpu")


def test_a_live_source_closes_clips_soon_also_where_the_model_fits_settings() -> None:
    fitted = SHEET.fitted()["hybrid"]
    live = for_live(fitted, fitted)
    assert live.unit.params == {"frames": 4, "unit_s_max": 10.0}
    assert live.encode.params["window_tokens"] == 512
    by_hand = fitted.with_settings(("unit.frames=2",))
    assert for_live(by_hand, fitted) == by_hand


def test_a_folder_of_the_same_name_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load.normal_spec("embedded") == "embedded"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def another_tokenizer(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    words = data["model"]["vocab"]
    last, before = sorted(words, key=words.get)[-2:]
    words[last], words[before] = words[before], words[last]
    (folder / "tokenizer.json").write_text(json.dumps(data))


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights gone": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.safetensors cannot be read",
    ),
    "weights flipped": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is damaged"),
    "weights cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"1"),
        "model.safetensors is damaged",
    ),
    "tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
    "another tokenizer": (another_tokenizer, "tokenizer.json is damaged or of another model"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
    "sheet": (lambda folder: (folder / "memdb.json").write_text("{"), "memdb.json is no sheet"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_embedded_model_is_refused(embedded: Path, harm: str) -> None:
    do, told = HARM[harm]
    do(embedded)
    with pytest.raises(
        ModelError, match=f"reinstall memdb-video or name another with --model: .*{told}"
    ) as error:
        load_model("embedded", device="cpu")
    assert "\n" not in str(error.value)


def test_weights_that_lack_are_not_drawn_at_random(made: Path, tmp_path: Path) -> None:
    """Also where no sheet knows the files: transformers itself only warns."""
    folder = Path(shutil.copytree(made, tmp_path / "model"))
    (folder / "memdb.json").unlink()
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "q_proj.bias" in name)
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not all there \(1 lack, .*q_proj.bias first\)"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "no table"),
        ('{"nmae": "x"}', "unknown entry 'nmae'"),
        ('{"note": 3}', "no line of text"),
        ('{"note": "a\\nb"}', "no line of text"),
        ('{"recipes": {"hybrid": "unit.frames=8"}}', "no list"),
        ('{"sha256": {"../config.json": "00"}}', "no name of a file"),
        ('{"joint": "/etc/passwd"}', "no name of a file"),
        ('{"joint": "a\\u0000b"}', "no name of a file"),
        ('{"sha256": {"\\ud800": "00"}}', "no name of a file"),
        ('{"sha256": ["model.safetensors"]}', "no table"),
        ('{"recipes": {"hybrid": [["unit.frames=8"]]}}', "no line of text"),
        ("[" * 60_000, "no sheet"),
        (" " * (1 << 17), "longer than"),
    ],
)
def test_a_sheet_that_is_none(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "memdb.json").write_text(text)
    with pytest.raises(ModelError, match=told):
        read_sheet(tmp_path)


@pytest.mark.parametrize("value", [5, "0.5", None, [], [0.5] * 2, [0.5, "x", 1], [1e300] * 3, {"0": 1}])
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_preprocessing_that_is_no_three_numbers_is_refused(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ModelError, match=name):
        load._preprocessing(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({name: [0, 0.25, 1]}))
    assert load._preprocessing(tmp_path)[name] == [0.0, 0.25, 1.0]


def test_a_folder_without_a_sheet_has_an_empty_one(tmp_path: Path) -> None:
    assert read_sheet(tmp_path) == ModelSheet()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds of the world, and eight that are not of it."""
    folder = tmp_path_factory.mktemp("films")
    render(folder / "world.mp4", plan(2, 8), fps=5, width=160, height=90)
    render_film(folder / "other.mp4", seconds=8, fps=5, width=160, height=96)
    return folder


def ingested(store: Path, film: Path, **more: Any) -> RecordingSpec:
    with memdb.connect(store) as db:
        db.ingest(film, sample_fps=1, **more)
        return db.store.recording(film.stem).spec


def test_settings_of_the_model_lie_under_those_of_the_user(
    embedded: Path, films: Path, tmp_path: Path
) -> None:
    spec = ingested(tmp_path / "a.memdb", films / "world.mp4", settings=("retrieve.caption_tokens=200",))
    mine = (*SHEET.recipes["hybrid"], "retrieve.caption_tokens=200")
    assert spec.recipe == RECIPES["hybrid"].with_settings(mine)
    assert spec.source.of_world
    (tmp_path / "own.toml").write_text('base = "hybrid"\n[unit]\nframes = 2\n')
    spec = ingested(tmp_path / "b.memdb", films / "other.mp4", recipe=str(tmp_path / "own.toml"))
    assert spec.recipe.unit.params["frames"] == 2
    assert spec.recipe.encode.params["window_tokens"] == 512
    assert not spec.source.of_world


def test_a_setting_may_be_one_of_the_method_that_fits_the_model(
    embedded: Path, films: Path, tmp_path: Path
) -> None:
    """The recipe as published has another method there, which has no such parameter."""
    fit = ("rebuild=restored", "rebuild.consecutive=true", "retain.budget_tokens=600")
    write_sheet(embedded, replace(SHEET, recipes={"infinipot-v": fit}))
    own = ("rebuild.time_text_s=8",)
    spec = ingested(tmp_path / "a.memdb", films / "world.mp4", recipe="infinipot-v", settings=own)
    assert spec.recipe.rebuild.method == "restored"
    assert spec.recipe.rebuild.params == {"consecutive": True, "time_text_s": 8.0}


@pytest.mark.parametrize(
    ("recipes", "told"),
    [
        ({"hybird": ("unit.frames=4",)}, "a recipe 'hybird', which this memdb has not"),
        ({"hybrid": ("unit.framse=4",)}, "'hybrid' does not fit.*no parameter 'framse'"),
        ({"hybrid": ("units.frames=4",)}, "'hybrid' does not fit.*unknown stage 'units'"),
        ({"rekv": ("retrieve.blocks=none",)}, "'rekv' does not fit.*retrieve.blocks"),
    ],
)
def test_settings_that_no_recipe_takes(
    embedded: Path, films: Path, tmp_path: Path, recipes: dict[str, tuple[str, ...]], told: str
) -> None:
    write_sheet(embedded, replace(SHEET, recipes=recipes))
    with pytest.raises(ModelError, match=told):
        ingested(tmp_path / "a.memdb", films / "world.mp4")


def test_what_the_user_typed_is_refused_before_a_model_is_loaded(
    embedded: Path, films: Path, tmp_path: Path
) -> None:
    shutil.rmtree(embedded)
    embedded.mkdir()  # nothing that could be loaded
    with pytest.raises(RecipeError, match="framse"):
        ingested(tmp_path / "a.memdb", films / "world.mp4", settings=("unit.framse=4",))


def test_so_it_is_for_a_model_of_the_hub_whose_sheet_alone_is_fetched(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetched(*_: Any, **__: Any) -> str:
        raise EntryNotFoundError("it has none")

    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    def refused(name: str) -> Path:
        raise ModelNotFound(name)

    monkeypatch.setattr(load, "_fetch", refused)
    for hub, told in ((fetched, RecipeError), (offline, ModelNotFound)):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
        with memdb.connect(tmp_path / told.__name__, model="some/model") as db, pytest.raises(told):
            db.ingest(films / "world.mp4", sample_fps=1, settings=("unit.framse=4",))


def test_a_film_of_another_world_gets_one_note(embedded: Path, films: Path, tmp_path: Path) -> None:
    store = tmp_path / "a.memdb"
    for name in ("world", "other"):
        ingested(store, films / f"{name}.mp4")
    (store / "catalog.sqlite").unlink()
    repair(store)  # what the film said of itself is in the segments, too
    with memdb.connect(store) as db:
        for name, notes in (("world", 0), ("other", 1)):
            for mode in ("kv", "captions"):
                answer = db.ask("what is seen?", recording=name, mode=mode)
                assert answer.warnings.count(NOTE) == notes, (name, mode)
        answer = db.ask("what is seen?", mode="captions")
        found = {item.recording for item in answer.evidence}
        assert answer.warnings.count(NOTE) == ("other" in found)


def test_a_store_of_an_earlier_embedded_model_names_the_trouble(
    embedded: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = save_random_llava(tmp_path / "earlier", seed=5)
    write_sheet(earlier, SHEET)
    with monkeypatch.context() as patch:
        patch.setattr(load, "EMBEDDED", earlier)
        ingested(tmp_path / "a.memdb", films / "world.mp4", settings=SHEET.recipes["hybrid"])
    with (
        memdb.connect(tmp_path / "a.memdb") as db,
        pytest.raises(ModelMismatch, match="ingest into a new store"),
    ):
        db.ask("what is seen?")
    with (
        memdb.connect(tmp_path / "a.memdb", model="embedded") as db,
        pytest.raises(ModelMismatch, match=r"not with 'embedded' .*: use another store"),
    ):
        db.ingest(films / "other.mp4", sample_fps=1)
    with (
        memdb.connect(tmp_path / "a.memdb", model="embedded") as db,
        pytest.raises(
            ModelMismatch, match="computed by 'embedded' with other weights and means nothing to 'embedded'"
        ),
    ):
        db.ask("what is seen?", mode="kv")
