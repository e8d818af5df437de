"""Segments, merged frames and CTR in a whole ingest: what is stored, resumed, forgotten and answered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from memdb.digest import unit_digest
from memdb.ingest.encode.window import OpenWindow
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import SeenFrame
from memdb.ingest.pipeline import _ready
from memdb.ingest.reduce import ctr
from memdb.ingest.reduce.ctr import CausalTemporal
from memdb.ingest.sampling import sample
from memdb.ingest.sources import open_source
from memdb.ingest.stages import compose
from memdb.models.protocol import VideoModel
from memdb.recipes import recipe as named
from memdb.schemas.errors import Interrupted
from memdb.schemas.recording import Tombstone
from memdb.schemas.units import BlockKind, Unit
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
    stored_kv,
    wrapped,
)
from tests.run_cases import (
    CHUNK,
    NAME,
    SETTINGS,
    WINDOW_TOKENS,
    content,
    ingested,
    opened,
    small_film,
    small_model,
    small_spec,
    unit_digests,
    unit_rows,
)
from tests.test_resume import Crash, crash_at, stop_at

FRAMES = 22
BASE = (f"encode.chunk_frames={CHUNK}", f"encode.window_tokens={WINDOW_TOKENS}")
SEGMENT = ("unit=segment", "unit.theta=0.985", "unit.frames_min=1", "unit.frames_max=2")
GUIDED = (
    *SEGMENT,
    "encode=segment",
    f"encode.init_prompt={INIT_PROMPT}",
    *BASE,
    "retain=select_kv",
    "retain.keep=0.5",
)
CTR = ("reduce=ctr", "reduce.tokens=2")
# Of rekv, by name. Scenes of the film are three frames long: batches of four cut through them.
CASES: dict[str, tuple[str, ...]] = {
    "ctr": (*BASE, *CTR, "write=oqm"),
    "ctr-clip": (*BASE, "unit=clip", "unit.frames=3", *CTR, "reduce.dpc=released", "write=oqm2"),
    "segment": (*BASE, *SEGMENT, "write=int4"),
    "streamkv": (*GUIDED, "retrieve=layer_adaptive", "retrieve.blocks=3", "write=int4"),
    "segment-ctr": (*BASE, *SEGMENT, *CTR, "write=oqm"),
    "merge": (*BASE, "reduce=merge", "reduce.delta=0.985", "write=int4"),
    "merge-clip": (*BASE, "unit=clip", "unit.frames=2", "reduce=merge", "reduce.delta=0.985", "write=int4"),
    "block": (*BASE, "unit=block", "unit.first_frames=6", "unit.frames=3", "write=int4"),
}


@dataclass(frozen=True)
class Bench:
    model: VideoModel
    film: Path
    whole: dict[str, Path]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("reduced")
    model, film = small_model(small_spec(folder)), small_film(folder / "film.mp4", FRAMES)
    whole = {case: folder / f"{case}.memdb" for case in CASES}
    for case, store in whole.items():
        run(Bench(model, film, {}), store, case)
    return Bench(model, film, whole)


def run(bench: Bench, store: Path, case: str, **changes: Any) -> Any:
    return ingested(store, bench.model, bench.film, "rekv", codec=None, settings=CASES[case], **changes)


def encoder(bench: Bench, case: str, *, seed: int = 0) -> StreamEncoder:
    row = named("rekv", settings=CASES[case])
    init = bench.model.init_ids(str(row.encode.params["init_prompt"]))
    return StreamEncoder(bench.model, compose(row), init, None, seed=seed)


def batches(bench: Bench, size: int) -> Iterator[list[Any]]:
    with open_source(bench.film) as source:
        frames = [_ready(frame, bench.model) for frame in sample(source.frames(), 1)]
    return (frames[start : start + size] for start in range(0, len(frames), size))


def digests(units: Sequence[Unit]) -> list[bytes]:
    return [unit_digest(unit) for unit in units]


# What is stored


def test_the_cases_are_what_they_are_meant_to_be(bench: Bench) -> None:
    counts = {case: [row.blocks["tokens"].tolist() for row in unit_rows(bench.whole[case])] for case in CASES}
    assert counts["ctr"] == [[2]] * FRAMES
    assert counts["ctr-clip"] == [[2] * 3] * 7 + [[2]]
    assert counts["block"] == [[4] * 6, *[[4] * 3] * 5, [4]]
    assert {len(unit) for unit in counts["segment"]} == {1, 2}
    assert all(tokens == [2] * len(tokens) for tokens in counts["segment-ctr"])
    assert 5 < len(counts["merge"]) < FRAMES
    assert all(unit == [4] for unit in counts["merge"])
    assert {len(unit) for unit in counts["merge-clip"]} == {1, 2} or {
        len(u) for u in counts["merge-clip"]
    } == {2}
    assert len({content(store) for store in bench.whole.values()}) == len(CASES)


@pytest.mark.parametrize("case", CASES)
def test_units_and_blocks_cover_the_film_without_holes(bench: Bench, case: str) -> None:
    rows = unit_rows(bench.whole[case])
    positions = [(int(b["position"]), int(b["tokens"])) for row in rows for b in row.blocks]
    frames = [row.blocks for row in rows]
    if case == "streamkv":  # behind the frames of each unit stands their summary
        assert all(blocks["kind"][-1] == BlockKind.SUMMARY for blocks in frames)
        frames = [blocks[:-1] for blocks in frames]
    spans = [(int(b["start_ns"]), int(b["end_ns"])) for blocks in frames for b in blocks]
    assert spans[0][0] == 0
    assert spans[-1][1] == FRAMES * 10**9
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert [(row.start_ns, row.end_ns) for row in rows] == [
        (int(blocks["start_ns"][0]), int(blocks["end_ns"][-1])) for blocks in frames
    ]
    kind = BlockKind.GROUP if "ctr" in case else BlockKind.FRAME
    assert {int(b["kind"]) for blocks in frames for b in blocks} == {kind}
    assert all(b[0] == a[0] + a[1] for a, b in pairwise(positions))


@pytest.mark.parametrize("case", CASES)
def test_a_question_is_answered_from_what_was_kept(bench: Bench, case: str) -> None:
    with opened(bench.whole[case], bench.model, create=False) as client:
        before = client.digest()
        answer = client.ask("What was there?", mode="kv")
        assert answer.evidence
        assert all(item.tier == "kv" for item in answer.evidence)
        assert client.digest() == before
        assert client.verify().ok


@pytest.mark.parametrize("case", ["ctr", "ctr-clip", "streamkv"])
def test_groups_move_to_another_store_bit_for_bit(bench: Bench, case: str, tmp_path: Path) -> None:
    with opened(bench.whole[case], bench.model, create=False) as client:
        client.export(NAME, tmp_path / "one.recording", format="memdb")
    with opened(tmp_path / "b.memdb", bench.model) as client:
        client.import_(tmp_path / "one.recording")
        assert client.verify().ok
    assert content(tmp_path / "b.memdb") == content(bench.whole[case])


HYBRIDS = {
    "ctr": ("unit.frames=3", *CTR, "write=oqm"),
    "merge": ("unit.frames=2", "reduce=merge", "reduce.delta=0.985"),
    "segment": SEGMENT,
    "streamkv": (*GUIDED, "retrieve=layer_adaptive", "retrieve.blocks=3", "retrieve.caption_tokens=100"),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_both_tiers_hold_reduced_units_and_resume(bench: Bench, name: str, tmp_path: Path) -> None:
    """Captions are said over what is left of a clip; recurrent tokens are chosen from it."""
    captions = tuple(setting for setting in SETTINGS["hybrid"] if setting.startswith("caption."))
    changes = {"codec": None, "settings": (*BASE, *captions, *HYBRIDS[name])}
    whole = tmp_path / "whole.memdb"
    ingested(whole, bench.model, bench.film, "hybrid", **changes)
    rows = unit_rows(whole)
    assert all(row.has_caption and len(row.blocks) for row in rows)
    for batch in (1, 3):
        store = tmp_path / f"{batch}.memdb"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            ingested(store, bench.model, bench.film, "hybrid", stop=stop_at(patch, batch), **changes)
        ingested(store, bench.model, bench.film, "hybrid", **changes)
        assert content(store) == content(whole)
    with opened(whole, bench.model, create=False) as client:
        assert client.ask("What was there?", mode="both").evidence


# T8, H2: through store, close, reopen and rebuild come the logits of one uncut forward over the reduced tokens


def seen_by(shown: Sequence[Any], settings: Sequence[str]) -> Tensor:
    """Tokens (T, E) as stages 1 and 2 leave them, from transformers' own, by plain loops."""
    frames = plain().see(shown)  # (F, N, E)
    if "reduce=merge" in settings:
        return torch.cat([frames[:3].mean(0), *frames[3:]])
    if "unit=segment" in settings:  # the two that are most alike become one, again and again
        return frames[[0, 3, 4, 5]].flatten(0, 1)
    return frames.flatten(0, 1)


