"""With the indexer stopped, another process finds the unit committed last: by vector, words, both, and KV."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import memdb.client
from memdb.captions import CaptionIndex
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.store import Store
from tests.question_cases import MODEL, SMALL, House

LOOK = """
import json, sys
from memdb.client import connect
from memdb.store import Store
with connect(sys.argv[1], create=False) as db:
    row = db.store.recording("late")
    last = db.store.unit(row.id, row.units - 1)
    text = db.store.read_caption(last).text
    hits = db.search(text, recording="late", limit=1)
    answer = db.ask("What is to be seen now?", recording="late", mode="recent")
    kv = db.ask("What was to be seen?", recording="late", mode="kv")
    captions = db.ask(text, recording="late", mode="captions")
print(json.dumps({
    "hit": [hits[0].start_s, hits[0].end_s], "last": [last.start_ns / 1e9, last.end_ns / 1e9],
    "recent": max(item.end_s for item in answer.evidence), "watermarks": [answer.watermark_s, kv.watermark_s],
    "captions": [item.end_s for item in captions.evidence], "kv": [item.tier for item in kv.evidence],
}))
"""


@pytest.fixture
def late(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recording whose derived indexes were never made."""
    monkeypatch.setattr("memdb.ingest.job.indexer", lambda store, spec: lambda flush: None)
    path = tmp_path / "late.memdb"
    with memdb.client.connect(path, model=MODEL) as client:
        client.ingest(house.film, recording="late", recipe="hybrid", settings=SMALL["hybrid"], sample_fps=1.0)
    assert not (path / "keys").exists()
    assert not (path / "captions.lance").exists()
    return path


def test_another_process_finds_the_unit_committed_last(late: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", LOOK, str(late)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["hit"] == found["last"]
    assert found["recent"] == found["last"][1]
    assert found["watermarks"] == [found["last"][1]] * 2
    assert found["last"][1] in found["captions"]
    assert "kv" in found["kv"]


def test_each_search_finds_the_last_unit_by_its_own_key(late: Path) -> None:
    with Store.open(late) as store:
        row = store.recording("late")
        last = store.unit(row.id, row.units - 1)
        caption, keys = store.read_caption(last), store.read_keys(last)
        assert keys is not None
        index, encoder = CaptionIndex(store.path), row.spec.caption_encoder
        for how in ({"vector": caption.vector}, {"text": caption.text}):
            hits = index.search(store, encoder, limit=1, **how)  # type: ignore[arg-type]
            assert [hit.unit for hit in hits] == [last.number]
        both = index.search(store, encoder, vector=caption.vector, text=caption.text, limit=1)
        assert [hit.unit for hit in both] == [last.number]
        with KeyTable.open(store, row.id) as table:
            search = KeySearch(table, sim="cos")
            for layer in range(keys.shape[0]):
                rows = search.search(layer, keys[layer, -1].astype(np.float32), 1).rows
                assert table.blocks[rows]["unit"].tolist() == [last.number]
