"""TaR + VaN (InfiniPot-V, arXiv 2506.15745): I1 to I7, and both profiles against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.models.rotary import Rotary
from memdb.retain.tar_van import STEP, TarVan, frame_age, pool_sides, pooled, tar_scores
from memdb.retain.tar_van_code import code_choice
from memdb.retain.view import LayerView
from memdb.schemas.errors import RecipeError
from memdb.schemas.units import BlockKind
from tests.retain_cases import Film, best, joined, later


def whole(k: Tensor, v: Tensor, grid: tuple[int, int]) -> LayerView:
    """A memory of whole frames, k and v (H, F*N, D)."""
    T, N = k.shape[1], grid[0] * grid[1]
    place = torch.arange(T)
    patch = torch.stack((place % N // grid[1], place % grid[1]), 1)
    return LayerView(k, v, place, place // N, patch, torch.full((T,), int(BlockKind.FRAME)), grid)


def film(k: Tensor, frames: int) -> Tensor:
    """One frame's keys (H, N, D), shown again and again: (H, F*N, D)."""
    return k.repeat(1, frames, 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The formulas, one token at a time


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def plain_tar(view: LayerView, frames: int) -> list[float]:
    k = view.k.double().numpy()
    where = [(int(f), tuple(p)) for f, p in zip(view.frame, view.patch.tolist(), strict=True)]
    newest = sorted({f for f, p in where if p[0] >= 0})[-frames:]
    scores = []
    for i, (_, patch) in enumerate(where):
        twins = [j for j, (f, p) in enumerate(where) if f in newest and p == patch and p[0] >= 0]
        if not twins:
            scores.append(math.inf)
            continue
        heads = [-sum(cosine(k[h, i], k[h, j]) for j in twins) / len(twins) for h in range(view.k.shape[0])]
        scores.append(round(sum(heads) / len(heads) / STEP) * STEP)
    return scores


def plain_van(view: LayerView, kernel: int) -> list[float]:
    v = view.v.double().numpy()
    norms = [
        sum(float(np.linalg.norm(v[h, i])) for h in range(v.shape[0])) / v.shape[0]
        for i in range(view.tokens)
    ]
    places = enumerate(zip(view.frame.tolist(), view.patch.tolist(), strict=True))
    at = {(f, row, column): norms[i] for i, (f, (row, column)) in places if row >= 0}
    out, reach = [], kernel // 2
    for i, (f, (row, column)) in enumerate(zip(view.frame.tolist(), view.patch.tolist(), strict=True)):
        near = [
            at[f, r, c]
            for r in range(row - reach, row + reach + 1)
            for c in range(column - reach, column + reach + 1)
            if (f, r, c) in at
        ]
        out.append(norms[i] if row < 0 else sum(near) / len(near))
    return out


def plain_tar_van(view: LayerView, method: TarVan) -> list[int]:
    C, N, T = method.budget_tokens, view.grid[0] * view.grid[1], view.tokens
    merged = [p[0] < 0 for p in view.patch.tolist()]
    frame = view.frame.tolist()
    tar_tokens = C - round((1 - method.tar) * C)
    frames = max(1, min(int(method.recent * T / N), tar_tokens // N))
    newest = sorted({f for f, m in zip(frame, merged, strict=True) if not m})[-frames:]
    recent = [i for i in range(T) if frame[i] in newest and not merged[i]]

    scores = plain_tar(view, frames)
    past = [i for i in best(scores, frame) if not merged[i] and i not in recent]
    changed = past[: tar_tokens - len(recent)]
    spared = [i for i in reversed(range(T)) if merged[i]][: int(method.exempt * C)]

    kernel = 1
    if method.limits():
        norms = [n for n, m in zip(plain_van(view, 1), merged, strict=True) if not m]
        variation = np.std(norms) / np.mean(norms) if norms else math.inf
        kernel = next(
            (k for k, limit in zip((7, 5, 3), method.limits(), strict=True) if variation < limit), 1
        )
    norms = plain_van(view, kernel)
    kept = [*recent, *spared, *changed]
    kept += [i for i in best(norms, frame) if i not in kept]
    return sorted(kept[:C])


methods = st.builds(
    TarVan,
    st.integers(24, 48),
    tar=st.sampled_from([0.5, 0.75, 1.0]),
    recent=st.sampled_from([0.25, 0.1, 0.5]),
    pooling=st.sampled_from(["none", "0.2,0.4,0.6", "9,9.5,10", "0,9,10", "0,0,9"]),
    exempt=st.sampled_from([0.0, 0.05, 0.25]),
)


@settings(deadline=None, max_examples=120)
@given(
    st.builds(
        Film,
        frames=st.integers(6, 10),
        seed=st.integers(0, 10**6),
        whole=st.booleans(),
        prototypes=st.booleans(),
    ),
    methods,
)
# Three prototypes, and room for one beside the recent frames.
@example(Film(frames=8, whole=True, prototypes=True), TarVan(25, tar=1.0, pooling="none"))
def test_it_is_the_formula_one_token_at_a_time(case: Film, method: TarVan) -> None:
    """On keys and values with exact arithmetic, so that ties abound and none is broken by rounding."""
    view = case.view()
    # Two recent frames or one or four: their means are exact as well.
    frames = method.recent_frames(view.tokens, case.frame_tokens)
    assume(view.tokens > method.budget_tokens and frames in (1, 2, 4))
    assert method.choose(view).tolist() == plain_tar_van(view, method)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pooling", ["none", "0.2,0.4,0.6", "9,9.5,10"])
def test_it_is_the_formula_on_any_numbers(seed: int, pooling: str) -> None:
    view = Film(frames=9, seed=seed, exact=False, prototypes=seed % 2 == 0).view()
    method = TarVan(48, pooling=pooling)
    assert method.choose(view).tolist() == plain_tar_van(view, method)


def test_a_patch_that_no_recent_frame_has_repeats_nothing() -> None:
    view = whole(film(normal(2, 4, 8), 5), normal(2, 20, 8), (2, 2))
    view = view.part(
        torch.tensor([i for i in range(20) if i != 18])
    )  # patch 2 of the newest frame is missing
    scores = tar_scores(view, frame_age(view), 1)
    gone = (view.patch == torch.tensor([1, 0])).all(1)
    assert bool(torch.isinf(scores[gone]).all())
    assert bool((scores[~gone] == -1).all())


# The reference tests of methods.md


@pytest.mark.parametrize("seed", range(5))
def test_a_static_film_keeps_whole_frames_from_the_newest_back(seed: int) -> None:
    """I1: all past scores are -1, so that ties alone decide."""
    N, frames = 6, 12
    view = whole(
        film(normal(2, N, 16, seed=seed) * 7, frames), film(normal(2, N, 16, seed=9), frames), (2, 3)
    )
    assert bool((tar_scores(view, frame_age(view), 3) == -1).all())
    for C in (4 * N, 4 * N + 2, 6 * N):
        kept = TarVan(C, tar=1.0, pooling="none").choose(view).tolist()
        newest_whole = range((frames - C // N) * N, frames * N)
        rest = range((frames - C // N - 1) * N, (frames - C // N - 1) * N + C % N)
        assert kept == [*rest, *newest_whole]


def test_only_recent_frames_stay_of_a_static_film_when_they_fill_the_budget() -> None:
    """I1 with C = r p: 12 frames, a quarter of them recent."""
    view = whole(film(normal(2, 4, 16), 12), normal(2, 48, 16), (2, 2))
    assert TarVan(12, tar=1.0).choose(view).tolist() == list(range(36, 48))


def test_a_patch_that_moved_is_what_survives() -> None:
    """I2: one patch differs in the past frames; its copies rank first and fill TaR's share down to the last."""
    N, frames, moving = 4, 8, 2
    k = film(normal(1, N, 16), frames)
    copies = [f * N + moving for f in range(6)]
    k[0, copies] *= -1
    view = whole(k, torch.ones(1, N * frames, 16), (2, 2))
    method = TarVan(2 * N + len(copies), tar=1.0, pooling="none")
    assert method.choose(view).tolist() == sorted([*copies, *range(24, 32)])
    scores = tar_scores(view, frame_age(view), 2)
    assert best(scores.tolist(), view.frame.tolist())[: len(copies)] == copies[::-1]


def test_rotated_keys_would_make_a_static_film_look_alive() -> None:
    """I3: why keys are unrotated."""
    N, frames = 4, 12
    k = film(normal(1, N, 64), frames)
    rotary = Rotary(1.0 / 10_000 ** (torch.arange(0, 64, 2) / 64))
    still = whole(k, torch.ones_like(k), (2, 2))
    turned = replace(still, k=rotary.rotate(k, 0))
    past = slice(0, 9 * N)
    assert float(tar_scores(still, frame_age(still), 3)[past].std()) == 0
    scores = tar_scores(turned, frame_age(turned), 3)[past]
    assert float(scores.max() - scores.min()) > 0.1


def test_values_decide_by_their_norm_and_keys_by_their_direction() -> None:
    """I4: TaR's share holds the recent frames only."""
    N, frames = 4, 12
    k, v = normal(2, N * frames, 8), normal(2, N * frames, 8, seed=1)
    view = whole(k, v, (2, 2))
    method = TarVan(6 * N, pooling="none")  # alpha C = 3 frames = r
    kept = method.choose(view)
    past = torch.arange(9 * N)
    norms = v.norm(dim=-1).mean(0)[past]
    assert kept.tolist() == sorted([*norms.topk(3 * N).indices.tolist(), *range(9 * N, 12 * N)])
    loser = int(norms.argmin())
    assert loser not in kept.tolist()
    louder = v.clone()
    louder[:, loser] *= 100
    assert loser in method.choose(replace(view, v=louder)).tolist()
    assert torch.equal(method.choose(replace(view, k=k * normal(N * frames, 1, seed=2).abs())), kept)


def test_a_thousand_frames_stay_within_the_budget() -> None:
    """I5: never more than the memory and one block before a round, exactly the budget after it."""
    method, case = TarVan(24 * 4, pooling="none"), Film(frames=8, grid=(2, 2), whole=True)
    memory = replace(case, frames=32).view()
    assert memory.tokens == 32 * 4
    for start in range(32, 1000, 8):
        memory = memory.part(method.choose(memory))
        assert memory.tokens == 24 * 4
        memory = joined(memory, later(replace(case, seed=start).view(), start, 4))
        assert memory.tokens == 32 * 4
    short = memory.part(torch.arange(24 * 4))
    assert method.choose(short).tolist() == list(range(24 * 4))
    assert memory.k.dtype == torch.float32


def test_every_survivor_still_knows_its_frame_and_patch() -> None:
    """I6: five rounds, with the true coordinates written into the values."""
    case, method = Film(frames=4, grid=(2, 3), whole=True, exact=False), TarVan(36)

    def marked(view: LayerView) -> LayerView:
        marks = torch.cat((view.frame[:, None], view.patch), 1).float()  # (T, 3)
        return replace(view, v=torch.cat((view.v[..., 3:], marks.expand(2, -1, -1) / 64), -1))

    memory = marked(case.view())
    for clip in range(1, 6):
        new = later(replace(case, seed=clip).view(), 4 * clip, 6)
        memory = joined(memory, marked(new))
        memory = memory.part(method.choose(memory))
    marks = torch.cat((memory.frame[:, None], memory.patch), 1).float() / 64
    assert torch.equal(memory.v[0, :, -3:], marks)
    assert torch.equal(memory.v[1, :, -3:], marks)


def test_pooling_keeps_the_shape_and_constants() -> None:
    """I7, and with masked means a constant map stays so at the borders as well."""
    view = Film(frames=4, prototypes=True).view()
    age = frame_age(view)
    norms = torch.rand(view.tokens, generator=torch.Generator().manual_seed(0))
    for kernel in (1, 3, 5, 7):
        found = pooled(norms, view, age, kernel)
        assert found.shape == norms.shape
        flat = torch.full_like(norms, 2.5)
        assert torch.equal(pooled(flat, view, age, kernel), flat)
    assert torch.equal(pooled(norms, view, age, 1), norms)


def test_flat_maps_are_pooled_wide_and_spiky_ones_not_at_all() -> None:
    limits = TarVan().limits()
    spread = torch.tensor([[1 - x, 1 + x] for x in (0.0, 0.1, 0.3, 0.5, 0.9)])  # their variation is x
    every = torch.ones_like(spread, dtype=torch.bool)
    assert pool_sides(spread, every, limits).tolist() == [7, 7, 5, 3, 1]
    loud = torch.cat((spread, torch.full((5, 1), 100.0)), 1)  # merged tokens have no say
    assert pool_sides(loud, loud < 100, limits).tolist() == [7, 7, 5, 3, 1]


def test_merged_tokens_stay_without_a_place_and_within_their_share() -> None:
    """R6: the newest of them, up to the share; without one they compete by their norms, which are low here."""
    view = Film(frames=9, prototypes=True, exact=False).view()
    quiet = torch.where(view.merged, 1e-3, 1.0)
    view = replace(view, v=view.v * quiet[:, None])
    merged = set(view.merged.nonzero().flatten().tolist())
    assert len(merged) == 3
    for exempt, wanted in ((0.25, 3), (2 / 48, 2), (0.0, 0)):
        kept = set(TarVan(48, exempt=exempt).choose(view).tolist())
        assert kept & merged == set(sorted(merged)[len(merged) - wanted :])


def test_a_budget_without_room_for_a_recent_frame_is_refused() -> None:
    view = Film(frames=9).view()
    method = TarVan(20)
    assert method.tokens_min(12) == 24
    with pytest.raises(RecipeError, match="at least 24"):
        method.choose(view)
    assert len(TarVan(24).choose(view)) == 24


def test_frames_that_came_reduced_count_as_they_came() -> None:
    """Five of twelve patches of each frame: a quarter of 60 tokens are three frames, not one."""
    k, v = normal(2, 144, 8), normal(2, 144, 8, seed=1)
    full = whole(k, v, (3, 4))
    some = torch.cat([12 * n + torch.randperm(12)[:5].sort().values for n in range(12)])
    view = replace(full.part(some), reduced_tokens=5)
    method = TarVan(40, pooling="none")
    kept = method.choose(view)
    assert set(range(45, 60)) <= set(kept.tolist())
    assert method.order(view)[:15].sort().values.tolist() == list(range(45, 60))
    # Room for two such frames, and for no whole one.
    assert TarVan(20, pooling="none").choose(view).shape == (20,)
    with pytest.raises(RecipeError, match="at least 24"):
        TarVan(20, pooling="none").choose(full)


@pytest.mark.parametrize("tar", [0.03, 0.3, 0.5, 0.7, 1.0])
def test_the_smallest_budget_holds_a_frame(tar: float) -> None:
    for frame_tokens in (1, 7, 49, 196):
        method = TarVan(TarVan(tar=tar).tokens_min(frame_tokens), tar=tar)
        assert method.tar_tokens >= frame_tokens


def test_parameters_out_of_range_are_refused() -> None:
    bad: list[dict[str, object]] = [
        *({"tar": 0.0}, {"tar": 1.5}, {"recent": 0.0}, {"exempt": -0.1}, {"exempt": 1.1}),
        {"tar": 1e-320},  # what it is divided by would have no end
        *({"pooling": "0.2"}, {"pooling": "3,2,1"}, {"pooling": "a,b,c"}, {"pooling": "1,2,nan"}),
    ]
    for params in bad:
        with pytest.raises(RecipeError):
            TarVan(**params)  # type: ignore[arg-type]


# The released code


def plain_code(
    k: Tensor,
    v: Tensor,
    N: int,
    kept: int,
    tar: float,
    recent: float,
    pooling: tuple[int, int] | None,
    rows: int,
) -> list[list[int]]:
    """`pooling`: dimensions and side of the window, zeros around the map counted."""
    H, T, _ = k.shape
    frames, C = T // N, kept * N
    r = int(frames * recent)
    norms = v.double().norm(dim=-1).numpy()
    if pooling is not None:
        norms = plain_code_pool(norms, frames, rows, *pooling)
    raised = norms.max() + 1
    out = []
    for h in range(H):
        unit = [row / (np.linalg.norm(row) + 1e-9) for row in k[h].double().numpy()]
        forced: list[int] = []
        if tar > 0:
            past = [
                -sum(float(unit[x] @ unit[(frames - r + f) * N + x % N]) for f in range(r)) / r
                for x in range(T - r * N)
            ]
            order = sorted(range(len(past)), key=lambda x: (-past[x], x))
            forced = [*order[: C - round((1 - tar) * C) - r * N], *range(T - r * N, T)]
        score = [raised if x in set(forced) else float(norms[h, x]) for x in range(T)]
        out.append(sorted(sorted(range(T), key=lambda x: (-score[x], x))[:C]))
    return out


def plain_code_pool(norms: np.ndarray, frames: int, rows: int, dimensions: int, side: int) -> np.ndarray:
    H, T = norms.shape
    reach = side // 2
    if dimensions == 1:
        wide = np.pad(norms, ((0, 0), (reach, reach)))
        return np.stack([wide[:, t : t + side].mean(1) for t in range(T)], 1)
    grid = norms.reshape(H, frames, rows, -1)
    deep = reach if dimensions == 3 else 0
    wide = np.pad(grid, ((0, 0), (deep, deep), (reach, reach), (reach, reach)))
    out = np.zeros_like(grid)
    for f in range(frames):
        for y in range(rows):
            for x in range(grid.shape[3]):
                box = wide[:, f : f + 2 * deep + 1, y : y + side, x : x + side]
                out[:, f, y, x] = box.reshape(H, -1).mean(1)
    return out.reshape(H, T)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("tar", "recent"), [(0.5, 0.25), (0.9, 0.4), (0.0, 0.25), (0.45, 0.2)])
def test_the_released_code_chooses_head_by_head(seed: int, tar: float, recent: float) -> None:
    k, v = normal(3, 8 * 7, 16, seed=seed), normal(3, 8 * 7, 16, seed=100 + seed)
    found = code_choice(k, v, 7, 5, tar=tar, recent=recent)
    assert found.tolist() == plain_code(k, v, 7, 5, tar, recent, None, 1)
    if tar > 0:
        assert len({tuple(row) for row in found.tolist()}) == 3  # a set for each head


@pytest.mark.parametrize(
    ("layer", "window"), [(0, (3, 5)), (1, (3, 5)), (2, (2, 5)), (4, (1, 3)), (6, None), (7, None)]
)
def test_the_released_code_pools_by_quarter(layer: int, window: tuple[int, int] | None) -> None:
    """A map of 8 frames of 6 x 6 patches: 7 does not fit and becomes 5."""
    k, v = normal(2, 8 * 36, 8), normal(2, 8 * 36, 8, seed=1)
    found = code_choice(k, v, 36, 6, pooling=True, rows=6, layer=layer, layers=8)
    assert found.tolist() == plain_code(k, v, 36, 6, 0.5, 0.25, window, 6)


def test_the_released_windows_are_clipped_by_the_number_of_frames_too() -> None:
    k, v = normal(1, 4 * 36, 8), normal(1, 4 * 36, 8, seed=1)
    found = code_choice(k, v, 36, 3, pooling=True, rows=6, layer=2, layers=8, recent=0.25, tar=0.7)
    assert found.tolist() == plain_code(k, v, 36, 3, 0.7, 0.25, (2, 3), 6)


def test_the_released_budget_rounds_half_to_even() -> None:
    """25 tokens at 0.5: 12 for norms, 13 for TaR, of which one frame of 5 is recent; at 35, 18 and 17."""
    for kept, tar_tokens in ((5, 13), (7, 17)):
        frames = kept + 1
        k = film(F.normalize(normal(1, 5, 8), dim=-1), frames)
        k[:, : 5 * (frames - 1)] += 0.01 * normal(1, 5 * (frames - 1), 8, seed=2)
        v = torch.linspace(1, 2, 5 * frames)[None, :, None]
        found = code_choice(k, v, 5, kept, recent=1 / frames + 1e-6)
        assert found.tolist() == plain_code(k, v, 5, kept, 0.5, 1 / frames + 1e-6, None, 1)
        assert 5 * kept - round(0.5 * 5 * kept) == tar_tokens


def test_the_released_code_leaves_what_fits_and_its_errors_are_named() -> None:
    k = normal(2, 12, 4)
    assert code_choice(k, k, 4, 3).tolist() == [list(range(12))] * 2
    with pytest.raises(RecipeError, match="whole frames"):
        code_choice(k, k, 5, 1)
    with pytest.raises(RecipeError, match="recent"):
        code_choice(k, k, 4, 2, recent=0.2)  # no recent frame
    with pytest.raises(RecipeError, match="TaR"):
        code_choice(k, k, 4, 2, recent=0.7, tar=0.5)  # two recent frames in a share of one
    with pytest.raises(RecipeError, match="quarter"):
        code_choice(normal(1, 48, 4), normal(1, 48, 4), 4, 6, pooling=True, rows=2, layer=5, layers=6)
