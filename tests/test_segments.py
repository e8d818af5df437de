"""The byte form of records: round trips, torn tails at every length, and every flipped bit noticed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.codecs import planes
from memdb.records import Kind, decode_prologue, encode, read_body, read_record
from memdb.schemas.errors import CodecError, CorruptionError, StoreError
from memdb.schemas.rows import PART_DTYPE, Part
from memdb.schemas.units import BLOCK_DTYPE, SLICE_DTYPE
from memdb.segments import (
    OpenSegment,
    SegmentGone,
    SegmentWriter,
    next_prologue,
    parse_segment_name,
    reading,
    remove_segments,
    scan,
    segment_name,
)

ID = "0123456789abcdef" * 2
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
records = st.tuples(
    st.sampled_from(Kind),
    st.integers(0, 2**63 - 1),
    st.dictionaries(st.sampled_from(["a", "unit", "text"]), json_values, max_size=3),
    st.lists(st.tuples(st.sampled_from(Part), st.binary(max_size=200)), max_size=5, unique_by=lambda p: p[0]),
    st.integers(0, 3),
    st.integers(0, 3),
)


def memory_file(data: bytes) -> OpenSegment:
    fd = os.memfd_create("segment")
    os.write(fd, data)
    return OpenSegment(fd, len(data), "segments/fake.seg")


def three_records() -> tuple[bytes, list[int]]:
    """A small file and the offsets at which its records end."""
    data, previous, ends = b"", b"", []
    for number, (kind, parts) in enumerate(
        [(Kind.HEADER, []), (Kind.UNIT, [(Part.CAPTION, b"said"), (Part.KV, b"k" * 70)]), (Kind.END, [])]
    ):
        buffers, record = encode(
            kind,
            number,
            {"n": number},
            offset=len(data),
            previous=previous,
            parts=parts,
            slices=bytes(SLICE_DTYPE.itemsize),
        )
        data += b"".join(buffers)
        previous = record.footer_hash
        ends.append(record.end)
    return data, ends


@settings(max_examples=60, deadline=None)
@given(st.lists(records, min_size=1, max_size=4))
def test_records_come_back_as_they_were_written(wanted: list[tuple]) -> None:  # type: ignore[type-arg]
    data, previous = b"", b""
    for kind, number, meta, parts, blocks, slices in wanted:
        buffers, record = encode(
            kind,
            number,
            meta,
            offset=len(data),
            previous=previous,
            parts=parts,
            blocks=os.urandom(blocks * BLOCK_DTYPE.itemsize),
            slices=os.urandom(slices * SLICE_DTYPE.itemsize),
        )
        data += b"".join(buffers)
        assert record.end == len(data)
        assert record.end % 64 == 0
        previous = record.footer_hash
    segment = memory_file(data)
    try:
        found = scan(segment, 0, previous=b"", bodies=True)
        assert (found.end, found.torn) == (len(data), "")
        assert len(found.records) == len(wanted)
        for record, (kind, number, meta, parts, blocks, slices) in zip(found.records, wanted, strict=True):
            assert (record.kind, record.number) == (kind, number)
            assert {key: record.meta[key] for key in meta} == meta
            assert len(record.blocks) == blocks * BLOCK_DTYPE.itemsize
            assert len(record.slices) == slices * SLICE_DTYPE.itemsize
            body = read_body(segment.fd, record, segment.size_bytes, file=segment.file)
            table = np.frombuffer(record.parts, PART_DTYPE)
            assert all(row["offset"] % 64 == 0 for row in table)
            stored = [(row["part"], body[int(row["offset"]) :][: int(row["length"])]) for row in table]
            assert stored == parts
    finally:
        os.close(segment.fd)


def test_a_tail_torn_at_any_length_leaves_the_whole_records_before_it() -> None:
    data, ends = three_records()
    for length in range(len(data)):
        segment = memory_file(data[:length])
        try:
            found = scan(segment, 0, previous=b"", bodies=True)
            whole = [end for end in ends if end <= length]
            assert len(found.records) == len(whole)
            assert found.end == (whole[-1] if whole else 0)
            assert bool(found.torn) == (length != found.end)
        finally:
            os.close(segment.fd)


def test_a_scan_stops_at_the_record_with_a_flipped_bit() -> None:
    data, ends = three_records()
    for byte in range(len(data)):
        damaged = bytearray(data)
        damaged[byte] ^= 1 << byte % 8
        segment = memory_file(bytes(damaged))
        try:
            found = scan(segment, 0, previous=b"", bodies=True)
            assert found.torn
            assert len(found.records) == sum(end <= byte for end in ends)
        finally:
            os.close(segment.fd)


def test_sizes_that_a_prologue_claims_are_compared_with_the_file() -> None:
    from memdb.records import encode_prologue

    for body, footer in ((1 << 62, 64), (0, 1 << 62), (0, 0), (63, 64), (2**64 - 64, 128)):
        data = encode_prologue(Kind.UNIT, 0, body, footer) + bytes(256)
        segment = memory_file(data)
        try:
            with pytest.raises(CorruptionError):
                read_record(segment.fd, 0, segment.size_bytes, file=segment.file)
        finally:
            os.close(segment.fd)


def test_the_next_record_behind_damage_is_found() -> None:
    data, ends = three_records()
    damaged = bytearray(data)
    damaged[:64] = b"memdbREC" * 8  # the magic everywhere, no prologue anywhere
    segment = memory_file(bytes(damaged))
    try:
        assert next_prologue(segment, 0, len(data)) == ends[0]
        assert next_prologue(segment, ends[1] + 1, len(data)) is None
    finally:
        os.close(segment.fd)


def test_a_prologue_is_64_bytes_and_says_what_it_was_given() -> None:
    data, _ = three_records()
    prologue = decode_prologue(data[:64])
    assert prologue is not None
    assert (prologue.kind, prologue.number, prologue.body_bytes) == (Kind.HEADER, 0, 0)
    assert decode_prologue(data[:63]) is None


def test_names_follow_from_id_and_sequence_alone() -> None:
    name = segment_name(ID, 7)
    assert name == f"{ID}-000007.seg"
    assert parse_segment_name(name) == (ID, 7)
    for bad in ("../" + name, name + "/..", name.upper(), ID + ".seg", "x" * 32 + "-000000.seg", name + "\n"):
        assert parse_segment_name(bad) is None


def test_reading_refuses_names_and_links_that_lead_elsewhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    folder = tmp_path / "segments"
    folder.mkdir()
    (folder / segment_name(ID, 0)).symlink_to(outside)
    for name in ("../outside", segment_name(ID, 0), segment_name(ID, 1)):
        with pytest.raises(CorruptionError), reading(folder, name):
            pytest.fail("it was opened")


def test_a_writer_never_goes_on_in_a_file_that_exists(tmp_path: Path) -> None:
    (tmp_path / segment_name(ID, 0)).write_bytes(b"")
    with pytest.raises(FileExistsError):
        SegmentWriter(tmp_path, segment_name(ID, 0))
    with pytest.raises(StoreError, match="cannot make"):
        SegmentWriter(tmp_path / "missing", segment_name(ID, 0))


def test_a_segment_that_somebody_has_open_is_not_removed(tmp_path: Path) -> None:
    names = [segment_name(ID, number) for number in range(3)]
    writers = [SegmentWriter(tmp_path, name) for name in names]
    writers[1].close()
    writers[2].close()
    with reading(tmp_path, names[1]):
        assert remove_segments(tmp_path, names, "a test") == [names[2]]
    assert remove_segments(tmp_path, names, "a test") == [names[1], names[2]]
    writers[0].close()
    assert remove_segments(tmp_path, names, "a test") == names
    assert not list(tmp_path.iterdir())
    with pytest.raises(SegmentGone), reading(tmp_path, names[0]):
        pass


def test_more_buffers_than_one_call_takes_are_written_in_order(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, segment_name(ID, 0))
    pieces = [bytes([number % 251]) * (number % 5) for number in range(3000)]
    writer.append(pieces)
    writer.close()
    assert (tmp_path / segment_name(ID, 0)).read_bytes() == b"".join(pieces)
    assert writer.end_bytes == sum(map(len, pieces))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_byte_planes_round_trip(raw: bytes, element_bytes: int, level: int) -> None:
    data = np.frombuffer(raw, np.uint8)
    stored = planes.pack(data, element_bytes, level=level)
    assert planes.unpack(stored, len(raw), element_bytes).tobytes() == raw


def test_byte_planes_of_smooth_floats_are_smaller() -> None:
    raw = np.linspace(1, 1.01, 2048, dtype=np.float32).view(np.uint8)
    assert planes.pack(raw, 4).size < raw.size // 2


def test_nonsense_is_refused_within_bounds() -> None:
    raw = np.arange(200, dtype=np.uint8)
    stored = planes.pack(np.zeros(1 << 20, np.uint8), 2)  # a small frame that claims a mebibyte
    good = planes.pack(raw, 2)
    for data, size in (
        (stored, 200),
        (good[:-3], 200),
        (good[:2], 200),
        (good, 199),
        (raw, 200),
        (raw[:0], 0),
    ):
        with pytest.raises(CodecError):
            planes.unpack(data, size, 2)
    with pytest.raises(CodecError):
        planes.unpack(good, 200, planes.element_bytes("int4", "float32"))


def test_element_sizes_follow_from_codec_and_dtype() -> None:
    sizes = {
        codec: planes.element_bytes(codec, "float32") for codec in ("raw", "fp16", "bf16", "int8", "int4")
    }
    assert sizes == {"raw": 4, "fp16": 2, "bf16": 2, "int8": 0, "int4": 0}
    assert planes.element_bytes("raw", "bfloat16") == 2
    with pytest.raises(CodecError):
        planes.element_bytes("raw", "float8")
