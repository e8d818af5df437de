"""CTR (methods.md 1.6 and 1.10): the vectorised code against plain loops, and T1 to T4."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.ingest.reduce.ctr import CausalTemporal, blended, budgets, reduce_frames, static_tokens
from memdb.ingest.reduce.dpc import JITTER, KINDS, centres, distances, jitter, top
from memdb.schemas.errors import RecipeError

QUICK = settings(deadline=None, database=None, max_examples=60)


# Plain loops, written from the formulas


def loop_static(frames: Tensor, before: Tensor | None, tau: float) -> list[list[bool]]:
    found = []
    for number, frame in enumerate(frames):
        last = frames[number - 1] if number else before
        row = []
        for i in range(len(frame)):
            if last is None:
                row.append(False)
                continue
            a, b = frame[i].double(), last[i].double()
            norms = max(float(a.norm()), 1e-12) * max(float(b.norm()), 1e-12)
            row.append(float(a @ b) / norms > tau)
        found.append(row)
    return found


def loop_centres(
    distance: Tensor, points: list[int], count: int, k: int, noise: Tensor, kind: str
) -> list[int]:
    """One frame: of the tokens `points`, which are centres; distance (N, N)."""
    if len(points) <= 1:
        return points[:count]
    kind_of = np.float32 if kind == "released" else np.float64
    d = {(i, j): float(distance[i, j]) for i in points for j in points}
    density = {}
    for i in points:
        near = sorted(d[i, j] for j in points)[: min(k, len(points) - 1)]
        mean = kind_of(sum(kind_of(x) ** 2 for x in near) / kind_of(len(near)))
        density[i] = kind_of(math.exp(-mean)) + kind_of(noise[i])
    largest = max(d.values())
    score = {}
    for i in points:
        if kind == "released":
            others = [d[i, j] for j in points if density[j] < density[i]]
        else:
            others = [d[i, j] for j in points if density[j] > density[i]]
        score[i] = density[i] * kind_of(min(others, default=largest))
    return sorted(sorted(points, key=lambda i: (-score[i], i))[:count])


def loop_ctr(
    frame: Tensor,
    static: list[bool],
    saliency: Tensor,
    distance: Tensor,
    noise: Tensor,
    G: int,
    k: int,
    beta: float,
    kind: str,
) -> tuple[Tensor, list[int]]:
    N = len(frame)
    still = [i for i in range(N) if static[i]]
    moving = [i for i in range(N) if not static[i]]
    still_count = math.floor(G * len(still) / N)
    moving_count = G - still_count
    peaks = loop_centres(distance, still, still_count, k, noise, kind)
    salient = sorted(moving, key=lambda i: (-float(saliency[i]), i))[:moving_count]
    members: dict[int, list[int]] = {centre: [] for centre in peaks}
    for i in still:
        if i not in peaks and peaks:
            members[min(peaks, key=lambda centre: (float(distance[i, centre]), centre))].append(i)
    out = {i: frame[i].double() for i in salient}
    for centre, own in members.items():
        value = frame[centre].double()
        if own:
            value = beta * value + (1 - beta) * torch.stack([frame[i].double() for i in own]).mean(0)
        out[centre] = value
    raster = sorted(out)
    return torch.stack([out[i] for i in raster]), raster


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """Frames of whole numbers, many of them equal, so that distances tie; saliency with ties; a frame before them."""
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    frames, N, E = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.sampled_from([1, 4, 16]))
    spread = draw(st.sampled_from([1, 2, 6]))
    now = random.integers(-spread, spread + 1, (N, E))
    rows = [now]
    for _ in range(frames):
        moved = random.random(N) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        now = np.where(moved[:, None], random.integers(-spread, spread + 1, (N, E)), now)
        rows.append(now)
    whole = torch.from_numpy(np.stack(rows)).float()
    saliency = torch.from_numpy(random.integers(0, 4, (frames, N))).float() / 4
    return whole[1:], saliency, whole[0] if draw(st.booleans()) else None


@QUICK
@given(
    streams(),
    st.integers(1, 12),
    st.sampled_from([-0.97123, 0.47123, 0.90123]),  # none that whole numbers give
    st.integers(1, 9),
    st.sampled_from([0.25, 0.6, 1.0]),
    st.sampled_from(KINDS),
)
def test_it_is_the_plain_loop(
    stream: tuple[Tensor, Tensor, Tensor | None], G: int, tau: float, k: int, beta: float, kind: str
) -> None:
    frames, saliency, before = stream
    N = frames.shape[1]
    G = min(G, N)
    method = CausalTemporal(tokens=G, tau=tau, neighbours=k, beta=beta, dpc=kind)
    found, raster = method.reduce(frames, saliency, before, seed=3, numbers=range(5, 5 + len(frames)))
    distance = distances(frames, kind=kind)
    static = loop_static(frames, before, tau)
    assert static_tokens(frames, before, tau).tolist() == static
    for i, frame in enumerate(frames):
        noise = jitter(3, 5 + i, N)
        truth, places = loop_ctr(frame, static[i], saliency[i], distance[i], noise, G, k, beta, kind)
        assert raster[i].tolist() == places
        assert torch.allclose(found[i].double(), truth, rtol=1e-5, atol=1e-5)


@QUICK
@given(streams(), st.integers(1, 9), st.sampled_from(KINDS), st.integers(0, 12))
def test_peaks_are_those_of_the_plain_loop(
    stream: tuple[Tensor, Tensor, Tensor | None], k: int, kind: str, count: int
) -> None:
    frames, _, _ = stream
    N = frames.shape[1]
    points = torch.rand(frames.shape[:2], generator=torch.Generator().manual_seed(count)) < 0.7
    counts = points.sum(-1).clamp(max=count)
    noise = torch.stack([jitter(1, i, N) for i in range(len(frames))])
    distance = distances(frames, kind=kind)
    found = centres(distance, points, counts, k, noise, kind=kind)
    for i in range(len(frames)):
        own = [j for j in range(N) if points[i, j]]
        truth = loop_centres(distance[i], own, int(counts[i]), k, noise[i], kind)
        assert found[i].nonzero()[:, 0].tolist() == truth


def test_distances_are_the_textbooks() -> None:
    frames = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(0))
    truth = (frames[:, :, None].double() - frames[:, None].double()).square().sum(-1).sqrt() / 12**0.5
    assert torch.allclose(distances(frames), truth, atol=1e-12)
    assert torch.allclose(distances(frames, kind="released").double(), truth, atol=1e-3)
    same = frames[:, :1].expand(-1, 40, -1)
    assert float(distances(same).max()) < 1e-7, "equal tokens are at distance 0"


def test_textbook_and_released_differ() -> None:
    """methods.md 1.12: in nearly every case."""
    differ = 0
    for seed in range(20):
        frames = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(seed))
        static, noise = torch.ones(1, 30, dtype=torch.bool), jitter(0, seed, 30)[None]
        one, other = (
            centres(distances(frames), static, torch.tensor([8]), 7, noise, kind=kind) for kind in KINDS
        )
        differ += not torch.equal(one, other)
    assert differ >= 18


@QUICK
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.data())
def test_the_top_are_the_highest_and_then_the_earliest(scores: list[int], data: st.DataObject) -> None:
    among = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    allowed = [i for i in range(len(scores)) if among[i]]
    count = data.draw(st.integers(0, len(allowed)))
    found = top(torch.tensor([scores]).float(), torch.tensor([among]), torch.tensor([count]))
    truth = sorted(allowed, key=lambda i: (-scores[i], i))[:count]
    assert found[0].nonzero()[:, 0].tolist() == sorted(truth)


# The reference tests


@pytest.mark.parametrize("still", [0, 1, 50, 195, 196])
@pytest.mark.parametrize("kind", KINDS)
def test_t1_always_the_same_count_in_raster_order(still: int, kind: str) -> None:
    G, N = 50, 196
    random = torch.Generator().manual_seed(still)
    frames, saliency = torch.randn(1, N, 8, generator=random), torch.rand(1, N, generator=random)
    static = torch.zeros(1, N, dtype=torch.bool)
    static[0, torch.randperm(N, generator=random)[:still]] = True
    found, raster = reduce_frames(
        frames, saliency, static, G, jitter(0, 0, N)[None], neighbours=7, beta=0.6, kind=kind
    )
    assert found.shape == (1, G, 8)
    assert bool((raster[0, 1:] > raster[0, :-1]).all())
    kept_still, kept_moving = (int(part) for part in budgets(static, G))
    assert int(static[0, raster[0]].sum()) == kept_still == G * still // N
    assert kept_still <= still
    assert kept_moving <= N - still


@given(st.integers(1, 400), st.data())
def test_a_budget_never_overflows(N: int, data: st.DataObject) -> None:
    """Why the released code's overflow rule is left out."""
    G, still = data.draw(st.integers(1, N)), data.draw(st.integers(0, N))
    static = torch.arange(N)[None] < still
    kept, moving = (int(part) for part in budgets(static, G))
    assert 0 <= kept <= still
    assert 0 <= moving <= N - still
    assert kept + moving == G


