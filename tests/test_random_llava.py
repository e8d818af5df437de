"""The tokenizer and the random model: the same in every process, honest in every part."""

from __future__ import annotations

import hashlib
import json
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.models import random_llava as random_llava_module
from memdb.models.random_llava import random_config, random_llava, save_random_llava
from memdb.models.random_weights import PARAMETERS_MAX, read_config
from memdb.models.tokenizer import SPECIAL_TOKENS, WORDS, WORDS_FIRST, build_tokenizer
from memdb.schemas.errors import ModelNotFound, UnsupportedModel, UsageError

TOKENIZER = build_tokenizer()
# Digest of the weights of seed 0: a change makes every store of the tiny model a store of another model.
TINY_DIGEST = "b8bca64b3d861542648f85518d55ff34"


def digest(model: torch.nn.Module) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + str(tuple(tensor.shape)).encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


# --- tokenizer


def test_words_are_whole_tokens_and_the_rest_is_bytes() -> None:
    ids = encode(" the red star?")
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["Ġthe", "Ġred", "Ġstar", "?"]
    assert encode(" " + " ".join(WORDS)) == list(range(WORDS_FIRST, WORDS_FIRST + len(WORDS)))
    assert len(TOKENIZER) == WORDS_FIRST + len(WORDS)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(deadline=None)
def test_every_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text


@pytest.mark.parametrize(
    "text", ["Zoë 🎈 日本 \x00", "two  spaces , .", "'s a\n\n\t", "<image>a <|im_end|>\n"]
)
def test_odd_texts_come_back(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text


def test_special_tokens_are_one_id_each_and_can_be_left_out() -> None:
    ids = encode("<|im_start|>red<video><image><|im_end|><|endoftext|>")
    assert [number for number in ids if number < len(SPECIAL_TOKENS)] == [1, 4, 3, 2, 0]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "red"
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 2)
    assert (TOKENIZER.image_token_id, TOKENIZER.video_token_id) == (3, 4)


def test_bytes_have_one_token_each() -> None:
    assert {len(encode(character)) for character in string.printable} == {1}


@pytest.mark.parametrize("words", [["red", "red"], ["two words"], [""], [" red"]])
def test_bad_word_lists_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        build_tokenizer(words)


# --- weights


