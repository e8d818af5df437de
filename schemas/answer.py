"""An answer and the evidence that it rests on."""

from __future__ import annotations

from dataclasses import dataclass, field

from memdb.schemas.plan import Plan


@dataclass(frozen=True)
class Evidence:
    """A span of a recording that stood in the context. `score` compares within one tier of one answer only:
    cosine for captions, the share of layers that chose it for KV. `unit` leads to the key frame.
    """

    recording: str
    start_s: float
    end_s: float
    tier: str  # captions | kv
    score: float
    caption: str | None
    unit: int
    keyframe: str | None = None  # path of the saved key frame, where saving was asked for

    def as_json(self) -> dict[str, object]:
        row: dict[str, object] = {
            "recording": self.recording,
            "start_s": self.start_s,
            "end_s": self.end_s,
            "tier": self.tier,
            "score": round(self.score, 6),
            "caption": self.caption,
        }
        if self.keyframe is not None:
            row["keyframe"] = self.keyframe
        return row


@dataclass(frozen=True)
class SearchHit:
    """A caption that a search found. `score`: cosine, or the sum of reciprocal ranks where words count too."""

    recording: str
    start_s: float
    end_s: float
    score: float
    caption: str
    how: str  # vector | text | both

    def as_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Used:
    """What an answer took of each budget."""

    latency_ms: float
    gpu_bytes: int
    read_bytes: int
    context_tokens: int

    def as_json(self) -> dict[str, float | int]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Answer:
    text: str
    evidence: tuple[Evidence, ...]
    plan: Plan
    timings_ms: dict[str, float]  # a figure per stage, and `total`
    watermark_s: float  # up to where the recordings in question were seen
    used: Used
    token_ids: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    as_of_s: float | None = None  # the moment whose state was asked, where one was; in mode `recent` always
    lag_s: float | None = None  # how far the newest stored frame is behind that moment
    facts: dict[str, str] = field(default_factory=dict)  # dtype, device, and what else describes the run

    def as_json(self) -> dict[str, object]:
        return {
            "text": self.text,
            "evidence": [item.as_json() for item in self.evidence],
            "plan": self.plan.as_json(),
            "timings_ms": {name: round(ms, 3) for name, ms in self.timings_ms.items()},
            "used": self.used.as_json(),
            "watermark_s": self.watermark_s,
            "as_of_s": self.as_of_s,
            "lag_s": self.lag_s,
            "facts": self.facts,
            "warnings": list(self.warnings),
        }
