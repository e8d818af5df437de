"""Reference tests of rLiVS (arXiv 2510.17364): L1 to L6, and captions against plain decoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.ingest.encode.base import ClipSeen, no_kv
from memdb.ingest.encode.caption_clip import CaptionOverClip
from memdb.ingest.reduce.recurrent import Recurrent
from memdb.models.attention import Context
from memdb.models.caption_vectors import InputEmbeddings
from memdb.models.protocol import VideoModel
from memdb.models.rotary import Rotary
from memdb.query.retrieve.mmr import mmr_order, within_budget
from memdb.schemas.fingerprint import ModelShape
from memdb.schemas.units import Caption
from tests.model_cases import (
    INIT_PROMPT,
    QUESTION,
    PlainModel,
    Planted,
    asked,
    causal,
    ingest,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    wrapped,
)

PROMPT = "Describe what is happening in this video."


# L1: which tokens are selected


class Looker:
    """A model of one layer whose query, key and value are its input: a prompt looks at what resembles it."""

    E = 32

    def __init__(self) -> None:
        self.rotary = Rotary(torch.zeros(self.E // 2))  # nothing turns
        self.shape = ModelShape(1, 1, 1, self.E, self.E, 4, 4096)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.stop_ids = frozenset({0})
        self.way = torch.eye(self.E)[0]  # of the prompt

    def frame_separator(self) -> Tensor:
        return torch.eye(self.E)[1][None].clone()

    def embed(self, ids: Sequence[int]) -> Tensor:
        return torch.stack([8 * self.way if token == 9 else torch.eye(self.E)[2] for token in ids])

    def prompt_ids(self, text: str) -> list[int]:
        return [7, 9]

    def forward(self, embeddings: Tensor, context: Context) -> Tensor:
        context.begin(len(embeddings))
        x = embeddings[None]
        out = context.attend(0, x, x, x, 1.0)
        context.end(len(embeddings))
        return out[0]

    def logits(self, states: Tensor) -> Tensor:
        return torch.zeros(len(states), 4)  # the stop token is said first: one row is heard

    def decode_text(self, ids: Sequence[int]) -> str:
        return ""


FRAMES, PATCHES, KEEP = 4, 4, 3


def selected(looker: Looker, clip: Tensor, queue: Sequence[Tensor], profile: str) -> list[int]:
    """Indices of the clip's tokens that go into the queue."""
    model = cast(VideoModel, looker)
    rule = Recurrent(clips=2, share=KEEP / (FRAMES * PATCHES), layers="0")
    seen = ClipSeen(clip, None, no_kv(model), (5, 6), queue)
    said = CaptionOverClip(tokens_max=3).say(model, seen, rule, profile=profile)
    assert said.attention is not None
    assert said.attention.shape == (len(clip),)
    chosen = rule.select(clip, said.attention)
    return [int((clip == token).all(1).nonzero()[0, 0]) for token in chosen]


