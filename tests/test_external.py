"""External retrieval (ReKV, R14): one list of frames for all layers, by a joint head, a CLIP or a SigLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from memdb.client import connect
from memdb.ingest.encoder import StreamEncoder
from memdb.models.image_text import ImageText
from memdb.models.joint import JointHead, random_head
from memdb.models.load import load_model
from memdb.models.random_llava import save_random_llava
from memdb.query.retrieve.external import External
from memdb.query.stored import StoredKV
from memdb.repair import repair
from memdb.schemas.errors import (
    EncodingMismatch,
    Interrupted,
    ModelError,
    ModelNotFound,
    RecipeError,
    UnsupportedModel,
)
from memdb.schemas.rows import Part
from memdb.store import Store
from memdb.world.questions import Asker
from memdb.world.scenes import plan
from memdb.world.source import painted
from tests.image_text_cases import SIDE, TEXT_TOKENS, save_image_text
from tests.model_cases import (
    INIT_PROMPT,
    QUESTION,
    causal,
    ingest,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    windowed,
    wrapped,
)
from tests.run_cases import NAME, content, opened, small_film, small_model, small_spec, unit_digests
from tests.store_cases import directory_digest, flip
from tests.test_resume import Crash, crash_at, stop_at

FRAMES, BLOCKS = 10, 3
SETTINGS = ("retrieve=external", f"retrieve.blocks={BLOCKS}", "answer.tokens_max=1")
Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: save_image_text(folder / kind, kind) for kind in ("clip", "siglip")}


def embeddings(path: Path, name: str = "film") -> Floats:
    """(frames, E) as they are stored, unit by unit."""
    with Store.open(path) as store:
        found = [store.read_embeddings(row) for row in store.units(store.recording(name).id)]
    return np.concatenate([one for one in found if one is not None]).astype(np.float32)


def taken(path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[list[list[int]], Any]:
    """The rows that a question read of each layer, and its answer."""
    rows: list[list[int]] = []
    read = StoredKV.read

    def recorded(self: StoredKV, layer: int, own: Any, *rest: Any) -> Any:
        rows.append(own.tolist())
        return read(self, layer, own, *rest)

    with reopened(path) as db:
        db.ask(QUESTION, mode="kv", **more)  # the first measures what reads cost
        with monkeypatch.context() as patched:
            patched.setattr(StoredKV, "read", recorded)
            answer = db.ask(QUESTION, mode="kv", **more)
    return rows, answer


def nearest(vectors: Floats, query: Sequence[float], blocks: int) -> list[int]:
    """The definition in fp64: every cosine, best first, of equals the earlier, in time order."""
    q = np.asarray(query, np.float64)
    cosines = [
        float(v @ q) / max(1e-12, float(np.sqrt((v @ v) * (q @ q)))) for v in vectors.astype(np.float64)
    ]
    ranked = sorted(range(len(cosines)), key=lambda row: (-np.float32(cosines[row]), row))
    return sorted(ranked[:blocks])


# The joint head


def perceptron(head: JointHead, side: str, x: Tensor) -> Tensor:
    """Two layers with the exact GELU, written out in fp64."""
    weights = {name: value.double() for name, value in head.state_dict().items()}
    inner = weights[f"{side}.0.weight"] @ x.double() + weights[f"{side}.0.bias"]
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    return weights[f"{side}.2.weight"] @ inner + weights[f"{side}.2.bias"]


def head_of(model: Any) -> JointHead:
    assert isinstance(model.joint, JointHead)
    return model.joint


@pytest.mark.parametrize("window", [15_000, 60])
def test_a_frame_is_the_head_over_the_mean_of_its_final_states(window: int, tmp_path: Path) -> None:
    """Against a plain forward, token by token where a window cuts what a frame sees."""
    shown, own, model = pictures(6), plain(), wrapped()
    ingest(tmp_path / "s", shown, settings=(*SETTINGS, f"encode.window_tokens={window}"))
    init = own.embed(model.init_ids(INIT_PROMPT))
    tokens = torch.cat((init, own.see(shown).flatten(0, 1)))
    states: list[Tensor] = []
    norm = own.exact.model.language_model.norm
    hook = norm.register_forward_hook(lambda _m, _i, out: states.append(out))
    own.loop(tokens, causal if window > len(tokens) else windowed(len(init), window))
    hook.remove()
    frames = states[-1][len(init) :].view(len(shown), -1, tokens.shape[1])
    truth = torch.stack([perceptron(head_of(model), "joint_clip", frame.mean(0)) for frame in frames])
    truth = truth / truth.norm(dim=-1, keepdim=True)
    assert float((torch.from_numpy(embeddings(tmp_path / "s")) - truth).abs().max()) < 1e-3  # fp16


def test_every_layer_reads_the_frames_that_are_nearest_and_full_recall_is_full_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, own, model = pictures(FRAMES), plain(), wrapped()
    ingest(tmp_path / "s", shown, codec="raw", settings=SETTINGS)
    rows, answer = taken(tmp_path / "s", monkeypatch)
    words = own.embed(model.encode_text(QUESTION)).mean(0)
    query = perceptron(head_of(model), "joint_text", words).tolist()
    best = nearest(embeddings(tmp_path / "s"), query, BLOCKS)
    assert rows == [best] * model.shape.layers
    assert [span.start_s for span in answer.evidence] == [float(row) for row in best]
    assert not answer.warnings
    ingest(tmp_path / "all", shown, codec="raw", settings=("retrieve=external", "answer.tokens_max=1"))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "all") as db:
        for mode in ("kv", "recent"):
            db.ask(QUESTION, mode=mode)
    init, prompt = own.embed(model.init_ids(INIT_PROMPT)), own.embed(model.prompt_ids(QUESTION))
    truth = own.forward(torch.cat((init, own.see(shown).flatten(0, 1), prompt)))[-1]
    assert all(relative(found, truth) < 1e-4 for found in decided)


def test_what_it_keeps_beside_the_keys_is_content_and_a_question_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest is another one than with the control's index, and the keys and values are the same."""
    for name, settings in (("joint", SETTINGS), ("keys", ("retrieve.blocks=3", "answer.tokens_max=1"))):
        ingest(tmp_path / name, pictures(FRAMES), settings=settings)
    digests = []
    for name in ("joint", "keys"):
        with reopened(tmp_path / name) as db:
            digests.append(db.digest()["film"])
            units = db.store.units(db.store.recording("film").id)
            assert all((Part.EMBEDDINGS in unit.parts) == (name == "joint") for unit in units)
    assert digests[0] != digests[1]
    before = directory_digest(tmp_path / "joint")
    taken(tmp_path / "joint", monkeypatch)
    assert directory_digest(tmp_path / "joint") == before
    one, other = (keys(tmp_path / name) for name in ("joint", "keys"))
    assert np.array_equal(one, other)


