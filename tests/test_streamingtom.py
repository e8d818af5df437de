"""Recipe streamingtom in a whole ingest: its window is what is stored, so it resumes without a saved one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memdb import age
from memdb.clock import set_policy
from memdb.compact import compact
from memdb.ingest.read_back import StoredGroups
from memdb.ingest.stages import compose
from memdb.models.protocol import VideoModel
from memdb.policy import Age, Policy
from memdb.query.stages import compose as compose_query
from memdb.recipes import recipe as named
from memdb.schemas.errors import CorruptionError, EncodingMismatch, Interrupted, RecipeError
from memdb.schemas.recipe import Recipe
from memdb.store import Store
from tests.age_cases import DAY_NS
from tests.model_cases import NS
from tests.run_cases import (
    NAME,
    content,
    opened,
    small_film,
    small_model,
    small_spec,
    unit_digests,
    unit_rows,
)
from tests.store_cases import directory_digest
from tests.test_resume import Crash, crash_at, stop_at

FRAMES, CHUNK, G, WINDOW = (
    14,
    4,
    2,
    7,
)  # three whole groups and a half in the window; the last batch has two frames
BASE = (
    f"encode.chunk_frames={CHUNK}",
    f"encode.window_tokens={WINDOW}",
    f"reduce.tokens={G}",
    "answer.tokens_max=4",
)
# How each case differs from the recipe: codec, profile, settings.
CASES: dict[str, tuple[str | None, str | None, tuple[str, ...]]] = {
    "oqm": (None, None, ()),
    "oqm2": ("oqm2", None, ()),
    "paper": (None, "paper", ()),
    "code": (None, "code", ()),
}


@dataclass(frozen=True)
class Bench:
    model: VideoModel
    film: Path
    whole: dict[str, Path]  # by case, a store whose ingest was not disturbed


def run(bench: Bench, store: Path, case: str = "oqm", *more: str, **changes: Any) -> Any:
    codec, profile, settings = CASES[case]
    with opened(store, bench.model) as client:
        arguments = {"codec": codec, "profile": profile, "settings": (*BASE, *settings, *more)} | changes
        return client.ingest(bench.film, recording=NAME, recipe="streamingtom", sample_fps=1, **arguments)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("tom")
    model, film = small_model(small_spec(folder)), small_film(folder / "film.mp4", FRAMES)
    bench = Bench(model, film, {case: folder / f"{case}.memdb" for case in CASES})
    for case, store in bench.whole.items():
        run(bench, store, case)
    return bench


@contextmanager
def reads() -> Iterator[list[range]]:
    """From now on, the units that encoders read back."""
    seen: list[range] = []
    read = StoredGroups.read

    def noted(self: StoredGroups, units: range) -> Any:
        seen.append(units)
        return read(self, units)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredGroups, "read", noted)
        yield seen


def stopped(bench: Bench, store: Path, batch: int, case: str = "oqm") -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        run(bench, store, case, stop=stop_at(patch, batch))


@pytest.mark.parametrize("case", CASES)
def test_a_question_is_answered_and_leaves_the_store_as_it_was(bench: Bench, case: str) -> None:
    with opened(bench.whole[case], bench.model, create=False) as client:
        assert client.verify().ok
        client.ask("What was there?", mode="auto")
        before = directory_digest(bench.whole[case])
        for mode in ("kv", "recent", "auto"):
            answer = client.ask("What was there?", mode=mode)
            assert not answer.warnings
            assert {item.tier for item in answer.evidence} == {"kv"}
        early = client.ask("What was there?", mode="kv", at=5)
        assert max(item.end_s for item in early.evidence) <= 5
        assert directory_digest(bench.whole[case]) == before


@pytest.mark.parametrize("case", CASES)
def test_stopped_or_dead_at_any_batch_and_run_again(bench: Bench, case: str, tmp_path: Path) -> None:
    whole = unit_digests(bench.whole[case])
    for batch in range(4) if case == "oqm" else (2,):
        for dies in (False, True) if case == "oqm" else (False,):
            store = tmp_path / f"{batch}-{dies}.memdb"
            with pytest.MonkeyPatch.context() as patch:
                if dies:
                    crash_at(patch, batch)
                    with pytest.raises(Crash):
                        run(bench, store, case)
                elif batch < 3:
                    with pytest.raises(Interrupted):
                        run(bench, store, case, stop=stop_at(patch, batch))
            before = unit_digests(store) if store.exists() else []
            assert before == whole[: len(before)]
            with reads() as seen:
                run(bench, store, case)
            assert unit_digests(store) == whole
            assert content(store) == content(bench.whole[case])
            if not dies and batch < 3:  # the last three groups, and nothing is encoded again
                done = CHUNK * (batch + 1)
                assert seen == [range(done - WINDOW // G, done)]


def test_a_state_holds_no_window_and_stays_small(bench: Bench, tmp_path: Path) -> None:
    """Counters, times, and the last frame as it was before reduction; the same however long the window is."""
    sizes = []
    for name, window in (("short", WINDOW), ("long", 4_800)):
        store = tmp_path / name
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            run(bench, store, "oqm", f"encode.window_tokens={window}", stop=stop_at(patch, 2))
        sizes.append(max(path.stat().st_size for path in (store / "state").glob("*.state")))
    shape = bench.model.shape
    raw_bytes = shape.frame_tokens * shape.embedding_size * 4
    rows_bytes = 64  # of a group's times, as text
    assert sizes[0] < raw_bytes + 4096
    assert 0 < sizes[1] - sizes[0] < (3 * CHUNK - WINDOW // G) * rows_bytes
    kv_bytes = shape.kv_bytes(3 * CHUNK * G, 4)
    assert sizes[1] - sizes[0] < kv_bytes / 4


def test_what_cannot_be_read_back_is_encoded_again(bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    stopped(bench, tmp_path / "s", 2)

    def damaged(self: StoredGroups, units: range) -> Any:
        raise CorruptionError("a slice is not what was written", file="segments")

    monkeypatch.setattr(StoredGroups, "read", damaged)
    report = run(bench, tmp_path / "s")
    assert (report.resumed_from_unit, report.replayed_units, report.epoch) == (0, 3 * CHUNK, 0)
    assert content(tmp_path / "s") == content(bench.whole["oqm"])


def test_groups_that_are_not_as_they_were_written_are_refused(bench: Bench, tmp_path: Path) -> None:
    """One bit of a slice, and a group that was forgotten."""
    run(bench, tmp_path / "s")
    first = unit_rows(tmp_path / "s")[5]
    with Store.open(tmp_path / "s") as store:
        groups = StoredGroups(store, store.recording(NAME).id, bench.model)
        held, stands, raster = groups.read(range(5, 8))
        assert raster is None, "on a line nobody asks"
        assert [kv.tokens for kv in held] == [3 * G] * bench.model.shape.layers
        start = int(first.blocks["position"][0])
        assert stands.tolist() == list(range(start, start + 3 * G))
        path = store.segments_path / first.segment
        data = bytearray(path.read_bytes())
        data[first.payload_offset + int(first.slices["offset"][0])] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match="cannot be read back"):
            groups.read(range(5, 8))
        groups.read(range(6, 9))
    with opened(tmp_path / "s", bench.model, create=False) as client:
        client.forget(NAME, start_s=7, end_s=8)
    with Store.open(tmp_path / "s") as store, pytest.raises(CorruptionError, match="unit 7 is not what was"):
        StoredGroups(store, store.recording(NAME).id, bench.model).read(range(6, 9))


@pytest.mark.parametrize(("span", "epoch"), [((0, 2), 0), ((10, 11), 1)])
def test_what_is_forgotten_while_it_is_stopped(
    bench: Bench, span: tuple[int, int], epoch: int, tmp_path: Path
) -> None:
    """Outside the window it goes on as if nothing were; inside, from a fresh window, as whoever forgot it would."""
    stopped(bench, tmp_path / "s", 2)
    with opened(tmp_path / "s", bench.model) as client:
        client.forget(NAME, start_s=span[0], end_s=span[1])
    report = run(bench, tmp_path / "s")
    assert report.epoch == epoch
    rows, whole = unit_rows(tmp_path / "s"), unit_digests(bench.whole["oqm"])
    assert len(rows) == FRAMES
    later = [row.digest for row in rows[3 * CHUNK :]]
    assert (later == whole[3 * CHUNK :]) == (epoch == 0)
    assert {row.epoch for row in rows[3 * CHUNK :]} == {epoch}
    with opened(tmp_path / "s", bench.model, create=False) as client:
        assert client.verify().ok
        found = client.ask("What was there?", mode="kv").evidence
        assert found
        assert all(item.end_s <= span[0] or item.start_s >= span[1] for item in found)


# What decides what is encoded


def test_another_codec_is_another_encoding(bench: Bench, tmp_path: Path) -> None:
    stopped(bench, tmp_path / "s", 1)
    with pytest.raises(EncodingMismatch):
        run(bench, tmp_path / "s", codec="oqm2")
    keys = [unit_keys(bench.whole[case]) for case in ("oqm", "oqm2")]
    assert keys[0] != keys[1], "keys are of what was not quantised yet, but older groups were"


def unit_keys(path: Path) -> list[bytes]:
    with Store.open(path) as store:
        return [store.read_keys(row).tobytes() for row in store.units(store.recording(NAME).id)]


CONTROLS = {
    "reduce": ("reduce=identity", "encode.window_tokens=8"),
    "dpc": ("reduce.dpc=released",),
    "encode": ("encode=window", "encode.window_tokens=7", "encode.chunk_frames=4"),
    "write": ("write=int4",),
    "window": ("encode.window_tokens=4",),
}


def test_each_stage_decides_what_is_kept(bench: Bench, tmp_path: Path) -> None:
    """A control in the place of one stage gives another digest, and so does each profile and codec."""
    found = {case: content(store) for case, store in bench.whole.items()}
    for name, settings in CONTROLS.items():
        run(bench, tmp_path / name, "oqm", *settings)
        found[name] = content(tmp_path / name)
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("settings", "profile", "message"),
    [
        (("unit=clip",), None, "R16b.*unit = 'frame'"),
        (("rebuild=written",), None, "R2b.*profile = 'code'"),
        (("encode=window", "rebuild=written"), "code", "R2b"),
        (("write=none",), None, "R1"),
        (("rebuild=original",), None, "R2"),
        (("retain=uniform", "retain.budget_tokens=64"), None, "R8c"),
        (("retrieve=all",), None, "R10b"),
        (("retrieve.budget_tokens=0",), None, "at least 1"),
        (("encode.window_tokens=0",), None, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    settings: tuple[str, ...], profile: str | None, message: str
) -> None:
    row = named("streamingtom", profile=profile).with_settings(settings)
    with pytest.raises(RecipeError, match=message):
        composed(row)


def composed(row: Recipe) -> None:
    """Both halves of it."""
    compose(row)
    compose_query(row)


def test_a_window_that_holds_no_group_is_refused_before_anything_is_written(
    bench: Bench, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"encode.window_tokens = 1 holds no whole group.*give at least 2"):
        run(bench, tmp_path / "s", "oqm", "encode.window_tokens=1")
    with opened(tmp_path / "s", bench.model) as client:
        assert client.recordings() == []


def thin(path: Path) -> None:
    """Half of the tokens of every group that there is."""
    with Store.open(path, write=True) as store:
        later_ns = store.recording(NAME).created_ns + 20 * DAY_NS
        set_policy(store, Policy(ages=(Age(NS, "", "uniform", 500_000),)), now_ns=later_ns)
        compact(store, now_ns=later_ns)
        units = store.units(store.recording(NAME).id)
        assert {int(unit.blocks["tokens"][0]) for unit in units} == {G // 2}


def test_a_window_that_ageing_thinned_is_encoded_again(
    bench: Bench, tmp_path: Path, monkeypatch: Any
) -> None:
    """What is left of it is not what the encoder saw; what follows is what an ingest without a break gives."""
    monkeypatch.setattr(age, "LATE_NS", 0)  # a film of seconds has no days
    stopped(bench, tmp_path / "s", 2)
    thin(tmp_path / "s")
    report = run(bench, tmp_path / "s")
    assert (report.resumed_from_unit, report.replayed_units, report.epoch) == (0, 3 * CHUNK, 0)
    assert unit_digests(tmp_path / "s")[3 * CHUNK :] == unit_digests(bench.whole["oqm"])[3 * CHUNK :]
    with opened(tmp_path / "s", bench.model, create=False) as client:
        assert client.verify().ok
        assert not client.ask("What was there?", mode="kv").warnings
