"""Two raw frames to one: films through every stage with a model that sees pairs, stopped, resumed, asked, forgotten."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb import age
from memdb.client import connect
from memdb.clock import set_policy
from memdb.compact import compact
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame, thumbnail, to_jpeg
from memdb.ingest.pipeline import _batches, _ready
from memdb.ingest.sampling import sample
from memdb.ingest.sources import open_source
from memdb.ingest.stages import compose
from memdb.models.cache import CacheContext
from memdb.models.caption_vectors import caption_vectors
from memdb.models.places import Next, Places
from memdb.models.protocol import VideoModel
from memdb.models.window import LayerKV, WindowContext
from memdb.policy import Age, Policy
from memdb.recipes import recipe as named
from memdb.schemas.errors import Interrupted
from memdb.schemas.recording import Gap
from memdb.schemas.rows import RecordingSpec
from memdb.schemas.units import Unit
from memdb.store import Store
from tests.age_cases import DAY_NS
from tests.model_cases import relative, stored_kv
from tests.qwen_cases import ids_by_hand
from tests.run_cases import (
    CHUNK,
    CODEC,
    NAME,
    RECIPES,
    SETTINGS,
    WINDOW_TOKENS,
    command,
    content,
    ingest_words,
    ingested,
    opened,
    small_film,
    small_model,
    unit_digests,
    unit_rows,
)
from tests.store_cases import directory_digest
from tests.test_resume import Crash, crash_at, stop_at

# 2 layers, 4 query and 2 KV heads of 8, 2 x 3 tokens a pair of frames.
SMALL = {
    "max_pixels": 8 * 28 * 28,
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2},
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "rope_theta": 50.0,
    },
}
NS = 10**9
FRAMES = 23  # batches of eight, eight and seven: the last frame has no partner
PAIRS = 12
GRID, N = (2, 3), 6
MODES = {"rekv": ("kv", "recent", "auto"), "rlivs": ("captions", "auto")}
MODES["hybrid"] = ("kv", "captions", "both", "recent", "auto")
MODES["bounded"] = ("kv", "recent", "auto")
QUESTION = "what was there before the star?"


@dataclass(frozen=True)
class House:
    model: VideoModel
    spec: str
    film: Path
    stores: dict[str, Path]  # by recipe; nobody changes them


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("pairs")
    path = folder / "small.json"
    path.write_text(json.dumps(SMALL))
    spec = f"random-qwen:7:{path}"
    model, film = small_model(spec), small_film(folder / "film.mp4", FRAMES)
    stores = {recipe: folder / f"{recipe}.memdb" for recipe in RECIPES}
    for recipe, store in stores.items():
        ingested(store, model, film, recipe)
    return House(model, spec, film, stores)


def spans(store: Path) -> list[tuple[float, float]]:
    return [(row.start_ns / NS, row.end_ns / NS) for row in unit_rows(store)]


def block_spans(store: Path) -> list[tuple[float, float]]:
    return [
        (block["start_ns"] / NS, block["end_ns"] / NS) for row in unit_rows(store) for block in row.blocks
    ]


def pairs() -> list[tuple[float, float]]:
    return [(2.0 * i, 2.0 * i + 2) for i in range(PAIRS - 1)] + [(22.0, 23.0)]


def test_blocks_span_pairs_and_an_odd_frame_its_own_time(house: House) -> None:
    assert PAIRS * N > 2 * WINDOW_TOKENS, "the window overflows"
    assert spans(house.stores["rekv"]) == pairs()
    for recipe in ("rekv", "hybrid"):
        assert block_spans(house.stores[recipe]) == pairs()
        positions = [int(b["position"]) for row in unit_rows(house.stores[recipe]) for b in row.blocks]
        assert set(np.diff(positions)) == {N}
    for recipe in ("rlivs", "hybrid"):
        assert spans(house.stores[recipe]) == [(0, 6), (6, 12), (12, 18), (18, 23)]


def test_the_key_frame_of_a_unit_is_the_first_of_its_first_pair(house: House) -> None:
    with open_source(house.film) as source:
        shown = [to_jpeg(thumbnail(frame)) for frame in sample(source.frames(), 1)]
    assert len(set(shown)) == FRAMES
    for recipe, pairs_a_unit in (("rekv", 1), ("hybrid", 3)):
        with Store.open(house.stores[recipe]) as store:
            row = store.recordings()[0]
            found = [store.read_keyframe(unit) for unit in store.units(row.id)]
        assert found == shown[:: 2 * pairs_a_unit]


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_after_any_batch_and_run_again(house: House, recipe: str, tmp_path: Path) -> None:
    whole = unit_digests(house.stores[recipe])
    for batch in range(2):
        store = tmp_path / f"{batch}.memdb"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            ingested(store, house.model, house.film, recipe, stop=stop_at(patch, batch))
        before = unit_digests(store)
        seen = CHUNK * (batch + 1)
        assert before == whole[: seen if recipe == "rekv" else seen // 3], "the batch in hand is kept"
        report = ingested(store, house.model, house.film, recipe)
        assert (report.resumed_from_unit, report.replayed_units) == (len(before), 0), "its state was saved"
        assert unit_digests(store) == whole
        assert content(store) == content(house.stores[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_dead_before_any_batch_and_run_again(house: House, recipe: str, tmp_path: Path) -> None:
    for batch in range(3):
        store = tmp_path / f"{batch}.memdb"
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, batch)
            with pytest.raises(Crash):
                ingested(store, house.model, house.film, recipe)
        report = ingested(store, house.model, house.film, recipe)
        assert report.epoch == 0
        assert content(store) == content(house.stores[recipe])


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_a_state_is_exact(house: House, recipe: str) -> None:
    """Restored in another encoder, it goes on with the same bits: ids in the window and the count of frames, too."""
    first, second = encoder(house, recipe), encoder(house, recipe)
    frames = ready(house)
    size = 2 * CHUNK
    first.step(frames[:size])
    first.step(frames[size : 2 * size])
    second.restore(first.state())
    assert second.state() == first.state()
    ends = [[*one.step(frames[2 * size :]), *one.finish()] for one in (first, second)]
    assert [digest(unit) for unit in ends[0]] == [digest(unit) for unit in ends[1]]
    assert ends[0]


def encoder(house: House, recipe: str) -> StreamEncoder:
    row = named(recipe, codec=CODEC[recipe], settings=SETTINGS[recipe])
    stages = compose(row)
    name = stages.captioner.encoder
    vectors = caption_vectors(name, lambda: house.model) if name else None
    init = house.model.init_ids(str(row.encode.params["init_prompt"]))
    return StreamEncoder(house.model, stages, init, vectors, sample_fps=1.0, grid=GRID)


def ready(house: House) -> list[ReadyFrame]:
    with open_source(house.film) as source:
        found = [_ready(frame, house.model, grid=GRID) for frame in sample(source.frames(), 1)]
    return [frame for frame in found if isinstance(frame, ReadyFrame)]


def digest(unit: Unit) -> bytes:
    from memdb.digest import unit_digest

    return unit_digest(unit)


def test_no_pair_spans_a_gap(house: House) -> None:
    """Five frames, a gap, three frames: the fifth and the eighth are alone."""
    frames = ready(house)[:8]
    gap = Gap(5 * NS, 5 * NS + 1, "lost")
    one, found = encoder(house, "rekv"), list[Unit]()
    for batch, _ in _batches(iter([*frames[:5], gap, *frames[5:]]), 2 * CHUNK):
        found += one.step(batch)
    assert [(unit.start_ns / NS, unit.end_ns / NS) for unit in found] == [
        (0, 2),
        (2, 4),
        (4, 5),
        (5, 7),
        (7, 8),
    ]


def test_what_was_forgotten_leaves_its_partner_alone(house: House) -> None:
    """Frames in hand that were forgotten are passed over; the frame beside them is seen twice and keeps its time."""
    frames, one = ready(house), encoder(house, "rekv")
    found = [*one.step(frames[:3]), *one.pass_over(frames[3:5]), *one.step(frames[5:8])]
    assert [(unit.start_ns / NS, unit.end_ns / NS) for unit in found] == [(0, 2), (2, 3), (5, 7), (7, 8)]


# Questions


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_mode_answers_and_leaves_the_store_as_it_was(house: House, recipe: str) -> None:
    store = house.stores[recipe]
    before = directory_digest(store)
    with opened(store, house.model, create=False) as client:
        for mode in MODES[recipe]:
            answer = client.ask(QUESTION, mode=mode)
            assert not answer.warnings
            assert answer.evidence
            assert answer.token_ids
            assert answer.plan.mode == mode or mode == "auto"
    assert directory_digest(store) == before


@pytest.mark.parametrize(("mode", "recipe"), [("kv", "rekv"), ("recent", "rekv"), ("both", "hybrid")])
@pytest.mark.parametrize("at_s", [9.0, 10.0, 22.5])
def test_as_of_a_moment_no_pair_that_ends_later_is_used(
    house: House, recipe: str, mode: str, at_s: float
) -> None:
    with opened(house.stores[recipe], house.model, create=False) as client:
        answer = client.ask(QUESTION, mode=mode, at=at_s)
        now = client.ask(QUESTION, mode=mode)
    ends = max(span.end_s for span in answer.evidence if span.tier == "kv")
    assert ends == (8.0 if at_s == 9.0 else 10.0 if at_s == 10.0 else 22.0)
    assert max(span.end_s for span in now.evidence) == 23.0


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_what_is_forgotten_is_in_no_answer(house: House, recipe: str, tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    ingested(store, house.model, house.film, recipe)
    with opened(store, house.model, create=False) as client:
        client.forget(NAME, start_s=7.5, end_s=9.0)  # half of a pair, and half of the next
        for mode in MODES[recipe]:
            answer = client.ask(QUESTION, mode=mode)
            assert answer.evidence
            assert all(span.end_s <= 7.5 or span.start_s >= 9.0 for span in answer.evidence)
        client.compact()
        assert client.verify().ok
        client.ask(QUESTION, mode="kv")


def test_forgotten_beside_a_running_ingest(house: House, tmp_path: Path) -> None:
    """Forgotten while it is stopped: what the window held goes with it, and a new epoch begins at a pair."""
    store = tmp_path / "s.memdb"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        ingested(store, house.model, house.film, "rekv", stop=stop_at(patch, 1))
    with opened(store, house.model, create=False) as client:
        client.forget(NAME, start_s=13.0, end_s=14.0)
    report = ingested(store, house.model, house.film, "rekv")
    assert report.epoch == 1
    rest = [span for span in block_spans(store) if span[0] >= 16]
    assert rest == pairs()[8:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_does_it_all(house: House, recipe: str, tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    ran = command(*ingest_words(store, house.spec, house.film, recipe), "--json")
    assert ran.code == 0, ran.err
    assert content(store) == content(house.stores[recipe])
    for mode in MODES[recipe]:
        words = ["ask", QUESTION, "--store", str(store), "--mode", mode, "--device", "cpu", "--json"]
        answer = command(*words)
        assert answer.code == 0, answer.err
        assert answer.json["evidence"]
    assert command("verify", "--store", str(store)).code == 0


def test_another_rate_is_another_encoding(house: House, tmp_path: Path) -> None:
    """Ids count time: at half the rate the same pictures are further apart, and so are their keys in deeper layers."""
    found: list[Any] = []
    for fps in (1.0, 0.5):
        row = named("rekv", codec="raw", settings=SETTINGS["rekv"])
        init = house.model.init_ids(str(row.encode.params["init_prompt"]))
        one = StreamEncoder(house.model, compose(row), init, None, sample_fps=fps, grid=GRID)
        found.append(one.step(ready(house)[:8]))
    for slow, fast in itertools.islice(zip(*found, strict=True), 1, None):
        assert slow.kv is not None
        assert fast.kv is not None
        layers = slow.kv.slices["layer"]
        same = [a == b for a, b in zip(slow.kv.slices["xxh3"], fast.kv.slices["xxh3"], strict=True)]
        assert [bool(one) for one in same] == [layer == 0 for layer in layers]


def test_captions_of_one_model_are_read_by_another_family(house: House) -> None:
    """KV stays with the model that computed it; text does not."""
    with connect(house.stores["hybrid"], model="random:0", create=False) as client:
        answer = client.ask(QUESTION, mode="captions")
        assert answer.evidence
        with pytest.raises(Exception, match="model"):
            client.ask(QUESTION, mode="kv")


def test_a_recording_keeps_the_grid_that_it_began_with(house: House, tmp_path: Path) -> None:
    """Kept in its spec, carried by export and import, part of the encoding; other films of the store have their own."""
    tall = [(float(i), np.full((160, 96, 3), 9 * i, np.uint8)) for i in range(4)]
    mixed = [*tall[:2], *[(float(i), np.full((96, 160, 3), 9 * i, np.uint8)) for i in (2, 3)]]
    store = tmp_path / "s.memdb"
    for name, film in (("tall", tall), ("mixed", mixed)):
        ingested(store, house.model, film, "rekv", recording=name)
    ingested(store, house.model, house.film, "rekv")
    with Store.open(store) as found:
        rows = {row.name: row for row in found.recordings()}
        tokens = {name: found.units(row.id)[0].blocks["tokens"].tolist() for name, row in rows.items()}
    assert {name: row.spec.grid for name, row in rows.items()} == {
        "tall": (3, 2),
        "mixed": (3, 2),
        NAME: GRID,
    }
    assert tokens == {"tall": [6], "mixed": [6], NAME: [6]}
    spec = rows["tall"].spec
    assert RecordingSpec.from_json(spec.as_json()) == spec
    assert spec.encoding_fingerprint != rows[NAME].spec.encoding_fingerprint
    for wrong in ([3], [0, 2], [3, 2, 1], [10**9, 1], "3x2"):
        with pytest.raises((TypeError, ValueError)):
            RecordingSpec.from_json({**spec.as_json(), "grid": wrong})
    with opened(store, house.model, create=False) as client:
        for name in rows:
            assert client.ask(QUESTION, mode="kv", recording=name).evidence


def test_frames_that_ageing_thinned_stand_where_their_tokens_were(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of each frame's tokens is kept; the logits are those of the rest at their own rows and columns."""
    monkeypatch.setattr(age, "LATE_NS", 0)  # a film of seconds has no days
    store, model = tmp_path / "s.memdb", house.model
    ingested(store, model, house.film, "hybrid", codec="raw")
    with opened(store, model, create=False) as client:
        whole = stored_kv(client, NAME)
    with Store.open(store, write=True) as found:
        row = found.recording(NAME)
        halved = Policy(ages=(Age(NS, "", "uniform", 500_000),))
        set_policy(found, halved, now_ns=row.created_ns + 20 * DAY_NS)
        compact(found, now_ns=row.created_ns + 20 * DAY_NS)
        assert {int(block["tokens"]) for unit in found.units(row.id) for block in unit.blocks} == {N // 2}
    with opened(store, model, create=False) as client:
        prompt, logits, _ = client._asking().question_logits(NAME, QUESTION)
        client.ask(QUESTION, mode="kv")
    init = row.spec.init_ids
    kept = torch.tensor([frame * N + int(token) for frame in range(PAIRS) for token in (1, 3, 5)])
    ids = ids_by_hand(len(init), PAIRS, 0, step=4.0)[:, len(init) + kept]
    order = torch.arange(len(init), len(init) + len(kept))
    places = Places(order, ids, Next(int(order[-1]) + 1, int(ids.max()) + 1))
    with torch.inference_mode():
        window = WindowContext(model.rotary, 10_000)
        model.forward(model.embed(init), window)
        rest = [LayerKV(kv.k[:, kept], kv.v[:, kept]) for kv in whole]
        context = CacheContext(model.rotary, window.init, rest, places=[places] * len(rest))
        truth = model.logits(model.forward(model.embed(prompt), context))
    assert relative(logits, truth) < 1e-5
