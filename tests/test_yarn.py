"""YaRN (arXiv 2309.00071) from its formula through encoding and store to a question: M6 of StreamMem, and rule R11."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from memdb.ingest.stages import compose, written_out
from memdb.models.rotary import Rotary
from memdb.models.yarn import is_default, stretched, yarn
from memdb.recipes import STREAMMEM, recipe
from memdb.schemas.errors import EncodingMismatch, RecipeError, UnsupportedModel
from memdb.schemas.fingerprint import encoding_fingerprint
from memdb.schemas.recipe import Recipe, Stage
from memdb.schemas.scaling import PLAIN, RopeScaling, scaling_of
from tests.memory_cases import memory_recipe
from tests.model_cases import (
    INIT_PROMPT,
    QUESTION,
    ingest,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    wrapped,
)
from tests.qwen_cases import N, ids_by_hand, plain_qwen, qwen, remember

FRAMES = 10
FACTOR, TRAINED = (
    4.0,
    64,
)  # the film's positions reach 180: beyond what it was trained on, within four times of it


def by_transformers(text: Any, factor: float, trained: int) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor as transformers makes them for a configuration."""
    config = Qwen2Config(
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": text.rope_parameters["rope_theta"],
            "factor": factor,
            "original_max_position_embeddings": trained,
        },
    )
    found, grown = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    return found, float(grown)


def stretch(network: Any, factor: float, trained: int) -> Any:
    """A copy of a network of transformers whose own rotation is YaRN."""
    own = copy.deepcopy(network)
    rotary = own.model.language_model.rotary_emb
    rotary.inv_freq, rotary.attention_scaling = by_transformers(own.config.text_config, factor, trained)
    return own


def with_yarn(row: Recipe, factor: float = FACTOR, trained: int = TRAINED) -> Recipe:
    return row.with_stage("rebuild", Stage("yarn", {"factor": factor, "trained_tokens": trained}))


# The formula


@pytest.mark.parametrize("heads", [4, 8, 32])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize(("factor", "trained"), [(2, 4096), (8, 32_768), (4, 64), (1.5, 200)])
def test_frequencies_and_attention_factor_are_those_of_transformers(
    heads: int, theta: float, factor: float, trained: int
) -> None:
    text = Qwen2Config(hidden_size=512, num_attention_heads=heads, rope_parameters={"rope_theta": theta})
    D = 512 // heads
    found, grown = yarn(theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D), factor, trained)
    truth, their = by_transformers(text, factor, trained)
    torch.testing.assert_close(found, truth.double(), rtol=1e-6, atol=0)
    assert grown == pytest.approx(their, rel=1e-12)


def test_fast_channels_stay_and_slow_ones_are_slowed_by_the_factor() -> None:
    """The closed form at both ends: more than 32 turns within the trained length, and less than one."""
    plain_freq = 1e6 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    found, grown = yarn(plain_freq, 8, 32_768)
    turns = 32_768 * plain_freq / (2 * math.pi)
    assert torch.equal(found[turns > 36], plain_freq[turns > 36])
    torch.testing.assert_close(found[turns < 0.7], plain_freq[turns < 0.7] / 8)
    between = (turns < 28) & (turns > 1.3)
    assert bool((found[between] < plain_freq[between]).all())
    assert bool((found[between] > plain_freq[between] / 8).all())
    assert grown == pytest.approx(1 + math.log(8) / 10)


def test_a_rotation_is_made_once_and_keeps_its_sections() -> None:
    own = qwen().rotary
    model = stretched(qwen(), RopeScaling(FACTOR, TRAINED))
    assert stretched(qwen(), RopeScaling(FACTOR, TRAINED)).rotary is model.rotary
    assert stretched(qwen(), PLAIN) is qwen()
    assert qwen().rotary is own
    ids = torch.tensor([[70, 3], [1, 90], [2, 5]])
    slow, grown = yarn(own.inv_freq, FACTOR, TRAINED)
    cos, sin = model.rotary.at(ids)
    for token in range(2):
        angles = torch.stack([ids[axis, token] * slow[pair] for pair, axis in enumerate(plain_qwen().axis)])
        torch.testing.assert_close(cos[token], (angles.cos() * grown).float().repeat(2))
        torch.testing.assert_close(sin[token], (angles.sin() * grown).float().repeat(2))


# Through the store


