"""Mean keys of a unit against a plain loop, block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memdb.index.mean_key import MeanKey
from memdb.models.window import LayerKV
from memdb.schemas.errors import CodecError

SIZES = [7, 7, 3, 7, 1, 1]  # tokens of each block


def unit(dtype: torch.dtype) -> list[list[LayerKV | None]]:
    """Three layers of blocks that are views of one tensor, as an encoder leaves them; some are dropped."""
    random = torch.Generator().manual_seed(0)
    rows: list[list[LayerKV | None]] = []
    for layer in range(3):
        whole = torch.randn(2, sum(SIZES), 10, generator=random).to(dtype) * 3 + 1
        rows.append([LayerKV(k, k) for k in torch.split(whole, SIZES, 1)])
        rows[layer][2 * layer] = None
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_keys_have_the_bits_of_a_plain_loop(dtype: torch.dtype) -> None:
    layers = unit(dtype)
    found = MeanKey().keys(layers)
    assert found.shape == (3, len(SIZES), 20)
    assert found.dtype == np.float16
    for layer, row in enumerate(layers):
        for block, kv in enumerate(row):
            if kv is None:
                assert not found[layer, block].any()
            else:
                alone = kv.k.float().mean(1).flatten().to(torch.float16)
                assert np.array_equal(found[layer, block], alone.numpy())


def test_a_mean_beyond_fp16_is_refused() -> None:
    layers = unit(torch.float32)
    layers[1][0] = LayerKV(torch.full((2, 7, 10), 1e6), torch.zeros(2, 7, 10))
    with pytest.raises(CodecError, match="fp16"):
        MeanKey().keys(layers)
