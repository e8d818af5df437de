"""Reference tests that every method keeps: X1 to X10.

X10, that two exchanged blocks change the logits, is `test_every_block_and_its_place_matter` of test_ladder.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memdb
from memdb import codecs, recipes
from memdb.codecs.layout import SliceLayout, affine_layout, oqm_layout, plain_layout
from memdb.index.key_search import search_keys
from memdb.index.mean_key import MeanKey, fold
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.encoder_state import Counters
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.stages import compose
from memdb.models.rotary import Rotary, turn
from memdb.models.window import LayerKV
from memdb.query.retrieve.topk import BlockTopK
from memdb.records import canonical_ascii
from memdb.schemas.errors import EncodingMismatch, ModelMismatch
from memdb.schemas.frames import Image
from memdb.schemas.units import Unit
from tests.model_cases import (
    INIT_PROMPT,
    NS,
    QUESTION,
    SHORT_CAPTIONS,
    TINY,
    ingest,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    stored_kv,
    timed,
    windowed,
    wrapped,
)
from tests.model_cases import (
    turn as turned,
)
from tests.store_cases import directory_digest

D, THETA = 16, 10_000.0
INV_FREQ = torch.tensor([THETA ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
# A window of 150 tokens is overflowed by the ninth frame of the tiny model.
SHORT = "encode.window_tokens=150"


# X1, X2, X3: rotation and grouped heads


@given(st.integers(0, 10**6), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_x1_scores_depend_on_distance_alone(far: int, p: int, j: int) -> None:
    """The same distance anywhere gives the same score; angles stay true up to a million."""
    q, k = torch.randn(2, 1, 1, D, generator=torch.Generator().manual_seed(1))
    own = Rotary(INV_FREQ)

    def score(at_q: int, at_k: int) -> float:
        return float((turn(q, *own.at(torch.tensor([at_q]))) * turn(k, *own.at(torch.tensor([at_k])))).sum())

    assert score(p + far, j + far) == pytest.approx(score(p, j), abs=2e-5)
    angles = (p - j) * INV_FREQ
    assert score(p, j) == pytest.approx(float((turned(q, angles.cos(), angles.sin()) * k).sum()), abs=2e-5)


@pytest.mark.parametrize("start", [0, 7, 1023, 50_000])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_x2_rotation_is_undone(start: int, scaling: float) -> None:
    """Also for the factor that YaRN puts on cosine and sine, and for channels that do not rotate."""
    own = Rotary(INV_FREQ, scaling)
    x = torch.randn(2, 5, D + 4, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(start, start + 5)
    there = own.rotate(x, start)
    assert torch.equal(there, own.rotate_at(x, positions, start + 5))
    assert torch.equal(there[..., D:], x[..., D:])
    angles = positions[:, None] * INV_FREQ
    assert relative(there[..., :D], turned(x[..., :D], angles.cos(), angles.sin()) * scaling) < 1e-6
    assert float((own.undo(there, positions) - x).abs().max()) < 1e-5
    assert torch.equal(Rotary(INV_FREQ).rotate(x[:, :1], 0), x[:, :1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (3, 3), (5, 1)])
def test_x3_folded_heads_rank_as_expanded_ones(heads: int, kv_heads: int) -> None:
    """A mean key of H * D and a folded query give the dot products, and the order by cosine, of Hq * D."""
    random = torch.Generator().manual_seed(heads)
    q = torch.randn(heads, 5, D, generator=random)
    blocks = [LayerKV(*torch.randn(2, kv_heads, 7, D, generator=random)) for _ in range(40)]
    keys = MeanKey().keys([blocks])[0]  # (40, H * D) fp16
    means = torch.from_numpy(keys.astype(np.float64)).view(40, kv_heads, D)
    exact = torch.stack([kv.k.double().mean(1) for kv in blocks])
    assert float((means - exact).abs().max()) < 1e-3  # fp16
    expanded = means.repeat_interleave(heads // kv_heads, 1).flatten(1)  # (40, Hq * D)
    query = q.double().mean(1).flatten()
    dot = expanded @ query
    cosine = dot / expanded.norm(dim=1)
    folded = fold(q, kv_heads).numpy()
    for sim, truth in (("dot", dot), ("cos", cosine)):
        hits = search_keys(keys, folded, 40, sim=sim)  # type: ignore[arg-type]
        order = truth.argsort(descending=True)
        if sim == "dot":
            assert hits.rows.tolist() == order.tolist()
            assert np.allclose(hits.scores, dot[order].numpy(), atol=1e-4)
        else:  # keys of length one are rounded to fp16 once more: near ties may change places
            assert float((truth[hits.rows] - truth[order]).abs().max()) < 2e-3
            assert hits.rows[0] == order[0]


# X4: what was written does not depend on what came after


def unit_digests(store: Path, until_s: float) -> list[bytes]:
    with reopened(store) as db:
        rows = db.store.units(db.store.recording("film").id)
        assert db.verify().ok
        return [row.digest for row in rows if row.end_ns <= until_s * NS]


RECIPES: dict[str, tuple[str, ...]] = {
    "rekv": ("encode.chunk_frames=4",),
    "hybrid": ("unit.frames=4", "encode.chunk_frames=4", "caption.share=0.1", *SHORT_CAPTIONS),
    "rlivs": ("unit.frames=4", "encode.chunk_frames=4", "caption.tokens_max=4"),
}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("now", [4, 16], ids=["before the overflow", "after it"])
def test_x4_the_past_does_not_depend_on_the_future(recipe: str, now: int, tmp_path: Path) -> None:
    past = pictures(now)
    futures = {"none": [], "short": pictures(3, seed=1), "long": pictures(9, seed=2)}
    settings = [*RECIPES[recipe], *(() if recipe == "rlivs" else (SHORT,))]
    found = {}
    for name, future in futures.items():
        ingest(tmp_path / name, [*past, *future], recipe=recipe, settings=settings)
        found[name] = unit_digests(tmp_path / name, until_s=now)
    assert len(found["none"]) == (now if recipe == "rekv" else now // 4)
    assert found["none"] == found["short"] == found["long"]
    others = tmp_path / "other past"
    ingest(others, [*pictures(now, seed=5), *futures["short"]], recipe=recipe, settings=settings)
    assert not set(found["none"]) & set(unit_digests(others, until_s=now))


def test_x4_frames_of_one_forward_do_not_see_the_later_ones(tmp_path: Path) -> None:
    """Past and future in one chunk: attention is causal inside it, bit for bit."""
    past = pictures(5)
    for name, seed in (("a", 1), ("b", 2)):
        ingest(
            tmp_path / name,
            [*past, *pictures(11, seed=seed)],
            codec="raw",
            settings=["encode.chunk_frames=16", SHORT],
        )
    assert unit_digests(tmp_path / "a", until_s=5) == unit_digests(tmp_path / "b", until_s=5)
    assert unit_digests(tmp_path / "a", until_s=16)[5] != unit_digests(tmp_path / "b", until_s=16)[5]


# X5: questions leave no trace


@pytest.fixture(scope="module")
def asked_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("asked") / "s"
    settings = ["unit.frames=4", "retrieve.blocks=5", "answer.tokens_max=3", *SHORT_CAPTIONS]
    ingest(store, pictures(14), recipe="hybrid", settings=settings)
    return store


def test_x5_questions_leave_no_trace(asked_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the store, and in the answers to other questions."""
    decided, before = record_decisions(monkeypatch), directory_digest(asked_store)
    asked = [("where is the red square?", "kv"), ("how many?", "both"), ("what is this?", "recent")]
    for order in (asked, asked[::-1]):
        with reopened(asked_store) as db:
            for text, mode in order:
                db.ask(text, mode=mode)
    assert directory_digest(asked_store) == before
    forth, back = decided[:3], decided[3:][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forth, back, strict=True))
    assert not torch.equal(forth[0], forth[1])


