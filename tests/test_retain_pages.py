"""Pages of retained tokens (LiveVLM's PaR, arXiv 2505.15269, version 2): V4 and plain means."""

from __future__ import annotations

import math

import pytest
import torch

from memdb.models.rotary import Rotary
from memdb.retain.pages import Pages, page_keys, page_places, page_scores
from memdb.schemas.errors import RecipeError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("T", [1, 15, 16, 17, 32, 50])
@pytest.mark.parametrize("page_tokens", [1, 7, 16])
def test_a_page_key_is_the_mean_of_its_tokens(T: int, page_tokens: int) -> None:
    k = normal(3, T, 8)
    found = page_keys(k, page_tokens)
    assert found.shape == (math.ceil(T / page_tokens), 3, 8)
    for page, key in enumerate(found):
        tokens = k[:, page * page_tokens : (page + 1) * page_tokens].double()
        torch.testing.assert_close(key.double(), tokens.mean(1), rtol=1e-5, atol=1e-6)


def test_no_tokens_are_no_pages() -> None:
    assert page_keys(torch.empty(2, 0, 8), 16).shape == (0, 2, 8)
    assert Pages().choose(normal(4, 3, 8), torch.empty(0, 2, 8)).tolist() == []


def test_scores_are_those_of_repeated_keys() -> None:
    q, keys = normal(6, 5, 8), normal(9, 2, 8, seed=1)
    mean = q.double().mean(1)
    plain = [
        sum(float(mean[head] @ keys[page, head // 3].double()) for head in range(6)) for page in range(9)
    ]
    torch.testing.assert_close(
        page_scores(q, keys).double(), torch.tensor(plain, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("ratio", "pages", "count"), [(0.4, 10, 4), (0.4, 11, 5), (0.1, 30, 3), (0.0, 9, 0), (1.0, 9, 9)]
)
def test_the_best_share_of_pages_is_read(ratio: float, pages: int, count: int) -> None:
    q, keys = normal(4, 3, 8), normal(pages, 2, 8, seed=2)
    score = page_scores(q, keys)
    wanted = sorted(sorted(range(pages), key=lambda i: (-float(score[i]), i))[:count])
    assert Pages(ratio=ratio).choose(q, keys).tolist() == wanted


def test_of_equal_pages_the_earlier_is_read() -> None:
    keys = torch.ones(6, 2, 8)
    assert Pages(ratio=0.5).choose(torch.ones(4, 3, 8), keys).tolist() == [0, 1, 2]


@pytest.mark.parametrize("T", [1, 16, 37])
def test_pages_and_their_tokens_are_one_partition(T: int) -> None:
    pages = torch.arange(len(page_keys(torch.zeros(1, T, 1), 16)))
    assert page_places(pages, T, 16).tolist() == list(range(T))
    assert page_places(pages[-1:], T, 16).tolist() == list(range(int(pages[-1]) * 16, T))


def test_scattered_equal_keys_keep_their_length_only_unrotated() -> None:
    """V4: a page of 16 equal keys from anywhere in 12,000 positions."""
    D = 128
    k = normal(1, 1, D).expand(1, 16, D).contiguous()
    length = float(k[0, 0].norm())
    assert float(page_keys(k, 16).norm()) / length == pytest.approx(1, abs=1e-6)
    positions = torch.randperm(12_000, generator=torch.Generator().manual_seed(0))[:16].sort().values
    rotary = Rotary(1.0 / 1e6 ** (torch.arange(0, D, 2) / D))
    turned = rotary.rotate_at(k, positions, 12_000)
    assert float(page_keys(turned, 16).norm()) / length < 0.9
    undone = rotary.undo(turned, positions)
    assert float(page_keys(undone, 16).norm()) / length > 0.99


def test_parameters_out_of_range_are_refused() -> None:
    for params in ({"page_tokens": 0}, {"ratio": -0.1}, {"ratio": 1.1}):
        with pytest.raises(RecipeError):
            Pages(**params)  # type: ignore[arg-type]
