"""Reference tests of StreamMem (arXiv 2508.15717) through its recipe: M1 to M5; M6 and YaRN are in test_yarn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memdb.client import Client
from memdb.ingest.encode.chunk import OpenMemory
from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.frames import ReadyFrame, SeenFrame
from memdb.ingest.memory import EncoderMemory
from memdb.ingest.stages import compose, written_out
from memdb.models.window import LayerKV
from memdb.query.stored import Readings, StoredKV
from memdb.reader import SliceReader
from memdb.recipes import STREAMMEM, adjusted
from memdb.retain.prototypes import Prototypes
from memdb.retain.template import Template
from memdb.retain.view import LayerView
from memdb.schemas.recipe import Recipe
from memdb.schemas.units import BlockKind
from tests.memory_cases import FRAME_TOKENS as P
from tests.memory_cases import memory_recipe, remembered_film
from tests.model_cases import (
    INIT_PROMPT,
    NS,
    ingest,
    pictures,
    reopened,
    wrapped,
)
from tests.run_cases import small_model, small_spec
from tests.test_retain_template import plain_prune

BUDGET = 56  # three frames and a half


def row(*settings: str) -> Recipe:
    """The recipe in small: clips of three frames in batches of four, every frame by itself unless a test says so."""
    small = ("unit.frames=3", "encode.chunk_frames=4", f"retain.budget_tokens={BUDGET}", "reduce.delta=1.01")
    return adjusted(STREAMMEM, codec="raw", settings=(*small, "answer.tokens_max=2", *settings))


# M1


def test_m1_the_budget_holds_at_every_moment_of_any_stream(tmp_path: Path) -> None:
    """Four hundred frames: prototypes count, and never hold more than their share."""
    model = copy.copy(small_model(small_spec(tmp_path)))
    N, E = model.shape.frame_tokens, model.shape.embedding_size
    film = torch.randn(40, N, E, generator=torch.Generator().manual_seed(1))

    def looked(pixels: Sequence[Any]) -> Tensor:
        return film[[int(shown[0, 0, 0]) for shown in pixels]]

    model.visual_tokens = looked  # type: ignore[method-assign]
    recipe = written_out(row("retain.budget_tokens=24", "retain.prototype_share=0.25"), model, N)
    encoder = StreamEncoder(model, compose(recipe), model.init_ids(INIT_PROMPT), None)
    picture, prototypes = pictures(1)[0], []
    assert isinstance(encoder._encoding, OpenMemory)
    for start in range(0, 400, 4):
        batch = [
            ReadyFrame(at, at * NS, (at + 1) * NS, np.full((2, 2, 3), at % 40, np.uint8), picture)
            for at in range(start, start + 4)
        ]
        for unit in encoder.step(batch):
            assert unit.keep is not None
            came = (unit.number + 1) * 3 * (N + 1)  # three frames and their prototypes a clip
            assert set(unit.keep.tokens) == {min(24, came)}
            for layer in encoder._encoding.memory.layers:
                assert len(layer.id) == min(24, came)
                prototypes.append(int((layer.kind == int(BlockKind.PROTOTYPE)).sum()))
    assert min(prototypes[20:]) >= 6, "their share is theirs"
    assert len(prototypes) == 2 * 133


# M2, M3


@dataclass
class Choice:
    method: Template
    view: LayerView
    kept: Tensor


def choices_of(path: Path, shown: Sequence[Any], recipe: Recipe) -> list[Choice]:
    """Every choice of a layer while a film is taken in: what it was made of, and what was chosen."""
    found: list[Choice] = []
    choose = Template.choose

    def choosing(self: Template, view: LayerView) -> Tensor:
        kept = choose(self, view)
        names = ("k", "v", "position", "frame", "patch", "kind", "importance")
        for layer in range(len(view.k)):
            own = replace(view, **{name: getattr(view, name)[layer] for name in names})
            found.append(Choice(self, own, kept[layer]))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Template, "choose", choosing)
        ingest(path, shown, recipe=recipe)
    return found


def test_m2_what_the_template_asks_for_is_kept_and_the_rest_goes(tmp_path: Path) -> None:
    """Every choice of a film is the rule one token at a time, over old memory and new tokens together."""
    choices = choices_of(tmp_path / "s", pictures(20), row())
    assert len(choices) == 4 * 7
    late = 0
    for choice in choices:
        assert choice.kept.tolist() == plain_prune(choice.view, choice.method)
        late += choice.view.tokens > BUDGET
        most = int(choice.view.importance.argmax())  # type: ignore[union-attr]
        assert most in choice.kept.tolist()
    assert late == 4 * 6, "all but the first of three frames: 51 tokens"


def test_m3_old_tokens_outlive_newer_ones_that_matter_less(tmp_path: Path) -> None:
    """Of the first clip some stay to the end of the film; the newest tokens alone remember nothing of it."""
    held = {}
    for name, recipe in (("template", row()), ("recent", memory_recipe("recent", BUDGET))):
        [*_, last] = remembered_film(tmp_path / name, pictures(20), recipe)
        held[name] = [set(layer.frame[layer.kind == int(BlockKind.FRAME)].tolist()) for layer in last.layers]
    assert any(frames & {0, 1, 2} for frames in held["template"])
    assert not any(frames & set(range(15)) for frames in held["recent"])


# M4


def test_m4_a_prototype_is_what_the_template_paid_of_its_frame(tmp_path: Path) -> None:
    """In the store: a plain loop over the clip's own keys and values, and what each of them was paid."""
    came: list[tuple[LayerKV, Prototypes, list[Tensor], int]] = []
    take = EncoderMemory.take

    def taking(
        self: EncoderMemory,
        unit: int,
        frames: Sequence[SeenFrame],
        fresh: LayerKV,
        made: Prototypes,
        heard: Sequence[Tensor],
        start: int,
        grid: tuple[int, int],
    ) -> None:
        came.append((fresh, made, list(heard), start))
        take(self, unit, frames, fresh, made, heard, start, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncoderMemory, "take", taking)
        ingest(tmp_path / "s", pictures(9), recipe=row())
    with reopened(tmp_path / "s") as db:
        for unit, (fresh, made, heard, start) in enumerate(came):
            for layer in range(4):
                stored = prototypes_in(db, unit, layer)
                paid = heard[layer][-3 * P :].double()
                for frame in range(3):
                    own = range(frame * P, (frame + 1) * P)
                    mass = sum(float(paid[at]) for at in own)
                    weights = [float(paid[at]) / mass for at in own]
                    assert sum(weights) == pytest.approx(1)
                    for found, of in ((stored.k, fresh.k[layer]), (stored.v, fresh.v[layer])):
                        want = sum(w * of[:, at].double() for w, at in zip(weights, own, strict=True))
                        assert isinstance(want, Tensor)
                        torch.testing.assert_close(found[:, frame].double(), want, rtol=1e-5, atol=1e-5)
                        part = of[:, frame * P : (frame + 1) * P]
                        assert bool((found[:, frame] <= part.max(1).values + 1e-6).all())
                        assert bool((found[:, frame] >= part.min(1).values - 1e-6).all())
                    place = sum(w * (start + at) for w, at in zip(weights, own, strict=True))
                    assert abs(int(made.position[layer, frame]) - place) <= 0.5 + 1e-3


