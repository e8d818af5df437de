"""Bad input through the command: one line that says what to do, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memdb.models.protocol import VideoModel
from memdb.models.random_llava import save_random_llava
from memdb.query import engine
from memdb.schemas.rows import Part, UnitRow
from memdb.store import Store
from tests.film_cases import closed_port, truncated, write_film, write_tone
from tests.run_cases import (
    CHUNK,
    NAME,
    SMALL,
    Ran,
    command,
    ingest_words,
    ingested,
    run,
    small_film,
    small_model,
    small_spec,
    unit_digests,
    unit_rows,
)
from tests.store_cases import directory_digest, flip
from tests.test_catalog import set_format

QUESTION = "what is shown?"
FRAMES = 16


@dataclass(frozen=True)
class House:
    folder: Path
    spec: str
    model: VideoModel
    film: Path
    store: Path  # a finished recording in `hybrid`, both tiers

    def ingest(self, film: Path | str, store: Path, recipe: str = "rekv") -> list[str]:
        """Words of an ingest; what is appended wins over what stands there."""
        return ingest_words(store, self.spec, film, recipe)

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.store, folder / "copy.memdb"))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    spec = small_spec(folder)
    model, film, store = small_model(spec), small_film(folder / "film.mp4", FRAMES), folder / "s.memdb"
    ingested(store, model, film, "hybrid")
    ran = command("ask", QUESTION, "--store", str(store), "--mode", "both")  # costs are measured once
    assert ran.code == 0, ran.err
    return House(folder, spec, model, film, store)


def refused(ran: Ran, code: int, *words: str) -> None:
    """One line on stderr that names all of `words`, nothing on stdout."""
    assert ran.code == code, ran
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("memdb: ")
    for word in words:
        assert word in lines[0]
    assert len(lines[0]) > 30, "it says what to do"


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    before = [directory_digest(folder) for folder in folders]
    yield
    assert [directory_digest(folder) for folder in folders] == before


def ask(store: Path, *words: str, mode: str = "kv") -> Ran:
    return command("ask", QUESTION, "--store", str(store), "--mode", mode, *words)


def told(answer: Any) -> tuple[Any, ...]:
    """What an answer says, without how long it took."""
    return answer["text"], answer["evidence"], answer["watermark_s"], answer["plan"]["mode"]


# Films


def _broken_pictures(folder: Path) -> Path:
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    return folder


NO_FILMS: dict[str, tuple[Callable[[Path, Path], Path | str], str]] = {
    "missing": (lambda folder, film: folder / "missing.mp4", "does not exist"),
    "below a file": (lambda folder, film: film / "x.mp4", "cannot be read"),
    "a dangling link": (lambda folder, film: _link(folder / "link.mp4", folder / "gone.mp4"), "not exist"),
    "a pipe": (lambda folder, film: _pipe(folder / "pipe.mp4"), "not a plain file"),
    "a device": (lambda folder, film: "/dev/null", "not a plain file"),
    "empty": (lambda folder, film: _file(folder / "empty.mp4", b""), "is empty"),
    "a text": (lambda folder, film: _file(folder / "notes.txt", b"words and words\n" * 99), "give a"),
    "a text named as a film": (lambda folder, film: _file(folder / "f.mp4", b"words\n" * 99), "give a film"),
    "noise": (lambda folder, film: _file(folder / "f.mkv", np.random.default_rng(0).bytes(9999)), "give a"),
    "zeros": (lambda folder, film: _file(folder / "f.mp4", bytes(9999)), "give a film"),
    "cut mp4": (lambda folder, film: truncated(_copy(film, folder), 0.5), "moov"),
    "only sound": (lambda folder, film: write_tone(folder / "tone.mp4", 500), "no video track"),
    "a folder without pictures": (lambda folder, film: folder, "holds no pictures"),
    "a folder of broken pictures": (lambda folder, film: _broken_pictures(folder), "can be read"),
    "an unknown scheme": (lambda folder, film: "ftp://camera/film.mp4", "are not read"),
    "no host": (lambda folder, film: "rtsp://", "no host"),
    "nobody there": (lambda folder, film: f"http://127.0.0.1:{closed_port()}/f.ts", "check the address"),
    "nothing": (lambda folder, film: "", "empty path"),
    "a name that no file has": (lambda folder, film: "x" * 5000, "cannot be read"),
    "no film but a store": (lambda folder, film: film.with_name("s.memdb"), "holds no pictures"),
}


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _copy(film: Path, folder: Path) -> Path:
    return Path(shutil.copy(film, folder))


@pytest.mark.parametrize("kind", NO_FILMS)
def test_what_is_no_film_is_refused(house: House, kind: str, tmp_path: Path) -> None:
    make, words = NO_FILMS[kind]
    film = make(tmp_path, house.film)
    with unchanged(house.store):
        refused(command(*house.ingest(film, house.store), "--recording", "new", "--json"), 1, words)


def test_a_film_that_may_not_be_read(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The administrator may read everything, so the refusal is the system's by proxy."""
    film = _copy(house.film, tmp_path)
    plain = Path.open

    def forbidden(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == film:
            raise PermissionError(13, "Permission denied")
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", forbidden)
    with unchanged(house.store):
        refused(command(*house.ingest(film, house.store), "--recording", "new"), 1, "may not be read")


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_a_film_that_breaks_off_is_kept_as_far_as_it_goes(house: House, suffix: str, tmp_path: Path) -> None:
    """Exit code 0, a warning with the time, and the units that the whole film would have given up to there."""
    film = write_film(tmp_path / f"film.{suffix}", [250 * number for number in range(80)])
    whole, cut = tmp_path / "whole.memdb", tmp_path / "cut.memdb"
    assert command(*house.ingest(film, whole)).code == 0
    ran = command(*house.ingest(truncated(film, 0.6), cut), "--json")
    assert ran.code == 0, ran.err
    warnings = [warning for warning in ran.json["warnings"] if "breaks off" in warning]
    kept = unit_digests(cut)
    assert 0.4 * 20 < len(kept) < 0.7 * 20
    assert ran.json["units"] == len(kept)
    assert len(kept) - 1 < ran.json["watermark_s"] <= len(kept)
    full = len(kept) // CHUNK * CHUNK  # the last batch is shorter than the whole film's
    assert kept[:full] == unit_digests(whole)[:full]
    answer = ask(cut, "--json").json
    assert answer["watermark_s"] == ran.json["watermark_s"]
    if suffix == "mkv":
        assert len(warnings) == 1, ran.json["warnings"]
        again = command(*house.ingest(truncated(film, 0.6), tmp_path / "again.memdb"))
        assert again.code == 0
        assert [line for line in again.err.splitlines() if line.startswith("warning: ")]


# Stores


@pytest.mark.parametrize(
    "words",
    [
        ["ask", QUESTION],
        ["search", "star"],
        ["recordings"],
        ["stats"],
        ["verify"],
        ["digest"],
        ["export", "--recording", NAME, "--out", "out.jsonl"],
    ],
    ids=lambda words: words[0],
)
def test_what_is_no_store_is_refused_and_left_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign, empty = tmp_path / "foreign", tmp_path / "empty"
    foreign.mkdir()
    empty.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with unchanged(tmp_path):
        refused(command(*words, "--store", str(foreign), "--json"), 1, "holds no store")
        refused(command(*words, "--store", str(empty), "--json"), 1, "holds no store")
        refused(command(*words, "--store", str(foreign / "thesis.txt"), "--json"), 1, "is a file")
        refused(command(*words, "--store", str(tmp_path / "none"), "--json"), 1, "memdb ingest")
        refused(command(*words, "--json"), 2, "--store")


def test_an_ingest_does_not_move_into_a_foreign_folder(house: House, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with unchanged(tmp_path):
        refused(command(*house.ingest(house.film, tmp_path)), 1, "thesis.txt", "name a new folder")
        refused(command(*house.ingest(house.film, tmp_path / "thesis.txt")), 1)


def test_a_store_of_a_newer_format(house: House, tmp_path: Path) -> None:
    store = house.copy(tmp_path)
    set_format(store, 99)
    with unchanged(store):
        refused(ask(store), 1, "newer", "99")
        refused(command("stats", "--store", str(store)), 1, "newer")
        refused(command(*house.ingest(house.film, store, "hybrid")), 1, "newer")


@pytest.mark.parametrize("harm", ["gone", "noise", "half"])
def test_a_store_whose_catalog_is_lost(house: House, harm: str, tmp_path: Path) -> None:
    store = house.copy(tmp_path)
    catalog = store / "catalog.sqlite"
    if harm == "gone":
        catalog.unlink()
    elif harm == "noise":
        catalog.write_bytes(np.random.default_rng(0).bytes(catalog.stat().st_size))
    else:
        catalog.write_bytes(catalog.read_bytes()[: catalog.stat().st_size // 2])
    with unchanged(store):
        refused(ask(store, "--json"), 1, "catalog.sqlite")
        refused(command(*house.ingest(house.film, store, "hybrid")), 1, "catalog.sqlite")
        assert command("verify", "--store", str(store)).code == 3


def test_another_model(house: House) -> None:
    other = house.spec.replace("random:7", "random:8")
    with unchanged(house.store):
        for mode in ("kv", "both", "recent"):
            refused(ask(house.store, "--model", other, mode=mode), 1, "model")
        ran = command(*house.ingest(house.film, house.store, "hybrid"), "--model", other)
        refused(ran, 1, "--model", "another store")


def test_another_revision_under_the_same_name(house: House, tmp_path: Path) -> None:
    folder, store = tmp_path / "model", tmp_path / "s.memdb"
    save_random_llava(folder, SMALL, seed=1)
    words = house.ingest(house.film, store)
    words[words.index("--model") + 1] = str(folder)
    assert command(*words).code == 0
    kept = unit_digests(store)
    save_random_llava(folder, SMALL, seed=2)
    with unchanged(store):
        refused(ask(store, "--json"), 1, "model", str(folder))
        refused(command(*words), 1, "model")
    save_random_llava(folder, SMALL, seed=1)
    assert ask(store, "--json").code == 0
    assert unit_digests(store) == kept


def test_another_encoding_film_or_codec(house: House, tmp_path: Path) -> None:
    other = small_film(tmp_path / "other.mp4", FRAMES, seed=5)
    words, out = house.ingest(house.film, house.store, "hybrid"), "another --recording"
    with unchanged(house.store):
        refused(command(*words, "--sample-fps", "2"), 1, out)
        refused(command(*words, "--seed", "3"), 1, out)
        refused(command(*words, "--set", "unit.frames=4"), 1, out)
        refused(command(*words, "--codec", "fp16"), 1, "--codec int4", out)
        refused(command(*house.ingest(other, house.store, "hybrid")), 1, "another film", out)
        refused(command(*house.ingest(house.film, house.store, "rekv")), 1, out)


def test_the_same_ingest_again_is_no_error(house: House) -> None:
    with unchanged(house.store):
        ran = command(*house.ingest(house.film, house.store, "hybrid"))
    assert ran.code == 0
    assert "holds all of film already" in ran.err


def test_a_recording_that_another_process_writes(house: House, tmp_path: Path) -> None:
    store = house.copy(tmp_path)
    with Store.open(store, write=True) as found, found.writer(found.recording(NAME).spec):
        other = small_film(tmp_path / "other.mp4", FRAMES)
        ran = command(*house.ingest(other, store, "hybrid"), "--sample-fps", "2")
        refused(ran, 1, "another process writes", "wait for it")


# Damage


def segment_of(store: Path, row: UnitRow) -> Path:
    return store / "segments" / row.segment


def damaged_slice(store: Path, number: int, layer: int = 1, block: int = 1) -> tuple[UnitRow, str]:
    """Flip a bit in one slice of a unit; the unit and the time of the block."""
    row = unit_rows(store)[number]
    index = next(i for i, one in enumerate(row.slices) if (one["layer"], one["block"]) == (layer, block))
    flip(segment_of(store, row), row.payload_offset + int(row.slices[index]["offset"]) + 3)
    return row, f"00:00:{int(row.blocks[block]['start_ns']) // 10**9:02d}"


def damaged_part(store: Path, number: int, part: Part) -> UnitRow:
    row = unit_rows(store)[number]
    span = row.parts[part]
    flip(segment_of(store, row), span.offset + span.length // 2)
    return row


def verified(store: Path) -> Any:
    ran = command("verify", "--store", str(store), "--json")
    assert ran.code == (0 if ran.json["ok"] else 3)
    assert ran.err == ""
    return ran.json


def test_a_damaged_slice(house: House, tmp_path: Path) -> None:
    """Questions are answered from what is whole, with a warning; verify says where, and digest refuses."""
    store = house.copy(tmp_path)
    assert verified(store)["ok"]
    row, moment = damaged_slice(store, 2)
    with unchanged(store):
        for mode in ("kv", "both", "recent"):
            answer = ask(store, "--json", mode=mode)
            assert (answer.code, answer.err) == (0, "")
            warnings = [w for w in answer.json["warnings"] if "damaged" in w or "differ" in w or "whole" in w]
            assert len(warnings) == 1, answer.json["warnings"]
            assert f"{NAME} at {moment}, layer 1" in warnings[0]
            assert answer.json["evidence"]
        captions = ask(store, "--json", mode="captions").json
        assert captions["warnings"] == []
        assert told(captions) == told(ask(house.store, "--json", mode="captions").json)
        spoken = ask(store)
        assert spoken.code == 0
        assert [line for line in spoken.err.splitlines() if line.startswith("warning: ") and moment in line]
        report = verified(store)
        (problem,) = report["problems"]
        assert not report["ok"]
        assert (problem["file"], problem["recording"]) == (f"segments/{row.segment}", NAME)
        assert (problem["start_s"], problem["end_s"]) == (row.start_ns / 1e9, row.end_ns / 1e9)
        refused(command("digest", "--store", str(store), "--json"), 1, row.segment)
    shown = command("verify", "--store", str(store))
    assert shown.code == 3
    assert f"segments/{row.segment}" in shown.out
    assert NAME in shown.out


def test_every_slice_of_a_recording_damaged(house: House, tmp_path: Path) -> None:
    """Nothing of the KV is whole: the question is answered all the same, and says what it could not read."""
    store = house.copy(tmp_path)
    for row in unit_rows(store):
        path = segment_of(store, row)
        data = bytearray(path.read_bytes())
        for one in row.slices:
            data[row.payload_offset + int(one["offset"])] ^= 1
        path.write_bytes(data)
    for mode in ("kv", "both", "recent"):
        answer = ask(store, "--json", mode=mode)
        assert answer.code == 0, answer.err
        assert answer.json["warnings"]
        assert all(item["tier"] == "captions" for item in answer.json["evidence"])
    assert len(verified(store)["problems"]) >= len(unit_rows(store))


def test_a_damaged_caption(house: House, tmp_path: Path) -> None:
    store = house.copy(tmp_path)
    row = damaged_part(store, 1, Part.CAPTION)
    with unchanged(store):
        for mode in ("captions", "both"):
            answer = ask(store, "--json", mode=mode)
            assert answer.code == 0, answer.err
            assert any("caption" in warning and "00:00:03" in warning for warning in answer.json["warnings"])
            captions = [item for item in answer.json["evidence"] if item["tier"] == "captions"]
            assert captions
            assert all(item["start_s"] != row.start_ns / 1e9 for item in captions)
        assert ask(store, "--json").json["warnings"] == []
        found = command("search", "the", "--store", str(store), "--limit", "99", "--json")
        assert found.code == 0
        starts = [hit["start_s"] for hit in found.json["hits"]]
        every = command("search", "the", "--store", str(house.store), "--limit", "99", "--json").json["hits"]
        assert starts == [hit["start_s"] for hit in every if hit["start_s"] != row.start_ns / 1e9]
        (problem,) = verified(store)["problems"]
        assert (problem["start_s"], problem["recording"]) == (row.start_ns / 1e9, NAME)
        out = tmp_path / "out.jsonl"
        ran = command("export", "--store", str(store), "--recording", NAME, "--out", str(out))
        refused(ran, 1, "memdb verify")
        assert not out.exists()


def test_a_damaged_key_frame(house: House, tmp_path: Path) -> None:
    store = house.copy(tmp_path)
    row = damaged_part(store, 1, Part.KEYFRAME)
    answer = ask(store, "--json", "--save-frames", str(tmp_path / "frames"), mode="captions")
    assert answer.code == 0, answer.err
    assert any("key frame" in warning for warning in answer.json["warnings"])
    assert told(ask(house.store, "--json", mode="captions").json)[0] == answer.json["text"]
    saved = [item["keyframe"] for item in answer.json["evidence"] if "keyframe" in item]
    assert len(saved) == len(answer.json["evidence"]) - 1
    assert all(Path(path).read_bytes()[:2] == b"\xff\xd8" for path in saved)
    assert verified(store)["problems"][0]["start_s"] == row.start_ns / 1e9


def _flipped(path: Path) -> None:
    for share in (3, 2):
        flip(path, path.stat().st_size // share)


DERIVED: dict[str, Callable[[Path], None]] = {
    "pages gone": lambda store: shutil.rmtree(store / "keys"),
    "pages flipped": lambda store: [_flipped(path) for path in (store / "keys").glob("*.pages")][:0],
    "pages cut": lambda store: [_cut(path) for path in (store / "keys").iterdir()][:0],
    "pages empty": lambda store: [path.write_bytes(b"") for path in (store / "keys").iterdir()][:0],
    "captions gone": lambda store: shutil.rmtree(store / "captions.lance"),
    "captions noise": lambda store: [_noise(path) for path in _files(store / "captions.lance")][:0],
    "captions cut": lambda store: [_cut(path) for path in _files(store / "captions.lance")][:0],
    "both gone": lambda store: [shutil.rmtree(store / name) for name in ("keys", "captions.lance")][:0],
}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(max(1, path.stat().st_size)))


@pytest.mark.parametrize("harm", DERIVED)
def test_derived_files_may_be_lost(house: House, harm: str, tmp_path: Path) -> None:
    """Nothing hangs on them: answers and hits equal those before, and nothing is warned of in the answer."""
    store = house.copy(tmp_path)
    assert _files(store / "keys")
    assert _files(store / "captions.lance")
    DERIVED[harm](store)
    for mode in ("captions", "kv", "both", "recent"):
        found = [ask(one, "--json", mode=mode) for one in (house.store, store)]
        assert found[1].code == 0, found[1].err
        assert told(found[0].json) == told(found[1].json)
    words = ["search", "the star", "--limit", "5", "--json"]
    hits = [command(*words, "--store", str(one)) for one in (house.store, store)]
    assert hits[1].code == 0, hits[1].err
    assert {hit["start_s"] for hit in hits[0].json["hits"]} == {
        hit["start_s"] for hit in hits[1].json["hits"]
    }
    assert command("digest", "--store", str(store), "--json").out == (
        command("digest", "--store", str(house.store), "--json").out
    )


# Names, recipes, numbers

BAD_NAMES = [
    "../x",
    "..",
    ".",
    "",
    " x",
    "/etc/x",
    "a/b",
    "a\\b",
    "x\n",
    "a\nb",
    ".hidden",
    "x..y",
    "ü",
    "x" * 129,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_climb_out(house: House, name: str, tmp_path: Path) -> None:
    words = house.ingest(house.film, house.store, "hybrid")
    words[words.index("--recording") + 1] = name
    out = tmp_path / "out.jsonl"
    with unchanged(house.folder):
        refused(command(*words, "--json"), 2, "is not allowed", "letter")
        store = ["--store", str(house.store), "--recording", name]
        refused(command("ask", QUESTION, *store, "--json"), 2, "no recording is named", NAME)
        refused(command("digest", *store), 2, "no recording is named")
        refused(command("search", "star", *store), 2, "no recording is named")
        refused(command("export", *store, "--out", str(out)), 2, "no recording is named")
    assert not out.exists()


BAD_INGESTS: dict[str, tuple[list[str], int, str]] = {
    "recipe": (["--recipe", "rekw"], 2, "rlivs, hybrid"),
    "recipe file": (["--recipe", "missing.toml"], 2, "cannot read"),
    "profile": (["--profile", "papper"], 2, "paper"),
    "profile of ours": (["--recipe", "hybrid", "--profile", "paper"], 2, "no profile"),
    "codec": (["--codec", "int3"], 2, "int4"),
    "codec none": (["--codec", "none"], 2, "legal"),
    "setting without a sign": (["--set", "unit.frames"], 2, "STAGE.PARAM=VALUE"),
    "setting of nothing": (["--set", "=3"], 2, "STAGE.PARAM=VALUE"),
    "setting of no stage": (["--set", "untt.frames=3"], 2, "the stages are"),
    "setting of no parameter": (["--set", "unit.frame=3"], 2, "parameters"),
    "setting of no method": (["--set", "unit=klip"], 2, "choose one of"),
    "word for a number": (["--set", "encode.window_tokens=many"], 2, "type int"),
    "share for a count": (["--set", "encode.window_tokens=1.5"], 2, "type int"),
    "truth for a count": (["--set", "encode.window_tokens=true"], 2, "type int"),
    "list for a count": (["--set", "encode.window_tokens=[1]"], 2, "not a number"),
    "number for a word": (["--set", "encode.init_prompt=3"], 2, "type str"),
    "zero": (["--set", "encode.window_tokens=0"], 2, "at least 1"),
    "below zero": (["--set", "encode.chunk_frames=-4"], 2, "at least 1"),
    "clip of none": (["--recipe", "hybrid", "--set", "unit.frames=0"], 2, "at least 1"),
    "no time": (["--recipe", "hybrid", "--set", "unit.unit_s_max=nan"], 2, "unit.unit_s_max"),
    "endless": (["--recipe", "hybrid", "--set", "unit.unit_s_max=inf"], 2, "unit.unit_s_max"),
    "no share": (["--recipe", "hybrid", "--set", "caption.share=2"], 2, "share"),
    "no depth": (["--recipe", "hybrid", "--set", "caption.layers=4/0"], 2, "depths"),
    "caption of nothing": (["--recipe", "hybrid", "--set", "caption.tokens_max=0"], 2, "at least 1"),
    "no block": (["--set", "retrieve.blocks=0"], 2, "at least 1"),
    "no similarity": (["--set", "retrieve.sim=near"], 2, "dot"),
    "no such retainer": (["--recipe", "rekv", "--set", "retain=foo"], 2, "'retain' has no method 'foo'"),
    "no such retriever": (["--recipe", "infinipot-v", "--set", "retrieve=foo"], 2, "has no method 'foo'"),
    "no such rebuilder": (["--recipe", "infinipot-v", "--set", "rebuild=foo"], 2, "has no method 'foo'"),
    "tokens below zero": (["--recipe", "hybrid", "--set", "retrieve.beside_tokens=-1"], 2, "beside_tokens"),
    "words by half": (["--recipe", "hybrid", "--set", "retrieve.words=0.5"], 2, "retrieve.words"),
    "no relevance": (["--set", "retrieve.relevance=nan"], 2, "retrieve.relevance"),
    "endless stamps": (["--set", "rebuild.time_text_s=inf"], 2, "rebuild.time_text_s"),
    "backward stamps": (["--set", "rebuild.time_text_s=-1"], 2, "rebuild.time_text_s"),
    "answer of nothing": (["--set", "answer.tokens_max=0"], 2, "at least 1"),
    "rate of 0": (["--sample-fps", "0"], 2, "frames a second"),
    "rate below 0": (["--sample-fps", "-1"], 2, "frames a second"),
    "rate nan": (["--sample-fps", "nan"], 2, "frames a second"),
    "rate inf": (["--sample-fps", "inf"], 2, "frames a second"),
    "rate 1e9": (["--sample-fps", "1e9"], 2, "frames a second"),
    "rate 1e-300": (["--sample-fps", "1e-300"], 2, "frames a second"),
    "rate as a word": (["--sample-fps", "often"], 2, "float"),
    "rate of a film": (["--fps", "5"], 2, "image folders"),
    "seed": (["--seed", "one"], 2, "integer"),
    "start": (["--started-at", "yesterday"], 2, "ISO 8601"),
    "empty start": (["--started-at", ""], 2, "ISO 8601"),
    "device": (["--device", "abacus"], 1, "cpu"),
    "dtype": (["--dtype", "float7"], 1, "float32"),
    "dtype of numbers": (["--dtype", "int8"], 1, "float32"),
    "option": (["--recipee", "rekv"], 2, "--recipe"),
}


@pytest.mark.parametrize("kind", BAD_INGESTS)
def test_an_ingest_that_makes_no_sense(house: House, kind: str) -> None:
    words, code, said = BAD_INGESTS[kind]
    with unchanged(house.store):
        base = house.ingest(house.film, house.store)
        base = base[: base.index("--set")]
        ran = command(*base, "--recording", "new", *words, "--json")
        refused(ran, code, said)


@pytest.mark.parametrize("fps", ["0", "-1", "nan", "1e9"])
def test_the_rate_of_a_folder(house: House, fps: str, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "0.png")
    with unchanged(house.store):
        ran = command(*house.ingest(tmp_path, house.store), "--recording", "new", "--fps", fps)
        refused(ran, 2, "frames a second")


BAD_TOMLS = {
    "no TOML": ("base = hybrid", "cannot read"),
    "a wrong stage": ('base = "hybrid"\n[untt]\nframes = 3', "untt"),
    "a wrong base": ('base = "hybrit"', "hybrid"),
    "a base that is no name": ("base = 3", "base"),
    "a base that is a list": ('base = ["hybrid"]', "base"),
    "no base": ('[unit]\nmethod = "frame"', "base = 'RECIPE'"),
    "a wrong parameter": ('base = "hybrid"\n[unit]\nframe = 3', "frame"),
    "a wrong type": ('base = "hybrid"\n[unit]\nframes = "three"', "type int"),
    "a wrong method": ('base = "hybrid"\n[unit]\nmethod = "klip"', "klip"),
    "a table in a table": ('base = "hybrid"\n[unit.frames]\nx = 3', "unit"),
    "a stage that is a number": ('base = "hybrid"\nunit = 3', "unit"),
    "an illegal pair": ('base = "hybrid"\nwrite = "none"', "not legal"),
    "a wrong profile": ('base = "rekv"\nprofile = "papper"', "paper"),
    "binary": ("\0\1\2", "cannot read"),
}


@pytest.mark.parametrize("kind", BAD_TOMLS)
def test_a_recipe_file_that_is_wrong(house: House, kind: str, tmp_path: Path) -> None:
    text, said = BAD_TOMLS[kind]
    path = tmp_path / "mine.toml"
    path.write_text(text)
    words = ["--store", str(house.store), "--recording", "new", "--recipe", str(path), "--model", house.spec]
    with unchanged(house.store):
        refused(command("ingest", str(house.film), *words), 2, said)


BAD_QUESTIONS: dict[str, tuple[list[str], int, str]] = {
    "mode": (["--mode", "some"], 2, "captions"),
    "latency 0": (["--latency-ms-max", "0"], 2, "latency_ms_max"),
    "latency below 0": (["--latency-ms-max", "-5"], 2, "latency_ms_max"),
    "latency nan": (["--latency-ms-max", "nan"], 2, "latency_ms_max"),
    "latency inf": (["--latency-ms-max", "inf"], 2, "latency_ms_max"),
    "latency as a word": (["--latency-ms-max", "soon"], 2, "float"),
    "gpu 0": (["--gpu-bytes-max", "0"], 2, "gpu_bytes_max"),
    "gpu below 0": (["--gpu-bytes-max", "-1"], 2, "gpu_bytes_max"),
    "gpu nan": (["--gpu-bytes-max", "nan"], 2, "integer"),
    "read 0": (["--read-bytes-max", "0"], 2, "read_bytes_max"),
    "context 0": (["--context-tokens-max", "0"], 2, "context_tokens_max"),
    "context below 0": (["--context-tokens-max", "-1"], 2, "context_tokens_max"),
    "context of one": (["--context-tokens-max", "1"], 4, "nearest budget that would do"),
    "a time below 0": (["--at", "-1"], 2, "time"),
    "time nan": (["--at", "nan"], 2, "time"),
    "time inf": (["--at", "inf"], 2, "time"),
    "time of no clock": (["--at", "12:99:99:1"], 2, "HH:MM:SS"),
    "wall clock unknown": (["--at", "2026-11-20T08:00:00Z"], 2, "--started-at"),
    "before everything": (["--at", "0"], 2, "stored up to this moment"),
    "recording": (["--recording", "hall"], 2, NAME),
    "device": (["--device", "abacus"], 1, "cpu"),
    "dtype": (["--dtype", "float7"], 1, "float32"),
    "model": (["--model", "./no-such-model"], 1, "embedded"),
}


@pytest.mark.parametrize("kind", BAD_QUESTIONS)
def test_a_question_that_makes_no_sense(house: House, kind: str) -> None:
    words, code, said = BAD_QUESTIONS[kind]
    with unchanged(house.store):
        refused(ask(house.store, "--json", *words), code, said)


@pytest.mark.parametrize("mode", ["captions", "kv", "both", "recent"])
@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_question(house: House, text: str, mode: str) -> None:
    with unchanged(house.store):
        ran = command("ask", text, "--store", str(house.store), "--mode", mode, "--json")
        refused(ran, 2, "empty")


@pytest.mark.parametrize("mode", ["captions", "kv", "both", "recent"])
def test_a_question_too_long_for_the_context(house: House, mode: str) -> None:
    """For any context, for the one that is asked for, and for the one that the model has."""
    store = ["--store", str(house.store), "--mode", mode, "--json"]
    with unchanged(house.store):
        refused(command("ask", "star " * 40_000, *store), 2, "shorten it")
        refused(command("ask", "zqx?" * 24_000, *store), 2, "shorten it")
        ran = command("ask", "the star " * 100, *store, "--context-tokens-max", "150")
        refused(ran, 4, "nearest budget", "context_tokens_max")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([""], "some words"),
        (["star", "--start", "10", "--end", "5"], "is empty"),
        (["star", "--start", "5", "--end", "5"], "is empty"),
        (["star", "--start", "nan"], "time"),
        (["star", "--end", "-3"], "time"),
        (["star", "--start", "tea time"], "HH:MM:SS"),
        (["star", "--limit", "0"], "at least 1"),
        (["star", "--limit", "-1"], "at least 1"),
        (["star", "--limit", "x"], "integer"),
        (["star", "--recording", "hall"], NAME),
    ],
)
def test_a_search_that_makes_no_sense(house: House, words: list[str], said: str) -> None:
    with unchanged(house.store):
        refused(command("search", *words, "--store", str(house.store), "--json"), 2, said)


def test_an_export_that_makes_no_sense(house: House, tmp_path: Path) -> None:
    store = ["export", "--store", str(house.store), "--recording", NAME]
    with unchanged(house.store):
        ran = command(*store, "--format", "docx", "--out", str(tmp_path / "x"))
        refused(ran, 2, "jsonl")
        refused(command(*store, "--out", str(tmp_path / "none" / "x")), 2, "--out")
        refused(command(*store, "--out", str(tmp_path)), 2, "--out")
        refused(command(*store), 2, "--out")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_holds_nothing_yet(house: House, tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    Store.open(store, create=True, write=True).close()
    refused(ask(store, "--model", house.spec), 2, "ingest first")
    for words in (["recordings"], ["stats"], ["verify"], ["digest"], ["search", "star"]):
        ran = command(*words, "--store", str(store), "--json")
        assert (ran.code, ran.err) == (0, "")
        json.loads(ran.out)


def test_a_tier_that_is_not_stored(house: House, tmp_path: Path) -> None:
    for recipe, modes in (("rekv", ("captions", "both")), ("rlivs", ("kv", "both", "recent"))):
        store = tmp_path / f"{recipe}.memdb"
        ingested(store, house.model, house.film, recipe)
        for mode in modes:
            refused(ask(store, mode=mode), 2, f"mode {mode} cannot answer")
    ran = command("export", "--store", str(tmp_path / "rekv.memdb"), "--recording", NAME, "--out", "x")
    refused(ran, 2, "no captions")


# Budgets that nothing fits


@pytest.mark.parametrize("mode", ["captions", "kv", "both", "recent"])
@pytest.mark.parametrize(
    "words",
    [
        ["--latency-ms-max", "0.001"],
        ["--gpu-bytes-max", "1"],
        ["--read-bytes-max", "1"],
        ["--context-tokens-max", "20"],
        ["--latency-ms-max", "0.001", "--gpu-bytes-max", "1"],
    ],
    ids=lambda words: "+".join(words[::2]),
)
def test_when_no_plan_fits_nothing_is_computed(
    house: House, mode: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "captions" and words[0] == "--read-bytes-max":
        assert ask(house.store, *words, "--json", mode=mode).code == 0, "captions read no KV"
        return

    def computed(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it computed")

    for name in ("bring_back", "prefill", "greedy"):
        monkeypatch.setattr(engine, name, computed)
    with unchanged(house.store):
        ran = ask(house.store, *words, "--json", mode=mode)
        refused(ran, 4, "no plan fits", "nearest budget")
    monkeypatch.undo()
    if "--latency-ms-max" not in words:  # what time it takes changes from call to call
        nearest = dict(re.findall(r"(\w+_max) ([0-9.e+]+)", ran.err.split("nearest budget")[1]))
        wider = [
            word
            for name, value in nearest.items()
            for word in (f"--{name.replace('_', '-')}", f"{float(value):.0f}")
        ]
        assert wider
        assert ask(house.store, *wider, "--json", mode=mode).code == 0


# Models


def _without(pattern: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        found = list(folder.glob(pattern))
        assert found
        for path in found:
            path.unlink()

    return harm


def _as_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (_without("*.safetensors"), "safetensors"),
    "weights cut": (lambda folder: _cut(folder / "model.safetensors"), "cannot be loaded"),
    "weights noise": (lambda folder: _noise(folder / "model.safetensors"), "cannot be loaded"),
    "weights empty": (lambda folder: _file(folder / "model.safetensors", b"") and None, "cannot be loaded"),
    "another family": (_as_family, "qwen2_vl"),
    "no tokenizer": (_without("tokenizer*"), "tokenizer"),
    "a broken tokenizer": (
        lambda folder: _file(folder / "tokenizer.json", b"{") and None,
        "cannot be loaded",
    ),
    "no configuration": (_without("config.json"), "config.json"),
    "a broken configuration": (lambda folder: _file(folder / "config.json", b"{") and None, "config.json"),
    "a list for a configuration": (
        lambda folder: _file(folder / "config.json", b"[]") and None,
        "config.json",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llava(tmp_path_factory.mktemp("checkpoint") / "model", SMALL, seed=3)


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_model_folder_that_is_none(house: House, checkpoint: Path, kind: str, tmp_path: Path) -> None:
    harm, said = BAD_MODELS[kind]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    harm(folder)
    store = tmp_path / "s.memdb"
    words = house.ingest(house.film, store)
    words[words.index("--model") + 1] = str(folder)
    refused(command(*words, "--json"), 1, said)
    with unchanged(house.store):
        refused(ask(house.store, "--model", str(folder), "--json"), 1, said)
    with Store.open(store) as found:
        assert found.recordings() == []
        assert found.model is None, "a store is not bound to a model that was refused"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no-such/model", "check the name"),
        ("/no/such/folder", "embedded"),
        ("random:", "seed"),
        ("random:x", "seed"),
        ("random:-1", "seed"),
        ("random:0:missing.json", "missing.json"),
        ("", "embedded"),
        ("qwen", "embedded"),
    ],
)
def test_a_name_of_no_model(house: House, spec: str, said: str) -> None:
    with unchanged(house.store):
        refused(ask(house.store, "--model", spec, "--json"), 1, said)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"size": "vast"}', '{"text_config": {"hidden_size": -1}}', '{"x": 1}', "\0"]
)
def test_a_configuration_of_no_model(house: House, text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with unchanged(house.store):
        refused(ask(house.store, "--model", f"random:0:{path}", "--json"), 1)


# The same in a process of its own, where logging, warnings and tracebacks go where users see them


def test_the_real_command_says_one_line(house: House, tmp_path: Path) -> None:
    with unchanged(house.store):
        words = house.ingest(tmp_path / "missing.mp4", house.store)
        refused(run(*words, "--json"), 1, "missing.mp4")
        ran = run(
            "ask", QUESTION, "--store", str(house.store), "--mode", "kv", "--gpu-bytes-max", "1", "--json"
        )
        refused(ran, 4, "nearest budget")
        refused(run("stats", "--store", str(tmp_path), "--json"), 1, "holds no store")


def test_the_real_command_answers_from_a_damaged_store(house: House, tmp_path: Path) -> None:
    store = house.copy(tmp_path)
    _, moment = damaged_slice(store, 2)
    shutil.rmtree(store / "keys")
    with unchanged(store):
        ran = run("ask", QUESTION, "--store", str(store), "--mode", "both", "--json")
    assert ran.code == 0, ran.err
    assert any(moment in warning for warning in ran.json["warnings"])
    assert "Traceback" not in ran.err
