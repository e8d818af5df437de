"""Captions as files that other programs read: JSON lines and subtitles, whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from memdb.client import Client
from memdb.export import export
from memdb.schemas.errors import CorruptionError, UnknownRecording, UsageError
from memdb.schemas.rows import Part
from memdb.schemas.units import Caption
from memdb.store import Store
from tests import store_cases as cases
from tests.question_cases import House


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[Client]:
    with house.open() as found:
        yield found


def said(client: Client, name: str) -> list[tuple[int, int, str]]:
    units = client.store.units(client.store.recording(name).id)
    return [(unit.start_ns, unit.end_ns, client.store.read_caption(unit).text) for unit in units]


def test_json_lines_hold_every_caption_in_time_order(client: Client, tmp_path: Path) -> None:
    for name in ("hall", "roof"):
        out = tmp_path / f"{name}.jsonl"
        count = client.export(name, out)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == count == 6
        found = [(round(row["start_s"] * 1e9), round(row["end_s"] * 1e9), row["caption"]) for row in rows]
        assert found == said(client, name)
    hall, roof = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("hall", "roof")
    )
    assert [row["start_at"] for row in hall][:2] == ["2026-11-20T08:00:00.000Z", "2026-11-20T08:00:04.000Z"]
    assert all("start_at" not in row for row in roof)


def test_subtitles_are_numbered_spans(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "hall.srt"
    assert client.export("hall", out, format="srt") == 6
    cues = out.read_text(encoding="utf-8").strip().split("\n\n")
    for number, (cue, (start_ns, end_ns, text)) in enumerate(zip(cues, said(client, "hall"), strict=True), 1):
        head, span, body = cue.split("\n")
        assert head == str(number)
        times = re.fullmatch(r"(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})", span)
        assert times is not None
        h, m, s, ms, *end = map(int, times.groups())
        assert ((h * 60 + m) * 60 + s) * 1000 + ms == start_ns // 10**6
        h, m, s, ms = end
        assert ((h * 60 + m) * 60 + s) * 1000 + ms == end_ns // 10**6
        assert body == " ".join(text.split())


class Fake:
    """A store of one recording with given captions."""

    def __init__(self, store: Store, texts: list[str]) -> None:
        self._store, self._texts = store, texts

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def read_caption(self, row: object) -> Caption:
        return Caption(self._texts[row.number], (), ())  # type: ignore[attr-defined]


def test_odd_texts_stay_one_cue_and_one_line(tmp_path: Path) -> None:
    texts = ["two\n\nparagraphs", " \t", "1\n00:00:00,000 --> 00:00:01,000", 'a "quote" — ✓\u2028and \x0b on']
    with cases.new_store(tmp_path) as store:
        cases.fill(store, len(texts))
        fake = Fake(store, texts)
        export(fake, "lobby", tmp_path / "a.srt", "srt")  # type: ignore[arg-type]
        export(fake, "lobby", tmp_path / "a.jsonl", "jsonl")  # type: ignore[arg-type]
    lines = (tmp_path / "a.srt").read_text(encoding="utf-8").split("\n")
    assert [lines[i] for i in range(0, 16, 4)] == ["1", "2", "3", "4"]
    assert [lines[i] for i in range(2, 16, 4)] == [" ".join(text.split()) for text in texts]
    rows = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(row)["caption"] for row in rows if row] == texts


def test_nothing_is_written_where_something_is_damaged(tmp_path: Path) -> None:
    out = tmp_path / "lobby.jsonl"
    out.write_text("as it was")
    with cases.new_store(tmp_path) as store:
        cases.fill(store, 4)
        unit = store.units(store.recording("lobby").id)[3]
        cases.flip(store.segments_path / unit.segment, unit.parts[Part.CAPTION].offset + 2)
        with pytest.raises(CorruptionError, match="nothing was written"):
            export(store, "lobby", out, "jsonl")
    assert out.read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [out.name]


def test_what_cannot_be_exported_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format 'vtt': choose one of jsonl, srt"):
        client.export("hall", tmp_path / "x", format="vtt")
    with pytest.raises(UsageError, match="has no captions"):
        client.export("yard", tmp_path / "x")
    with pytest.raises(UnknownRecording):
        client.export("cellar", tmp_path / "x")
    with pytest.raises(UsageError, match="name another file with --out"):
        client.export("hall", tmp_path / "missing" / "x")
    assert list(tmp_path.iterdir()) == []