# X6: how many frames are fed at once


@pytest.mark.parametrize("short", [False, True], ids=["before the overflow", "after it"])
def test_x6_chunks_do_not_matter(short: bool, tmp_path: Path) -> None:
    """1, 3 and 64 frames at a time give the keys and values of a plain loop over the whole stream."""
    shown, own, model = pictures(18), plain(), wrapped()
    init = model.init_ids(INIT_PROMPT)
    whole = torch.cat((own.embed(init), own.see(shown).flatten(0, 1)))
    heard: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    own.loop(whole, windowed(len(init), 150 if short else 15_000), heard=heard)
    for chunk in (1, 3, 64):
        store = tmp_path / str(chunk)
        settings = [f"encode.chunk_frames={chunk}", *([SHORT] if short else [])]
        ingest(store, shown, codec="raw", settings=settings)
        with reopened(store) as db:
            for kv, (_, k, v) in zip(stored_kv(db), heard, strict=True):
                assert relative(kv.k, k[:, len(init) :]) < 1e-5
                assert relative(kv.v, v[:, len(init) :]) < 1e-5


# X7: every byte is accounted for


def layout_of(codec: str, T: int, H: int, size: int, scale_bytes: int) -> SliceLayout:
    """The closed form: two parts of plain values, or codes, scales and minima along channels and tokens."""
    if codec.startswith("int"):
        return affine_layout(int(codec[3:]), scale_bytes, H, T, size)
    if codec.startswith("oqm"):
        return oqm_layout(int(codec[3:] or 4), scale_bytes, H, T, size)
    return plain_layout({"raw": 4, "fp16": 2, "bf16": 2}[codec], H, T, size)


