"""A plan: what a question will do, what that is predicted to cost, and what was rejected for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

KINDS = ("gist", "detail", "place", "motion", "count", "order", "when", "now", "absent")


@dataclass(frozen=True)
class Sizes:
    """How much a plan takes of each thing. Blocks are per layer. `time_tokens`: of times as text in a memory, at most;
    blocks bring theirs along.
    """

    blocks: int
    caption_tokens: int
    answer_tokens: int
    time_tokens: int = 0

    def as_json(self) -> dict[str, int]:
        return {name: int(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class MemorySize:
    """A bounded memory: what a question takes of it, or nothing at all. Blocks and tokens of the layer with the most.

    `chosen`: whether the question's own queries choose the tokens, which takes a forward of it over them.
    `time_tokens`: of the times that would be written into it, at most.
    """

    blocks: int
    tokens: int
    read_bytes: int
    chosen: bool = False
    time_tokens: int = 0


@dataclass(frozen=True)
class Predicted:
    """What a plan is predicted to use: milliseconds by stage (p50), and the other budgets."""

    stages_ms: dict[str, float]
    gpu_bytes: int
    read_bytes: int
    context_tokens: int

    @property
    def total_ms(self) -> float:
        return sum(self.stages_ms.values())

    def as_json(self) -> dict[str, object]:
        return {
            "stages_ms": {name: round(ms, 3) for name, ms in self.stages_ms.items()},
            "gpu_bytes": self.gpu_bytes,
            "read_bytes": self.read_bytes,
            "context_tokens": self.context_tokens,
        }


@dataclass(frozen=True)
class Rejected:
    """An alternative that was not taken: at which sizes, at what cost, and why not."""

    mode: str
    sizes: Sizes
    predicted_ms: float
    why: str

    def as_json(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "sizes": self.sizes.as_json(),
            "predicted_ms": round(self.predicted_ms, 3),
            "why": self.why,
        }


@dataclass(frozen=True)
class Plan:
    mode: str  # captions | kv | both | recent
    kind: str
    sizes: Sizes
    predicted: Predicted
    reasons: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    recordings: tuple[str, ...]
    actual_ms: dict[str, float] = field(default_factory=dict)

    @property
    def predicted_ms(self) -> float:
        return self.predicted.total_ms

    def after(self, actual_ms: dict[str, float]) -> Plan:
        """The same plan with what it really took beside what was predicted."""
        return replace(self, actual_ms=actual_ms)

    def explain(self) -> str:
        """The plan in words, line by line."""
        lines = [
            f"mode {self.mode}, question kind {self.kind}, recordings {', '.join(self.recordings) or 'none'}",
            f"sizes: {self.sizes.blocks} blocks a layer, {self.sizes.caption_tokens} caption tokens, "
            f"{self.sizes.answer_tokens} answer tokens",
            *(f"because {reason}" for reason in self.reasons),
        ]
        for stage, ms in self.predicted.stages_ms.items():
            lines.append(f"  {stage:<10} predicted {ms:9.2f} ms{self._actual(stage)}")
        lines.append(f"  {'total':<10} predicted {self.predicted_ms:9.2f} ms{self._actual('total')}")
        for other in self.rejected:
            lines.append(f"rejected {other.mode} ({other.predicted_ms:.2f} ms): {other.why}")
        return "\n".join(lines)

    def _actual(self, stage: str) -> str:
        return f", took {self.actual_ms[stage]:9.2f} ms" if stage in self.actual_ms else ""

    def as_json(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "kind": self.kind,
            "sizes": self.sizes.as_json(),
            "predicted_ms": round(self.predicted_ms, 3),
            "predicted": self.predicted.as_json(),
            "reasons": list(self.reasons),
            "rejected": [other.as_json() for other in self.rejected],
            "recordings": list(self.recordings),
        }
