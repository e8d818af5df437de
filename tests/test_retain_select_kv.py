"""SelectKV (arXiv 2511.07278): counts against the formulas in plain loops, K4, and the released code's habits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.retain.select_kv import SelectKV, exact_counts, guidance_scores, top_blocks
from memdb.retain.select_kv_code import (
    code_compress_counts,
    code_counts,
    code_rescaled,
    code_retrieve_counts,
)
from memdb.schemas.errors import RecipeError


def rows_of(seed: int, layers: int, blocks: list[int], ties: bool) -> list[Tensor]:
    random = np.random.default_rng(seed)
    sizes = [blocks[layer % len(blocks)] for layer in range(layers)]
    if ties:
        return [torch.from_numpy(random.integers(0, 4, n) / 4).float() for n in sizes]
    return [torch.from_numpy(random.normal(size=n)).float() for n in sizes]


def plain_sums(score: Tensor, z_scores: bool) -> list[float]:
    z = [float(x) for x in score]
    if z_scores:
        mean = sum(z) / len(z)
        std = math.sqrt(sum((x - mean) ** 2 for x in z) / (len(z) - 1)) if len(z) > 1 else 0.0
        z = [(x - mean) / std if std > 1e-9 else 0.0 for x in z]
    weights = sorted((math.exp(x) for x in z), reverse=True)
    return [sum(weights[: i + 1]) / sum(weights) for i in range(len(weights))]


def plain_counts_at(sums: list[list[float]], p: float) -> list[int]:
    """min{k: c_k >= p} of each layer; all blocks where rounding leaves the last sum below p."""
    return [next((k for k, c in enumerate(row, 1) if c >= p), len(row)) for row in sums]


scored = st.builds(
    rows_of,
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.booleans(),
)


@settings(deadline=None, max_examples=150)
@given(scored, st.floats(0, 1), st.booleans())
def test_exact_counts_are_a_water_line_with_its_ties_shared_out(
    rows: list[Tensor], part: float, z_scores: bool
) -> None:
    """The counts stand between those of the formula just below and just above one p, and sum up to the total."""
    L, most = len(rows), sum(map(len, rows))
    total = L + int(part * (most - L))
    counts = exact_counts(rows, total, z_scores=z_scores)
    assert sum(counts) == total
    assert all(1 <= count <= len(row) for count, row in zip(counts, rows, strict=True))
    sums = [plain_sums(row, z_scores) for row in rows]
    entered = [row[count - 2] if count > 1 else 0.0 for row, count in zip(sums, counts, strict=True)]
    p = max(entered)  # the last block that was taken entered here
    below, above = plain_counts_at(sums, p - 1e-9), plain_counts_at(sums, p + 1e-9)
    assert all(low <= count <= high for low, count, high in zip(below, counts, above, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_exact_counts_are_those_of_a_search_for_p(seed: int) -> None:
    """Without ties a bisection of p meets every total, and there is nothing left to choose."""
    rows = rows_of(seed, 5, [9, 12], ties=False)
    sums = [plain_sums(row, True) for row in rows]
    for total in range(5, sum(map(len, rows)) + 1):
        low, high = 0.0, 1.0 + 1e-9
        for _ in range(80):
            p = (low + high) / 2
            low, high = (p, high) if sum(plain_counts_at(sums, p)) < total else (low, p)
        assert exact_counts(rows, total, z_scores=True) == plain_counts_at(sums, high)


@settings(deadline=None, max_examples=100)
@given(scored, st.floats(0.01, 1), st.sampled_from(["paper", "fixed"]))
def test_the_budget_is_exact_and_no_layer_is_left_out(rows: list[Tensor], keep: float, mode: str) -> None:
    """K4."""
    counts = SelectKV(keep, mode).counts(rows)
    assert sum(counts) == sum(math.ceil(round(keep * len(row), 9)) for row in rows)
    assert all(1 <= count <= len(row) for count, row in zip(counts, rows, strict=True))


@pytest.mark.parametrize("mode", ["paper", "fixed"])
@pytest.mark.parametrize("keep", [0.1, 0.33, 0.6, 1.0])
def test_layers_that_score_alike_keep_alike(mode: str, keep: float) -> None:
    """K4, also for layers in which all scores are equal."""
    for row in (torch.randn(20, generator=torch.Generator().manual_seed(1)), torch.full((20,), 0.7)):
        counts = SelectKV(keep, mode).counts([row.clone() for _ in range(7)])
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == 7 * math.ceil(round(keep * 20, 9))


@pytest.mark.parametrize("mode", ["code", "fixed"])
def test_a_peaked_layer_gets_fewer_frames_than_a_diffuse_one(mode: str) -> None:
    """K4: one frame that stands out against twenty that hardly differ."""
    peaked = torch.full((20,), 0.0)
    peaked[3] = 5.0
    diffuse = torch.linspace(0.0, 1.0, 20)
    few, many = SelectKV(0.5, mode).counts([peaked, diffuse])
    assert few < many


def test_flat_layers_are_nearly_equal_in_the_paper_and_tell_apart_when_fixed() -> None:
    random = torch.Generator().manual_seed(0)
    peaked = torch.full((64,), 0.1)
    peaked[:3] = 0.5
    cosines = [peaked, torch.rand(64, generator=random) * 0.1]
    paper, fixed = (SelectKV(0.5, mode).counts(cosines) for mode in ("paper", "fixed"))
    assert abs(paper[0] - paper[1]) < abs(fixed[0] - fixed[1])


@settings(deadline=None, max_examples=100)
@given(scored, st.floats(0.05, 1), st.sampled_from(["paper", "fixed", "code"]))
def test_each_layer_keeps_its_best_frames_the_earlier_of_equals(
    rows: list[Tensor], keep: float, mode: str
) -> None:
    method = SelectKV(keep, mode)
    if mode == "code":
        rows = [row[: min(map(len, rows))] for row in rows]  # the released code compresses one segment
    for row, count, kept in zip(rows, method.counts(rows), method.choose(rows), strict=True):
        order = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
        assert kept.tolist() == sorted(order[:count])


def test_scores_decide_in_the_layer_that_they_belong_to() -> None:
    """K6, the kernel's part: two layers with other best frames keep other frames."""
    rows = [torch.tensor([9.0, 0, 0, 0]), torch.tensor([0, 0, 0, 9.0])]
    assert [kept.tolist() for kept in SelectKV(0.25, "fixed").choose(rows)] == [[0], [3]]


