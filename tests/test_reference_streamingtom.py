"""StreamingTOM (arXiv 2510.18269) from pixels to logits: the reference tests of the paper, through store and reopen.

The reduction and the codec alone are held against plain loops in test_ctr.py and test_codecs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from memdb import codecs
from memdb.codecs.affine import Affine
from memdb.codecs.pack import pack_unit
from memdb.ingest.encode.groups import Groups
from memdb.ingest.reduce.ctr import CausalTemporal
from memdb.models.window import LayerKV
from memdb.query.retrieve.groups import GroupTopK
from memdb.schemas.units import BlockKind
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

FRAMES, G = 11, 4  # 4 of the tiny model's 16 tokens: the paper's share
WINDOW = 14  # three groups and a half: three are whole
BATCH = 4
CUT = (f"encode.window_tokens={WINDOW}", f"encode.chunk_frames={BATCH}", "answer.tokens_max=1")
PROFILES = ("fixed", "paper", "code")
BOUND = 1e-4
KEY_BOUND = 1e-3  # of a mean key, stored in fp16

Ints = npt.NDArray[np.int64]
Seen = Callable[[int, int], tuple[Tensor, Tensor]]


def film(frames: int = FRAMES) -> list[Any]:
    shown = pictures(frames)
    shown[2] = shown[1]  # one frame is still
    return shown


def reduced(shown: Sequence[Any]) -> Tensor:
    """(F, G, E) as stages 1 and 2 give them; test_ctr.py proves these."""
    tokens, saliency = wrapped().salient_tokens([wrapped().prepare(picture) for picture in shown])
    return CausalTemporal().reduce(tokens, saliency, None, seed=0, numbers=range(len(shown)))[0]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A film by each profile, its window overflowing twice. In 2 bits: what is lost by them is seen in what follows."""
    folder = tmp_path_factory.mktemp("tom")
    for profile in PROFILES:
        ingest(folder / profile, film(), recipe="streamingtom", codec="oqm2", profile=profile, settings=CUT)
    return {profile: folder / profile for profile in PROFILES}


def init_embeddings() -> Tensor:
    return plain().embed(wrapped().init_ids(INIT_PROMPT))