def test_the_tiny_model_is_the_same_in_every_process() -> None:
    script = (
        "import torch; torch.manual_seed(7); torch.rand(3)\n"
        "from tests.test_random_llava import digest, encode, random_llava\n"
        "print(digest(random_llava()[0]), encode(' a red star, très vite'))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == [TINY_DIGEST, f"{encode(' a red star, très vite')}\n"]
    assert digest(random_llava()[0]) == TINY_DIGEST
    assert digest(random_llava(seed=1)[0]) != TINY_DIGEST


def test_building_leaves_the_callers_random_state_alone() -> None:
    before = torch.get_rng_state()
    random_llava(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lower_precision_is_the_rounded_model() -> None:
    full, _ = random_llava()
    half, _ = random_llava(dtype=torch.bfloat16)
    for name, parameter in full.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.to(torch.bfloat16)), name


def test_a_parameter_is_the_same_whatever_stands_beside_it() -> None:
    deep, _ = random_llava({"text_config": {"num_hidden_layers": 6}})
    plain, _ = random_llava()
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(deep.get_parameter(name), plain.get_parameter(name))


def test_shapes_of_the_presets() -> None:
    tiny, tokenizer = random_llava()
    assert 2e6 < sum(parameter.numel() for parameter in tiny.parameters()) < 4e6
    assert tiny.config.text_config.vocab_size == len(tokenizer)
    with torch.device("meta"):
        medium = type(tiny)(random_config(size="20m"))
        large = type(tiny)(random_config(size="7b"))
    assert sum(parameter.numel() for parameter in medium.parameters()) == pytest.approx(20e6, rel=0.05)
    assert sum(parameter.numel() for parameter in large.parameters()) == pytest.approx(8.03e9, rel=0.01)
    attention = large.model.language_model.layers[27].self_attn
    assert (attention.head_dim, attention.q_proj.out_features, attention.k_proj.out_features) == (
        128,
        28 * 128,
        512,
    )
    assert large.config.vision_config.image_size // large.config.vision_config.patch_size == 27


@torch.inference_mode()
def frame_tokens(model: Any, shade: float) -> torch.Tensor:
    """Visual tokens of one frame with a block of that shade, (N, E)."""
    pixels = torch.full((1, 1, 3, 112, 112), -0.5)
    pixels[..., 0, 28:70, 28:84] = shade
    found = model.model.get_video_features(pixels).pooler_output
    tokens: torch.Tensor = found[0] if isinstance(found, list | tuple) else found
    return tokens.reshape(-1, tokens.shape[-1])[:16]


@torch.inference_mode()
def test_the_model_looks_attends_and_speaks_in_words() -> None:
    model, tokenizer = random_llava()
    dark, bright = frame_tokens(model, -1.0), frame_tokens(model, 1.0)
    assert (dark - bright).norm() > 0.1 * dark.norm()  # frames differ
    assert (dark - dark.mean(0)).norm() > 0.05 * dark.norm()  # so do the places in a frame

    said = []
    for frame in (dark, bright):
        embeddings, cache, ids = frame[None], None, []
        for _ in range(12):
            out = model.model.language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids.append(int(model.lm_head(out.last_hidden_state[:, -1]).argmax()))
            embeddings = model.get_input_embeddings()(torch.tensor([[ids[-1]]]))
        assert all(number >= WORDS_FIRST or number == tokenizer.eos_token_id for number in ids)
        said.append(ids)
    assert said[0] != said[1]

    model.model.language_model.set_attn_implementation("eager")
    out = model.model.language_model(inputs_embeds=torch.cat((dark, bright))[None], output_attentions=True)
    for rows in out.attentions:  # (1, Hq, T, T)
        last = rows[0, :, -1].clamp_min(1e-12)
        held = torch.exp(
            -(last * last.log()).sum(-1)
        ).mean()  # tokens that share the weight, flat would be 32
        assert 2 < held < 26


# --- folders and configurations


def test_a_saved_folder_loads_as_the_same_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

    folder = save_random_llava(tmp_path / "model", seed=5)
    assert not list(folder.glob("*.bin"))
    loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert digest(loaded) == digest(random_llava(seed=5)[0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a red<video>").input_ids == encode("a red<video>")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 112, "width": 112}
    assert processor["image_mean"] == processor["image_std"] == [0.5, 0.5, 0.5]
    assert processor["rescale_factor"] == pytest.approx(1 / 255)


def test_a_configuration_file_overrides_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {
        "model_type": "llava_onevision",
        "text_config": {"num_hidden_layers": 2, "num_key_value_heads": 1, "rope_theta": 10_000.0},
        "vision_config": {"image_size": 56},
    }
    path.write_text(json.dumps(fields))
    model, _ = random_llava(read_config(path))
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_key_value_heads, text.hidden_size) == (2, 1, 256)
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert model.config.vision_config.image_size == 56
    assert model.config.video_token_index == TOKENIZER.video_token_id


def test_a_configuration_may_name_a_preset_and_scale_its_positions() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192}
    config = random_config({"size": "20m", "text_config": {"rope_parameters": yarn}})
    assert config.text_config.hidden_size == random_config(size="20m").text_config.hidden_size
    assert config.text_config.rope_parameters["rope_type"] == "yarn"


def test_tied_embeddings_are_not_made_faint() -> None:
    model, _ = random_llava({"text_config": {"tie_word_embeddings": True}})
    table = model.get_input_embeddings().weight
    assert model.lm_head.weight.data_ptr() == table.data_ptr()
    assert table[:WORDS_FIRST].std().item() == pytest.approx(table[WORDS_FIRST:].std().item(), rel=0.05)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text_config": {"num_attention_heads": 3}}, "multiple of num_key_value_heads"),
        ({"text_config": {"hidden_size": 255}}, "multiple of num_attention_heads"),
        ({"text_config": {"hidden_size": 4 * 63}}, "even"),
        ({"text_config": {"hiden_size": 256}}, "no field 'hiden_size'"),
        ({"text_config": {"num_hidden_layers": 0}}, "num_hidden_layers"),
        ({"text_config": {"num_hidden_layers": True}}, "whole number"),
        ({"text_config": {"vocab_size": 10}}, "vocab_size"),
        ({"text_config": {"model_type": "mamba"}}, "'mamba'"),
        ({"text_config": {"use_sliding_window": True}}, "sliding"),
        ({"text_config": {"initializer_range": -1}}, "initializer_range"),
        ({"text_config": {"rope_scaling": 4}}, "rope_scaling"),
        ({"text_config": {"hidden_size": 32_768, "num_hidden_layers": 128}}, f"{PARAMETERS_MAX:.0e}"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"text_config": {"max_position_embeddings": "long"}}, "max_position_embeddings"),
        ({"text_config": {"rms_norm_eps": "small"}}, "rms_norm_eps"),
        ({"text_config": []}, "text_config"),
        ({"vision_config": {"image_size": 20}}, "two patches"),
        ({"vision_config": {"num_attention_heads": 5}}, "multiple of num_attention_heads"),
        ({"vision_config": {"model_type": "clip"}}, "'clip'"),
        ({"model_type": "llava"}, "llava_onevision"),
        ({"vision": {}}, "no field 'vision'"),
    ],
)
def test_bad_configurations_are_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        random_config(fields)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_configuration_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read_config(tmp_path / "none.json")
    for text in ("{", "[]", "\udcff", '{"a": ' * 100_000, " " * (1 << 21)):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UnsupportedModel):
            read_config(tmp_path / "config.json")
    with pytest.raises(UnsupportedModel, match="unknown size"):
        random_config(size="huge")


def test_at_the_published_size_a_template_has_the_published_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rows are what StreamMem's probe costs: a line, the end of a turn, a line, a turn, its role, a line."""
    seen: list[Any] = []

    def kept(config: object, *, size: str, tokenizer: object) -> object:
        seen.append(tokenizer)
        raise UsageError("far enough")

    monkeypatch.setattr(random_llava_module, "random_config", kept)
    with pytest.raises(UsageError):
        random_llava({"size": "7b"})
    [tokenizer] = seen
    assert len(tokenizer.encode("\n<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)) == 6