def keys(path: Path) -> Any:
    with Store.open(path) as store:
        found = [store.read_keys(row) for row in store.units(store.recording("film").id)]
    return np.concatenate([one for one in found if one is not None], 1)


def test_a_head_comes_with_a_models_folder(tmp_path: Path) -> None:
    """As training saves it: half precision, and names beside it that are not the head's."""
    folder = save_random_llava(tmp_path / "model", {}, seed=2)
    assert load_model(str(folder), device="cpu").joint is None
    width = load_model(str(folder), device="cpu").shape.embedding_size
    drawn = random_head(width, 5, torch.device("cpu"))
    weights = {name: value.bfloat16() for name, value in drawn.state_dict().items()}
    save_file({**weights, "sharp": torch.zeros(3)}, folder / "joint.safetensors")
    (folder / "memdb.json").write_text(json.dumps({"joint": "joint.safetensors"}))
    found = head_of(load_model(str(folder), device="cpu"))
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    rounded = JointHead(width, width, 32)
    rounded.load_state_dict({name: value.float() for name, value in weights.items()})
    truth = perceptron(rounded, "joint_clip", x.mean(0))
    assert float((found.of_frame(x).double() - truth).abs().max()) < 1e-5
    assert found.name not in ("", drawn.name)
    save_file({"sharp": torch.zeros(3)}, folder / "joint.safetensors")
    with pytest.raises(ModelError, match="holds no joint head"):
        load_model(str(folder), device="cpu")