def test_cosines_do_not_see_the_length_of_a_key_and_dots_do() -> None:
    random = torch.Generator().manual_seed(3)
    q, keys = torch.randn(4, 3, 8, generator=random), torch.randn(10, 16, generator=random)
    longer = keys.clone()
    longer[int(guidance_scores(q, keys, "cos").argmin())] *= -10
    cos, dot = (guidance_scores(q, longer, sim) for sim in ("cos", "dot"))
    assert int(dot.argmax()) == int(guidance_scores(q, keys, "cos").argmin())
    torch.testing.assert_close(cos.abs(), guidance_scores(q, keys, "cos").abs())


# The released code


def plain_code_counts(rows: list[Tensor], total: int) -> list[int]:
    """Bisection over p as the released code walks it, over sums in fp32."""
    sums = []
    for row in rows:
        z = (row - row.mean()) / row.std()
        weights = torch.exp(z - z.max())
        sums.append([float(c) for c in (weights / weights.sum()).sort(descending=True).values.cumsum(0)])
    low, high = 0.0, 1.0
    counts: list[int] = []
    while high - low > 1e-6:
        p = (low + high) / 2
        counts = [max(1, sum(c < p for c in row)) for row in sums]
        if abs(sum(counts) - total) < 5:
            return counts
        if sum(counts) > total:
            high = p
        else:
            low = p
    return counts


def plain_rescale(counts: list[int], low: float, high: float) -> list[int]:
    smallest, largest, total = min(counts), max(counts), sum(counts)
    if smallest == largest:
        return counts
    spread = [(c - smallest) / (largest - smallest) * (high - low) + low for c in counts]
    factor = total / float(np.array(spread).sum())
    new = [min(max(float(round(c * factor)), low), high) for c in spread]
    missing = round(total - sum(new))
    if missing > 0:
        for row in sorted(range(len(new)), key=lambda i: (new[i], i)):
            if missing and new[row] < high:
                new[row] += 1
                missing -= 1
    elif missing < 0:
        for row in sorted(range(len(new)), key=lambda i: (-new[i], i)):
            if missing and new[row] > low:
                new[row] -= 1
                missing += 1
    return [int(c) for c in new]


@pytest.mark.parametrize("seed", range(30))
def test_the_search_of_the_released_code(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = rows_of(seed, int(random.integers(2, 28)), [int(random.integers(2, 64))], ties=False)
    total = int(random.integers(len(rows), sum(map(len, rows)) + 1))
    assert code_counts(rows, total) == plain_code_counts(rows, total)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=30),
    st.sampled_from([(1, 64), (4, 12), (8.4, 19.6), (1, 1), (3.5, 128.0), (1, 0)]),
)
def test_the_rescale_of_the_released_code(counts: list[int], band: tuple[float, float]) -> None:
    assert code_rescaled(counts, *band) == plain_rescale(counts, *band)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=30), st.integers(1, 20), st.integers(0, 20))