def prototypes_in(db: Client, unit: int, layer: int) -> LayerKV:
    """The prototypes that one layer of a unit stores, as a question reads them."""
    spec, readings = db.store.recording("film"), Readings()
    with SliceReader(db.store) as reader:
        kv = StoredKV(db.store, spec, reader, backend="exact", sim="dot")
        blocks = kv.table.blocks
        rows = np.flatnonzero((blocks["unit"] == unit) & (blocks["kind"] == BlockKind.PROTOTYPE))
        assert len(rows) == 3
        found, _ = kv.read(layer, rows, torch.device("cpu"), torch.float32, readings)
        kv.close()
    assert found is not None
    assert not readings.bad
    return found


# M5


def test_m5_frames_that_are_alike_are_one_that_spans_them_all(tmp_path: Path) -> None:
    """Ten equal frames between others: one block of as many tokens as any frame has."""
    different = pictures(5, seed=4)
    shown = [*different[:2], *[different[2]] * 10, *different[3:]]
    for name, delta, spans in (
        ("merged", 0.999999, [(0, 1), (1, 2), (2, 12), (12, 13), (13, 14)]),
        ("apart", 1.01, [(at, at + 1) for at in range(14)]),
    ):
        ingest(tmp_path / name, shown, recipe=row(f"reduce.delta={delta}"))
        with reopened(tmp_path / name) as db:
            units = db.store.units(db.store.recording("film").id)
        frames = [block for unit in units for block in unit.blocks if block["kind"] == int(BlockKind.FRAME)]
        assert [(int(block["start_ns"]) // NS, int(block["end_ns"]) // NS) for block in frames] == spans
        assert {int(block["tokens"]) for block in frames} == {P}


def test_what_ends_the_users_turn_leaves_nothing_behind(tmp_path: Path) -> None:
    """R19: every token of the memory is one of the film or a prototype, at a position of the film."""
    n = len(wrapped().init_ids(INIT_PROMPT))
    moments = remembered_film(tmp_path / "s", pictures(20), row())
    for moment in moments:
        seen = min(20, 3 * (moment.unit + 1))
        for layer in moment.layers:
            assert int(layer.position.min()) >= n
            assert int(layer.position.max()) < n + seen * P
            assert torch.equal((layer.position - n) // P, layer.frame)
            assert set(layer.kind.tolist()) <= {int(BlockKind.FRAME), int(BlockKind.PROTOTYPE)}
