"""Qwen2.5-VL behind the protocol: what transformers sees, turns and reads; what is refused."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.models.load import load_model
from memdb.models.places import Grid, Line, Next, Places, place_frames
from memdb.models.qwen2_5_vl import VISION_BATCH, smart_grid
from memdb.models.random_qwen import random_config, save_random_qwen
from memdb.models.rotary import Rotary
from memdb.models.window import WindowContext
from memdb.schemas.errors import ModelError, ModelNotFound, UnsupportedModel
from tests.model_cases import pictures, relative
from tests.qwen_cases import COLUMNS, QWEN, ROWS, N, ids_by_hand, plain_qwen, qwen

SMALL = {"text_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}}
FEW = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_qwen(tmp_path_factory.mktemp("saved") / "model", SMALL, seed=2)


# Seeing


@pytest.mark.parametrize("count", [1, 2, 5, 2 * VISION_BATCH + 3])
def test_visual_tokens_are_those_of_transformers(count: int) -> None:
    """An odd last frame is seen twice; pairs do not see each other, so batches do not matter."""
    shown = pictures(count)
    found = qwen().visual_tokens([qwen().prepare(picture) for picture in shown])
    assert found.shape[:2] == (-(-count // 2), N)
    assert relative(found, plain_qwen().see(shown)) < 1e-5
    alone = qwen().visual_tokens([qwen().prepare(picture) for picture in shown[-2 + count % 2 :]])
    assert relative(found[-1], alone[-1]) < 1e-5


def test_both_frames_of_a_pair_count() -> None:
    a, b, c = (qwen().prepare(picture) for picture in pictures(3))
    pairs = [qwen().visual_tokens([x, y])[0] for x, y in [(a, b), (b, a), (a, c), (a, a)]]
    assert all(relative(other, pairs[0]) > 1e-2 for other in pairs[1:])
    assert torch.equal(qwen().visual_tokens([a])[0], pairs[3])


@pytest.mark.parametrize("size", [(64, 96), (84, 140), (300, 90), (30, 30), (720, 1280)])
def test_a_picture_is_prepared_as_by_transformers(size: tuple[int, int]) -> None:
    """Their processor resizes 8-bit pictures as we do, and takes one picture as two equal frames."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, own = qwen(), plain_qwen()
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    theirs = Qwen2VLImageProcessorPil(
        image_mean=own._preprocessing["image_mean"],
        image_std=own._preprocessing["image_std"],
        size={"shortest_edge": 28 * 28, "longest_edge": 18 * 28 * 28},
    )(picture, return_tensors="pt", input_data_format="channels_last")
    rows, columns = model.frame_grid(*size)
    assert theirs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    before = picture.copy()
    ready = model.prepare(picture, (rows, columns))
    assert (ready.shape, ready.dtype) == ((28 * rows, 28 * columns, 3), np.dtype(np.uint8))
    assert np.array_equal(picture, before)
    with torch.inference_mode():
        see = own.network.model.get_video_features
        seen = see(theirs["pixel_values"], theirs["image_grid_thw"]).pooler_output
    assert relative(model.visual_tokens([ready])[0], seen[0]) < 1e-5


