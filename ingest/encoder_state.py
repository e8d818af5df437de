"""The exact bytes of an encoder's state: the tensors of its parts by name, and one more, `meta`, of numbers as JSON.

Later versions read them. So names and rows of a part stay as they are; what is added to one is left out where it says
nothing, and may be missing where it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from memdb.ingest.held import Timed
from memdb.schemas.errors import CorruptionError


@dataclass
class Counters:
    """Where the encoder stands. `taken_ns` is the start of the last frame taken; -1 before the first.

    `tombstones`: how many spans of the recording had been forgotten when it last took note. It holds nothing of
    what they forgot.
    """

    unit: int = 0  # number of the next unit
    frame: int = 0  # number of the next frame
    taken_ns: int = -1
    until_ns: int = 0  # end of that frame
    position: int = 0  # stream position of the next token
    epoch: int = 0
    tombstones: int = 0
    widths: dict[int, int] = field(default_factory=dict)  # scale width by layer


@dataclass(frozen=True, eq=False)
class Saved:
    """A state that was read. Tensors lie on the CPU."""

    counters: Counters
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


class Part(Protocol):
    """What one stage carries from one batch to the next. No two parts have a name in common."""

    @property
    def held(self) -> Sequence[Timed]:
        """What it holds of the stream."""
        ...

    @property
    def state_bytes(self) -> int:
        """About what its tensors take, without making them."""
        ...

    def tensors(self) -> Mapping[str, Tensor]: ...

    def numbers(self) -> Mapping[str, object]: ...

    def restore(self, saved: Saved) -> None:
        """Inverse of the two above, in a part that is fresh."""
        ...


def to_bytes(counters: Counters, parts: Sequence[Part]) -> bytes:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, object] = {"counters": asdict(counters)}
    for part in parts:
        tensors |= part.tensors()
        numbers |= part.numbers()
    tensors["meta"] = bytes_tensor(json.dumps(numbers).encode())
    saved: bytes = save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    return saved


def from_bytes(payload: bytes) -> Saved:
    """Inverse of `to_bytes`, as far as it can be without the parts; inside `reading`."""
    tensors = load_tensors(payload)
    numbers = json.loads(tensor_bytes(tensors["meta"]))
    counters = Counters(**numbers["counters"])
    counters.widths = {int(layer): int(width) for layer, width in counters.widths.items()}
    return Saved(counters, tensors, numbers)


# What reading a state raises where it is none, its tensors or its numbers.
_NO_STATE = (
    *(SafetensorError, KeyError, ValueError, TypeError, IndexError),
    *(AttributeError, OverflowError, RecursionError),
)


@contextmanager
def reading() -> Iterator[None]:
    """Bytes that are no state of this encoder are CorruptionError, whatever they break."""
    try:
        yield
    except _NO_STATE as error:
        raise CorruptionError(f"the saved encoder state cannot be read: {error}", file="state") from error


def bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def tensor_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.numpy())


def tensor_size(*tensors: Tensor) -> int:
    """Their bytes together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