def heard_alone(init: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the init tokens in every layer, in fp64."""
    heard: list[tuple[Tensor, Tensor, Tensor]] = []
    plain().loop(init, causal, heard=heard)
    return [(k, v) for _, k, v in heard]


def groups_in_view(profile: str, frame: int) -> tuple[int, int]:
    """First and past-last of the older groups that a frame sees as they are stored."""
    until = frame if profile == "fixed" else frame // BATCH * BATCH
    return max(0, until - WINDOW // G), until


def written_at(n: int) -> list[int]:
    """Where the released code writes each frame: behind init and window, at the batch's start, one after another."""
    found = []
    for frame in range(FRAMES):
        first, until = groups_in_view("code", frame)
        found.append(n + (until - first) * G + frame % BATCH * G)
    return found


# Stage 3


@pytest.mark.parametrize("profile", PROFILES)
def test_a_frame_is_encoded_over_what_is_stored_of_older_ones(stores: dict[str, Path], profile: str) -> None:
    """T5 end to end: every stored entry is within half a step of what a plain loop over [init | stored | own] gives.

    The loop is given what is stored of older groups, so that nothing adds up from frame to frame. The key of a group
    is compared as well, which no quantisation touched (R12).
    """
    shown, init = film(), init_embeddings()
    kind = "released" if profile == "code" else "textbook"
    tokens, saliency = wrapped().salient_tokens([wrapped().prepare(picture) for picture in shown])
    frames = CausalTemporal(dpc=kind).reduce(tokens, saliency, None, seed=0, numbers=range(FRAMES))[0]
    alone, n = heard_alone(init), len(init)
    with reopened(stores[profile]) as db:
        stored = stored_kv(db)
        units = db.store.units(db.store.recording("film").id)
        keys = np.concatenate([db.store.read_keys(unit) for unit in units], 1)  # (L, F, H*D) fp16
    stands = written_at(n)
    assert [int(unit.blocks["position"][0]) for unit in units] == (
        stands if profile == "code" else [n + G * frame for frame in range(FRAMES)]
    )
    assert {int(unit.blocks["kind"][0]) for unit in units} == {BlockKind.GROUP}
    for frame in range(FRAMES):
        first, until = groups_in_view(profile, frame)
        together = frames[until : frame + 1].flatten(0, 1)
        given = [
            (
                torch.cat((k, kv.k[:, first * G : until * G].double()), 1),
                torch.cat((v, kv.v[:, first * G : until * G].double()), 1),
            )
            for (k, v), kv in zip(alone, stored, strict=True)
        ]
        seen: Seen = causal
        if profile == "code":
            places = [*range(n), *(at + i for at in stands[first : frame + 1] for i in range(G))]
            seen = by_places(np.array(places))
        heard: list[tuple[Tensor, Tensor, Tensor]] = []
        before = torch.zeros(n + (until - first) * G, init.shape[1])
        plain().loop(torch.cat((before, together)), seen, given=given, heard=heard, reach=200)
        for layer, (_, k, v) in enumerate(heard):
            for exact, found in ((k, stored[layer].k), (v, stored[layer].v)):
                own, back = exact[:, -G:], found[:, frame * G : (frame + 1) * G].double()  # (H, G, D)
                step = (own.amax(1, keepdim=True) - own.amin(1, keepdim=True)) / 3
                slack = own.abs().amax() * (2.0**-10 + BOUND)
                assert bool(((back - own).abs() <= step / 2 * (1 + 2.0**-9) + slack).all())
            mean = k[:, -G:].mean(1).flatten()
            assert relative(torch.from_numpy(keys[layer, frame]).double(), mean) < KEY_BOUND


def by_places(places: Ints) -> Seen:
    """Everything before, in the order of the stream, at the distance of its place; two may share one."""

    def seen(layer: int, x: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(x + 1)
        return tokens, torch.from_numpy(places[x] - places[: x + 1])

    return seen


def test_what_is_stored_enters_the_encoding_and_each_profile_does_so_in_its_way(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """The guard of the equality above: exact older groups, or another profile's, give keys far outside its bound."""
    found = {}
    ingest(tmp_path / "raw", film(), recipe="streamingtom", codec="raw", settings=CUT)
    for name, store in {**stores, "raw": tmp_path / "raw"}.items():
        with reopened(store) as db:
            units = db.store.units(db.store.recording("film").id)
            keys = np.concatenate([db.store.read_keys(unit) for unit in units], 1)
            found[name] = torch.from_numpy(keys).double()  # (L, F, H*D)
    for one, other in combinations(found, 2):
        print(
            one, other, relative(found[one][-1], found[other][-1]), relative(found[one][0], found[other][0])
        )
        assert relative(found[one][-1], found[other][-1]) > 10 * KEY_BOUND


@pytest.mark.parametrize("profile", PROFILES)
def test_x6_where_batches_are_cut_matters_to_papers_alone(profile: str, tmp_path: Path) -> None:
    """In `fixed` no frame sees another of its batch otherwise than it will be read back."""
    found = []
    for chunk in (1, 3):
        settings = (CUT[0], f"encode.chunk_frames={chunk}", "reduce.dpc=textbook")
        ingest(
            tmp_path / str(chunk),
            film(),
            recipe="streamingtom",
            profile=profile,
            codec="raw",
            settings=settings,
        )
        with reopened(tmp_path / str(chunk)) as db:
            found.append(stored_kv(db)[-1].k)
    assert (relative(*found) < 1e-5) == (profile == "fixed")


def test_a_layer_that_widens_its_scales_is_seen_as_it_is_stored() -> None:
    """The third group overflows fp16 scales: it and all after it have wide ones, in context and store alike."""
    codec, generator = codecs.codec("oqm"), torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 2, 5 * G, 8, generator=generator).unbind()  # (H, 5 * G, D) each
    k[:, 2 * G : 3 * G] *= 2e4
    context = Groups().open(wrapped(), [5], codec, profile="fixed")
    context.expect_frames([G] * 5)
    back, widths, stored = context._as_stored(0, k, v), dict[int, int](), []
    for group in range(5):
        own = LayerKV(k, v).part(group * G, (group + 1) * G)
        packed = pack_unit(codec, [[own]], widths, torch.float32)
        [row] = packed.slices
        widths = {0: int(row["scale_bytes"])}
        raw = torch.from_numpy(packed.payload[int(row["offset"]) :][: int(row["raw_bytes"])])[None]
        found = codec.unpack(raw, torch.float32, widths[0], 2, G, 8, torch.float32)
        stored.append([part[0] for part in found])
    assert context.widths == widths == {0: 4}
    assert torch.equal(back.k, torch.cat([pair[0] for pair in stored], 1))
    assert torch.equal(back.v, torch.cat([pair[1] for pair in stored], 1))
    assert not torch.equal(back.v, context._as_stored(0, k, v).v), "the first two would be wide by now"


# T7


def test_t7_the_released_code_writes_all_later_batches_at_the_same_places() -> None:
    """4,814 to 6,413 from the 96th frame on, with 14 init tokens, 50 a group, and batches of 32."""
    model, frame = wrapped(), torch.zeros(50, wrapped().shape.embedding_size)
    method = Groups()
    context = method.open(model, range(5, 19), codecs.codec("oqm"), profile="code")
    frame[:, 0] = torch.arange(50)
    # The forward is of no interest here, and takes a while.
    context.attend = lambda layer, q, k, v, scale: _noted(context, layer, q, k, v)  # type: ignore[method-assign]
    stands = []
    for _ in range(5):
        stands.append(method.encode(model, context, [frame] * 32)[1])
    assert stands[0] == [14 + 50 * i for i in range(32)]
    assert stands[1][0] == 14 + 1600
    assert stands[2][0] == 14 + 3200
    assert stands[3] == stands[4] == [4_814 + 50 * i for i in range(32)]
    assert stands[4][-1] + 49 == 6_413
    assert context.held_tokens == 4_800
    assert context.stands[:50].tolist() == list(range(14 + 3200, 14 + 3250)), (
        "each keeps the place it was given"
    )


def _noted(context: Any, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    context.fresh.append(LayerKV(k, v))
    known = context.held[layer].plus(LayerKV(k, v))
    context._next.append(known.part(max(0, known.tokens - 4_800)))
    return q


@pytest.mark.parametrize("profile", PROFILES)
def test_t7_a_question_stands_as_far_from_a_group_as_the_profile_says(
    stores: dict[str, Path], profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All groups in every layer, read as they are stored: logits of a plain loop over places by hand.

    In `code` groups of different batches stand at one place; elsewhere they stand one behind the other.
    """
    decided = record_decisions(monkeypatch)
    with reopened(stores[profile]) as db:
        stored = stored_kv(db)
        answer = db.ask(QUESTION, mode="kv")
    assert not answer.warnings
    own, model, init = plain(), wrapped(), init_embeddings()
    n, prompt = len(init), own.embed(model.prompt_ids(QUESTION))
    held = FRAMES * G
    places = np.arange(n + held + len(prompt))
    if profile == "code":
        places[n : n + held] = [at + i for at in written_at(n) for i in range(G)]
        assert len(set(places[n : n + held])) < held, "the collision"
    given = [
        (torch.cat((k, kv.k.double()), 1), torch.cat((v, kv.v.double()), 1))
        for (k, v), kv in zip(heard_alone(init), stored, strict=True)
    ]
    embeddings = torch.cat((torch.zeros(n + held, init.shape[1]), prompt))
    truth = own.loop(embeddings, by_places(places), given=given, reach=200)[-1]
    assert relative(decided[0], truth.float()) < BOUND
    if profile == "code":
        other = own.loop(embeddings, causal, given=given)[-1]
        assert relative(other, truth) > 100 * BOUND


# T6


def test_t6_as_many_groups_as_the_budget_takes() -> None:
    assert GroupTopK().groups(50) == 251
    assert GroupTopK(12).groups(4) == 3
    assert GroupTopK(13).groups(4) == 4
    assert GroupTopK(1).groups(50) == 1


@pytest.mark.parametrize("budget", [1, 13, 999])
def test_t6_the_best_by_cosine_and_only_they_are_dequantised(
    stores: dict[str, Path], budget: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = (*CUT, f"retrieve.budget_tokens={budget}")
    ingest(tmp_path / "s", film(), recipe="streamingtom", settings=settings)
    chosen: list[tuple[npt.NDArray[np.float32], list[int]]] = []
    unpacked: list[int] = []
    select, unpack = GroupTopK.select, Affine.unpack

    def selecting(self: GroupTopK, search: Any, layer: int, query: Any, *rest: Any) -> Any:
        rows = select(self, search, layer, query, *rest)
        chosen.append((query, rows.tolist()))
        return rows

    def counting(self: Affine, packed: Tensor, *rest: Any) -> Any:
        unpacked.append(len(packed))
        return unpack(self, packed, *rest)

    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="recent")  # costs are measured by reading, once
        units = db.store.units(db.store.recording("film").id)
        keys = np.concatenate([db.store.read_keys(unit) for unit in units], 1).astype(np.float64)
        with monkeypatch.context() as patch:
            patch.setattr(GroupTopK, "select", selecting)
            patch.setattr(Affine, "unpack", counting)
            answer = db.ask(QUESTION, mode="kv")
    assert not answer.warnings
    k = min(FRAMES, -(-budget // G))
    assert len(chosen) == wrapped().shape.layers
    for layer, (query, rows) in enumerate(chosen):
        assert all(a < b for a, b in pairwise(rows)), "ascending, each once"
        # The paper's: mean over the heads of a group, cosine of the expanded vectors (methods.md P3).
        heads, D = wrapped().shape.kv_heads, wrapped().shape.head_size
        mean = query.astype(np.float64).reshape(heads, D) / (wrapped().shape.query_heads // heads)
        scores = keys[layer] @ mean.ravel() / np.linalg.norm(keys[layer], axis=1) / np.linalg.norm(mean)
        best = sorted(np.argsort(-scores, kind="stable")[:k].tolist())
        assert rows == best
    assert sum(unpacked) == k * wrapped().shape.layers
    if 1 < k < FRAMES:
        assert len({tuple(rows) for _, rows in chosen}) > 1, "each layer has its own"


# T8


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("reduce", ["identity", "ctr"])
def test_t8_nothing_lost_is_full_attention(
    profile: str, reduce: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No quantisation, all tokens of a frame, all groups: the logits of one uncut forward, by any profile."""
    shown, decided = film(6), record_decisions(monkeypatch)
    settings = ["encode.chunk_frames=4", "answer.tokens_max=1"]
    settings += ["reduce=identity"] if reduce == "identity" else ["reduce.tokens=16"]
    ingest(tmp_path / "s", shown, recipe="streamingtom", profile=profile, codec="raw", settings=settings)
    with reopened(tmp_path / "s") as db:
        db.ask(QUESTION, mode="kv")
    own, model = plain(), wrapped()
    prompt = own.embed(model.prompt_ids(QUESTION))
    truth = own.forward(torch.cat((init_embeddings(), own.see(shown).flatten(0, 1), prompt)))[-1]
    assert relative(decided[0], truth) < BOUND


def test_t4_two_futures_leave_the_past_as_it_was(tmp_path: Path) -> None:
    """X4 through every stage: what is stored up to a batch does not depend on what follows it."""
    shown, found = film(), []
    other = [*shown[:BATCH], *(255 - picture for picture in shown[BATCH:])]
    for name, frames in (("one", shown), ("two", other)):
        ingest(tmp_path / name, frames, recipe="streamingtom", settings=CUT)
        with reopened(tmp_path / name) as db:
            found.append([unit.digest for unit in db.store.units(db.store.recording("film").id)])
    assert found[0][:BATCH] == found[1][:BATCH]
    assert found[0][BATCH] != found[1][BATCH]
