"""Slips that a reader with fresh eyes found by trying: each once, so that it stays mended."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from memdb.client import connect
from memdb.models.load import load_model, resolve_device
from memdb.models.random_llava import save_random_llava
from memdb.paths import cache_dir
from memdb.schemas.errors import (
    BudgetError,
    MemdbError,
    ModelError,
    QuestionError,
    RecipeError,
    UnsupportedModel,
)
from memdb.schemas.question import Budget, Question
from tools.films import render_film

SMALL = ["caption.tokens_max=4"]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    render_film(path, seconds=5.4, width=160, height=96)
    return path


def test_the_ladder_holds_with_a_window_shorter_than_the_init_prompt(tmp_path: Path, film: Path) -> None:
    settings = ["encode.window_tokens=5", "rebuild.time_text_s=0"]
    with connect(tmp_path / "s") as db:
        db.ingest(film, recording="r", recipe="rekv", codec="raw", settings=settings, sample_fps=1)
        report = db.compare_uncut(film, "r", "What is it?")
    assert report.init_tokens > 5
    assert report.relative < 1e-4


def test_as_of_the_end_of_a_film_everything_of_it_was_seen(tmp_path: Path, film: Path) -> None:
    with connect(tmp_path / "s") as db:
        db.ingest(film, recording="r", sample_fps=1, settings=SMALL)
        end_s = db.ask("what is it?", mode="kv").watermark_s
        assert 5 < end_s < 6  # the last slot reaches beyond the film
        for mode in ("kv", "captions", "both", "recent"):
            whole, then = db.ask("what is it?", mode=mode), db.ask("what is it?", mode=mode, at=end_s)
            assert [item.as_json() for item in then.evidence] == [item.as_json() for item in whole.evidence]
            assert then.token_ids == whole.token_ids


def test_a_first_ingest_that_failed_leaves_the_name_free(tmp_path: Path, film: Path) -> None:
    good = np.zeros((48, 48, 3), np.uint8)
    with connect(tmp_path / "s") as db:
        with pytest.raises(MemdbError):
            db.ingest([good, np.zeros(3)], fps=1, recording="r", recipe="rekv", sample_fps=1)
        report = db.ingest(film, recording="r", recipe="rekv", codec="int8", sample_fps=1)
        assert report.units == 6
        assert db.verify().ok


@pytest.mark.parametrize(
    "setting",
    ["encode.window_tokens=100000000000000000000000000", "encode.chunk_frames=1e20", "unit.unit_s_max=1e300"],
)
def test_huge_parameters_are_refused(tmp_path: Path, film: Path, setting: str) -> None:
    with connect(tmp_path / "s") as db, pytest.raises(RecipeError):
        db.ingest(film, settings=[setting])


def test_huge_budgets_and_broken_text_are_refused() -> None:
    with pytest.raises(BudgetError, match="read_bytes_max"):
        Budget(read_bytes_max=10**400)
    with pytest.raises(QuestionError, match="UTF-8"):
        Question("\ud800")


@pytest.mark.parametrize("name", ["meta", "mps", "cuda:99", "nonsense"])
def test_devices_that_are_not_carried_are_named(name: str) -> None:
    with pytest.raises(ModelError, match="cpu"):
        resolve_device(name)


def test_a_user_without_a_home_has_a_cache_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(cls: type[Path]) -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("MEMDB_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert str(os.getuid()) in cache_dir().name


def test_a_language_model_of_another_build_is_refused(tmp_path: Path) -> None:
    config = {"text_config": {"model_type": "cohere"}}
    with pytest.raises(UnsupportedModel):
        load_model(str(save_random_llava(tmp_path / "cohere", config)))


def test_starting_again_with_another_start_says_that_the_first_stays(
    tmp_path: Path, film: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(tmp_path / "s") as db:
        db.ingest(film, recording="r", sample_fps=1, settings=SMALL)
        db.ingest(film, recording="r", sample_fps=1, settings=SMALL, started_at="2026-11-20T08:00:00Z")
        assert "keeps the start" in caplog.text
        assert db.recordings()[0].spec.started_at_ns is None
