"""LLaVA-OneVision behind the protocol: what transformers computes, from folders as they are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from memdb.models.attention import Context
from memdb.models.llava_onevision import VISION_BATCH
from memdb.models.load import load_model, normal_spec, resolve_device, resolve_dtype
from memdb.models.random_llava import save_random_llava
from memdb.models.window import WindowContext
from memdb.schemas.errors import ModelError, ModelNotFound, UnsupportedModel
from tests.model_cases import OTHER, PlainModel, other_spec, pictures, plain, relative, wrapped

SMALL = {"text_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}}


@pytest.fixture(scope="module", params=["tiny", "other"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return "random:0" if request.param == "tiny" else other_spec(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llava(tmp_path_factory.mktemp("saved") / "model", SMALL, seed=2)


# Seeing


def test_visual_tokens_are_those_of_transformers(spec: str) -> None:
    """Also in more frames than pass the vision tower at once, and with an odd number of patches a side."""
    shown = pictures(VISION_BATCH + 3)
    model = wrapped(spec)
    found = model.visual_tokens([model.prepare(picture) for picture in shown])
    truth = plain(spec).see(shown)
    assert found.shape[1] == model.shape.frame_tokens
    assert relative(found, truth) < 1e-5
    assert relative(found[:1], found[1:2]) > 1e-2  # frames differ
    assert torch.equal(model.frame_separator(), plain(spec).newline())


def test_pooling_is_that_of_transformers(spec: str) -> None:
    model, network = wrapped(spec), plain(spec).network
    side = model._side  # type: ignore[attr-defined]
    features = torch.randn(3, side * side, 24, generator=torch.Generator().manual_seed(0))
    found = model._pool(features)  # type: ignore[attr-defined]
    assert relative(found, network.model.apply_pooling(features)) < 1e-6
    constant = model._pool(torch.full_like(features, 0.3))  # type: ignore[attr-defined]
    assert float((constant - 0.3).abs().max()) < 1e-6


@pytest.mark.parametrize("size", [(64, 96), (112, 112), (300, 40), (1, 1)])
def test_preprocessing_is_that_of_transformers(size: tuple[int, int]) -> None:
    """Their PIL processor resizes 8-bit pictures as we do; what is left is the rounding of fp32."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    side = 112
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=[[side, side]],
    )
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    theirs = processor(picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0, 0]
    ours = wrapped().prepare(picture)
    assert ours.shape == (side, side, 3)
    assert ours.dtype == np.uint8
    scaled = (torch.from_numpy(ours.copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    assert float((scaled - theirs).abs().max()) < 1e-6


def test_preparing_leaves_the_picture_alone() -> None:
    picture = pictures(1)[0]
    before = picture.copy()
    first, second = wrapped().prepare(picture), wrapped().prepare(picture)
    assert np.array_equal(picture, before)
    assert np.array_equal(first, second)


# Reading


def test_states_and_logits_are_those_of_transformers(spec: str) -> None:
    """Position ids 0 and our rotation beside the model's own."""
    model, own = wrapped(spec), plain(spec)
    ids = model.encode_text("where was the red star? " * 4)
    context: Context = WindowContext(model.rotary, 10_000)
    found = model.logits(model.forward(model.embed(ids), context))
    assert relative(found, own.forward(own.embed(ids))) < 1e-5
    assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_keys_are_the_projection_bit_for_bit(spec: str, dtype: str) -> None:
    """Position-free without un-rotating."""
    model = load_model(spec, device="cpu", dtype=dtype)
    projected: list[torch.Tensor] = []
    first = model._language.layers[0].self_attn.k_proj  # type: ignore[attr-defined]
    first.register_forward_hook(lambda module, args, out: projected.append(out))
    context = WindowContext(model.rotary, 10_000)
    model.forward(model.embed(model.encode_text("a red star")), context)
    H, D = model.shape.kv_heads, model.shape.head_size
    assert torch.equal(context.init[0].k, projected[0].view(-1, H, D).transpose(0, 1))


def test_shape_says_what_the_network_has() -> None:
    own, shape = plain(), wrapped().shape
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_size) == (
        own.layers,
        own.heads,
        own.kv_heads,
        own.head_size,
    )
    assert (shape.embedding_size, shape.frame_tokens, shape.context_tokens_max) == (256, 16, 32_768)


def test_texts_stand_in_the_published_turns() -> None:
    model = wrapped()
    head, tail = model.init_ids("Be brief."), model.prompt_ids("What is this?")
    whole = model._tokenizer.decode([*head, *tail])  # type: ignore[attr-defined]
    assert whole == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.encode_text("<|im_end|>")[0] in model.stop_ids
    assert model.decode_text(model.encode_text("a red star")) == "a red star"


# Folders and names


def test_a_saved_folder_is_the_model_that_was_saved(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    saved, built = load_model(str(folder), device="cpu"), load_model(f"random:2:{path}", device="cpu")
    shown = [built.prepare(picture) for picture in pictures(2)]
    assert torch.equal(saved.visual_tokens(shown), built.visual_tokens(shown))
    ids = built.prompt_ids("What is this?")
    both = [m.logits(m.forward(m.embed(ids), WindowContext(m.rotary, 100))) for m in (saved, built)]
    assert torch.equal(*both)
    assert saved.identity.shape == built.identity.shape
    assert saved.identity.spec == str(folder)
    assert normal_spec(str(folder)) == str(folder)
    assert normal_spec("random:0") == "random:0"
    assert (saved.stop_ids, saved.init_ids("x")) == (built.stop_ids, built.init_ids("x"))


def changed(folder: Path, copy: Path, change: Callable[[Path], None]) -> Path:
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    return copy


def rewrite(name: str, *path: str, value: object) -> Callable[[Path], None]:
    """A change of one field of a JSON file."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / name).write_text(json.dumps(data))

    return change


def one_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        one_weight,
        rewrite("preprocessor_config.json", "image_mean", value=[0.4, 0.5, 0.5]),
        rewrite("config.json", "text_config", "rope_parameters", "rope_theta", value=5e5),
        rewrite("tokenizer.json", "pre_tokenizer", value={"type": "WhitespaceSplit"}),
    ],
    ids=["weight", "mean", "rope", "tokenizer"],
)
def test_the_fingerprint_knows_what_decides_keys(
    folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    first = load_model(str(folder), device="cpu").identity.fingerprint
    assert (
        load_model(str(changed(folder, tmp_path / "same", lambda _: None)), device="cpu").identity.fingerprint
        == first
    )
    other = load_model(str(changed(folder, tmp_path / "other", change)), device="cpu").identity.fingerprint
    assert other != first


def test_mean_and_deviation_of_the_checkpoint_are_used(folder: Path, tmp_path: Path) -> None:
    def change(copy: Path) -> None:
        rewrite("preprocessor_config.json", "image_mean", value=[0.25, 0.25, 0.25])(copy)
        rewrite("preprocessor_config.json", "image_std", value=[0.25, 0.25, 0.25])(copy)

    model = load_model(str(changed(folder, tmp_path / "other", change)), device="cpu")
    base = load_model(str(folder), device="cpu")
    dark = np.full((112, 112, 3), 64, np.uint8)
    # (64/255 - 0.25) / 0.25 in the other scale is what 0.5 + 0.5 * that is in the first
    shade = 0.5 + 0.5 * (64 / 255 - 0.25) / 0.25
    near = np.full((112, 112, 3), round(shade * 255), np.uint8)
    assert relative(model.visual_tokens([dark]), base.visual_tokens([near])) < 1e-2
    assert relative(model.visual_tokens([dark]), base.visual_tokens([dark])) > 1e-2


def test_the_same_weights_in_another_dtype_have_the_same_fingerprint(folder: Path) -> None:
    """A question may run in another dtype than the encoding."""
    for name in (str(folder), "random:0"):
        found = {
            load_model(name, device="cpu", dtype=dtype).identity.fingerprint
            for dtype in ("float32", "bfloat16")
        }
        assert len(found) == 1
    assert wrapped("random:0").identity.fingerprint != wrapped("random:1").identity.fingerprint


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("random:x", ModelNotFound, "random:0"),
        ("random:", ModelNotFound, "random:0"),
        ("random:0:/nowhere/config.json", ModelNotFound, "/nowhere/config.json"),
        ("/nowhere/model", ModelNotFound, "a folder"),
        ("./nowhere", ModelNotFound, "a folder"),
        ("gpt", ModelNotFound, "Hub id"),
        ("nobody/never-was", ModelNotFound, "neither a folder here nor"),
    ],
)
def test_names_that_lead_nowhere_say_what_would(name: str, kind: type[ModelError], says: str) -> None:
    with pytest.raises(kind) as caught:
        load_model(name, device="cpu")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (remove("config.json"), ModelNotFound, "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), ModelNotFound, "config.json"),
        (rewrite("config.json", "model_type", value="mamba"), UnsupportedModel, "'mamba'"),
        (remove("model.safetensors"), ModelNotFound, "safetensors"),
        (cut, ModelError, "cannot be loaded"),
        (remove("tokenizer.json", "tokenizer_config.json"), ModelError, ""),
        (
            rewrite(
                "config.json",
                "text_config",
                "rope_parameters",
                value={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
            ),
            UnsupportedModel,
            "'dynamic'",
        ),
        (
            rewrite(
                "config.json", "text_config", "layer_types", value=["full_attention", "sliding_attention"]
            ),
            UnsupportedModel,
            "full attention",
        ),
    ],
    ids=[
        "no config",
        "no JSON",
        "family",
        "no weights",
        "cut weights",
        "no tokenizer",
        "dynamic rope",
        "sliding",
    ],
)
def test_folders_that_cannot_be_loaded_say_why(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], kind: type[ModelError], says: str
) -> None:
    with pytest.raises(kind) as caught:
        load_model(str(changed(folder, tmp_path / "bad", change)), device="cpu")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_devices_and_dtypes() -> None:
    assert resolve_dtype(None, torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ModelError, match="float64"):
        resolve_dtype("float64", torch.device("cpu"))
    with pytest.raises(ModelError, match="abacus"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        assert resolve_device(None) == torch.device("cpu")
        with pytest.raises(ModelError, match="memdb doctor"):
            resolve_device("cuda")


def test_scaled_rotations_are_carried(tmp_path: Path) -> None:
    """YaRN: other frequencies, and a factor on cosine and sine that is not the identity at position 0."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    text = {name: value for name, value in OTHER["text_config"].items() if name != "rope_theta"}
    path = tmp_path / "yarn.json"
    path.write_text(json.dumps({**OTHER, "text_config": {**text, "rope_parameters": yarn}}))
    model, own = load_model(f"random:1:{path}", device="cpu"), PlainModel(f"random:1:{path}")
    assert model.rotary.scaling > 1.1
    ids = model.encode_text("where was the red star? " * 20)
    found = model.logits(model.forward(model.embed(ids), WindowContext(model.rotary, 10_000)))
    assert relative(found, own.forward(own.embed(ids))) < 1e-5