def test_with_room_for_everything_it_is_transformers_own_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded chunk by chunk and asked, against one forward of a network that rotates by YaRN."""
    shown, model, decided = pictures(FRAMES), wrapped(), record_decisions(monkeypatch)
    ingest(tmp_path / "s", shown, recipe=with_yarn(memory_recipe(budget=4096)))
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
        report = db.compare_uncut(((n * 1.0, shown[n]) for n in range(FRAMES)), "film", QUESTION)
        stored = db.store.recording("film").spec
    own = plain()
    parts = (
        own.embed(model.init_ids(INIT_PROMPT)),
        own.see(shown).flatten(0, 1),
        own.embed(model.prompt_ids(QUESTION)),
    )
    unstretched = own.forward(torch.cat(parts))[-1]
    monkeypatch.setattr(own, "network", stretch(own.network, FACTOR, TRAINED))
    assert relative(decided[0], own.forward(torch.cat(parts))[-1]) < 1e-4
    assert relative(decided[0], unstretched) > 1e-2
    assert report.relative < 1e-4
    assert scaling_of(stored.recipe) == RopeScaling(FACTOR, TRAINED)


def test_so_it_is_on_three_position_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, own = pictures(20), plain_qwen()
    row = with_yarn(memory_recipe("uniform", 1000), FACTOR, 24)
    remember(tmp_path / "s", shown, recipe=row)  # type: ignore[arg-type]
    init, prompt = qwen().init_ids(INIT_PROMPT), qwen().prompt_ids(QUESTION)
    embeddings = torch.cat((own.embed(init), own.see(shown).flatten(0, 1), own.embed(prompt)))
    ids = ids_by_hand(len(init), 10, len(prompt), step=4.0)
    assert len(embeddings) == len(init) + 10 * N + len(prompt)
    unstretched = own.forward(embeddings, ids)[-len(prompt) :]
    monkeypatch.setattr(own, "network", stretch(own.network, FACTOR, 24))
    with reopened(tmp_path / "s") as db:
        found = db._asking().question_logits("film", QUESTION)[1]
    assert relative(found, own.forward(embeddings, ids)[-len(prompt) :]) < 1e-4
    assert relative(found, unstretched) > 1e-2


def test_captions_beside_it_are_said_and_read_by_the_same_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip of one frame that sees nothing but itself: its caption is that of a network that rotates by YaRN."""
    shown, model, own = pictures(1), wrapped(), plain()
    said = {"encoder": "input-embeddings", "tokens_max": 4, "clips": 0, "prompt": "What is there?"}
    row = with_yarn(memory_recipe(budget=4096, frames=1)).with_stage("caption", Stage("blocks", said))
    ingest(tmp_path / "s", shown, recipe=row)
    with reopened(tmp_path / "s") as db:
        caption = db.store.read_caption(db.store.units(db.store.recording("film").id)[0])
    assert caption is not None
    monkeypatch.setattr(own, "network", stretch(own.network, FACTOR, TRAINED))
    parts = (
        own.embed(model.init_ids(INIT_PROMPT)),
        own.see(shown).flatten(0, 1),
        own.embed(model.prompt_ids("What is there?")),
    )
    assert list(caption.token_ids) == own.say(torch.cat(parts), 4, model.stop_ids)


