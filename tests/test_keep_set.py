"""Keep sets: ids, the byte form, and what is refused of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb import keep_set
from memdb.contents import check_unit
from memdb.digest import digests_of
from memdb.memory import remembered
from memdb.schemas.errors import CodecError, CorruptionError, StoreError
from memdb.schemas.keep import KeepSet, split_ids, token_ids
from memdb.store import Store
from memdb.transfer import export_recording, import_recording
from tests.age_cases import MODEL, L, kv_unit
from tests.memory_cases import same_keep
from tests.store_cases import UNIT_NS, spec, unit

NUMBERS = st.tuples(st.integers(0, (1 << 31) - 1), st.integers(0, 65535), st.integers(0, 65535))
LAYERS = st.lists(st.sets(NUMBERS, max_size=40), max_size=4)


def made(layers: list[set[tuple[int, int, int]]], seed: int = 0) -> KeepSet:
    random = np.random.default_rng(seed)
    ids = [np.array(sorted((u << 32) | (b << 16) | t for u, b, t in layer), np.int64) for layer in layers]
    return KeepSet(tuple(ids), tuple(random.integers(0, 1 << 40, len(own)) for own in ids))


@given(layers=LAYERS)
def test_ids_sort_as_unit_block_and_token_do(layers: list[set[tuple[int, int, int]]]) -> None:
    for layer in layers:
        numbers = sorted(layer)
        ids = [int(token_ids(u, b, t)) for u, b, t in numbers]
        assert ids == sorted(ids)
        parts = split_ids(np.array(ids, np.int64))
        assert list(zip(*(part.tolist() for part in parts), strict=True)) == numbers


@given(layers=LAYERS, seed=st.integers(0, 99))
def test_a_keep_set_comes_back_as_it_went(layers: list[set[tuple[int, int, int]]], seed: int) -> None:
    keep = made(layers, seed)
    assert same_keep(keep_set.decode(keep_set.encode(keep)), keep)


@settings(max_examples=300)
@given(layers=LAYERS, at=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_a_changed_byte_form_is_refused_or_another_set(
    layers: list[set[tuple[int, int, int]]], at: int, bit: int
) -> None:
    """The part's checksum is what finds a flipped bit; behind it, nothing but CodecError may come of one."""
    data = bytearray(keep_set.encode(made(layers)))
    data[at % len(data)] ^= 1 << bit
    try:
        found = keep_set.decode(bytes(data))
    except CodecError:
        return
    assert all((np.diff(ids) > 0).all() for ids in found.ids)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 11, -1])
def test_a_cut_byte_form_is_refused(cut: int) -> None:
    whole = keep_set.encode(made([{(0, 0, 1), (3, 1, 2)}, {(1, 1, 1)}]))
    with pytest.raises(CodecError):
        keep_set.decode(whole[:cut])
    with pytest.raises(CodecError):
        keep_set.decode(whole + b"\0")


def test_a_head_that_lies_allocates_nothing() -> None:
    head = b"\x01\0\0\0" + (1).to_bytes(4, "little") + (0xFFFFFFFF).to_bytes(4, "little")
    with pytest.raises(CodecError, match="cannot be"):
        keep_set.decode(head + b"x")


def test_its_bytes_are_bounded_by_the_budget_whatever_the_stream() -> None:
    """6,000 tokens of 28 layers, evenly spread over ten hours: under 1 % of the int4 KV of eight frames of a 7B."""
    random = np.random.default_rng(0)
    stream = 18_000 * 196
    position = np.sort(random.choice(stream, 6_000, replace=False))
    frame, token = np.divmod(position, 196)
    ids = token_ids(frame // 8, frame % 8, token)
    size = len(keep_set.encode(KeepSet((ids,) * 28, (position,) * 28)))
    frames_bytes = 8 * 196 * 28 * 2 * 512 // 2
    assert size < 0.01 * frames_bytes
    apart = [np.sort(random.choice(stream, 6_000, replace=False)) for _ in range(28)]  # nothing in common
    each = [token_ids(p // 196 // 8, p // 196 % 8, p % 196) for p in apart]
    assert len(keep_set.encode(KeepSet(tuple(each), tuple(apart)))) < 0.05 * frames_bytes


def test_the_digest_covers_it() -> None:
    plain = unit(2)
    kept = [replace(plain, keep=made([{(0, 0, token)}, {(2, 1, 3)}])) for token in (1, 2)]
    found = [digests_of(one).all for one in (plain, *kept)]
    assert len(set(found)) == 3
    moved = replace(kept[0].keep, positions=(np.array([5]), np.array([9])))
    assert digests_of(replace(plain, keep=moved)).all not in found
    assert len({digests_of(one).captions for one in (plain, *kept)}) == 1


@pytest.mark.parametrize(
    "number",
    [(3, 0, 0), (2, 2, 0), (2, 0, 4), (2, 65535, 0)],
)
def test_a_unit_whose_keep_set_tells_of_what_cannot_be_is_refused(number: tuple[int, int, int]) -> None:
    """Unit 2 has two blocks of four tokens: a later unit, a third block, a fifth token."""
    check_unit(replace(unit(2), keep=made([{(0, 9, 9), (2, 1, 3)}])))
    with pytest.raises(StoreError, match="keep set"):
        check_unit(replace(unit(2), keep=made([{number}])))


def test_an_import_refuses_a_keep_set_of_other_layers_than_the_model_has(tmp_path: Path) -> None:
    with Store.open(tmp_path / "a.memdb", create=True, write=True) as store:
        with store.writer(spec(codec="raw", model=MODEL)) as writer:
            keep = made([{(0, 0, 1)}] * (L - 1))
            writer.append([replace(kv_unit(0, UNIT_NS, "raw"), keep=keep)])
        assert remembered(store, store.recording("lobby")).keep is None, "and a question goes without it"
    export_recording(tmp_path / "a.memdb", "lobby", tmp_path / "lobby.copy")
    with (
        Store.open(tmp_path / "b.memdb", create=True, write=True) as store,
        pytest.raises(CorruptionError, match="keep set is not of the 2 layers"),
    ):
        import_recording(store, tmp_path / "lobby.copy")


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 3_000), frames=st.integers(20, 18_000), seed=st.integers(0, 99))
def test_the_size_of_a_unit_counts_at_least_what_its_keep_set_takes(
    tokens: int, frames: int, seed: int
) -> None:
    """It decides whether a commit still fits, and how often states are saved."""
    random = np.random.default_rng(seed)
    position = np.sort(random.choice(frames * 196, tokens, replace=False))
    ids = token_ids(position // 196 // 8, position // 196 % 8, position % 196)
    keep = KeepSet((ids,), (position,))
    plain = replace(unit(2), keep=None)
    said = replace(plain, keep=keep).payload_bytes - plain.payload_bytes
    assert len(keep_set.encode(keep)) <= said