@pytest.mark.parametrize(
    "settings",
    [
        ["reduce=ctr", "reduce.tokens=16"],
        ["unit=block", "unit.first_frames=4", "unit.frames=2"],
        ["reduce=merge", "reduce.delta=0.9999"],
        ["unit=segment", "unit.theta=-1", "unit.frames_max=4"],
    ],
    ids=" ".join,
)
def test_t8_nothing_lost_is_full_attention(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, decided = pictures(6), record_decisions(monkeypatch)
    shown = [shown[0], shown[0], shown[0], *shown[3:]]
    ingest(tmp_path / "s", shown, codec="raw", settings=[*settings, "answer.tokens_max=1"])
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
    own, model = plain(), wrapped()
    init, prompt = own.embed(model.init_ids(INIT_PROMPT)), own.embed(model.prompt_ids(QUESTION))
    truth = own.forward(torch.cat((init, seen_by(shown, settings), prompt)))[-1]
    assert len(decided) == 1
    assert relative(decided[0], truth) < 1e-4


def test_ctr_stores_what_the_tokens_that_it_keeps_give(tmp_path: Path) -> None:
    """Stored keys are those of a plain loop over [init | G tokens a frame], whatever the batches."""
    shown = pictures(7)
    shown[2] = shown[1]  # one frame is still
    own, model = plain(), wrapped()
    tokens, saliency = model.salient_tokens([model.prepare(picture) for picture in shown])
    kept, _ = CausalTemporal(tokens=5).reduce(tokens, saliency, None, seed=0, numbers=range(7))
    init = own.embed(model.init_ids(INIT_PROMPT))
    heard: list[tuple[Tensor, Tensor, Tensor]] = []
    own.loop(torch.cat((init, kept.flatten(0, 1))), causal, heard=heard)
    for chunk in (1, 3, 64):  # X6
        settings = ["reduce=ctr", "reduce.tokens=5", f"encode.chunk_frames={chunk}"]
        ingest(tmp_path / str(chunk), shown, codec="raw", settings=settings)
        with reopened(tmp_path / str(chunk)) as db:
            for kv, (_, k, v) in zip(stored_kv(db), heard, strict=True):
                assert relative(kv.k, k[:, len(init) :]) < 1e-5
                assert relative(kv.v, v[:, len(init) :]) < 1e-5


@pytest.mark.parametrize("codec", ["oqm", "oqm2"])
def test_an_odd_group_comes_back_from_a_store_within_half_a_step(codec: str, tmp_path: Path) -> None:
    """R16: groups of 5 tokens end in the middle of a byte. R12: their keys are those of what was not quantised."""
    shown, levels = pictures(5), 15 if codec == "oqm" else 3
    read, keys = [], []
    for name in ("raw", codec):
        ingest(tmp_path / name, shown, codec=name, settings=["reduce=ctr", "reduce.tokens=5"])
        with reopened(tmp_path / name) as db:
            read.append(stored_kv(db))
            units = db.store.units(db.store.recording("film").id)
            keys.append(np.concatenate([db.store.read_keys(unit) for unit in units], 1))
            assert {int(row["tokens"]) for unit in units for row in unit.slices} == {5}
    assert np.array_equal(*keys)
    for exact, rough in zip(*read, strict=True):
        for x, back in ((exact.k, rough.k), (exact.v, rough.v)):
            groups = x.unflatten(1, (-1, 5)).double()  # (H, groups, 5, D)
            step = (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / levels
            error = (back.unflatten(1, (-1, 5)).double() - groups).abs()
            ulp = groups.abs().amax(2, keepdim=True) * 2.0**-10 + 2.0**-24
            assert bool((error <= step / 2 * (1 + 2.0**-9) + ulp).all())
            assert float(error.max()) > 0


def test_what_comes_after_ctr_knows_where_its_tokens_stood(bench: Bench) -> None:
    """R5: raster ids go with a frame, in the order of its tokens."""
    coder = encoder(bench, "ctr")
    [batch] = list(batches(bench, FRAMES))
    frames = coder._see(batch)
    [reduced] = coder._carried.reduce([frames])
    tokens = torch.stack([frame.tokens for frame in frames])
    saliency = torch.stack([frame.saliency for frame in frames if frame.saliency is not None])
    kept, raster = CausalTemporal(tokens=2).reduce(tokens, saliency, None, seed=0, numbers=range(FRAMES))
    for frame, own, places in zip(reduced, kept, raster, strict=True):
        assert torch.equal(frame.tokens, own)
        assert frame.raster is not None
        assert torch.equal(frame.raster, places)


# Resuming


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_state_and_restore_are_exact(bench: Bench, case: str, size: int) -> None:
    first, carried = encoder(bench, case), encoder(bench, case)
    for batch in batches(bench, size):
        state = carried.state()
        carried = encoder(bench, case)
        carried.restore(state)
        assert carried.state() == state == first.state()
        assert abs(carried.state_bytes - len(state)) < 8192
        ours, theirs = carried.step(batch), first.step(batch)
        assert digests(ours) == digests(theirs)
        assert [unit.keyframe for unit in ours] == [unit.keyframe for unit in theirs]
    ours, theirs = carried.finish(), first.finish()
    assert digests(ours) == digests(theirs)
    assert [unit.keyframe for unit in ours] == [unit.keyframe for unit in theirs]


@pytest.mark.parametrize("case", CASES)
def test_stopped_or_dead_at_any_batch_and_run_again(bench: Bench, case: str, tmp_path: Path) -> None:
    whole = unit_digests(bench.whole[case])
    for batch in range(6):
        for dies in (False, True):
            store = tmp_path / f"{batch}-{dies}.memdb"
            with pytest.MonkeyPatch.context() as patch:
                if dies:
                    crash_at(patch, batch)
                    with pytest.raises(Crash):
                        run(bench, store, case)
                elif batch < 5:
                    with pytest.raises(Interrupted):
                        run(bench, store, case, stop=stop_at(patch, batch))
            before = unit_digests(store) if store.exists() else []
            assert before == whole[: len(before)]
            run(bench, store, case)
            assert unit_digests(store) == whole
            assert content(store) == content(bench.whole[case])


def test_a_state_of_before_there_was_reduction_still_loads(bench: Bench) -> None:
    """Saved without the frame beside which the next is reduced; recipes that need none go on from it."""
    row = named("rekv", settings=(*BASE, "unit=clip", "unit.frames=3"))
    init = bench.model.init_ids(str(row.encode.params["init_prompt"]))
    first, second = (StreamEncoder(bench.model, compose(row), init, None) for _ in range(2))
    first_batch, next_batch = list(batches(bench, CHUNK))[:2]
    first.step(first_batch)
    tensors = load_tensors(first.state())
    meta = json.loads(bytes(tensors["meta"].numpy()))
    assert [len(frame) for frame in meta["open"]] == [3], "rows as they always were"
    del meta["before"]
    tensors["meta"] = torch.from_numpy(np.frombuffer(json.dumps(meta).encode(), np.uint8).copy())
    second.restore(save_tensors(tensors))
    assert second.state() == first.state()
    assert digests(second.step(next_batch)) == digests(first.step(next_batch))


# X6: how many frames come at once changes results by rounding only


@pytest.mark.parametrize("case", CASES)
def test_x6_batches_do_not_decide_what_is_stored(bench: Bench, case: str) -> None:
    found = []
    for size in (1, 5, FRAMES):
        coder = encoder(bench, case)
        units = [unit for batch in batches(bench, size) for unit in coder.step(batch)] + coder.finish()
        found.append(units)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert np.array_equal(one.blocks, other.blocks)
            assert one.keys is not None
            assert other.keys is not None
            scale = float(np.abs(one.keys).max())
            assert np.allclose(one.keys, other.keys, rtol=2e-3, atol=2e-3 * scale)  # fp16


# X4: nothing looks ahead


@pytest.mark.parametrize("case", CASES)
def test_x4_what_closed_does_not_depend_on_what_follows(bench: Bench, case: str) -> None:
    frames = [frame for batch in batches(bench, 1) for frame in batch]
    for until in (7, 8, 10, 17):
        found = []
        for other in (False, True):
            coder = encoder(bench, case)
            units = []
            shown = frames if not other else [*frames[:until], *turned(frames[until:])]
            for start in range(0, FRAMES, CHUNK):
                units += coder.step(shown[start : start + CHUNK])
            found.append([unit for unit in units if unit.end_ns <= until * 10**9])
            assert [unit.number for unit in found[-1]] == list(range(len(found[-1])))
        # A frame that follows may say that a unit is over; what is in a unit that both call over is one.
        shared = [(a, b) for a, b in zip(*found, strict=False) if a.end_ns == b.end_ns]
        assert shared
        assert digests([a for a, _ in shared]) == digests([b for _, b in shared])
        assert min(len(units) for units in found) - len(shared) <= 1


def turned(frames: Sequence[Any]) -> list[Any]:
    return [replace(frame, pixels=frame.pixels[::-1].copy()) for frame in frames]


# Seeds


def test_jitter_is_asked_for_by_seed_and_frame_number(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    jitter = ctr.jitter

    def noted(seed: int, number: int, tokens: int) -> Tensor:
        asked.append((seed, number))
        return jitter(seed, number, tokens)

    monkeypatch.setattr(ctr, "jitter", noted)
    for size in (1, 5):
        asked.clear()
        coder = encoder(bench, "ctr", seed=9)
        for batch in batches(bench, size):
            coder.step(batch)
        assert asked == [(9, number) for number in range(FRAMES)]
    asked.clear()
    assert bench.whole
    store = bench.whole["ctr"].with_name("seeded.memdb")
    run(bench, store, "ctr", seed=5)
    assert asked == [(5, number) for number in range(FRAMES)]


# Forgetting


def stone(start_s: int, end_s: int) -> Tombstone:
    return Tombstone(0, start_s * 10**9, end_s * 10**9, 99, 0)


def test_the_frame_beside_which_the_next_is_reduced_is_held(bench: Bench) -> None:
    """Also where no window holds it any more: in recipes without KV there is none."""
    coder, new = encoder(bench, "ctr"), encoder(bench, "ctr")
    first, second = list(batches(bench, CHUNK))[:2]
    coder.step(first)
    assert isinstance(coder._encoding, OpenWindow)
    coder._encoding._frames = []
    assert not coder.holds([stone(0, 3)])
    assert coder.holds([stone(3, 4)])
    assert coder.reach_ns == 3 * 10**9
    assert coder.forget([stone(3, 4)]) == []
    assert coder.reach_ns == 4 * 10**9
    new.counters.frame = 4
    kv = [unit.kv.payload.tobytes() for unit in new.step(second) if unit.kv is not None]
    assert [unit.kv.payload.tobytes() for unit in coder.step(second) if unit.kv is not None] == kv


def test_the_reach_covers_what_a_summary_stands_for(bench: Bench) -> None:
    """A summary is of its whole segment, and still in the window when the segment's first frames have left it."""
    coder, cut = encoder(bench, "streamkv"), 0
    for batch in batches(bench, 1):
        coder.step(batch)
        held = [second for second in range(FRAMES) if coder.holds([stone(second, second + 1)])]
        assert coder.reach_ns == held[0] * 10**9
        assert isinstance(coder._encoding, OpenWindow)
        window = coder._encoding.held
        cut += bool(window) and window[0].start_ns > min(frame.start_ns for frame in window)
    assert cut, "windows whose first frame is not the oldest thing in them"


@pytest.mark.parametrize("case", ["merge", "merge-clip", "segment", "streamkv"])
def test_a_merged_frame_that_overlaps_what_was_forgotten_goes_whole(bench: Bench, case: str) -> None:
    coder = encoder(bench, case)
    still = next(batches(bench, 1))

    for i in range(6):
        coder.step([replace(still[0], number=i, start_ns=i * 10**9, end_ns=(i + 1) * 10**9)])
    held = [(frame.start_ns // 10**9, frame.end_ns // 10**9) for frame in coder._carried.opened]
    assert any(end - start > 1 for start, end in held)
    start, end = next(span for span in held if span[1] - span[0] > 1)
    coder.forget([stone(start, start + 1)])
    assert all(
        frame.end_ns <= start * 10**9 or frame.start_ns >= end * 10**9 for frame in coder._carried.opened
    )
    assert coder.counters.epoch == 1


def test_open_frames_know_their_embedding_as_they_came(bench: Bench) -> None:
    """A saved state keeps it: the cosine of the next frame is with it, and not with what it became."""
    coder = encoder(bench, "segment")
    frames: list[SeenFrame] = []
    for batch in batches(bench, 1):
        frames += coder._see(batch)
        coder.step(batch)
        if coder._carried.opened:
            again = encoder(bench, "segment")
            again.restore(coder.state())
            assert torch.equal(again._carried.opened[-1].embedding, frames[-1].embedding)
            assert [frame.likeness for frame in again._carried.opened] == [
                frame.likeness for frame in coder._carried.opened
            ]


def test_names_are_as_the_store_has_them(bench: Bench) -> None:
    with opened(bench.whole["ctr"], bench.model, create=False) as client:
        row = client.store.recording(NAME)
        assert row.spec.recipe.reduce.method == "ctr"
        assert row.spec.recipe.codec == "oqm"
