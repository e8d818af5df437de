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
    first, last, n = blocks[0], blocks[-1], len(blocks)
    begins = [block.data_ptr() for block in blocks]
    step = (begins[-1] - begins[0]) // max(1, n - 1)
    even = step > 0 and begins == list(range(begins[0], begins[-1] + 1, step))
    # Two addresses in one piece of memory, with all others between them.
    if not even or first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return torch.stack(list(blocks))
    strides = first.stride()
    if any(block.stride() != strides for block in blocks):
        return torch.stack(list(blocks))
    distance = step // first.element_size()
    return first.as_strided((n, *first.shape), (distance, *strides), first.storage_offset())


class Received:
    """x of a device on its way to the host; `read` waits for it. On a CPU it is there already."""

    def __init__(self, x: Tensor) -> None:
        self._held = x
        self._done: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            # Several times as fast to copy to as other memory.
            self._held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._held.copy_(x, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(x.device))

    def read(self) -> npt.NDArray[Any]:
        if self._done is not None:
            self._done.synchronize()
        return np.asarray(self._held.numpy())
