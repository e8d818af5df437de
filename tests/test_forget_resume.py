"""An ingest that stops or dies after something was forgotten goes on, and sees nothing of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memdb.ingest.encoder import StreamEncoder
from memdb.ingest.run import Run
from memdb.schemas.units import Unit
from tests.forget_cases import (
    FRAMES,
    NS,
    Bench,
    Span,
    before_batch,
    behind,
    check_whole,
    dead,
    digests,
    epochs,
    expected,
    forget_now,
    made_bench,
    states,
    stopped,
)
from tests.run_cases import (
    RECIPES,
    ingested,
    unit_digests,
    unit_rows,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return made_bench(tmp_path_factory.mktemp("forget"))


# Going on after a stop or a death


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("death", [False, True])
def test_a_state_behind_the_span_serves(bench: Bench, recipe: str, death: bool, tmp_path: Path) -> None:
    """Also where units behind it are encoded again: none of them is a husk. No epoch, no other bit."""
    store = tmp_path / "s.memdb"
    units = dead(bench, store, recipe, 6) if death else stopped(bench, store, recipe, 4)
    if death:
        states(store)[-1].unlink()
    before = states(store)
    forget_now(store, (1, 3))
    assert states(store) == before
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.epoch, report.replayed_units > 0, report.resumed_from_unit) == (
        0,
        death,
        units - report.replayed_units,
    )
    plain, _ = expected(bench, recipe, 24, (1, 3), touched=False)
    assert unit_digests(store) == digests(plain)
    check_whole(store)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("span", [(13, 15), (0, None)])
def test_without_a_state_behind_the_span_an_epoch_begins_behind_the_watermark(
    bench: Bench, recipe: str, span: Span, tmp_path: Path
) -> None:
    """The film is not encoded again from its beginning, where the forgotten would be seen; positions go on."""
    store = tmp_path / "s.memdb"
    units = stopped(bench, store, recipe, 4)
    forget_now(store, span)
    assert states(store) == []
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.replayed_units, report.epoch) == (0, 1)
    assert epochs(store) == [(0, 0), (1, units)]
    assert unit_digests(store) == digests(behind(bench, recipe, units, span))
    check_whole(store)


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_an_epoch_that_has_no_unit_yet_is_not_begun_twice(
    bench: Bench, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgotten between the last batch and the end of the ingest, whose state is then lost."""
    store, ending = tmp_path / "s.memdb", Run.ending

    def forgetting(self: Run, *, flush: bool) -> Any:
        forget_now(store, (17, 18))
        return ending(self, flush=flush)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "ending", forgetting)
        units = stopped(bench, store, recipe, 4)
    assert epochs(store) == [(0, 0), (1, units)]
    assert len(states(store)) == 1, "that of the new epoch"
    states(store)[0].unlink()
    report = ingested(store, bench.model, bench.film, recipe)
    assert (report.epoch, epochs(store)) == (1, [(0, 0), (1, units)])
    assert unit_digests(store) == digests(behind(bench, recipe, units, (17, 18)))
    check_whole(store)


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
def test_dead_after_the_forget_it_goes_on_from_its_new_epoch(
    bench: Bench, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the state of that epoch: as if there had been no death. Without it: another epoch behind the units."""
    for lost in (False, True):
        store = tmp_path / f"{lost}.memdb"
        with pytest.MonkeyPatch.context() as patch:
            before_batch(patch, {4: lambda: forget_now(store, (11, 12))})  # noqa: B023
            units = dead(bench, store, recipe, 5)
        plain, begins = expected(bench, recipe, 16, (11, 12), touched=True)
        assert unit_digests(store) == digests(plain)[:units]
        for path in states(store) if lost else []:
            path.unlink()
        report = ingested(store, bench.model, bench.film, recipe)
        assert epochs(store) == [(0, 0), (1, begins), *([(2, units)] if lost else [])]
        assert report.epoch == (2 if lost else 1)
        if not lost:
            assert unit_digests(store) == digests(plain)
        assert unit_digests(store)[:units] == digests(plain)[:units]
        check_whole(store)


@pytest.mark.parametrize("recipe", ["rekv", "hybrid"])
@pytest.mark.parametrize("moment", ["before a batch", "within a batch", "behind it"])
def test_forgotten_while_the_film_is_encoded_again(
    bench: Bench, recipe: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No state is left, so the film is encoded again and compared: up to where it would see what is gone."""
    store = tmp_path / "s.memdb"
    units = dead(bench, store, recipe, 5)
    for path in states(store):
        path.unlink()
    span = {"before a batch": (12, 14), "within a batch": (9, 10), "behind it": (1, 3)}[moment]
    step, calls = StreamEncoder.step, iter(range(1 << 30))

    def forgetting(self: StreamEncoder, frames: Any) -> list[Unit]:
        if next(calls) == 2:
            forget_now(store, span)
        return step(self, frames)

    if moment == "within a batch":
        monkeypatch.setattr(StreamEncoder, "step", forgetting)
    else:
        number = 2 if moment == "before a batch" else 4
        before_batch(monkeypatch, {number: lambda: forget_now(store, span)})
    report = ingested(store, bench.model, bench.film, recipe)
    if moment == "behind it":
        assert (report.replayed_units, epochs(store)) == (units, [(0, 0)])
        assert unit_digests(store) == digests(expected(bench, recipe, 24, span, touched=False)[0])
    else:
        assert 0 < report.replayed_units < units
        assert epochs(store) == [(0, 0), (1, units)]
        assert unit_digests(store)[:units] == digests(behind(bench, recipe, units, span))[:units]
        assert [row.start_ns for row in unit_rows(store)][-1] >= 24 * NS
        seconds = [row.end_ns // NS - row.start_ns // NS for row in unit_rows(store)]
        assert sum(seconds) == FRAMES, "every frame is there once"
    check_whole(store)
