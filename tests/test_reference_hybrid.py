"""Reference tests of the hybrid recipe: H1, H2, captions over stored blocks, and the wall between the tiers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.index.key_table import KeyTable
from memdb.schemas.units import BLOCK_DTYPE
from memdb.store import Store
from tests import store_cases
from tests.model_cases import (
    INIT_PROMPT,
    NS,
    QUESTION,
    SHORT_CAPTIONS,
    causal,
    ingest,
    pictures,
    plain,
    record_decisions,
    relative,
    reopened,
    stored_kv,
    wrapped,
)

PROMPT = "Describe what is happening in this video."


# H1: captions and blocks meet in time

span_s = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3))  # gap before, length, blocks


@settings(max_examples=25, deadline=None)
@given(
    units=st.lists(span_s, min_size=1, max_size=7),
    asked=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
)
def test_h1_every_block_that_overlaps_a_clip_and_no_other(
    units: list[tuple[int, int, int]], asked: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random clips and blocks in a real store: gaps, units of several blocks, a block that covers all its unit."""
    blocks: list[tuple[int, int]] = []
    clips: list[tuple[int, int]] = []
    with Store.open(tmp_path_factory.mktemp("h1") / "s", create=True, write=True) as store:
        with store.writer(store_cases.spec()) as writer:
            at = 0
            for number, (gap, length, count) in enumerate(units):
                start, at = at + gap, at + gap + length
                unit = store_cases.unit(number, blocks=count)
                table = np.array(unit.blocks, BLOCK_DTYPE)
                cuts = [start * NS + length * NS * i // count for i in range(count + 1)]
                table["start_ns"], table["end_ns"] = cuts[:-1], cuts[1:]
                table["end_ns"][0] = at * NS  # a merged one: it lasts as long as its unit
                fields = {**unit.__dict__, "blocks": table, "start_ns": start * NS, "end_ns": at * NS}
                writer.append([type(unit)(**fields)])
                blocks += [(int(row["start_ns"]), int(row["end_ns"])) for row in table]
                clips.append((start * NS, at * NS))
        recording = store.recording("lobby").id
        with KeyTable.open(store, recording) as keys:
            for first, second in [*((a * NS, b * NS) for a, b in asked), *clips]:
                low, high = min(first, second), max(first, second) + 1
                found = np.flatnonzero(keys.span(low, high)).tolist()
                assert found == [row for row, (start, end) in enumerate(blocks) if start < high and end > low]
                numbers = [unit.number for unit in store.units(recording, start_ns=low, end_ns=high)]
                assert numbers == [i for i, (start, end) in enumerate(clips) if start < high and end > low]


def test_h1_evidence_of_blocks_names_the_caption_of_their_clip(tmp_path: Path) -> None:
    settings = ["unit.frames=4", "retrieve.blocks=3", "answer.tokens_max=1", *SHORT_CAPTIONS]
    ingest(tmp_path / "s", pictures(14), recipe="hybrid", settings=settings)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
        units = db.store.units(db.store.recording("film").id)
        said = {unit.number: db.store.read_caption(unit).text for unit in units}
    assert answer.evidence
    for span in answer.evidence:
        (unit,) = [u for u in units if u.start_ns <= span.start_s * NS and span.end_s * NS <= u.end_ns]
        assert (span.unit, span.caption) == (unit.number, said[unit.number])


# H2: nothing dropped, nothing rounded, everything retrieved


@pytest.mark.parametrize(
    "settings",
    [
        ["unit=frame", "caption=none"],
        ["unit=frame", *SHORT_CAPTIONS],
        ["unit.frames=1", "caption=none"],
        ["unit.frames=5", "caption=none", "encode.chunk_frames=4"],
        ["unit.frames=5", *SHORT_CAPTIONS, "caption.clips=0"],
        ["unit.frames=64", *SHORT_CAPTIONS, "encode.chunk_frames=5"],
        ["unit.frames=7", "unit.unit_s_max=3.0", *SHORT_CAPTIONS],
        ["unit.frames=4", "caption=clip", *SHORT_CAPTIONS],
        ["unit.frames=4", *SHORT_CAPTIONS, "retrieve.group=4", "retrieve.sim=cos"],
        ["unit.frames=4", *SHORT_CAPTIONS, "rebuild.windowed=true"],
    ],
    ids=" ".join,
)
def test_h2_every_choice_of_stages_gives_full_attention(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, own, model, decided = pictures(13), plain(), wrapped(), record_decisions(monkeypatch)
    more = ["rebuild.time_text_s=0", "answer.tokens_max=1"]
    ingest(tmp_path / "s", shown, recipe="hybrid", codec="raw", settings=[*settings, *more])
    with reopened(tmp_path / "s") as db:
        for mode in ("kv", "recent"):
            db.ask(QUESTION, mode=mode)
    init, prompt = own.embed(model.init_ids(INIT_PROMPT)), own.embed(model.prompt_ids(QUESTION))
    truth = own.forward(torch.cat((init, own.see(shown).flatten(0, 1), prompt)))[-1]
    assert all(relative(found, truth) < 1e-4 for found in decided)


# Captions over stored blocks


def say_over(held: list[tuple[Tensor, Tensor]], follows: Tensor, tokens_max: int) -> list[int]:
    """Plain decoding where the first places hold given keys and values (H, G, D), a pair a layer."""
    own, model = plain(), wrapped()
    first = held[0][0].shape[1]
    ids: list[int] = []
    while len(ids) < tokens_max:
        whole = torch.cat((torch.zeros(first, follows.shape[1]), follows, own.embed(ids)))
        logits = own.loop(whole, causal, given=held)
        token = int(logits[-1].argmax())
        if token in model.stop_ids:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("window", [15_000, 90])
def test_captions_over_blocks_are_those_of_plain_decoding(window: int, tmp_path: Path) -> None:
    """The first over [init | clip | prompt], by transformers; later ones over the stored keys and values of their
    clip, which has seen the clips before through its window, and the tokens that these left.
    """
    shown, frames, tokens_max, share = pictures(9), 3, 5, 0.1
    own, model = plain(), wrapped()
    settings = [
        f"unit.frames={frames}",
        f"encode.window_tokens={window}",
        f"caption.tokens_max={tokens_max}",
        "caption.encoder=input-embeddings",
        "caption.clips=2",
        f"caption.share={share}",
        "caption.layers=0,1/2",
    ]
    ingest(tmp_path / "s", shown, recipe="hybrid", codec="raw", settings=settings)
    with reopened(tmp_path / "s") as db:
        units = db.store.units(db.store.recording("film").id)
        said = [list(db.store.read_caption(unit).token_ids) for unit in units]
        kv = stored_kv(db)
    seen, init = own.see(shown), own.embed(model.init_ids(INIT_PROMPT))
    prompt = own.embed(model.prompt_ids(PROMPT))
    heard: list[tuple[Tensor, Tensor, Tensor]] = []
    own.loop(init, causal, heard=heard)
    clips = [seen[at : at + frames].flatten(0, 1) for at in range(0, 9, frames)]
    assert said[0] == own.say(torch.cat((init, clips[0], prompt)), tokens_max, model.stop_ids)
    queue: list[Tensor] = []
    size = len(clips[0])
    for number, clip in enumerate(clips):
        held = [
            (
                torch.cat((k, layer.k[:, number * size : (number + 1) * size]), 1),
                torch.cat((v, layer.v[:, number * size : (number + 1) * size]), 1),
            )
            for (_, k, v), layer in zip(heard, kv, strict=True)
        ]
        assert said[number] == say_over(held, torch.cat([*queue, prompt]), tokens_max)
        attention = heard_by(held, torch.cat([*queue, prompt]), said[number], tokens_max, len(init), size)
        kept = attention.topk(max(1, round(share * size))).indices.sort().values
        queue = [*queue, clip[kept]][-2:]
    assert all(said)
    assert len({tuple(ids) for ids in said}) == len(said)


def heard_by(
    held: list[tuple[Tensor, Tensor]], follows: Tensor, ids: list[int], tokens_max: int, start: int, size: int
) -> Tensor:
    """(size,): mean attention of the last prompt token and the tokens fed after it on the clip, layers 0 and half."""
    own = plain()
    fed = ids[:-1] if len(ids) == tokens_max else ids
    whole = torch.cat((torch.zeros(held[0][0].shape[1], follows.shape[1]), follows, own.embed(fed)))
    heard: list[tuple[Tensor, Tensor, Tensor]] = []
    own.loop(whole, causal, given=held, heard=heard)
    rows = range(held[0][0].shape[1] + len(follows) - 1, len(whole))
    found = [
        own.attention(*heard[layer][:2], x)[start : start + size]
        for layer in (0, own.layers // 2)
        for x in rows
    ]
    return torch.stack(found).mean(0)


# The wall between the tiers


@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_stored_kv_does_not_depend_on_captions(codec: str, tmp_path: Path) -> None:
    """On or off, long or short, with or without recurrent tokens: the digest of the KV tier is one."""
    shown, base = pictures(14), ["unit.frames=4", "encode.window_tokens=100"]
    kinds = {
        "none": ["caption=none"],
        "short": [*SHORT_CAPTIONS],
        "long": [
            "caption.encoder=input-embeddings",
            "caption.tokens_max=9",
            "caption.clips=1",
            "caption.share=1.0",
        ],
        "other": [*SHORT_CAPTIONS, "caption.prompt=What moves?", "caption.clips=0"],
        "clip": ["caption=clip", *SHORT_CAPTIONS],
    }
    kv, captions = set(), set()
    for name, changes in kinds.items():
        ingest(tmp_path / name, shown, recipe="hybrid", codec=codec, settings=[*base, *changes])
        with reopened(tmp_path / name) as db:
            kv.add(db.digest(tier="kv")["film"])
            captions.add(db.digest(tier="captions")["film"])
    assert len(kv) == 1
    assert len(captions) == len(kinds)
    ingest(
        tmp_path / "else",
        pictures(14, seed=1),
        recipe="hybrid",
        codec=codec,
        settings=[*base, "caption=none"],
    )
    with reopened(tmp_path / "else") as db:
        assert db.digest(tier="kv")["film"] not in kv


def test_one_commit_covers_caption_vector_key_frame_and_kv(tmp_path: Path) -> None:
    """Every unit has all of them, over one span, and units meet without holes."""
    ingest(tmp_path / "s", pictures(10), recipe="hybrid", settings=["unit.frames=4", *SHORT_CAPTIONS])
    with reopened(tmp_path / "s") as db:
        units = db.store.units(db.store.recording("film").id)
        assert [(unit.start_ns // NS, unit.end_ns // NS) for unit in units] == [(0, 4), (4, 8), (8, 10)]
        assert all(a.end_ns == b.start_ns for a, b in pairwise(units))
        for unit in units:
            assert (unit.blocks["start_ns"][0], unit.blocks["end_ns"][-1]) == (unit.start_ns, unit.end_ns)
            assert len(db.store.read_caption(unit).vector) == wrapped().shape.embedding_size
            assert (db.store.read_keyframe(unit) or b"").startswith(b"\xff\xd8")
            assert db.store.read_keys(unit) is not None
            assert len(unit.slices) == len(unit.blocks) * wrapped().shape.layers
