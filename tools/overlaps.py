"""What bounded retainers agree on: one film, one budget, and how much of the kept tokens two of them share.

    python -m tools.overlaps --model random:0 --frames 24 --budget 64

Every retainer gets a memory of its own from the same frames, chunk after chunk. The overlap of two is the Jaccard index
of what they hold at the end, |both| / |either|, layer by layer; the table shows the mean over layers. Two retainers
that hold the same sets would show 1. Beside it stands what chance gives: two random sets of the same sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame
from memdb.ingest.stages import compose
from memdb.models.load import load_model
from memdb.models.protocol import VideoModel
from memdb.recipes import CONTROLS
from memdb.retain import BOUNDED
from memdb.schemas.errors import MemdbError
from memdb.schemas.frames import Image
from memdb.schemas.keep import Ids, KeepSet
from memdb.schemas.recipe import Recipe, Stage
from memdb.world.scenes import plan
from memdb.world.source import painted

SECOND_NS = 1_000_000_000
# Whose attention a retainer hears, where it hears any: its paper's own, else that of the chat template.
PROBES: Mapping[str, Mapping[str, str | int]] = {"vision_sink": {"probe": "recent", "probe_tokens": 16}}


@dataclass(frozen=True, eq=False)
class Overlaps:
    """names (n,); layers (L, n, n): the Jaccard index of each pair in each layer; tokens: seen in each layer."""

    names: tuple[str, ...]
    layers: np.ndarray[tuple[int, int, int], np.dtype[np.float64]]
    kept: tuple[tuple[int, ...], ...]  # (n, L)
    tokens: int

    @property
    def mean(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """(n, n) over layers."""
        found: np.ndarray[tuple[int, int], np.dtype[np.float64]] = self.layers.mean(0)
        return found

    @property
    def chance(self) -> float:
        """The overlap that two random sets of the mean size have, about."""
        share = float(np.mean(self.kept)) / self.tokens
        return share / (2 - share)


def jaccard(one: Ids, other: Ids) -> float:
    """|both| / |either|; of two empty sets 1: they are the same."""
    either = len(np.union1d(one, other))
    return len(np.intersect1d(one, other)) / either if either else 1.0


def overlaps(kept: Mapping[str, KeepSet], tokens: int) -> Overlaps:
    """Every pair of what retainers hold after one film of so many tokens."""
    names, sets = tuple(kept), list(kept.values())
    layers = [
        [[jaccard(one.ids[layer], other.ids[layer]) for other in sets] for one in sets]
        for layer in range(len(sets[0].ids))
    ]
    return Overlaps(names, np.array(layers), tuple(tuple(one.tokens) for one in sets), tokens)


def bounded_recipe(retain: str, budget_tokens: int, clip: int) -> Recipe:
    """The frame that all of them share: only what is kept differs, and whose attention is heard for it."""
    base, probe = CONTROLS["uniform"], {}
    if BOUNDED[retain].hears:
        probe = dict(PROBES.get(retain, {"probe": "template"}))
    return replace(
        base,
        name=retain,
        unit=Stage("clip", {"frames": clip}),
        encode=base.encode.with_params(**probe),
        retain=Stage(retain, {"budget_tokens": budget_tokens}),
    )


def kept_sets(
    model: VideoModel, shown: Sequence[Image], budget_tokens: int, *, clip: int = 8
) -> dict[str, KeepSet]:
    """What each bounded retainer holds after the film, one frame a second."""
    grid = model.frame_grid(*shown[0].shape[:2])
    frames = [
        ReadyFrame(number, number * SECOND_NS, (number + 1) * SECOND_NS, model.prepare(image, grid), image)
        for number, image in enumerate(shown)
    ]
    found = {}
    for name in BOUNDED:
        recipe = bounded_recipe(name, budget_tokens, clip)
        stages = compose(recipe)
        stages.check_frames(model.shape.tokens_of(grid), grid)
        init = model.init_ids(str(recipe.encode.params["init_prompt"]))
        encoder = StreamEncoder(model, stages, init, None, grid=grid)
        keep = [unit.keep for unit in (*encoder.step(frames), *encoder.finish())][-1]
        assert keep is not None, "rule R8b: a chunk is followed by its keep set"
        found[name] = keep
    return found


def table(found: Overlaps) -> str:
    """Markdown: a row and a column a retainer."""
    rows = [["", *found.names, "kept a layer"], ["---"] * (len(found.names) + 2)]
    for name, row, kept in zip(found.names, found.mean, found.kept, strict=True):
        rows.append([name, *(f"{value:.2f}" for value in row), f"{np.mean(kept):.0f} of {found.tokens}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", f"two random sets of these sizes would overlap by {found.chance:.2f}"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", help="embedded, random:SEED, a folder or a Hub id")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--budget", type=int, default=64, help="tokens a layer")
    parser.add_argument("--clip", type=int, default=8, help="frames a chunk")
    parser.add_argument("--seed", type=int, default=0, help="of the film")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        model = load_model(args.model, device="cpu")
        film = painted(plan(args.seed, max(60, args.frames)))
        shown = [image for _, image in islice(film, args.frames)]
        kept = kept_sets(model, shown, args.budget, clip=args.clip)
    except MemdbError as error:
        sys.stderr.write(f"overlaps: {error}\n")
        return error.exit_code
    frame_tokens = model.shape.tokens_of(model.frame_grid(*shown[0].shape[:2]))
    found = overlaps(kept, -(-len(shown) // model.frames_together) * frame_tokens)
    if args.json:
        names, rows = found.names, found.mean.tolist()
        pairs = {name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)}
        kept_of = dict(zip(names, found.kept, strict=True))
        print(json.dumps({"overlaps": pairs, "kept": kept_of, "chance": found.chance}))
    else:
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