@pytest.mark.parametrize("recipe", ["rekv", "hybrid", "rlivs"])
@pytest.mark.parametrize("codec", codecs.NAMES)
def test_x7_bytes_are_those_of_the_closed_form(recipe: str, codec: str, tmp_path: Path) -> None:
    if recipe == "rlivs" and codec != codecs.NAMES[0]:
        return
    shape = wrapped().shape
    L, H, size, N, frames = shape.layers, shape.kv_heads, shape.head_size, shape.frame_tokens, 6
    settings = [] if recipe == "rekv" else ["unit.frames=4", *RECIPES[recipe][2:]]
    ingest(
        tmp_path / "s",
        pictures(frames),
        recipe=recipe,
        codec=None if recipe == "rlivs" else codec,
        settings=settings,
    )
    with reopened(tmp_path / "s") as db:
        stats, row = db.stats(), db.store.recording("film")
        units = db.store.units(row.id)
        own = stats.recordings[0].bytes
        captions = [db.store.read_caption(unit) for unit in units if unit.has_caption]
        keyframes = [db.store.read_keyframe(unit) or b"" for unit in units]
    if recipe != "rlivs":
        slices = np.concatenate([unit.slices for unit in units])
        layouts = [layout_of(codec, int(r["tokens"]), H, size, int(r["scale_bytes"])) for r in slices]
        assert [int(raw) for raw in slices["raw_bytes"]] == [layout.slice_bytes for layout in layouts]
        aligned = sum(-(-int(stored) // 64) * 64 for stored in slices["stored_bytes"])
        assert own["kv"] == aligned
        if codec.startswith(("int", "oqm")):
            assert own["kv"] == frames * L * layout_of(codec, N, H, size, 2).slice_bytes
            assert (slices["stored_bytes"] == slices["raw_bytes"]).all()
        else:
            payload = wrapped().shape.kv_bytes(frames * N, 4 if codec == "raw" else 2)
            assert int(slices["raw_bytes"].sum()) == payload
            assert 0.5 * payload < own["kv"] <= payload
    else:
        assert own["kv"] == 0
    assert own["keys"] == (0 if recipe == "rlivs" else frames * L * H * size * 2)
    said = [canonical_ascii({"text": one.text, "token_ids": list(one.token_ids)}) for one in captions]
    assert own["captions"] == sum(len(text) for text in said) + sum(4 * len(one.vector) for one in captions)
    assert len(captions) == {"rekv": 0, "hybrid": 2, "rlivs": 2}[recipe]
    assert own["keyframes"] == sum(map(len, keyframes))
    assert all(value > 0 for value in (own["keyframes"], own["overhead"], own["state"]))
    segments = sum(path.stat().st_size for path in (tmp_path / "s" / "segments").iterdir())
    states = sum(path.stat().st_size for path in (tmp_path / "s" / "state").iterdir())
    assert sum(own.values()) == segments + states
    on_disk = sum(
        (Path(root) / name).stat().st_size for root, _, names in os.walk(tmp_path / "s") for name in names
    )
    locks = sum(path.stat().st_size for path in (tmp_path / "s" / "locks").iterdir())
    assert stats.total_bytes == on_disk == segments + states + sum(stats.derived_bytes.values()) + locks


def test_x7_an_hour_of_the_published_model_in_int4() -> None:
    """LLaVA-OneVision 7B at 0.5 frames/s: 18.84 GiB in fp16, 3.8 times less with scales, minima and padding."""
    fp16 = 1800 * 28 * plain_layout(2, 4, 196, 128).slice_bytes
    int4 = 1800 * 28 * affine_layout(4, 2, 4, 196, 128).slice_bytes
    assert fp16 == 2 * 28 * 1800 * 196 * 4 * 128 * 2
    assert int4 == 1800 * 28 * 105_600
    assert fp16 / int4 == pytest.approx(3.801, abs=1e-3)
    assert fp16 / (int4 + 1800 * 28 * 4 * 128 * 2) == pytest.approx(
        3.765, abs=1e-3
    )  # with representative keys


# X8: what was encoded otherwise is refused


def test_x8_another_model_is_refused_kv(asked_store: Path) -> None:
    with memdb.connect(asked_store, model="random:1", device="cpu", create=False) as db:
        for mode in ("kv", "both", "recent"):
            with pytest.raises(ModelMismatch, match="random:0"):
                db.ask(QUESTION, mode=mode)
        with pytest.raises(ModelMismatch):
            db.ingest(timed(pictures(2)), recording="more", recipe="rekv", sample_fps=1.0)
    with reopened(asked_store) as db:
        assert [row.name for row in db.recordings()] == ["film"]


@pytest.mark.parametrize(
    ("settings", "dtype", "more"),
    [
        (["encode.init_prompt=Watch closely."], None, {}),
        (["encode.window_tokens=151"], None, {}),
        ([], "bfloat16", {}),
        ([], None, {"codec": "int8"}),
        ([], None, {"seed": 1}),
        ([], None, {"profile": "code"}),
    ],
    ids=["init prompt", "window", "dtype", "codec", "seed", "profile"],
)
def test_x8_a_recording_does_not_go_on_in_another_encoding(
    settings: list[str], dtype: str | None, more: dict[str, Any], tmp_path: Path
) -> None:
    shown = pictures(6)
    given = {"codec": "fp16", "settings": ["encode.chunk_frames=2", SHORT], "recipe": "rekv"}
    ingest(tmp_path / "s", shown[:4], **given)  # type: ignore[arg-type]
    before = unit_digests(tmp_path / "s", until_s=4)
    changed = {**given, "settings": [*given["settings"], *settings], "dtype": dtype, **more}
    with pytest.raises(EncodingMismatch, match="film"):
        ingest(tmp_path / "s", shown, **changed)  # type: ignore[arg-type]
    assert unit_digests(tmp_path / "s", until_s=9) == before


# X9: nothing changes by closing


def test_x9_rows_and_logits_are_the_same_bits_after_reopening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client that wrote, and two that opened later: rows by layer, logits, tokens."""
    decided, rows, answers = record_decisions(monkeypatch), [], []
    select = BlockTopK.select

    def recorded(self: BlockTopK, *rest: Any) -> Any:
        rows.append(select(self, *rest))
        return rows[-1]

    monkeypatch.setattr(BlockTopK, "select", recorded)
    settings = ["unit.frames=4", "retrieve.blocks=5", "answer.tokens_max=5", SHORT, *SHORT_CAPTIONS]
    with memdb.connect(tmp_path / "s", model=TINY, device="cpu") as db:
        db.ingest(timed(pictures(14)), recording="film", recipe="hybrid", settings=settings, sample_fps=1.0)
        answers += [db.ask(QUESTION, mode=mode).token_ids for mode in ("kv", "both")]
    for _ in range(2):
        with reopened(tmp_path / "s") as db:
            answers += [db.ask(QUESTION, mode=mode).token_ids for mode in ("kv", "both")]
    assert answers[:2] == answers[2:4] == answers[4:]
    for later in (2, 4):
        assert all(torch.equal(a, b) for a, b in zip(decided[:2], decided[later : later + 2], strict=True))
    size = 2 * wrapped().shape.layers
    assert len(rows) == 3 * size
    assert len({tuple(mine) for mine in rows[:size]}) > 1
    for later in (size, 2 * size):
        assert all(np.array_equal(a, b) for a, b in zip(rows[:size], rows[later : later + size], strict=True))


# A position of ten million


def encode(counters: Counters, shown: Sequence[Image], settings: Sequence[str]) -> list[Unit]:
    model = wrapped()
    recipe = recipes.recipe("rekv", codec="int4", settings=tuple(settings))
    encoder = StreamEncoder(model, compose(recipe), model.init_ids("x"), None)
    encoder.start_fresh(counters)
    ready = [
        ReadyFrame(number, number * NS, (number + 1) * NS, model.prepare(picture), picture)
        for number, picture in enumerate(shown)
    ]
    return encoder.step(ready[:7]) + encoder.step(ready[7:])


@pytest.mark.parametrize("position", [10**7, 10**12])
def test_a_stream_position_of_ten_million_gives_the_bits_of_position_zero(position: int) -> None:
    """Keys, values and representative keys; only the write positions say where the stream stood."""
    shown = pictures(14)
    first, far = (encode(Counters(position=at), shown, [SHORT]) for at in (0, position))
    init = len(wrapped().init_ids("x"))
    for number, (a, b) in enumerate(zip(first, far, strict=True)):
        assert a.kv is not None
        assert b.kv is not None
        assert np.array_equal(a.kv.payload, b.kv.payload)
        assert np.array_equal(a.keys, b.keys)  # type: ignore[arg-type]
        assert a.blocks["position"].tolist() == [init + 16 * number]
        assert b.blocks["position"].tolist() == [position + 16 * number]


def test_a_film_that_repeats_gives_the_same_bits_ever_after() -> None:
    """Once what a frame can reach (layers times window) repeats, so do keys and values, however long it runs."""
    lap, settings = pictures(2), ["encode.window_tokens=40", "encode.chunk_frames=2"]
    model = wrapped()
    recipe = recipes.recipe("rekv", codec="raw", settings=tuple(settings))
    encoder = StreamEncoder(model, compose(recipe), model.init_ids("x"), None)
    laps = []
    for number in range(20):
        ready = [
            ReadyFrame(2 * number + i, (2 * number + i) * NS, (2 * number + i + 1) * NS, model.prepare(p), p)
            for i, p in enumerate(lap)
        ]
        laps.append([unit.kv.raw_digest for unit in encoder.step(ready) if unit.kv is not None])
    reach = -(-model.shape.layers * (40 + 32) // 32) + 1  # laps
    assert laps[0] != laps[-1]
    assert all(one == laps[-1] for one in laps[reach:])
    assert len(laps) > reach + 3