def a_clip(seed: int) -> Tensor:
    """Tokens (T, E) that all differ and that the prompt does not look at."""
    tokens = 0.1 * torch.randn(FRAMES * PATCHES, Looker.E, generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = -1
    return tokens


@settings(max_examples=40, deadline=None)
@given(
    places=st.lists(st.integers(0, FRAMES * PATCHES - 2), min_size=KEEP, max_size=KEEP, unique=True),
    memory=st.integers(0, 2),
    profile=st.sampled_from(["paper", "fixed", "code"]),
)
def test_l1_the_tokens_that_the_caption_looked_at_are_selected(
    places: list[int], memory: int, profile: str
) -> None:
    """With memory the released code returns token j for attention on j - 1; paper and fixed return j."""
    looker, clip = Looker(), a_clip(0)
    for rank, place in enumerate(places):
        clip[place, 0] = 1 + 0.1 * rank
    late = 1 if profile == "code" and memory else 0
    found = selected(looker, clip, [a_clip(9)[:KEEP]] * memory, profile)
    assert found == sorted(place + late for place in places)


@pytest.mark.parametrize("where", ["init", "memory", "newline", "prompt"])
def test_l1_attention_elsewhere_selects_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the mass lies outside of the clip, and the faint rest inside decides."""
    looker, clip, memory = Looker(), a_clip(0), a_clip(9)[:KEEP]
    embed, separator = looker.embed, looker.frame_separator()
    clip[[3, 8, 14], 0] = 0.1
    if where == "memory":
        memory[:, 0] = 4
    if where == "newline":
        separator[0, 0] = 4
    if where in ("init", "prompt"):
        loud = 5 if where == "init" else 7
        monkeypatch.setattr(
            looker,
            "embed",
            lambda ids: embed(ids) + 4 * looker.way * torch.tensor([[i == loud] for i in ids]),
        )
    monkeypatch.setattr(looker, "frame_separator", lambda: separator)
    for profile in ("paper", "fixed"):
        assert selected(looker, clip, [memory], profile) == [3, 8, 14]


def test_l1_the_code_reads_the_newline_for_token_0_and_never_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looker, clip = Looker(), a_clip(0)
    separator = looker.frame_separator()
    separator[0, 0] = 4
    clip[-1, 0] = 5  # the most looked at of all
    clip[[3, 8], 0] = 1
    monkeypatch.setattr(looker, "frame_separator", lambda: separator)
    assert selected(looker, clip, [a_clip(9)[:KEEP]], "code") == [0, 4, 9]
    assert selected(looker, clip, [a_clip(9)[:KEEP]], "fixed") == [3, 8, 15]


# L2: the queue


def test_l2_196_tokens_a_clip_and_sixteen_clips() -> None:
    rule = Recurrent()
    random = torch.Generator().manual_seed(0)
    queue: list[Tensor] = []
    clips = [torch.randn(16 * 196, 8, generator=random) for _ in range(19)]
    for number, clip in enumerate(clips):
        attention = torch.rand(len(clip), generator=random)
        chosen = rule.select(clip, attention)
        best = sorted(sorted(range(len(clip)), key=lambda j: -float(attention[j]))[:196])
        assert torch.equal(chosen, clip[best])  # in their original order
        queue = rule.remember(queue, chosen)
        assert len(queue) == min(16, number + 1)
        assert torch.equal(queue[-1], chosen)
    assert all(any(torch.equal(row, first) for first in clips[3]) for row in queue[0][:3])  # the oldest went
    assert sum(part.numel() for part in queue) * 2 == 16 * 196 * 8 * 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_l2_ties_go_to_the_earlier_token(levels: list[int], share: float) -> None:
    tokens = torch.arange(len(levels)).float()[:, None]
    count = min(len(levels), max(1, round(share * len(levels))))
    chosen = Recurrent(share=share).select(tokens, torch.tensor(levels).float())
    best = sorted(sorted(range(len(levels)), key=lambda j: (-levels[j], j))[:count])
    assert chosen[:, 0].tolist() == best


def test_l2_layers_carry_over_by_their_depth() -> None:
    assert Recurrent().layer_indices(28) == [4, 8, 13, 19]
    assert Recurrent().layer_indices(4) == [0, 1, 2]
    assert Recurrent(layers="0,1/2").layer_indices(3) == [0, 1]


# Captions and selection through a whole network


class Teller:
    """rLiVS from the formulas, with an untouched network: what is said of each clip, and what is carried on."""

    def __init__(self, own: PlainModel, model: VideoModel, profile: str, clips: int, share: float) -> None:
        self.own, self.model, self.profile, self.clips, self.share = own, model, profile, clips, share
        self.layers = sorted({depth * own.layers // 28 for depth in (4, 8, 13, 19)})
        self.queue: list[Tensor] = []

    def tell(self, clip: Tensor, tokens_max: int) -> list[int]:
        own = self.own
        newline = own.newline()
        head = own.embed(self.model.init_ids(INIT_PROMPT))
        memory = [*self.queue, newline] if self.queue else []
        start = len(head) + sum(len(part) for part in memory)
        whole = torch.cat([head, *memory, clip, newline, own.embed(self.model.prompt_ids(PROMPT))])
        ids = own.say(whole, tokens_max, self.model.stop_ids)
        # Rows of the last prompt token and of every token that was fed after it.
        fed = ids[:-1] if len(ids) == tokens_max else ids
        first = start - 1 if self.profile == "code" and self.queue else start
        heard = self._heard(torch.cat((whole, own.embed(fed))), len(whole) - 1)
        attention = heard[first : first + len(clip)]
        count = max(1, round(self.share * len(clip)))
        self.queue = [*self.queue, clip[attention.topk(count).indices.sort().values]][-self.clips :]
        return ids

    def _heard(self, whole: Tensor, first_row: int) -> Tensor:
        """(T,): mean over heads, layers and the rows from `first_row` on."""
        own, heard = self.own, cast(list[tuple[Tensor, Tensor, Tensor]], [])
        own.loop(whole, causal, heard=heard)
        rows = range(first_row, len(whole))
        paid = torch.zeros(len(self.layers) * len(rows), len(whole), dtype=torch.float64)
        for row, (layer, x) in zip(paid, ((layer, x) for layer in self.layers for x in rows), strict=True):
            row[: x + 1] = own.attention(*heard[layer][:2], x)
        return paid.mean(0)


@pytest.mark.parametrize("profile", ["paper", "code", "fixed"])
def test_captions_are_those_of_plain_decoding(profile: str, tmp_path: Path) -> None:
    """Token for token, first without memory, then with one clip's tokens, then with two and the oldest dropped."""
    shown, frames, tokens_max, share = pictures(12), 3, 6, 0.1
    settings = [
        f"unit.frames={frames}",
        f"caption.tokens_max={tokens_max}",
        "reduce.clips=2",
        f"reduce.share={share}",
        "encode.chunk_frames=5",
    ]
    ingest(tmp_path / "s", shown, recipe="rlivs", profile=profile, settings=settings)
    with reopened(tmp_path / "s") as db:
        captions = [db.store.read_caption(unit) for unit in db.store.units(db.store.recording("film").id)]
    own = plain()
    teller = Teller(own, wrapped(), profile, clips=2, share=share)
    seen = own.see(shown)
    told = [teller.tell(seen[at : at + frames].flatten(0, 1), tokens_max) for at in range(0, 12, frames)]
    assert [list(caption.token_ids) for caption in captions] == told
    assert all(told)
    assert len({tuple(ids) for ids in told}) == len(told)


def test_memory_changes_what_is_said() -> None:
    """Else the tokens above would prove nothing about it."""
    own, model = plain(), wrapped()
    clips = own.see(pictures(6)).view(2, -1, 256)
    with_memory, without = (Teller(own, model, "fixed", clips=2, share=0.1) for _ in range(2))
    with_memory.tell(clips[0], 6)
    assert with_memory.tell(clips[1], 6) != without.tell(clips[1], 6)


# L3: maximal marginal relevance


def quadratic(
    vectors: npt.NDArray[np.float64], query: npt.NDArray[np.float64], relevance: float
) -> list[int]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine, alike = unit @ (query / np.linalg.norm(query)), unit @ unit.T
    order: list[int] = []
    for _ in vectors:
        scores = [
            -np.inf
            if row in order
            else relevance * cosine[row] - (1 - relevance) * (max(alike[row, order]) if order else 0.0)
            for row in range(len(vectors))
        ]
        order.append(int(np.argmax(np.round(scores, 6))))
    return order


@pytest.mark.parametrize("relevance", [1.0, 0.5, 0.2])
def test_l3_the_order_is_that_of_the_quadratic_one(relevance: float) -> None:
    """Forty captions, each said twice: equal ones stand in the order of their rows."""
    random = np.random.default_rng(1)
    vectors = np.concatenate([random.normal(size=(20, 8))] * 2)
    query = random.normal(size=8)
    found = [row for row, _ in mmr_order(vectors.astype(np.float32), query.astype(np.float32), relevance)]
    assert found == quadratic(vectors, query, relevance)
    if relevance == 1.0:
        cosine = vectors @ query / np.linalg.norm(vectors, axis=1)
        assert found == sorted(range(40), key=lambda row: (-round(cosine[row], 6), row))
    else:
        assert found[1] != (found[0] + 20) % 40


# L4: the budget, through a store


SAID = [
    "a red star moves left",
    "a red star moves right",
    "the blue circle",
    "a red star",
    "a green square stands beside a yellow triangle",
    "the blue circle turns",
]


@pytest.mark.parametrize("budget", [2, 3, 4, 6, 11, 12, 19, 31, 32, 1000])
def test_l4_captions_until_the_budget_and_in_the_order_of_time(
    budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken by MMR until one would bring the sum to the budget, none behind it; all where all fit into it."""
    own, model, decided = plain(), wrapped(), record_decisions(monkeypatch)
    film = Planted.random(len(SAID))
    film.captions = SAID
    film.write(tmp_path / "s", f"retrieve.caption_tokens={budget}")
    texts = [model.encode_text(text) for text in SAID]
    vectors = np.stack([own.embed(ids).double().mean(0).numpy() for ids in texts])
    query = own.embed(model.encode_text("where is the red star?")).double().mean(0).numpy()
    sizes, taken = [len(ids) for ids in texts], []
    assert sum(sizes) == 32
    if sum(sizes) <= budget:
        taken = list(range(len(SAID)))
    else:
        for row in quadratic(vectors, query, 0.5):
            if sum(sizes[other] for other in taken) + sizes[row] >= budget:
                break
            taken.append(row)
    with reopened(tmp_path / "s") as db:
        answer = db.ask("where is the red star?", mode="captions")
    assert sorted(int(span.start_s) for span in answer.evidence) == sorted(taken)
    assert bool(answer.warnings) == (not taken)  # a first pick that alone reaches the budget is no crash
    context = [token for row in sorted(taken) for token in texts[row]]
    whole = own.embed([*model.init_ids(INIT_PROMPT), *context, *model.prompt_ids("where is the red star?")])
    assert relative(decided[0], own.forward(whole)[-1]) < 1e-4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 40), st.randoms(use_true_random=False))
def test_l4_the_rule_alone(sizes: list[int], budget: int, random: Any) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)

    def picks(rows: Iterable[int]) -> Any:
        return iter([(row, 0.0) for row in rows])

    taken = [row for row, _ in within_budget(picks(order), sizes, budget)]
    assert taken == order[: len(taken)]
    if sum(sizes) <= budget:
        assert taken == order
    else:
        assert not taken or sum(sizes[row] for row in taken) < budget
        following = order[len(taken)]
        assert sum(sizes[row] for row in taken) + sizes[following] >= budget


# L5: what no caption says


def test_l5_what_no_caption_says_is_found_by_kv_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame that the question's own queries point at, in a recording whose captions do not know of it."""
    film, needle, text = Planted.random(8), 5, QUESTION
    film.captions = ["a grey wall"] * 8
    for layer in range(wrapped().shape.layers):
        film.write(tmp_path / str(layer), "retrieve.blocks=1", "retrieve.caption_tokens=9")
        _, queries = asked(tmp_path / str(layer), monkeypatch, "both")
        for frame in range(film.frames):
            film.point(layer, frame, queries[layer], 5.0 if frame == needle else 0.0)
    film.write(tmp_path / "s", "retrieve.blocks=1", "retrieve.caption_tokens=9")
    with reopened(tmp_path / "s") as db:
        captions, both, kv = (db.ask(text, mode=mode) for mode in ("captions", "both", "kv"))
        assert not [hit for hit in db.search("red star") if "star" in hit.caption]
    assert {span.tier for span in captions.evidence} == {"captions"}
    assert (needle, needle + 1) not in [(span.start_s, span.end_s) for span in captions.evidence]
    for answer in (both, kv):
        spans = [(span.start_s, span.end_s, span.score) for span in answer.evidence if span.tier == "kv"]
        assert spans == [(needle, needle + 1, 1.0)]


# L6: vectors of captions


def test_l6_a_caption_is_the_mean_of_its_input_embeddings(tmp_path: Path) -> None:
    own, model = plain(), wrapped()
    settings = ["unit.frames=3", "caption.tokens_max=5", "encode.chunk_frames=6"]
    ingest(tmp_path / "s", pictures(9), recipe="rlivs", settings=settings)
    with reopened(tmp_path / "s") as db:
        captions: list[Caption] = [
            db.store.read_caption(unit) for unit in db.store.units(db.store.recording("film").id)
        ]
    vectors = InputEmbeddings(model)
    for caption in captions:
        assert caption.token_ids
        mean = own.embed(caption.token_ids).double().mean(0)
        assert relative(torch.tensor(np.asarray(caption.vector)), mean) < 1e-6
        turned = vectors.of_caption(caption.text, caption.token_ids[::-1])
        assert np.allclose(turned, caption.vector, atol=1e-6)  # the order of tokens does not matter
        alone = vectors.of_caption(caption.text, caption.token_ids)
        assert np.array_equal(alone, np.asarray(caption.vector))  # nor what is in hand beside it
    question = vectors.of_question(QUESTION)
    assert relative(torch.tensor(question), own.embed(model.encode_text(QUESTION)).double().mean(0)) < 1e-6
    assert not vectors.of_caption("", ()).any()
