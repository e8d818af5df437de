"""Units that a compaction moves or writes anew between two reads, and units of several codecs in one recording."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.codecs import NAMES, codec
from memdb.codecs.pack import pack_unit
from memdb.database import row_checksum
from memdb.models.window import LayerKV
from memdb.query.stored import Readings, StoredKV
from memdb.reader import SliceReader
from memdb.schemas.errors import CorruptionError
from memdb.schemas.rows import UnitRow
from memdb.schemas.units import Unit
from memdb.segments import segment_name
from memdb.store import Store
from memdb.tables import COLUMNS
from tests.store_cases import LAYERS, MODEL, fill, new_store, raw_slices, spec, unit
from tests.test_absurd_rows import reseal

HEADS, HEAD_SIZE = MODEL.shape.kv_heads, MODEL.shape.head_size
CPU = torch.device("cpu")
every = np.arange(2 * LAYERS)


def rows_of(store: Store) -> list[UnitRow]:
    return store.units(store.recording("lobby").id)


def move(store: Store, *, sequence: int = 7) -> None:
    """Every unit to another file, as a compaction leaves the store: the old file is deleted."""
    recording = store.recording("lobby").id
    old, new = rows_of(store)[0].segment, segment_name(recording, sequence)
    shutil.copyfile(store.segments_path / old, store.segments_path / new)
    for row in rows_of(store):
        rewrite(store, replace(row, segment=new))
    (store.segments_path / old).unlink()


def rewrite(store: Store, row: UnitRow) -> None:
    """Put another row of a unit into the catalog."""
    values = [getattr(row, field.name) for field in fields(row)]
    names = COLUMNS["units"]
    assert len(names) == len(values)
    assignments = ", ".join(f"{name} = ?" for name in (*names, "checksum"))
    with sqlite3.connect(store.path / "catalog.sqlite") as connection:
        connection.execute(
            f"UPDATE units SET {assignments} WHERE recording = ? AND number = ?",
            (*values, row_checksum("units", values), row.recording_id, row.number),
        )
    connection.close()


# A file that is gone


def test_a_reader_finds_what_was_moved(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 4)
        wanted = [(row, every) for row in rows_of(store)]
        expected = np.stack([raw for number in range(4) for raw in raw_slices(number, 2, "int4")])
        with SliceReader(store) as reader:
            assert np.array_equal(reader.read(wanted).stacked(), expected)
            move(store)
            batch = reader.read(wanted)
            assert batch.bad == []
            assert np.array_equal(batch.stacked(), expected)
            assert [row.number for row in batch.renewed] == [0, 1, 2, 3]
            assert batch.renewed[0].segment == rows_of(store)[0].segment != wanted[0][0].segment


def test_parts_are_read_where_they_were_moved_to(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 4)
        rows = rows_of(store)
        before = [(store.read_caption(row), store.read_keyframe(row), store.read_keys(row)) for row in rows]
        move(store)
        for row, (caption, keyframe, keys) in zip(rows, before, strict=True):
            assert store.read_caption(row) == caption
            assert store.read_keyframe(row) == keyframe
            found = store.read_keys(row)
            assert keys is not None
            assert found is not None
            assert np.array_equal(found, keys)


def test_what_is_gone_and_was_not_moved_is_damage(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 2)
        rows = rows_of(store)
        (store.segments_path / rows[0].segment).unlink()
        with SliceReader(store) as reader:
            batch = reader.read([(row, every) for row in rows])
        assert [bad.index for bad in batch.bad] == list(range(8))
        with pytest.raises(CorruptionError):
            store.read_caption(rows[0])


def test_a_question_holds_on_to_the_files_that_it_reads(tmp_path: Path) -> None:
    """Inside `pinned` the files stay open: what was deleted meanwhile is still read, and is read from there."""
    with new_store(tmp_path) as store:
        fill(store, 2)
        wanted = [(row, every) for row in rows_of(store)]
        with SliceReader(store) as reader:
            with reader.pinned():
                first = reader.read(wanted).stacked().copy()
                (store.segments_path / wanted[0][0].segment).unlink()
                assert np.array_equal(reader.read(wanted).stacked(), first)
            assert len(reader.read(wanted).bad) == 8


# Codecs that differ from unit to unit


def tensors(number: int, blocks: int, tokens: Sequence[int]) -> list[list[LayerKV]]:
    """Per layer, per block its keys and values: what a unit holds, from its number alone."""
    random = torch.Generator().manual_seed(number)
    return [
        [
            LayerKV(*(torch.randn(HEADS, tokens[block], HEAD_SIZE, generator=random) for _ in range(2)))
            for block in range(blocks)
        ]
        for _ in range(LAYERS)
    ]


def plain(name: str, kv: LayerKV, width: int) -> LayerKV:
    """What a codec gives back of one block: packed and unpacked alone."""
    chosen, T = codec(name), kv.tokens
    packed = chosen.pack(kv.k[None], kv.v[None], width)
    k, v = chosen.unpack(packed, torch.float32, width, HEADS, T, HEAD_SIZE, torch.float32)
    return LayerKV(k[0], v[0])


def mixed_store(folder: Path, made: Sequence[tuple[str, int]]) -> tuple[Store, list[list[LayerKV]]]:
    """A recording whose units have a codec and a number of tokens of their own; per layer, what its blocks hold."""
    store = new_store(folder)
    truth: list[list[LayerKV]] = [[] for _ in range(LAYERS)]
    with store.writer(spec(codec="raw")) as writer:
        for number, (name, tokens) in enumerate(made):
            layers = tensors(number, 2, (tokens, tokens))
            kv = pack_unit(codec(name), layers, {}, torch.float32)
            blocks = unit(number).blocks.copy()
            blocks["tokens"] = tokens
            plain_unit = unit(number)
            assert plain_unit.keys is not None
            writer.append([replace_kv(plain_unit, blocks, kv)])
            for layer in range(LAYERS):
                width = int(kv.slices["scale_bytes"][kv.slices["layer"] == layer][0])
                truth[layer] += [plain(name, block, width) for block in layers[layer]]
    for number, (name, _) in enumerate(made):
        rewrite(store, replace(rows_of(store)[number], codec="" if name == "raw" else name))
    return store, truth


def replace_kv(made: Unit, blocks: npt.NDArray[np.void], kv: object) -> Unit:
    return replace(made, blocks=blocks, kv=kv)  # type: ignore[arg-type]


def joined(blocks: Sequence[LayerKV]) -> LayerKV:
    return LayerKV(torch.cat([block.k for block in blocks], 1), torch.cat([block.v for block in blocks], 1))


@settings(max_examples=15, deadline=None)
@given(
    made=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from([1, 4, 5])), min_size=1, max_size=5),
    data=st.data(),
)
def test_blocks_of_several_codecs_come_in_time_order(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[str, int]], data: st.DataObject
) -> None:
    store, truth = mixed_store(tmp_path_factory.mktemp("mixed"), made)
    chosen = data.draw(st.sets(st.integers(0, 2 * len(made) - 1), min_size=1))
    rows = np.array(sorted(chosen))
    with store, SliceReader(store) as reader:
        kv = StoredKV(store, store.recording("lobby"), reader, backend="exact", sim="dot")
        readings = Readings()
        for layer in range(LAYERS):
            found, whole = kv.read(layer, rows, CPU, torch.float32, readings)
            expected = joined([truth[layer][row] for row in rows])
            assert found is not None
            assert np.array_equal(whole, rows)
            assert torch.equal(found.k, expected.k)
            assert torch.equal(found.v, expected.v)
        with kv.knowing([rows] * LAYERS, readings):  # several layers a read: the same
            for layer in range(LAYERS):
                found, _ = kv.read(layer, rows, CPU, torch.float32, readings)
                assert found is not None
                assert torch.equal(found.k, joined([truth[layer][row] for row in rows]).k)
        assert readings.bad == []
        assert readings.calls == LAYERS + 1
        kv.close()


def test_a_damaged_slice_among_several_codecs_costs_only_itself(tmp_path: Path) -> None:
    store, truth = mixed_store(tmp_path, [("int8", 4), ("int4", 4), ("raw", 5)])
    rows = np.arange(6)
    with store, SliceReader(store) as reader:
        row = rows_of(store)[1]
        piece = row.slices[1]  # layer 0, block 1 of unit 1: row 3
        path = store.segments_path / row.segment
        data = bytearray(path.read_bytes())
        data[row.payload_offset + int(piece["offset"]) + 3] ^= 1
        path.write_bytes(data)
        kv = StoredKV(store, store.recording("lobby"), reader, backend="exact", sim="dot")
        readings = Readings()
        found, whole = kv.read(0, rows, CPU, torch.float32, readings)
        assert whole.tolist() == [0, 1, 2, 4, 5]
        assert found is not None
        assert torch.equal(found.v, joined([truth[0][at] for at in whole]).v)
        assert len(readings.bad) == 1
        assert "unit 1, block 1, layer 0" in readings.bad[0]
        kv.close()


@pytest.mark.parametrize(
    ("column", "value"), [("tokens", (1 << 32) - 1), ("tokens", 400), ("scale_bytes", 7)]
)
def test_a_slice_of_more_tokens_than_its_bytes_hold_is_bad_and_takes_no_memory(
    tmp_path: Path, column: str, value: int
) -> None:
    """Under right checksums: place was made for the keys and values of four milliards of tokens."""
    store, truth = mixed_store(tmp_path, [("int4", 4), ("raw", 4)])
    path, row = store.path, rows_of(store)[0]
    store.close()
    slices = row.slices.copy()
    slices[column][1] = value  # layer 0, block 1 of unit 0: row 1
    reseal(path, "units", "slices", slices.tobytes())
    rows = np.arange(4)
    with Store.open(path) as store, SliceReader(store) as reader:
        kv = StoredKV(store, store.recording("lobby"), reader, backend="exact", sim="dot")
        before, readings = kv.tokens(rows).tolist(), Readings()
        found, whole = kv.read(0, rows, CPU, torch.float32, readings)
        assert whole.tolist() == [0, 2, 3]
        assert found is not None
        assert torch.equal(found.k, joined([truth[0][at] for at in whole]).k)
        assert "unit 0, block 1, layer 0: its size is not that of its tokens" in readings.bad[0]
        assert len(readings.bad) == 1
        assert kv.tokens(rows).tolist() == before
        kv.close()


def test_a_unit_that_ageing_wrote_anew_is_read_in_its_new_codec(tmp_path: Path) -> None:
    """Between two reads of one connection: another file, another codec, other sizes."""
    store, truth = mixed_store(tmp_path / "a", [("raw", 4), ("raw", 4)])
    aged, aged_truth = mixed_store(tmp_path / "b", [("int4", 4), ("int4", 4)])
    rows = np.arange(4)
    with store, aged, SliceReader(store) as reader:
        kv = StoredKV(store, store.recording("lobby"), reader, backend="exact", sim="dot")
        readings = Readings()
        first, _ = kv.read(1, rows, CPU, torch.float32, readings)
        assert first is not None
        assert torch.equal(first.k, joined(truth[1]).k)
        recording, old = store.recording("lobby").id, rows_of(store)[0].segment
        name = segment_name(recording, 3)
        shutil.copyfile(aged.segments_path / rows_of(aged)[0].segment, store.segments_path / name)
        for row in rows_of(aged):
            rewrite(store, replace(row, recording_id=recording, segment=name))
        (store.segments_path / old).unlink()
        for _ in range(2):  # once by a fresh snapshot, once with what that left
            found, whole = kv.read(1, rows, CPU, torch.float32, readings)
            assert np.array_equal(whole, rows)
            assert found is not None
            assert torch.equal(found.k, joined(aged_truth[1]).k)
        assert readings.bad == []
        kv.close()


def test_a_block_that_its_unit_does_not_hold_any_more_is_a_bad_slice(tmp_path: Path) -> None:
    store, truth = mixed_store(tmp_path, [("int8", 4), ("int8", 4)])
    with store, SliceReader(store) as reader:
        kv = StoredKV(store, store.recording("lobby"), reader, backend="exact", sim="dot")
        row = rows_of(store)[0]
        kept = row.slices[row.slices["block"] != 0]
        rewrite(store, replace(row, slices_table=kept.tobytes()))
        readings = Readings()
        found, whole = kv.read(1, np.arange(4), CPU, torch.float32, readings)
        assert whole.tolist() == [1, 2, 3]
        assert found is not None
        assert torch.equal(found.k, joined(truth[1][1:]).k)
        assert "unit 0, block 0, layer 1: the catalog knows no place of it" in readings.bad[0]
        kv.close()


def test_keys_and_values_are_nobodys_buffer(tmp_path: Path) -> None:
    """A single block of a codec that stores what it gets unpacks to a copy, not to a view of the next read."""
    store, truth = mixed_store(tmp_path, [("raw", 4), ("raw", 4)])
    with store, SliceReader(store) as reader:
        kv = StoredKV(store, store.recording("lobby"), reader, backend="exact", sim="dot")
        readings = Readings()
        first, _ = kv.read(0, np.array([0]), CPU, torch.float32, readings)
        kv.read(0, np.array([3]), CPU, torch.float32, readings)
        assert first is not None
        assert torch.equal(first.k, truth[0][0].k)
        assert torch.equal(first.v, truth[0][0].v)
        kv.close()
