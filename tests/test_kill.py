"""`kill -9` of the real command at many moments: what was acknowledged stays, and the end is the same."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from memdb.client import connect
from memdb.models.protocol import VideoModel
from memdb.store import Store
from tests.run_cases import (
    NAME,
    RECIPES,
    WINDOW_TOKENS,
    Ran,
    content,
    end_at,
    ingest_words,
    ingested,
    run,
    small_film,
    small_model,
    small_spec,
    unit_digests,
    unit_rows,
)

SECONDS = 120  # frames, of which a unit takes one (rekv) or three
MOMENTS = {"rekv": (0.02, 0.3, 0.6), "rlivs": (0.05, 0.75), "hybrid": (0.2, 0.5), "bounded": (0.4,)}
SOAK = tuple((part + 0.2) / 14.5 for part in range(14))  # of three recipes: 42 kills


@dataclass(frozen=True)
class Bench:
    spec: str
    model: VideoModel
    film: Path
    whole: dict[str, Path]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("kill")
    spec, film = small_spec(folder), small_film(folder / "film.mp4", SECONDS)
    model = small_model(spec)
    assert SECONDS * model.shape.frame_tokens > 2 * WINDOW_TOKENS, "the window overflows twice and more"
    whole = {recipe: folder / f"{recipe}.memdb" for recipe in RECIPES}
    for recipe, store in whole.items():
        ingested(store, model, film, recipe)
    return Bench(spec, model, film, whole)


def killed(bench: Bench, store: Path, recipe: str, share: float) -> bool:
    """Kill an ingest of the recording (a first or a resumed one) at this share of its units.

    Whether the encoder's state had been saved by then. What was acknowledged is there and is as it should be.
    """
    whole = unit_digests(bench.whole[recipe])
    before = unit_digests(store) if store.exists() else []
    at = max(1, round(share * len(whole)))
    ran = end_at(store, at, signal.SIGKILL, *ingest_words(store, bench.spec, bench.film, recipe))
    assert ran.code == -signal.SIGKILL, ran.err
    kept = unit_digests(store)
    assert max(at, len(before)) <= len(kept) < len(whole), "the kill landed in the middle"
    assert kept == whole[: len(kept)]
    return any((store / "state").glob("*.state"))


def check_resumed(bench: Bench, store: Path, recipe: str, kept: list[bytes]) -> None:
    assert unit_digests(store)[: len(kept)] == kept, "every acknowledged unit is there"
    assert content(store) == content(bench.whole[recipe]), "the bits on disk are those of an unbroken ingest"
    with Store.open(store) as found:
        row = found.recording(NAME)
    assert row.finished
    assert [epoch.number for epoch in row.epochs] == [0]
    with connect(store, create=False) as client:
        assert client.verify().ok


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_again_and_again(bench: Bench, recipe: str, tmp_path: Path) -> None:
    """One recording, killed at every moment in turn: later kills hit ingests that were resumed."""
    store, saved = tmp_path / "s.memdb", []
    for share in MOMENTS[recipe]:
        saved.append(killed(bench, store, recipe, share))
        with connect(store, create=False) as client:
            assert client.verify().ok, "an open store that nobody writes is whole"
    kept = unit_digests(store)
    ingested(store, bench.model, bench.film, recipe)
    check_resumed(bench, store, recipe, kept)
    assert saved[-1], "some kills land after a state was saved"


def test_killed_before_and_after_the_first_state(bench: Bench, tmp_path: Path) -> None:
    """The same kill, once as if it had come before a state was saved: everything is encoded again, and compared."""
    store, saved = tmp_path / "s.memdb", tmp_path / "with-states.memdb"
    killed(bench, store, "hybrid", 0.3)
    shutil.copytree(store, saved)
    for path in (store / "state").iterdir():
        path.unlink()
    kept = unit_digests(store)
    report = ingested(store, bench.model, bench.film, "hybrid")
    assert (report.resumed_from_unit, report.replayed_units) == (0, len(kept))
    check_resumed(bench, store, "hybrid", kept)
    report = ingested(saved, bench.model, bench.film, "hybrid")
    assert report.replayed_units < len(kept)
    check_resumed(bench, saved, "hybrid", kept)


@pytest.mark.soak
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("share", SOAK)
def test_killed_once(bench: Bench, recipe: str, share: float, tmp_path: Path) -> None:
    """A recording of its own for every kill; the resumed ingest is the same command."""
    store = tmp_path / "s.memdb"
    killed(bench, store, recipe, share)
    kept = unit_digests(store)
    ran = run(*ingest_words(store, bench.spec, bench.film, recipe), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["units"] == len(unit_digests(bench.whole[recipe])) - len(kept)
    check_resumed(bench, store, recipe, kept)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)], ids=["int", "term"]
)
def test_ctrl_c_finishes_the_batch_in_hand(bench: Bench, number: signal.Signals, tmp_path: Path) -> None:
    store = tmp_path / "s.memdb"
    whole = unit_digests(bench.whole["hybrid"])
    words = ingest_words(store, bench.spec, bench.film, "hybrid")
    ran: Ran = end_at(store, 3, number, *words)
    assert ran.code == 130
    assert ran.out == ""
    assert "everything up to there is kept" in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err
    rows = unit_rows(store)
    kept = [row.digest for row in rows]
    assert 3 <= len(kept) < len(whole)
    assert kept == whole[: len(kept)]
    states = sorted((store / "state").glob("*.state"))
    assert int(states[-1].stem.split("-")[1]) == len(kept), "the state of the very end is saved"
    report = ingested(store, bench.model, bench.film, "hybrid")
    assert (report.resumed_from_unit, report.replayed_units) == (len(kept), 0)
    check_resumed(bench, store, "hybrid", kept)
