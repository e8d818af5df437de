"""Ways to damage a file: single bits, and what is harsher."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tools.trust.ground import Ground

FLIP = "a flipped bit"
HARSHER = (
    "512 zeros",
    "4096 zeros",
    "a truncation",
    "an older version",
    "another file's bytes",
    "deleted",
    "random bytes",
)
_TRIES = 50


@dataclass(frozen=True)
class Damage:
    """What was done to a file, and the bytes that it touched."""

    kind: str
    file: str  # relative to the store
    start: int
    end: int

    def __str__(self) -> str:
        place = f" at {self.start}" if self.end - self.start < 5000 and self.kind != "deleted" else ""
        return f"{self.file}, {self.kind}{place}"


def harm(ground: Ground, path: Path, file: str, kind: str, chance: random.Random) -> Damage | None:
    """Damage a file of a copy of the ground; None where this kind would change nothing of it."""
    target = path / file
    data = target.read_bytes()
    if kind == "deleted":
        target.unlink()
        return Damage(kind, file, 0, len(data))
    for _ in range(_TRIES):
        found = _harmed(ground, file, data, kind, chance)
        if found is None:
            return None
        changed, start, end = found
        if changed != data:
            target.write_bytes(changed)
            return Damage(kind, file, start, end)
    return None


def _harmed(
    ground: Ground, file: str, data: bytes, kind: str, chance: random.Random
) -> tuple[bytes, int, int] | None:
    at = chance.randrange(len(data))
    if kind == FLIP:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :], at, at + 1
    if kind.endswith("zeros"):
        size = int(kind.split()[0])
        start = at // size * size if chance.random() < 0.7 else at
        end = min(start + size, len(data))
        return data[:start] + bytes(end - start) + data[end:], start, end
    if kind == "a truncation":
        return data[:at], at, len(data)
    if kind == "an older version":
        older = ground.older / file
        return (older.read_bytes(), 0, len(data)) if older.is_file() else None
    if kind == "another file's bytes":
        others = [name for names in ground.files.values() if file in names for name in names if name != file]
        return ((ground.path / chance.choice(others)).read_bytes(), 0, len(data)) if others else None
    return chance.randbytes(len(data)), 0, len(data)