@FEW
@given(
    st.integers(28, 4000),
    st.integers(28, 4000),
    st.sampled_from([128, 200, 768]),
    st.sampled_from([1, 4, 64]),
)
def test_grids_are_those_of_the_published_rule(height: int, width: int, most: int, least: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(height, width) / min(height, width) > 100:
        return  # theirs refuses those, or makes more tokens than it was allowed
    theirs = smart_resize(height, width, factor=28, min_pixels=least * 784, max_pixels=most * 784)
    rows, columns = smart_grid(height, width, cell=28, pixels_min=least * 784, pixels_max=most * 784)
    assert (28 * rows, 28 * columns) == tuple(theirs)


def test_a_frame_of_16_to_9_has_8_by_15_tokens() -> None:
    assert smart_grid(1080, 1920, cell=28, pixels_min=784, pixels_max=128 * 784) == (8, 15)


@given(st.integers(1, 5000), st.integers(1, 5000))
@FEW
def test_no_picture_has_more_tokens_than_the_shape_says(height: int, width: int) -> None:
    rows, columns = qwen().frame_grid(height, width)
    assert 1 <= rows * columns <= qwen().shape.frame_tokens == 18


def test_a_later_picture_of_another_shape_is_stretched_to_the_grid() -> None:
    tall = np.random.default_rng(1).integers(0, 256, (300, 90, 3), np.uint8)
    pair = [qwen().prepare(picture, (ROWS, COLUMNS)) for picture in (pictures(1)[0], tall)]
    assert pair[0].shape == pair[1].shape == (28 * ROWS, 28 * COLUMNS, 3)
    assert qwen().visual_tokens(pair).shape[:2] == (1, N)


# Places


@pytest.mark.parametrize("fps", [4.0, 2.0, 1.0, 0.5])
@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_ids_are_those_of_transformers(fps: float, frames: int) -> None:
    """Of init prompt and film always; of the text behind it where the film is no longer than its longest side."""
    if 2 / fps < 1 and plain_qwen().truncates_seconds:
        pytest.skip("this transformers cuts the seconds between frames to whole ones")
    init, prompt = [7] * 6, [8] * 4
    grid = torch.tensor([[frames, 2 * ROWS, 2 * COLUMNS]])
    given = plain_qwen().given(init, frames, prompt, grid, fps)
    theirs, _ = plain_qwen().network.model.get_rope_index(**given)
    ours, end = (
        qwen()
        .placing(fps, (ROWS, COLUMNS))
        .ids(0, np.array([6, *[N] * frames, 4]), np.array([False, *[True] * frames, False]))
    )
    assert np.array_equal(ours, ids_by_hand(6, frames, 4, step=4 / fps).numpy())
    assert end == ours.max() + 1
    assert np.array_equal(ours[:, :-4], theirs[:, 0, :-4].numpy())
    short = (frames - 1) * 4 / fps < COLUMNS
    assert np.array_equal(ours, theirs[:, 0].numpy()) == short


@FEW
@given(
    segments=st.lists(
        st.one_of(st.just(("frame", 6)), st.tuples(st.just("text"), st.integers(1, 4))), max_size=12
    ),
    start=st.integers(0, 9),
    step=st.fractions(0, 9, max_denominator=7),
)
def test_ids_of_texts_and_frames_are_the_plain_loop(
    segments: list[tuple[str, int]], start: int, step: Fraction
) -> None:
    """2 x 3 tokens a frame; a text between two frames ends the run, and what follows begins behind its last id."""
    rows: list[list[int]] = []
    base, nth, highest = start, 0, start - 1
    for kind, size in segments:
        if kind == "text":
            rows += [[highest + 1 + i] * 3 for i in range(size)]
            highest, nth = highest + size, 0
            continue
        if nth == 0:
            base = highest + 1
        t = base + int(nth * step)
        own = [[t, base + row, base + column] for row in range(2) for column in range(3)]
        highest, nth = max(highest, *(max(ids) for ids in own)), nth + 1
        rows += own
    sizes = np.array([size for _, size in segments], np.int64)
    visual = np.array([kind == "frame" for kind, _ in segments], np.bool_)
    ids, end = Grid(2, 3, step).ids(start, sizes, visual)
    assert ids.T.tolist() == rows
    assert end == highest + 1
    line, stop = Line().ids(start, sizes, visual)
    assert line.tolist() == list(range(start, start + int(sizes.sum())))
    assert stop == start + int(sizes.sum())


def test_the_next_place_is_past_every_axis_and_not_behind_the_last_token() -> None:
    grid = Grid(2, 3, Fraction(4))
    places = place_frames(grid, 2, [6, 6], torch.device("cpu")).after(2)
    assert places.ids.tolist() == [
        [0, 1, *[2] * 6, *[6] * 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3],
        [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4],
    ]
    assert places.order.tolist() == list(range(14))
    assert places.end == Next(order=14, id=7)
    text = Places.text(places.end, 2, torch.device("cpu"))
    assert (text.order.tolist(), text.ids.tolist()) == ([14, 15], [7, 8])
    still = place_frames(Grid(2, 3, Fraction(0)), 2, [6, 6, 6], torch.device("cpu"))
    assert still.end == Next(order=20, id=5)  # its last column, not its time


def test_a_thinned_frame_stands_where_its_tokens_were() -> None:
    from memdb.retain.uniform import Uniform

    whole, _ = Grid(3, 5, Fraction(2)).ids(0, np.array([15]), np.array([True]))
    for kept in range(1, 16):
        ids, _ = Grid(3, 5, Fraction(2)).ids(0, np.array([kept]), np.array([True]))
        assert np.array_equal(ids, whole[:, Uniform().choose(15, kept)])


# Turning


SECTIONS = (1, 3, 4)
INV_FREQ = torch.tensor([100.0 ** (-i / 8) for i in range(8)], dtype=torch.float64)


def explicit(x: Tensor, ids: Tensor) -> Tensor:
    """x (H, T, 16) turned pair by pair, the first pair by time, three by row, four by column."""
    out = x.double().clone()
    for token in range(x.shape[1]):
        for pair in range(8):
            axis = 0 if pair < 1 else 1 if pair < 4 else 2
            angle = ids[axis, token].double() * INV_FREQ[pair]
            left, right = x[:, token, pair].double(), x[:, token, pair + 8].double()
            out[:, token, pair] = left * angle.cos() - right * angle.sin()
            out[:, token, pair + 8] = right * angle.cos() + left * angle.sin()
    return out


def some(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_the_table_of_three_ids_is_the_explicit_angles() -> None:
    rotary, x = Rotary(INV_FREQ, sections=SECTIONS), some(2, 50, 16)
    ids = torch.randint(0, 3000, (3, 50), generator=torch.Generator().manual_seed(1))
    found = rotary.rotate_at(x, ids, 3000)
    assert float((found - explicit(x, ids)).abs().max()) < 1e-5
    cos, sin = rotary.at(ids)
    table_cos, _ = rotary.tables(3000)
    assert torch.equal(cos[:, 0], table_cos[ids[0], 0])
    assert torch.equal(cos[:, 7], table_cos[ids[2], 7])
    assert cos.shape == sin.shape == (50, 16)


def test_one_id_is_three_equal_ones_and_sections_then_say_nothing() -> None:
    rotary, plain, x = Rotary(INV_FREQ, sections=SECTIONS), Rotary(INV_FREQ), some(2, 9, 16)
    ids = torch.arange(4, 13)
    one = plain.rotate(x, 4)
    assert torch.equal(rotary.rotate(x, 4), one)
    assert torch.equal(rotary.rotate_at(x, ids, 13), one)
    assert torch.equal(rotary.rotate_at(x, ids.expand(3, 9), 13), one)


@FEW
@given(
    st.lists(st.integers(0, 500), min_size=3, max_size=3),
    st.lists(st.integers(0, 500), min_size=3, max_size=3),
)
def test_x1_only_the_distance_on_each_axis_counts(place: list[int], shift: list[int]) -> None:
    rotary = Rotary(INV_FREQ, sections=SECTIONS)
    q, k = some(1, 1, 16), some(1, 6, 16, seed=1)
    own = torch.tensor(place)[:, None]
    keys = torch.randint(0, 500, (3, 6), generator=torch.Generator().manual_seed(2))
    by = torch.tensor(shift)[:, None]
    scores = [
        rotary.rotate_at(q, own + move, 1001)[0] @ rotary.rotate_at(k, keys + move, 1001)[0].T
        for move in (0 * by, by)
    ]
    assert float((scores[0] - scores[1]).abs().max()) < 1e-4


def test_each_axis_turns_its_own_section() -> None:
    rotary, x = Rotary(INV_FREQ, sections=SECTIONS), some(1, 1, 16)
    base = rotary.rotate_at(x, torch.tensor([[5], [6], [7]]), 50)[0, 0]
    for axis, pairs in enumerate([[0], [1, 2, 3], [4, 5, 6, 7]]):
        ids = torch.tensor([[5], [6], [7]])
        ids[axis] += 3
        moved = rotary.rotate_at(x, ids, 50)[0, 0] != base
        assert torch.nonzero(moved)[:, 0].tolist() == [*pairs, *[pair + 8 for pair in pairs]]


@pytest.mark.parametrize("far", [50, 50_000])
@pytest.mark.parametrize("scaling", [1.0, 1.2])
def test_x2_turning_back_gives_the_key(far: int, scaling: float) -> None:
    rotary, k = Rotary(INV_FREQ, scaling, SECTIONS), some(2, 40, 16)
    ids = torch.randint(0, far, (3, 40), generator=torch.Generator().manual_seed(3))
    assert float((rotary.undo(rotary.rotate_at(k, ids, far), ids) - k).abs().max()) < 1e-5


# Reading


def test_states_and_logits_are_those_of_transformers() -> None:
    model, own = qwen(), plain_qwen()
    ids = model.encode_text("where was the red star? " * 4)
    found = model.logits(model.forward(model.embed(ids), WindowContext(model.rotary, 10_000)))
    at = torch.arange(len(ids)).expand(3, -1)
    assert relative(found, own.forward(own.embed(ids), at)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_keys_are_the_projection_bit_for_bit(dtype: str) -> None:
    model: Any = load_model(QWEN, device="cpu", dtype=dtype)
    projected: list[Tensor] = []
    model._language.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: projected.append(out)
    )
    context = WindowContext(model.rotary, 10_000, placing=model.placing(1.0, (ROWS, COLUMNS)))
    model.forward(model.embed(model.encode_text("a red star")), context)
    context.expect_frames([N, N])
    model.forward(model.visual_tokens([model.prepare(p) for p in pictures(4)]).flatten(0, 1), context)
    H, D = model.shape.kv_heads, model.shape.head_size
    for kv, out in zip((context.init[0], context.fresh[0]), projected, strict=True):
        assert torch.equal(kv.k, out.view(-1, H, D).transpose(0, 1))


def test_what_the_module_remembers_of_another_stream_is_never_looked_at() -> None:
    """transformers keeps `rope_deltas` of the last film on the module: two streams of one model must not meet there."""
    model: Any = load_model(QWEN, device="cpu")

    def run() -> Tensor:
        context = WindowContext(model.rotary, 100, placing=model.placing(1.0, (ROWS, COLUMNS)))
        model.forward(model.embed(model.init_ids("x")), context)
        context.expect_frames([N])
        found: Tensor = model.forward(model.visual_tokens([model.prepare(pictures(1)[0])])[0], context)
        return found

    first = run()
    assert model._network.model.rope_deltas is None
    model._network.model.rope_deltas = torch.tensor([[12_345]])
    assert torch.equal(run(), first)
    assert model._network.model.rope_deltas.tolist() == [[12_345]]


def test_a_stream_of_ten_million_frames_gives_the_bits_of_any_other() -> None:
    """Ids in the window are kept as they were given, and counted from the oldest before anything is turned."""
    model, outs = qwen(), []
    frames = model.visual_tokens([model.prepare(picture) for picture in pictures(12)])
    for frame in (0, 10**7):
        context = WindowContext(model.rotary, 16, placing=model.placing(1.0, (ROWS, COLUMNS)))
        model.forward(model.embed(model.init_ids("x")), context)
        for start in range(0, 6, 2):
            if start == 4:
                assert context.ids is not None
                context.frames += frame
                moved = torch.tensor([[4 * frame], [0], [0]])  # step 4 at a frame a second
                context.ids = context.ids + moved
            context.expect_frames([N, N])
            out = model.forward(frames[start : start + 2].flatten(0, 1), context)
        outs.append(out)
        assert context.ids is not None
        assert context.ids.shape == (3, 16)
        assert len(model.rotary.tables(0)[0]) <= 1024
    assert torch.equal(*outs)


def test_texts_stand_in_the_published_turns() -> None:
    model: Any = qwen()
    whole = model._tokenizer.decode([*model.init_ids("Be brief."), *model.prompt_ids("What is this?")])
    assert whole == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        "<|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.frame_separator().shape == (0, model.shape.embedding_size)
    assert model.encode_text("<|im_end|>")[0] in model.stop_ids


def test_shape_says_what_the_network_has() -> None:
    shape = qwen().shape
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_size) == (4, 4, 2, 64)
    assert (shape.embedding_size, shape.frame_tokens, shape.context_tokens_max) == (256, 18, 32_768)
    assert qwen().frames_together == 2


@pytest.mark.parametrize(
    ("size", "layers", "heads", "kv_heads", "width", "weights"),
    [("3b", 36, 16, 2, 2048, 3_754_622_976), ("7b", 28, 28, 4, 3584, 8_292_166_656)],
)
def test_full_shapes_have_the_published_number_of_weights(
    size: str, layers: int, heads: int, kv_heads: int, width: int, weights: int
) -> None:
    """Built without memory for their weights; nothing is drawn."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config, _ = random_config({"size": size})
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    assert sum(part.numel() for part in network.parameters()) == weights
    text = config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (
        layers,
        heads,
        kv_heads,
    )
    assert (text.hidden_size, config.vision_config.out_hidden_size) == (width, width)
    assert list(text.rope_parameters["mrope_section"]) == [16, 24, 24]
    assert config.tie_word_embeddings == (size == "3b")


# Folders and names


def test_a_saved_folder_is_the_model_that_was_saved(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    saved, built = load_model(str(folder), device="cpu"), load_model(f"random-qwen:2:{path}", device="cpu")
    shown = [built.prepare(picture) for picture in pictures(3)]
    assert torch.equal(saved.visual_tokens(shown), built.visual_tokens(shown))
    ids = built.prompt_ids("What is this?")
    assert torch.equal(
        *(m.logits(m.forward(m.embed(ids), WindowContext(m.rotary, 100))) for m in (saved, built))
    )
    assert saved.identity.shape == built.identity.shape
    assert (saved.stop_ids, saved.init_ids("x")) == (built.stop_ids, built.init_ids("x"))
    assert saved.placing(0.5, (4, 7)) == built.placing(0.5, (4, 7)) == Grid(4, 7, Fraction(8))


def test_a_folder_in_the_form_of_the_hub_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    """Published with a flat configuration, `rope_scaling` of type mrope, and older names of weights."""
    from safetensors.torch import load_file, save_file

    copy = changed(folder, tmp_path / "flat", "preprocessor_config.json", "do_resize", value=True)
    config = json.loads((copy / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    own = {name: text[name] for name in text if name not in ("model_type", "layer_types", "dtype")}
    vision["model_type"] = "qwen2_5_vl"
    flat = {
        **config,
        **own,
        "vision_config": vision,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "bfloat16",
    }
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (copy / "config.json").write_text(json.dumps(flat))
    weights = {}
    for name, tensor in load_file(copy / "model.safetensors").items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        weights[name] = tensor
    assert "visual.patch_embed.proj.weight" in weights
    assert "model.embed_tokens.weight" in weights
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    found, truth = load_model(str(copy), device="cpu"), load_model(str(folder), device="cpu")
    shown, ids = [truth.prepare(picture) for picture in pictures(2)], truth.prompt_ids("What is this?")
    assert torch.equal(found.visual_tokens(shown), truth.visual_tokens(shown))
    both = [m.logits(m.forward(m.embed(ids), WindowContext(m.rotary, 100))) for m in (found, truth)]
    assert torch.equal(*both)
    assert found.identity.shape == truth.identity.shape


def test_tied_embeddings_are_carried(tmp_path: Path) -> None:
    path = tmp_path / "tied.json"
    path.write_text(json.dumps({**SMALL, "tie_word_embeddings": True}))
    model: Any = load_model(f"random-qwen:1:{path}", device="cpu")
    assert model._network.lm_head.weight is model._network.get_input_embeddings().weight


def changed(folder: Path, copy: Path, name: str, *path: str, value: object) -> Path:
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = json.loads((copy / name).read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (copy / name).write_text(json.dumps(data))
    return copy


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("preprocessor_config.json", ["image_mean"], [0.4, 0.5, 0.5]),
        ("preprocessor_config.json", ["max_pixels"], 32 * 784),
        ("config.json", ["text_config", "rope_parameters", "mrope_section"], [4, 2, 2]),
        ("config.json", ["vision_config", "tokens_per_second"], 4),
    ],
)
def test_the_fingerprint_knows_what_decides_keys(
    folder: Path, tmp_path: Path, name: str, path: list[str], value: object
) -> None:
    first = load_model(str(folder), device="cpu").identity.fingerprint
    other = load_model(str(changed(folder, tmp_path / "other", name, *path, value=value)), device="cpu")
    assert other.identity.fingerprint != first


@pytest.mark.parametrize(
    ("named", "rows", "columns"),
    [
        ({"max_pixels": 40 * 784, "min_pixels": 784}, 4, 8),
        ({"size": {"longest_edge": 40 * 784, "shortest_edge": 784}}, 4, 8),
        ({"max_pixels": 12_845_056, "min_pixels": 3136}, 8, 15),  # of pictures: ours is the lower limit
    ],
)
def test_pixel_limits_of_the_checkpoint_are_used(
    folder: Path, tmp_path: Path, named: dict[str, object], rows: int, columns: int
) -> None:
    copy = changed(folder, tmp_path / "other", "preprocessor_config.json", "do_resize", value=True)
    data = json.loads((copy / "preprocessor_config.json").read_text())
    del data["max_pixels"]
    (copy / "preprocessor_config.json").write_text(json.dumps({**data, **named}))
    model = load_model(str(copy), device="cpu")
    assert model.frame_grid(1080, 1920) == (rows, columns)
    assert model.shape.frame_tokens == (40 if rows == 4 else 128)
    assert model.visual_tokens([model.prepare(pictures(1)[0], (rows, columns))]).shape[1] == rows * columns


@pytest.mark.parametrize(
    ("name", "path", "value", "says"),
    [
        ("config.json", ["text_config", "rope_parameters", "mrope_section"], [2, 3, 4], "mrope_section"),
        ("config.json", ["text_config", "rope_parameters", "mrope_section"], [4, 4], "three sections"),
        ("config.json", ["text_config", "rope_parameters", "mrope_interleaved"], True, "interleaves"),
        (
            "config.json",
            ["text_config", "layer_types"],
            ["full_attention", "sliding_attention"],
            "full attention",
        ),
        ("config.json", ["model_type"], "qwen3_5", "'qwen3_5'"),
        ("preprocessor_config.json", ["max_pixels"], "many", "max_pixels"),
        ("preprocessor_config.json", ["max_pixels"], 100, "max_pixels"),
    ],
)
def test_what_cannot_be_carried_says_why(
    folder: Path, tmp_path: Path, name: str, path: list[str], value: object, says: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        load_model(str(changed(folder, tmp_path / "bad", name, *path, value=value)), device="cpu")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def remove_sections(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    del data["text_config"]["rope_parameters"]["mrope_section"]
    (folder / "config.json").write_text(json.dumps(data))


def test_sections_that_are_not_named_are_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would take those of the published models, whatever the size of a head."""
    copy = changed(folder, tmp_path / "bad", "preprocessor_config.json", "do_resize", value=True)
    remove_sections(copy)
    with pytest.raises(UnsupportedModel, match="mrope_section is None"):
        load_model(str(copy), device="cpu")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"size": "1b"}, "tiny, 3b, 7b"),
        ({"model_type": "llava_onevision"}, "qwen2_5_vl"),
        ({"colour": 1}, "colour"),
        ({"text_config": {"hidden_sise": 64}}, "hidden_sise"),
        ({"text_config": {"num_attention_heads": 3}}, "multiple"),
        ({"vision_config": {"depth": 0}}, "depth"),
        ({"vision_config": {"num_heads": 5}}, "num_heads"),
        ({"vision_config": 5}, "vision_config"),
        ({"size": "7b", "text_config": {"num_hidden_layers": 120}}, "too large"),
    ],
)
def test_random_configurations_are_checked(config: dict[str, object], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        random_config(config)


def test_names_without_a_seed_say_what_would_do() -> None:
    with pytest.raises(ModelNotFound, match="random-qwen:0"):
        load_model("random-qwen:x", device="cpu")
    with pytest.raises(ModelError):
        load_model("random-qwen:0:/nowhere/config.json", device="cpu")