def test_t1_the_first_frame_keeps_what_is_looked_at_most() -> None:
    frames, saliency = torch.randn(1, 20, 4), torch.rand(1, 20)
    found, raster = CausalTemporal(tokens=6).reduce(frames, saliency, None, seed=0, numbers=[0])
    order = sorted(range(20), key=lambda i: -float(saliency[0, i]))[:6]
    assert raster[0].tolist() == sorted(order)
    assert torch.equal(found[0], frames[0, sorted(order)])


@pytest.mark.parametrize("beta", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_t2_a_still_frame_is_centres_alone(beta: float, kind: str) -> None:
    frame = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
    method = CausalTemporal(tokens=5, beta=beta, dpc=kind)
    saliency = torch.rand(1, 20)
    found, raster = method.reduce(frame[None], saliency, frame, seed=0, numbers=[1])
    peaks = centres(
        distances(frame[None], kind=kind), torch.ones(1, 20, dtype=torch.bool), torch.tensor([5]), 7,
        jitter(0, 1, 20)[None], kind=kind,
    )  # fmt: skip
    assert raster[0].tolist() == peaks[0].nonzero()[:, 0].tolist()
    again, _ = method.reduce(frame[None], 1 - saliency, frame, seed=0, numbers=[1])
    assert torch.equal(found, again), "saliency has no say"
    alike = frame[:1].expand(20, -1)
    found, _ = method.reduce(alike[None], saliency, alike, seed=0, numbers=[1])
    assert torch.allclose(found, alike[None, :5], rtol=1e-6)


def test_t3_one_changed_patch_is_kept() -> None:
    frame = torch.randn(196, 8, generator=torch.Generator().manual_seed(3))
    changed = frame.clone()
    changed[77] = -changed[77]
    found, raster = CausalTemporal(tokens=50).reduce(
        changed[None], torch.zeros(1, 196), frame, seed=0, numbers=[1]
    )
    assert 77 in raster[0].tolist()
    assert torch.equal(found[0, raster[0].tolist().index(77)], changed[77])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [2, 2, 3], [7]])