def test_a_model_without_a_head_says_what_to_set(tmp_path: Path) -> None:
    folder = save_random_llava(tmp_path / "model", {}, seed=2)
    with (
        connect(tmp_path / "s", model=str(folder), device="cpu") as db,
        pytest.raises(UnsupportedModel, match=r"no joint head.*index\.encoder"),
    ):
        db.ingest([(0.0, pictures(1)[0])], recording="film", recipe="rekv", settings=SETTINGS)


def test_the_embedded_models_head_finds_what_was_asked_for(tmp_path: Path) -> None:
    """In its world, where the truth is known: far more of the evidence than as many frames by chance."""
    scenes, found, frames = plan(1, 60), [], 8
    asked = [
        one
        for one in Asker(scenes, 1).some(2)
        if one.spans and one.kind in ("gist", "detail", "place", "motion")
    ]
    settings = ("retrieve=external", f"retrieve.blocks={frames}", "answer.tokens_max=1")
    with connect(tmp_path / "s", device="cpu") as db:
        db.ingest(painted(scenes), recording="film", recipe="rekv", sample_fps=1.0, settings=settings)
        for one in asked:
            read = seconds(db.ask(one.text, mode="kv"))
            true = {at for start, end in one.spans for at in range(start, end)}
            found.append(len(read & true) / min(frames, len(true)))
    assert len(found) >= 4
    assert float(np.mean(found)) > 0.6, "chance gives 8 of 60"


# CLIP and SigLIP


