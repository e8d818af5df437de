"""To a device and back without waiting: what a GPU has still to do goes on meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x of the host on a device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


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
