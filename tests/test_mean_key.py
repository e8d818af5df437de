"""Mean keys of a unit against a plain loop, block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memdb.index.mean_key import MeanKey
from memdb.models.transfers import together
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


def test_blocks_of_one_tensor_are_put_together_without_a_copy_and_any_others_with_one() -> None:
    whole = (
        torch.arange(5 * 24.0).view(5, 4, 6).transpose(1, 2)
    )  # heads of a token together, as a memory has them
    own = [layer[:, start : start + 2] for layer in whole for start in (0, 2)]
    found = together(own)
    assert found.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert torch.equal(found, torch.stack(own))
    for others in (own[:3] + own[4:], own[::-1], [own[0], own[0]], [x.clone() for x in own], own[:1]):
        assert torch.equal(together(others), torch.stack(others))