def test_m6_with_factor_1_it_is_the_rotation_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in what is stored and in what is answered; with another factor it is another memory."""
    decided, digests = record_decisions(monkeypatch), []
    row = memory_recipe("template", 40)
    for name, own in (("a", row), ("b", with_yarn(row, 1.0)), ("c", with_yarn(row, 2.0))):
        ingest(tmp_path / name, pictures(FRAMES), recipe=own)
        with reopened(tmp_path / name) as db:
            db.ask(QUESTION, mode="kv")
            digests.append(db.digest("film")["film"])
    assert torch.equal(decided[0], decided[1])
    assert digests[0] == digests[1]
    assert relative(decided[2], decided[0]) > 1e-2
    assert digests[2] != digests[0]


def test_r11_positions_beyond_what_the_model_reads_are_told(tmp_path: Path) -> None:
    """The film's last token stands at n + 159, however little of it is remembered."""
    n, prompt = (len(ids) for ids in (wrapped().init_ids(INIT_PROMPT), wrapped().prompt_ids(QUESTION)))
    reached = n + FRAMES * 16 + prompt + 1  # of two answer tokens one is fed
    row = memory_recipe("recent", 20)
    for name, trained, warned in (("a", (reached - 1) // 2, True), ("b", (reached + 1) // 2, False)):
        ingest(tmp_path / name, pictures(FRAMES), recipe=with_yarn(row, 2.0, trained))
        with reopened(tmp_path / name) as db:
            answer = db.ask(QUESTION, mode="kv")
        reach = 2 * trained
        assert len(answer.token_ids) == 2
        assert [f"positions reach {reached}, more than the {reach}" in text for text in answer.warnings] == (
            [True] if warned else []
        ), (answer.warnings, reached)


# What is left to the model, and what cannot be


def test_the_factor_of_the_family_is_written_into_the_recording(tmp_path: Path) -> None:
    """StreamMem's: 8 for LLaVA-OneVision, none for Qwen2.5-VL; what a user sets stands."""
    for model, tokens, factor in ((wrapped(), 16, 8.0), (qwen(), N, 1.0)):
        trained = model.shape.context_tokens_max
        assert scaling_of(written_out(STREAMMEM, model, tokens)) == RopeScaling(factor, trained)
        for setting, made in (
            ("rebuild.factor=3", RopeScaling(3.0, trained)),
            ("rebuild.trained_tokens=50", RopeScaling(factor, 50)),
        ):
            row = recipe("streammem", settings=(setting,))
            assert scaling_of(written_out(row, model, tokens)) == made
    settings = ("encode.chunk_frames=4", "retain.budget_tokens=40")
    ingest(tmp_path / "s", pictures(4), recipe="streammem", settings=settings)
    with reopened(tmp_path / "s") as db:
        stored = db.store.recording("film").spec.recipe.rebuild.params
    assert stored == {"factor": 8.0, "trained_tokens": wrapped().shape.context_tokens_max}
    ingest(tmp_path / "s", pictures(8), recipe="streammem", settings=settings)  # goes on
    for other in ("rebuild.factor=2", "rebuild.factor=1", "rebuild.trained_tokens=50"):
        with pytest.raises(EncodingMismatch):
            ingest(tmp_path / "s", pictures(12), recipe="streammem", settings=(*settings, other))


def test_the_encoding_fingerprint_has_the_scaling_and_nothing_else_of_the_rebuild_stage() -> None:
    def fingerprint(row: Recipe) -> str:
        return encoding_fingerprint(row, model="m", init_ids=(), sample_fps=1, seed=0, dtype="float32")

    row = memory_recipe()
    assert fingerprint(with_yarn(row, 1.0)) == fingerprint(row)
    found = {fingerprint(with_yarn(row, factor, trained)) for factor in (2, 4) for trained in (64, 128)}
    assert len(found | {fingerprint(row)}) == 5
    assert fingerprint(with_yarn(row, 2)) == fingerprint(with_yarn(row, 2.0))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"factor": 0.5}, "rebuild.factor = 0.5 is too small: give at least 1"),
        ({"factor": -1.0}, "too small"),
        ({"factor": math.nan}, "too small"),
        ({"factor": math.inf}, "too large"),
        ({"factor": "8"}, "is not of type float"),
        ({"trained_tokens": -1}, "too small"),
        ({"length": 5}, "no parameter 'length'"),
    ],
)
def test_scalings_that_cannot_be_are_refused_when_composed(params: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        compose(memory_recipe().with_stage("rebuild", Stage("yarn", params)))


def test_a_checkpoint_that_is_scaled_already_is_left_as_it_is() -> None:
    """It gets no factor by itself, and another one over its own is refused."""
    own = copy.copy(wrapped())
    for scaled in (
        Rotary(own.rotary.inv_freq, 1.2),
        Rotary(yarn(own.rotary.inv_freq, 8, 64)[0]),
        Rotary(own.rotary.inv_freq / 4),
    ):
        assert not is_default(scaled)
        own.rotary = scaled
        assert own.yarn_factor == 1
        assert scaling_of(written_out(STREAMMEM, own, 16)).is_plain
        with pytest.raises(UnsupportedModel, match=r"set rebuild\.factor = 1"):
            written_out(recipe("streammem", settings=("rebuild.factor=8",)), own, 16)
    assert is_default(wrapped().rotary)
    assert is_default(qwen().rotary)