def test_ties_in_the_repair_change_who_not_how_much(counts: list[int], low: int, width: int) -> None:
    ours = code_rescaled(counts, low, low + width)
    numpys = code_rescaled(counts, low, low + width, stable=False)
    assert sorted(ours) == sorted(numpys)


def test_the_bands_of_the_released_code() -> None:
    rows = rows_of(7, 28, [20], ties=False)
    found = code_counts(rows, int(28 * 20 * 0.6))
    assert code_compress_counts(rows, 0.6, 0.25) == plain_rescale(found, 9, 15)
    assert code_compress_counts(rows, 0.6, 1.0) == plain_rescale(found, 1, 20)
    found = code_counts(rows, 28 * 8)
    assert code_retrieve_counts(rows, 8, 0.5) == plain_rescale(found, 4.0, 12.0)
    assert code_retrieve_counts(rows, 8, 1.0) == plain_rescale(found, 1, 16.0)
    long = rows_of(8, 28, [400], ties=False)
    capped = code_retrieve_counts(long, 100, 0.5)
    assert max(capped) <= 128
    assert capped == plain_rescale(code_counts(long, 2800), 50.0, 128)


def test_one_pass_of_repair_may_miss_the_total() -> None:
    """methods.md 1.12: the band does not hold what the counts had together, and each layer is visited once."""
    counts = [200, 190, 2, 2]
    assert sum(code_rescaled(counts, 1, 60)) < sum(counts)


def test_equal_counts_stay_as_they_are_also_outside_the_band() -> None:
    assert code_rescaled([9, 9, 9], 1, 4) == [9, 9, 9]


def test_equal_scores_keep_everything_in_the_released_code_and_a_share_when_fixed() -> None:
    rows = [torch.full((16,), 0.5), *rows_of(1, 3, [16], ties=False)]
    assert code_counts(rows, 30)[0] == 16
    fixed = SelectKV(0.5, "fixed").counts(rows)
    assert sum(fixed) == 32
    assert all(1 <= count < 16 for count in fixed)


def test_a_single_frame_is_kept_in_every_mode() -> None:
    for mode in ("paper", "fixed", "code"):
        kept = SelectKV(0.1, mode).choose([torch.tensor([0.3])] * 4)
        assert [row.tolist() for row in kept] == [[0]] * 4


@pytest.mark.parametrize("mode", ["paper", "code", "fixed"])
def test_a_share_of_nearly_nothing_leaves_a_frame_to_each_layer(mode: str) -> None:
    assert SelectKV(1e-12, mode).counts([torch.randn(64) for _ in range(4)]) == [1] * 4


def test_top_blocks_takes_no_more_than_there_is() -> None:
    assert [row.tolist() for row in top_blocks([torch.tensor([1.0, 2.0])], [5])] == [[0, 1]]


def test_parameters_out_of_range_are_refused() -> None:
    for params in ({"keep": 0.0}, {"keep": 1.1}, {"mode": "both"}, {"band": -0.1}, {"band": math.inf}):
        with pytest.raises(RecipeError):
            SelectKV(**params)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="every layer keeps one"):
        exact_counts([torch.zeros(4)] * 3, 2, z_scores=True)


@settings(deadline=None, max_examples=100)
@given(scored, st.floats(0, 1), st.booleans(), st.integers(1, 4), st.integers(0, 6))
def test_bounds_clip_the_water_line_and_leave_the_total_exact(
    rows: list[Tensor], part: float, z_scores: bool, low: int, width: int
) -> None:
    """The counts of one p, each brought into its layer's bounds, stand on both sides of what is given out."""
    high = low + width
    least, most = (sum(min(bound, len(row)) for row in rows) for bound in (low, high))
    total = least + int(part * (most - least))
    counts = exact_counts(rows, total, z_scores=z_scores, low=low, high=high)
    assert sum(counts) == total
    sums = [plain_sums(row, z_scores) for row in rows]

    def clipped(p: float) -> list[int]:
        at = zip(plain_counts_at(sums, p), rows, strict=True)
        return [min(max(count, low), high, len(row)) for count, row in at]

    edges = sorted({0.0, 1.0, *(c for row in sums for c in row)})
    p = next((edge for edge in edges if sum(clipped(edge + 1e-9)) >= total), 1.0)
    below, above = clipped(p - 1e-9), clipped(p + 1e-9)
    assert all(a <= count <= b for a, count, b in zip(below, counts, above, strict=True))
