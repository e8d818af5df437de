"""Probe rows and the GQA fold, against attention and cosines with every key repeated (methods.md X3)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from memdb.index.mean_key import fold
from memdb.retain import attention
from memdb.retain.attention import ROWS_AT_ONCE, Listener, attention_rows, importance
from memdb.retain.select_kv import guidance_scores


def drawn(Hq: int, H: int, r: int, T: int, D: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(Hq, r, D, generator=random), torch.randn(H, T, D, generator=random)


def plain_rows(
    q: torch.Tensor, k: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    Hq, r, _ = q.shape
    group = Hq // k.shape[0]
    out = torch.zeros(Hq, r, k.shape[1], dtype=torch.float64)
    for head in range(Hq):
        for row in range(r):
            scores = [float(q[head, row].double() @ key.double()) * scale for key in k[head // group]]
            if mask is not None:
                scores = [s if seen else -math.inf for s, seen in zip(scores, mask[row], strict=True)]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            out[head, row] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return out


@pytest.mark.parametrize(("Hq", "H"), [(1, 1), (6, 2), (8, 8), (7, 1)])
def test_rows_are_the_softmax_of_every_head(Hq: int, H: int) -> None:
    q, k = drawn(Hq, H, 5, 11, 16)
    found = attention_rows(q, k, 0.25)
    assert found.shape == (Hq, 5, 11)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain_rows(q, k, 0.25), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3])
def test_importance_is_the_mean_of_all_rows_however_many(rows: int) -> None:
    q, k = drawn(4, 2, rows, 13, 8, seed=rows)
    found = importance(q, k, 8**-0.5)
    torch.testing.assert_close(found.double(), plain_rows(q, k, 8**-0.5).mean((0, 1)), rtol=1e-5, atol=1e-7)
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("rows", [4, ROWS_AT_ONCE + 5])
def test_rows_among_the_keys_see_what_stands_before_them(rows: int) -> None:
    """An observation window: the last keys' own queries, each behind the one before."""
    T = rows + 9
    q, k = drawn(4, 2, rows, T, 8)
    mask = torch.ones(rows, T, dtype=torch.bool).tril(T - rows)
    plain = plain_rows(q, k, 0.3, mask)
    assert float(plain[:, 0, -1].max()) == 0
    torch.testing.assert_close(attention_rows(q, k, 0.3, mask).double(), plain, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(importance(q, k, 0.3, mask).double(), plain.mean((0, 1)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("room", "calls"), [(1 << 29, [2, 1, 2]), (1000, [1, 1, 1, 1, 1])])
def test_layers_are_heard_together_as_each_would_be_alone(
    room: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU hears them, whose wide product stands in: as many at once as there is room for, of one size."""
    layers = [drawn(4, 2, 3, T, 8, seed=layer) for layer, T in enumerate((9, 9, 12, 9, 9))]
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    alone = [importance(q, k, 0.3, mask) for q, k in layers]
    heads: list[int] = []

    def wide(q: torch.Tensor, k: torch.Tensor, *terms: Any) -> torch.Tensor:
        heads.append(len(q) // 4)
        with monkeypatch.context() as plain:
            plain.setattr(attention, "multiplies_wide", lambda *_: False)
            return attention_rows(q, k, *terms)

    monkeypatch.setattr(attention, "multiplies_wide", lambda *_: True)
    monkeypatch.setattr(attention, "attention_rows", wide)
    monkeypatch.setattr(attention, "SCORES_BYTES", room)
    listener = Listener()
    for q, k in layers:
        listener.hear(q, k, 0.3, mask)
    found = listener.heard()
    assert heads == calls
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_half_precision_accumulates_in_fp32() -> None:
    q, k = drawn(4, 2, 3, 500, 64)
    q, k = q.bfloat16(), k.bfloat16()
    torch.testing.assert_close(
        attention_rows(q, k, 0.125).double(), plain_rows(q, k, 0.125), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("seed", range(5))
def test_folded_queries_score_as_repeated_keys_do(group: int, seed: int) -> None:
    """X3: the dot product exactly, the cosine with its own length, and so its ranking."""
    H, D, blocks = 4, 16, 30
    q, k = drawn(H * group, H, 6, blocks, D, seed)
    keys = k.transpose(0, 1).flatten(1)  # (blocks, H*D)
    mean = q.mean(1).double().flatten()  # (Hq*D,)
    repeated = k.transpose(0, 1).repeat_interleave(group, 1).double().flatten(1)  # (blocks, Hq*D)
    dots = repeated @ mean
    cosines = dots / (repeated.norm(dim=1) * mean.norm())
    torch.testing.assert_close((keys @ fold(q, H)).double(), dots, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guidance_scores(q, keys, "dot").double(), dots, rtol=1e-5, atol=1e-5)
    found = guidance_scores(q, keys, "cos")
    torch.testing.assert_close(found.double(), cosines, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.argsort(), cosines.argsort())
