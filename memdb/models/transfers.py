"""To a device and back without waiting: what a GPU has still to do goes on meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x of the host on a device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def together(blocks: Sequence[Tensor]) -> Tensor:
    """(n, ...) of n tensors of one shape: a view where they lie at even distances in one piece of memory, else a copy.

    To look costs microseconds on the host; hundreds of pieces of a large tensor are slow to copy on a GPU.
    """
    first = blocks[0]
    offsets = [block.storage_offset() for block in blocks]
    step = offsets[1] - offsets[0] if len(blocks) > 1 else 1
    home = first.untyped_storage().data_ptr()
    if step <= 0 or any(
        offset != offsets[0] + n * step
        or block.stride() != first.stride()
        or block.shape != first.shape
        or block.untyped_storage().data_ptr() != home
        for n, (offset, block) in enumerate(zip(offsets, blocks, strict=True))
    ):
        return torch.stack(list(blocks))
    return first.as_strided((len(blocks), *first.shape), (step, *first.stride()), offsets[0])


class Received:
    """x of a device on its way to the host; `read` waits for it. On a CPU it is there already."""

    def __init__(self, x: Tensor) -> None:
        self._held = x
        self._done: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            self._held = torch.empty(
                x.shape, dtype=x.dtype, pin_memory=True
            )  # several times as fast to copy to
            self._held.copy_(x, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def read(self) -> npt.NDArray[Any]:
        if self._done is not None:
            self._done.synchronize()
        return np.asarray(self._held.numpy())