def test_t4_where_batches_are_cut_does_not_matter(kind: str, cuts: list[int]) -> None:
    frames = torch.randn(7, 24, 6, generator=torch.Generator().manual_seed(4))
    frames[1:] = frames[:1] + 0.3 * frames[1:]
    saliency = torch.rand(7, 24, generator=torch.Generator().manual_seed(5))
    method = CausalTemporal(tokens=9, dpc=kind)
    whole = method.reduce(frames, saliency, None, seed=8, numbers=range(7))
    at, before, parts = 0, None, []
    for size in cuts:
        some = frames[at : at + size]
        parts.append(
            method.reduce(some, saliency[at : at + size], before, seed=8, numbers=range(at, at + size))
        )
        at, before = at + size, some[-1]
    for place in (0, 1):
        assert torch.equal(torch.cat([part[place] for part in parts]), whole[place])


def test_t4_a_frame_depends_on_itself_and_the_one_before() -> None:
    frames = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(6))
    frames[1:] = frames[:1] + 0.3 * frames[1:]
    saliency, method = torch.rand(4, 16), CausalTemporal(tokens=5)
    found, _ = method.reduce(frames, saliency, None, seed=0, numbers=range(4))
    older = frames.clone()
    older[1] = torch.randn(16, 6)
    other, _ = method.reduce(older, saliency, None, seed=0, numbers=range(4))
    assert torch.equal(found[3], other[3])
    assert not torch.equal(found[2], other[2])


# Jitter, parameters


def test_jitter_is_of_the_recording_and_the_frame_alone() -> None:
    assert torch.equal(jitter(1, 2, 9), jitter(1, 2, 9))
    assert torch.equal(jitter(1, 2, 9)[:4], jitter(1, 2, 4))
    assert not torch.equal(jitter(1, 2, 9), jitter(2, 2, 9))
    assert not torch.equal(jitter(1, 2, 9), jitter(1, 3, 9))
    drawn = jitter(-1, 1 << 40, 1000)
    assert 0 <= float(drawn.min()) < float(drawn.max()) < JITTER


def test_jitter_decides_between_equals() -> None:
    """Four tokens on a square, all alike in density: which is a centre is the seed's choice, and stays so."""
    square = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
    static = torch.ones(1, 4, dtype=torch.bool)
    picked = set()
    for seed in range(40):
        noise = jitter(seed, 0, 4)[None]
        found = centres(distances(square), static, torch.tensor([1]), 3, noise)[0].nonzero()[:, 0].tolist()
        assert found == [int(noise[0].argmax())]
        picked.add(found[0])
    assert picked == {0, 1, 2, 3}


def test_without_members_a_centre_stays_as_it_is() -> None:
    frames = torch.randn(1, 6, 3)
    static = torch.ones(1, 6, dtype=torch.bool)
    assert torch.equal(blended(frames, distances(frames), static, static, 0.3), frames)


def test_all_tokens_kept_is_identity() -> None:
    frames = torch.randn(3, 10, 4)
    found, raster = CausalTemporal(tokens=10).reduce(
        frames, torch.rand(3, 10), frames[0], seed=0, numbers=range(3)
    )
    assert torch.equal(found, frames)
    assert raster.tolist() == [list(range(10))] * 3


def test_the_default_is_the_papers_share() -> None:
    assert [CausalTemporal().kept(N) for N in (196, 64, 16, 4, 1)] == [50, 16, 4, 1, 1]
    assert CausalTemporal(tokens=16).kept(16) == 16
    with pytest.raises(RecipeError, match="a frame of this model has 16"):
        CausalTemporal(tokens=17).kept(16)


@pytest.mark.parametrize(
    "params",
    [
        {"tokens": -1},
        {"neighbours": 0},
        {"beta": 0.0},
        {"beta": 1.5},
        {"tau": -1.5},
        {"tau": math.nan},
        {"dpc": "mine"},
    ],
)
def test_values_that_cannot_be_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"reduce\."):
        CausalTemporal(**params)  # type: ignore[arg-type]
