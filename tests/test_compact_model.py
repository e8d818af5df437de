"""The bytes of a forgotten face: a real store by a real, if tiny, Video-LLM, searched file by file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memdb.bm25 import words_of
from memdb.codecs import planes
from memdb.schemas.units import Unit
from memdb.sealed import read_unit
from memdb.store import Store
from tests import run_cases
from tests.needle_cases import holders, needles

SPAN_S = (15.0, 24.0)  # the end of the film: the window and the state hold of it


def units_of(path: Path, start_s: float, end_s: float) -> list[Unit]:
    with Store.open(path) as store:
        row = store.recording(run_cases.NAME)
        found = store.units(row.id, start_ns=int(start_s * 1e9), end_ns=int(end_s * 1e9))
        return [read_unit(store.segments_path, row, unit) for unit in found]


def tensor_rows(unit: Unit, head_size: int) -> dict[str, bytes]:
    """Keys of single tokens as the model computed them: what a saved window holds of them."""
    assert unit.kv is not None
    found = {}
    for number, piece in enumerate(unit.kv.slices):
        start, size = int(piece["offset"]), int(piece["stored_bytes"])
        raw = unit.kv.payload[start : start + size]
        if size < piece["raw_bytes"]:
            raw = planes.unpack(raw, int(piece["raw_bytes"]), 4)
        rows = raw[: len(raw) // 2].view(np.float32).reshape(-1, head_size)
        found |= {f"tensor {number} {at}": row.tobytes() for at, row in enumerate(rows[:4]) if row.any()}
    return found


def wanted_of(units: list[Unit], head_size: int) -> dict[str, bytes]:
    wanted: dict[str, bytes] = {}
    for unit in units:
        for name, data in {**needles(unit), **tensor_rows(unit, head_size)}.items():
            wanted[f"{name} of unit {unit.number}"] = data
    return wanted


def test_nothing_of_a_forgotten_span_is_left_on_the_disk(tmp_path: Path) -> None:
    model = run_cases.small_model(run_cases.small_spec(tmp_path))
    film = run_cases.small_film(tmp_path / "film.mp4")
    path = tmp_path / "s.memdb"
    run_cases.ingested(path, model, film, "hybrid", codec="raw")
    units = units_of(path, *SPAN_S)
    kept = units_of(path, 0, SPAN_S[0])
    wanted = wanted_of(units, model.shape.head_size)
    others = wanted_of(kept, model.shape.head_size)
    shared = {data for data in others.values() if data in set(wanted.values())}
    wanted = {name: data for name, data in wanted.items() if data not in shared}

    found = holders(path, wanted)
    assert {name.split(" ")[0] for name in found} == {
        "caption",
        "vector",
        "picture",
        "key",
        "slice",
        "tensor",
    }
    folders = {
        kind: {file.split("/")[0] for name, files in found.items() if name.startswith(kind) for file in files}
        for kind in ("vector", "key ", "tensor", "slice", "picture")
    }
    assert {"segments", "keys", "captions.lance"} <= folders["vector"]
    assert {"segments", "keys"} <= folders["key "]
    assert "state" in folders["tensor"]
    assert "segments" in folders["slice"] & folders["picture"]

    with run_cases.opened(path, model, create=False) as client:
        client.forget(run_cases.NAME, start_s=SPAN_S[0], end_s=SPAN_S[1])
        still = client.digest()
        report = client.compact()
        assert report.left == []
        assert [left for done in report.recordings for left in done.left] == []
        assert client.digest() == still
        assert client.verify().ok
        answer = client.ask("what is there?", mode="both")
        assert all(item.start_s < SPAN_S[0] for item in answer.evidence)
    assert holders(path, wanted) == {}
    assert holders(path, others)
    # What was said of the span goes from the index of words, too.
    said = {word for unit in units if unit.caption for word in words_of(unit.caption.text)}
    said -= {word for unit in kept if unit.caption for word in words_of(unit.caption.text)}
    rare = {word: word.encode() for word in said if len(word) >= 6}
    assert holders(path / "captions.lance", rare) == {}
