"""What a reducer does: to frames one by one before their unit closes, and to the units that close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from memdb.ingest.encoder_state import Saved, bytes_tensor, tensor_bytes, tensor_size
from memdb.ingest.frames import SeenFrame
from memdb.ingest.held import Timed
from memdb.ingest.open_frames import frame_from, frame_row, frame_tensors
from memdb.ingest.terms import Terms
from memdb.ingest.units.base import UnitStage
from memdb.models.protocol import Pixels


@dataclass(frozen=True)
class Reducer:
    """A frozen dataclass of parameters. One that changes nothing is this one."""

    def kept(self, frame_tokens: int) -> int:
        """How many tokens are left of a frame of so many. Raises RecipeError where it cannot do with them."""
        return frame_tokens

    def begin(self, terms: Terms, unit: UnitStage) -> Carried:
        """Itself at work on a recording, with nothing seen yet."""
        return Carried(terms, unit)


class Carried:
    """A reducer at work, and what it carries from batch to batch: of this one the open unit, its frames as they are.

    `opened`: the frames of the open unit. `before`: the frame that was reduced last, as it was, where the next one is
    reduced beside it.
    """

    def __init__(self, terms: Terms, unit: UnitStage) -> None:
        self.opened: list[SeenFrame] = []
        self.before: SeenFrame | None = None
        self._terms, self._unit = terms, unit

    def see(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Tokens (F, N, E) of frames as the model sees them, and of each its saliency (N,), where the reducer asks."""
        tokens = self._terms.model.visual_tokens(pixels)
        return tokens, [None] * len(tokens)

    def arrived(self, frames: Sequence[SeenFrame]) -> Sequence[SeenFrame]:
        """The frames of a batch, before they come one by one: what can be done for all of them at once."""
        return frames

    def extend(self, frame: SeenFrame) -> list[list[SeenFrame]]:
        """The units that close with this frame."""
        closed, self.opened = self._unit.extend(self.opened, frame)
        return closed

    def finish(self) -> list[list[SeenFrame]]:
        """The unit that is still open when the stream ends."""
        closed, self.opened = [self.opened] if self.opened else [], []
        return closed

    def reduce(self, groups: Sequence[Sequence[SeenFrame]]) -> Sequence[Sequence[SeenFrame]]:
        """Units that close, their frames as the language model will take them."""
        return groups

    @property
    def held(self) -> Sequence[Timed]:
        return [*self._beside, *self.opened]

    @property
    def _beside(self) -> list[SeenFrame]:
        return [self.before] if self.before is not None else []

    # Its part of a saved state

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, frame in enumerate(self.opened):
            found |= frame_tensors(f"open.{index}", frame)
        for frame in self._beside:
            found |= frame_tensors("before", frame)
        if self.opened:  # of what may open a unit
            found["jpeg"] = bytes_tensor(self.opened[0].jpeg())
        return found

    def numbers(self) -> Mapping[str, object]:
        return {
            "open": [frame_row(frame) for frame in self.opened],
            "before": [frame_row(frame) for frame in self._beside],
        }

    @property
    def state_bytes(self) -> int:
        frames = [*self.opened, *self._beside]
        return sum(tensor_size(*frame_tensors("", frame).values()) for frame in frames)

    def restore(self, saved: Saved) -> None:
        device, jpeg = self._terms.model.device, saved.tensors.get("jpeg")
        picture = b"" if jpeg is None else tensor_bytes(jpeg)
        tensors = {name: tensor.to(device) for name, tensor in saved.tensors.items()}
        self.opened = [
            frame_from(f"open.{index}", row, tensors, picture)
            for index, row in enumerate(saved.numbers["open"])
        ]
        for row in saved.numbers.get("before", ()):  # none in states of older versions
            self.before = frame_from("before", row, tensors, b"")