def theirs(folder: Path, kind: str, shown: Sequence[Any], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures and a text by transformers' own network, in fp32, prepared as their papers say."""
    from PIL import Image
    from transformers import AutoModel

    network = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    told = json.loads((folder / "preprocessor_config.json").read_text())
    prepared = []
    for picture in shown:  # 96 x 64
        image = Image.fromarray(picture)
        if kind == "clip":
            image = image.resize((48, SIDE), Image.Resampling.BICUBIC).crop((8, 0, 8 + SIDE, SIDE))
        else:
            image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        prepared.append((np.asarray(image) / 255 - told["image_mean"]) / told["image_std"])
    pixels = torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        text = network.text_model(input_ids=ids).pooler_output
        seen = network.vision_model(pixel_values=pixels).pooler_output
        if kind == "clip":
            text, seen = network.text_projection(text), network.visual_projection(seen)
    return seen, text[0]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pictures_and_texts_are_seen_as_transformers_sees_them(
    kind: str, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, folder = pictures(FRAMES), encoders[kind]
    ingest(tmp_path / "s", shown, settings=(*SETTINGS, f'index.encoder="{folder}"'))
    words = [4, 5, 6, 7, 8, 9]  # of the question; what it does not know of case is unknown
    words[0] = 3
    ids = torch.tensor([words if kind == "clip" else words + [0] * (TEXT_TOKENS - len(words))])
    seen, text = theirs(folder, kind, shown, ids)
    truth = seen / seen.norm(dim=-1, keepdim=True)
    found = embeddings(tmp_path / "s")
    assert float((torch.from_numpy(found) - truth).abs().max()) < 2e-3  # fp16
    rows, answer = taken(tmp_path / "s", monkeypatch)
    assert rows == [nearest(found, text.tolist(), BLOCKS)] * wrapped().shape.layers
    assert not answer.warnings


def test_another_encoder_than_the_one_that_saw_the_frames_is_refused(
    encoders: dict[str, Path], tmp_path: Path
) -> None:
    """One that changed under the same name, at a question and when the ingest goes on."""
    folder = save_image_text(tmp_path / "mine", "clip")
    settings = (*SETTINGS, f'index.encoder="{folder}"')
    ingest(tmp_path / "s", pictures(4), settings=settings)
    from memdb.models import frame_encoder

    save_image_text(folder, "clip", seed=1)
    frame_encoder._image_text.cache_clear()
    with (
        reopened(tmp_path / "s") as db,
        pytest.raises(EncodingMismatch, match="put the encoder back that was there"),
    ):
        db.ask(QUESTION, mode="kv")
    with pytest.raises(EncodingMismatch):
        ingest(tmp_path / "s", pictures(6), settings=settings)


def test_what_is_no_encoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random_llava(tmp_path / "model", {}, seed=2)
    with pytest.raises(UnsupportedModel, match="carries clip, siglip"):
        ImageText.load(str(folder), device=torch.device("cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        ImageText.load(str(tmp_path / "empty"), device=torch.device("cpu"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="neither a folder here nor"):
        ImageText.load("nobody/nothing", device=torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"index\.encoder is empty"):
        ingest(tmp_path / "s", pictures(1), settings=(*SETTINGS, 'index.encoder=" "'))


# Ingest: the same bits wherever it stopped


@pytest.mark.parametrize(
    "settings",
    [
        ("index=frame_embedding", "unit=clip", "unit.frames=3"),
        ("index=frame_embedding", "index.encoder=CLIP", "unit=clip", "unit.frames=3", "reduce=merge"),
    ],
    ids=["joint", "clip"],
)
def test_stopped_or_dead_at_any_batch_it_ends_with_the_same_digest(
    settings: tuple[str, ...], encoders: dict[str, Path], tmp_path: Path
) -> None:
    model, film = small_model(small_spec(tmp_path)), small_film(tmp_path / "film.mp4", 14)
    told = [one.replace("CLIP", f'"{encoders["clip"]}"') for one in settings]
    told += ["retrieve=external", "encode.chunk_frames=4"]

    def take_in(store: Path, **more: Any) -> Any:
        with opened(store, model) as client:
            return client.ingest(film, recording=NAME, recipe="rekv", settings=told, sample_fps=1, **more)

    take_in(tmp_path / "whole")
    whole = unit_digests(tmp_path / "whole")
    for batch in range(3):
        for dies in (False, True):
            store = tmp_path / f"{batch}-{dies}"
            with pytest.MonkeyPatch.context() as patch:
                if dies:
                    patch.setattr(StreamEncoder, "state_bytes", 0 if batch % 2 else 1 << 40)
                    crash_at(patch, batch + 1)
                stop = None if dies else stop_at(patch, batch)
                with pytest.raises(Crash if dies else Interrupted):
                    take_in(store, stop=stop)
            assert take_in(store).epoch == 0
            assert unit_digests(store) == whole
            assert content(store) == content(tmp_path / "whole")
    assert len(embeddings(tmp_path / "whole", NAME)) == 14 or "reduce=merge" in settings


def test_a_merged_frame_is_the_mean_of_its_pictures(encoders: dict[str, Path], tmp_path: Path) -> None:
    """Merging everything leaves one frame, in the middle of the vectors of all."""
    shown, folder = pictures(4), encoders["clip"]
    more = (f'index.encoder="{folder}"', "reduce=merge", "reduce.delta=-1", "unit=clip", "unit.frames=4")
    ingest(tmp_path / "one", shown, settings=(*SETTINGS, *more))
    network = ImageText.load(str(folder), device=torch.device("cpu"))
    mean = network.of_pictures(shown).mean(0)
    found = embeddings(tmp_path / "one")
    assert found.shape == (1, 8)
    assert float((torch.from_numpy(found[0]) - mean / mean.norm()).abs().max()) < 1e-3


# Damage and forgetting


def test_a_damaged_embedding_costs_its_frame_and_verify_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    ingest(path, pictures(FRAMES), settings=SETTINGS)
    before, _ = taken(path, monkeypatch)
    hit = before[0][1]
    with Store.open(path) as store:
        row = store.unit(store.recording("film").id, hit)
        span, file = row.parts[Part.EMBEDDINGS], path / "segments" / row.segment
    for at in (0, span.length - 1):
        flip(file, span.offset + at, 3)
        with reopened(path) as db:
            assert [problem.start_s for problem in db.verify().problems] == [float(hit)]
        rows, answer = taken(path, monkeypatch)
        assert hit not in rows[0]
        assert len(rows[0]) == BLOCKS
        assert "embeddings of unit" in answer.warnings[0]
        flip(file, span.offset + at, 3)
    assert taken(path, monkeypatch)[0] == before


def test_what_is_forgotten_or_later_than_the_moment_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    ingest(path, pictures(FRAMES), settings=(*SETTINGS, "unit=clip", "unit.frames=4"))
    before, early = seconds(taken(path, monkeypatch)[1]), seconds(taken(path, monkeypatch, at=5)[1])
    assert max(early) < 5
    gone = min(before)
    with connect(path) as db:
        db.forget("film", start_s=gone, end_s=gone + 1)
        db.compact()
        assert db.verify().ok
    left = embeddings(path)
    assert len(left) == FRAMES
    assert [row for row in range(FRAMES) if not left[row].any()] == [gone]
    after = seconds(taken(path, monkeypatch)[1])
    assert before - {gone} < after, "the next best came for it"
    assert gone not in after


def test_copies_and_a_catalog_made_anew_have_the_same_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    ingest(path, pictures(FRAMES), settings=SETTINGS)
    before, vectors = taken(path, monkeypatch)[0], embeddings(path)
    with connect(path) as db:
        digest = db.digest()
        db.export("film", tmp_path / "film.recording", format="memdb")
    with connect(tmp_path / "other") as db:
        db.import_(tmp_path / "film.recording")
        assert db.digest() == digest
    repair(path)
    for copy in (path, tmp_path / "other"):
        assert np.array_equal(embeddings(copy), vectors)
        assert taken(copy, monkeypatch)[0] == before


def test_pairs_of_frames_on_three_position_ids_are_found_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5-VL: a block is a pair, and so is its vector."""
    path = tmp_path / "s"
    ingest(path, pictures(12), model="random-qwen:0", settings=SETTINGS)
    found = embeddings(path)
    assert len(found) == 6
    model = wrapped("random-qwen:0")
    words = model.embed(model.encode_text(QUESTION)).mean(0)
    query = perceptron(head_of(model), "joint_text", words).tolist()
    rows, answer = taken(path, monkeypatch)
    assert rows == [nearest(found, query, BLOCKS)] * model.shape.layers
    assert not answer.warnings


def seconds(answer: Any) -> set[int]:
    """Of a frame a second, those in the evidence, which joins neighbours."""
    return {at for span in answer.evidence for at in range(int(span.start_s), int(span.end_s))}


# Choosing


@given(
    st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=12),
    st.tuples(*[st.integers(-2, 2)] * 3),
    st.integers(1, 12),
    st.integers(0, 2**12),
)
def test_the_order_is_that_of_cosines_ties_included(
    rows: list[tuple[int, int, int]], query: tuple[int, int, int], blocks: int, mask: int
) -> None:
    vectors = np.array(rows, np.float32)
    allowed = np.array([bool(mask >> at & 1) for at in range(len(rows))])
    found = External(blocks).select(vectors, np.array(query, np.float32), allowed, blocks)
    there = np.flatnonzero(allowed)
    truth = [int(there[place]) for place in nearest(vectors[there], query, blocks)]
    assert found.tolist() == (truth if len(there) > blocks else there.tolist())


def test_runs_of_neighbours_are_ranked_by_their_mean() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.8, 0.2], [1, 0.1]], np.float32)
    found = External(2, group=2).select(vectors, np.array([1, 0], np.float32), np.ones(5, bool), 2)
    assert found.tolist() == [4], "a shorter run at the end counts as one, and it is the best here"
    found = External(4, group=4).select(vectors, np.array([0, 1], np.float32), np.ones(5, bool), 2)
    assert found.tolist() == [0, 1], "a plan may have room for less than a run"
    with pytest.raises(RecipeError, match="no multiple"):
        External(3, group=2)
