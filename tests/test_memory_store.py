"""A bounded memory in the store: resume, forgetting, damage, repair, copies, ageing, and what it takes on disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memdb.backup import backup
from memdb.client import connect
from memdb.database import CATALOG
from memdb.ingest.encoder import StreamEncoder
from memdb.memory import remembered
from memdb.models.protocol import VideoModel
from memdb.repair import repair
from memdb.schemas.errors import Interrupted
from memdb.schemas.keep import block_ids, split_ids
from memdb.schemas.rows import Part
from memdb.state import StateFiles
from memdb.store import Store
from tests.memory_cases import CLIP, METHODS, Moment, live_scores, memory_recipe, remembered_film, same_keep
from tests.model_cases import NS, QUESTION, ingest, pictures, record_decisions, reopened
from tests.run_cases import CHUNK, NAME, content, opened, small_film, small_model, small_spec, unit_digests
from tests.store_cases import directory_digest, flip
from tests.test_resume import Crash, crash_at, stop_at

FRAMES = 22  # of the small film: five batches of four and one of two
SMALL_BUDGET = 20  # five of its frames


@dataclass(frozen=True)
class Bench:
    model: VideoModel
    film: Path
    whole: dict[str, Path]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("memory")
    model, film = small_model(small_spec(folder)), small_film(folder / "film.mp4", FRAMES)
    whole = {name: folder / f"{name}.memdb" for name in METHODS}
    made = Bench(model, film, whole)
    for name, store in whole.items():
        taken_in(made, store, name)
    return made


def taken_in(bench: Bench, store: Path, name: str, **more: Any) -> Any:
    recipe = memory_recipe(name, SMALL_BUDGET, codec="int4")
    with opened(store, bench.model) as client:
        return client.ingest(bench.film, recording=NAME, recipe=recipe, sample_fps=1, **more)


# Resume


@pytest.mark.parametrize("name", METHODS)
def test_stopped_or_dead_at_any_batch_it_ends_with_the_same_digest(
    bench: Bench, name: str, tmp_path: Path
) -> None:
    """Stopped, its state was saved; dead, the last one serves, with what came after it encoded and compared again."""
    whole = unit_digests(bench.whole[name])
    for batch in range(5):
        for dies in (False, True):
            store = tmp_path / f"{batch}-{dies}.memdb"
            with pytest.MonkeyPatch.context() as patch:
                if dies:
                    patch.setattr(StreamEncoder, "state_bytes", 0 if batch % 2 else 1 << 40)
                    crash_at(patch, batch + 1)
                stop = None if dies else stop_at(patch, batch)
                with pytest.raises(Crash if dies else Interrupted):
                    taken_in(bench, store, name, stop=stop)
            before = unit_digests(store)
            assert before == whole[: CHUNK * (batch + 1) // 3]
            report = taken_in(bench, store, name)
            assert report.epoch == 0
            assert report.replayed_units == (len(before) if dies and not batch % 2 else 0)
            assert unit_digests(store) == whole
            assert content(store) == content(bench.whole[name])


# Forgetting


def without_span(moment: Moment, start: int, end: int) -> Moment:
    """A moment's memory without the frames from `start` to before `end`."""
    layers = [
        layer.at(((layer.frame < start) | (layer.frame >= end)).nonzero()[:, 0]) for layer in moment.layers
    ]
    return Moment(moment.unit, moment.init, layers, moment.keep)


@pytest.mark.parametrize("name", ["uniform", "template"])
@pytest.mark.parametrize(("span", "gone"), [((3, 6), True), ((4, 5), False), ((12, 14), True)])
@pytest.mark.parametrize("compacted", [False, True])
def test_what_is_forgotten_leaves_every_memory(
    name: str,
    span: tuple[int, int],
    gone: bool,
    compacted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the watermark and as of any moment: the rest answers, bit for bit; states that held it are gone.

    A unit that is forgotten as a whole tells of no memory: the one before it does.
    """
    moments = remembered_film(tmp_path / "s", pictures(14), memory_recipe(name))
    decided = record_decisions(monkeypatch)
    with connect(tmp_path / "s") as db:
        report = db.forget("film", start_s=span[0], end_s=span[1])
        assert report.states > 0
        if compacted:
            db.compact()
        assert db.verify().problems == []
    meant = range(span[0] // 3, -(-span[1] // 3))
    with reopened(tmp_path / "s") as db:
        row = db.store.recording("film")
        for unit, moment in enumerate(moments):
            told = unit if not (gone and unit in meant) else unit - 1
            end_s = min(14, (unit + 1) * 3)
            assert remembered(db.store, row, end_s * NS).unit == told
            db.ask(QUESTION, mode="kv", at=end_s)
            assert torch.equal(decided[-1], live_scores(without_span(moments[told], *span))), unit
            if unit in meant and not gone:
                keep = db.store.read_keep(db.store.unit(row.id, unit))
                assert keep is not None
                assert not any(np.isin(block_ids(ids), (unit << 16) | 1).any() for ids in keep.ids)
            assert moment.unit == unit


# A moment inside a unit


@pytest.mark.parametrize("at_s", [1, 2, 4, 8, 10, 11, 13])
def test_as_of_a_moment_inside_a_unit_its_frames_so_far_follow_the_memory(
    at_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a camera would have been asked then: the memory as the last whole clip left it, and what came since."""
    moments = remembered_film(tmp_path / "s", pictures(14), memory_recipe("recent"))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv", at=at_s)
    # After it has ended, the newest clip is still there as a whole.
    ended, opened = at_s // CLIP - 1, moments[at_s // CLIP]
    layers = [own.at((own.frame < at_s).nonzero()[:, 0]) for own in opened.layers]
    newer = [own.at((own.frame >= at_s // CLIP * CLIP).nonzero()[:, 0]) for own in layers]
    if ended >= 0:
        newer = [old.plus(new) for old, new in zip(moments[ended].layers, newer, strict=True)]
    assert torch.equal(decided[-1], live_scores(Moment(ended, opened.init, newer, opened.keep)))
    assert max(item.end_s for item in answer.evidence) == at_s
    assert answer.warnings == ()


def test_a_bound_on_the_context_takes_the_open_units_oldest_frames(tmp_path: Path) -> None:
    """A moment inside a unit is answered wherever the memory before it alone could be."""
    remembered_film(tmp_path / "s", pictures(16), memory_recipe("recent"))
    with reopened(tmp_path / "s") as db:
        whole = db.ask(QUESTION, mode="kv", at=9).plan.predicted.context_tokens
        for at_s in range(3, 17):
            for room in (whole, whole + 16, whole + 20, whole + 32):
                answer = db.ask(QUESTION, mode="kv", at=at_s, context_tokens_max=room)
                assert answer.used.context_tokens <= room
                fits = at_s % CLIP == 0 or room >= whole + 16
                assert (max(item.end_s for item in answer.evidence) == at_s) >= fits


def test_the_last_of_it_can_be_forgotten(tmp_path: Path) -> None:
    """Where nothing is left, a question says so, and in the tiers that are left it is answered."""
    from memdb.schemas.errors import QuestionError

    remembered_film(tmp_path / "s", pictures(6), memory_recipe())
    with connect(tmp_path / "s") as db:
        db.forget("film", start_s=0, end_s=6)
    with reopened(tmp_path / "s") as db, pytest.raises(QuestionError, match="forgotten"):
        db.ask(QUESTION, mode="kv")


# Damage


def keep_spans(store: Path) -> list[tuple[Path, int, int]]:
    """Where each unit's keep set lies: file, offset, length."""
    with Store.open(store) as found:
        rows = found.units(found.recording("film").id)
        return [
            (store / "segments" / row.segment, row.parts[Part.KEEP].offset, row.parts[Part.KEEP].length)
            for row in rows
        ]


def test_verify_finds_every_flipped_bit_of_a_keep_set_and_a_question_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of the unit before answers, with a warning."""
    moments = remembered_film(tmp_path / "s", pictures(14), memory_recipe())
    path, offset, length = keep_spans(tmp_path / "s")[-1]
    decided, random = record_decisions(monkeypatch), np.random.default_rng(0)
    for at in [0, length - 1, *random.integers(0, length, 10).tolist()]:
        bit = int(random.integers(0, 8))
        flip(path, offset + at, bit)
        with reopened(tmp_path / "s") as db:
            found = db.verify()
            assert not found.ok
            assert [(problem.recording, problem.start_s) for problem in found.problems] == [("film", 12.0)]
            answer = db.ask(QUESTION, mode="kv")
        [warning] = answer.warnings
        assert "the keep of unit 4 is damaged" in warning
        assert "run memdb verify" in warning
        assert torch.equal(decided[-1], live_scores(moments[-2]))
        flip(path, offset + at, bit)
    with reopened(tmp_path / "s") as db:
        assert db.verify().ok


def test_a_damaged_slice_takes_its_tokens_along_and_nothing_else(tmp_path: Path) -> None:
    remembered_film(tmp_path / "s", pictures(14), memory_recipe("recent"))
    with Store.open(tmp_path / "s") as store:
        row = store.unit(store.recording("film").id, 4)
        place = row.payload_offset + int(row.slices["offset"][0]) + 3
    flip(tmp_path / "s" / "segments" / row.segment, place)
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
    assert any("layer 0" in warning for warning in answer.warnings)


@pytest.mark.parametrize("name", ["uniform", "template"])
def test_repair_from_the_segments_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = remembered_film(tmp_path / "s", pictures(14), memory_recipe(name))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        before, stats = db.digest("film"), db.stats().recordings[0]
    for path in (tmp_path / "s").glob(f"{CATALOG}*"):
        path.unlink()
    shutil.rmtree(tmp_path / "s" / "keys")
    repair(tmp_path / "s")
    with reopened(tmp_path / "s") as db:
        assert db.digest("film") == before
        assert db.stats().recordings[0].bytes == stats.bytes
        assert db.verify().ok
        db.ask(QUESTION, mode="kv")
        row = db.store.recording("film")
        for unit, moment in enumerate(moments):
            keep = db.store.read_keep(db.store.unit(row.id, unit))
            assert keep is not None
            assert same_keep(keep, moment.keep)
    assert torch.equal(decided[0], live_scores(moments[-1]))


# Copies


def test_a_copy_is_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backup, and export with import under another name: digest, keep sets, logits, bit for bit."""
    moments = remembered_film(tmp_path / "s", pictures(14), memory_recipe("template"))
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        digest = db.digest("film")["film"]
        db.export("film", tmp_path / "film.memdb-recording", format="memdb")
    backup(tmp_path / "s", tmp_path / "copy")
    with connect(tmp_path / "other") as db:
        db.import_(tmp_path / "film.memdb-recording", recording="again")
    for store, name in (("copy", "film"), ("other", "again")):
        with reopened(tmp_path / store) as db:
            assert db.digest(name)[name] == digest
            assert db.verify().ok
            db.ask(QUESTION, recording=name, mode="kv")
            assert torch.equal(decided[-1], live_scores(moments[-1]))


def test_recordings_of_different_recipes_live_in_one_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = {}
    for name in ("uniform", "template"):
        moments[name] = remembered_film(
            tmp_path / "s", pictures(9), memory_recipe(name), recording=f"by {name}"
        )
    ingest(tmp_path / "s", pictures(9), recipe="rekv", codec="raw", recording="by rekv")
    decided = record_decisions(monkeypatch)
    with reopened(tmp_path / "s") as db:
        assert len(set(db.digest().values())) == 3
        for name, own in moments.items():
            db.ask(QUESTION, recording=f"by {name}", mode="kv")
            assert torch.equal(decided[-1], live_scores(own[-1]))
        assert db.ask(QUESTION, recording="by rekv", mode="kv").plan.sizes.blocks == 9


# Ageing


def test_ageing_changes_the_codec_and_thins_nothing(tmp_path: Path) -> None:
    """A keep set names tokens by their place in a block; captions-only takes the KV, and the memory with it."""
    remembered_film(
        tmp_path / "s", pictures(14), memory_recipe("template"), started_at="2025-06-01T00:00:00Z"
    )
    (tmp_path / "age.toml").write_text(
        '[[age]]\nafter = "1 d"\ncodec = "int4"\n[[age]]\nafter = "2 d"\nretainer = "uniform"\nkeep = 0.5\n'
    )
    with reopened(tmp_path / "s") as db:
        before = db.ask(QUESTION, mode="kv").used.context_tokens
    with connect(tmp_path / "s") as db:
        db.policy(set=tmp_path / "age.toml")
        db.compact(age_now=True)
        rows = db.store.units(db.store.recording("film").id)
        assert {row.codec for row in rows} == {"int4"}
        assert {row.kept_ppm for row in rows} == {1_000_000}
        assert all(Part.KEEP in row.parts for row in rows)
        assert db.due_now() == {}
    with reopened(tmp_path / "s") as db:
        answer = db.ask(QUESTION, mode="kv")
        assert (answer.used.context_tokens, answer.warnings) == (before, ())
        assert db.verify().ok


# Bytes


@pytest.mark.parametrize("name", ["recent", "template"])
def test_stats_tell_what_keep_sets_take_and_what_an_ingest_wrote(
    bench: Bench, name: str, tmp_path: Path
) -> None:
    """Under 2.5 times the units; resumed or not, as far as states reach."""
    saved: list[int] = []
    save = StateFiles.save

    def counted(self: StateFiles, unit: int, payload: bytes, **more: int) -> None:
        save(self, unit, payload, **more)
        saved.append(self.files()[0].stat().st_size)

    film, store = small_film(tmp_path / "long.mp4", 120), tmp_path / "s.memdb"
    long = Bench(bench.model, film, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateFiles, "save", counted)
        with pytest.raises(Interrupted):
            taken_in(long, store, name, stop=stop_at(patch, 11))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateFiles, "save", counted)
        taken_in(long, store, name)
    with Store.open(store) as found:
        rows = found.units(found.recording(NAME).id)
    with connect(store, create=False) as db:
        stats = db.stats().recordings[0]
    assert stats.bytes["keep_sets"] == sum(row.parts[Part.KEEP].length for row in rows)
    units = sum(row.length for row in rows)
    assert len(saved) > 2
    assert stats.written_ratio == pytest.approx((units + sum(saved)) / units)
    assert stats.written_ratio is not None
    assert stats.written_ratio < 2.5
    assert stats.bytes["keep_sets"] < 0.25 * units
    with Store.open(store) as found:
        keep = remembered(found, found.recording(NAME)).keep
    assert keep is not None
    assert max(keep.tokens) == SMALL_BUDGET
    assert all((split_ids(ids)[0] < len(rows)).all() for ids in keep.ids)
    before = directory_digest(store)
    assert taken_in(long, store, name).units == 0
    assert directory_digest(store) == before


@pytest.mark.parametrize("codec", ["raw", "int4"])
@pytest.mark.parametrize("name", ["uniform", "template"])
def test_compaction_gathers_what_the_memory_holds_where_the_policy_says_so(
    name: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survivors' codes as they are: the same logits, bit for bit, of a few bytes; older moments lose the rest."""
    store = tmp_path / "s"
    moments = remembered_film(
        store, pictures(14), memory_recipe(name, codec=codec), started_at="2025-06-01T00:00:00Z"
    )
    (tmp_path / "age.toml").write_text('[[age]]\nafter = "1 d"\nkeep = "memory"\n')
    decided = record_decisions(monkeypatch)
    with reopened(store) as db:
        db.ask(QUESTION, mode="kv")
        before = db.stats().recordings[0].bytes["kv"]
    with connect(store) as db:
        db.policy(set=tmp_path / "age.toml")
        assert db.due_now() == {"film": 5}
        assert db.compact(age_now=True).recordings[0].aged_units == 5
        assert db.due_now() == {}
    last = moments[-1].keep
    with reopened(store) as db:
        answer = db.ask(QUESTION, mode="kv")
        assert (answer.warnings, db.verify().problems) == ((), [])
        assert torch.equal(decided[0], decided[1])
        digest = db.digest("film")["film"]
        # A slice is exactly the tokens that the memory holds of its block.
        row = db.store.recording("film")
        for unit in db.store.units(row.id):
            for piece in unit.slices:
                own = block_ids(last.ids[int(piece["layer"])]) == (unit.number << 16) | int(piece["block"])
                assert int(piece["tokens"]) == int(own.sum())
        assert db.stats().recordings[0].bytes["kv"] < before
        # Of the first moment those are left that the last one still holds.
        db.ask(QUESTION, mode="kv", at=6)
        first = moments[1]
        layers = [
            own.at(torch.isin(own.id, torch.from_numpy(ids)).nonzero()[:, 0])
            for own, ids in zip(first.layers, last.ids, strict=True)
        ]
        if codec == "raw":
            assert torch.equal(decided[-1], live_scores(Moment(1, first.init, layers, first.keep)))
        recent = db.ask(QUESTION, mode="recent")
        assert not recent.warnings
        db.export("film", tmp_path / "film.copy", format="memdb")
    for path in store.glob(f"{CATALOG}*"):
        path.unlink()
    repair(store)
    with connect(tmp_path / "other") as db:
        db.import_(tmp_path / "film.copy")
    for path in (store, tmp_path / "other"):
        with reopened(path) as db:
            assert db.digest("film")["film"] == digest
            db.ask(QUESTION, mode="kv")
        assert torch.equal(decided[-1], decided[0])
    with connect(store) as db:  # and what is left of it is forgotten as ever
        db.forget("film", start_s=4, end_s=5)
        db.compact()
        assert db.verify().problems == []
    if codec == "raw":
        with reopened(store) as db:
            db.ask(QUESTION, mode="kv")
        assert torch.equal(decided[-1], live_scores(without_span(moments[-1], 4, 5)))


def test_a_compaction_between_looking_up_and_reading_costs_blocks_and_never_takes_wrong_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the question had looked before the compaction that gathered: what it finds has other places."""
    store = tmp_path / "s"
    moments = remembered_film(store, pictures(14), memory_recipe(), started_at="2025-06-01T00:00:00Z")
    (tmp_path / "age.toml").write_text('[[age]]\nafter = "1 d"\nkeep = "memory"\n')
    with connect(store) as db:
        db.policy(set=tmp_path / "age.toml")
        db.compact(age_now=True)
    assert all(int((own.frame == number).sum()) < 16 for own in moments[-1].layers for number in range(14))
    monkeypatch.setattr(Store, "gathered_units", lambda self, recording: {})
    with reopened(store) as db:
        answer = db.ask(QUESTION, mode="kv")
    assert any("gathered just now" in warning for warning in answer.warnings)
    assert answer.evidence == (), "no block lies as it did"


def test_a_policy_says_memory_once_and_leaves_other_recordings_alone(tmp_path: Path) -> None:
    from memdb.policy import Age, parse
    from memdb.schemas.errors import UsageError

    table = {
        "age": [{"after": "1 d", "keep": "memory", "codec": "int4"}, {"after": "2 d", "keep": "captions"}]
    }
    policy = parse(table)
    assert policy.ages[0] == Age(86_400 * NS, "int4", memory_only=True)
    assert parse(policy.as_table()) == policy
    for bad, says in (
        ([{"after": "1 d", "keep": "memory"}] * 1 + [{"after": "2 d", "keep": "memory"}], "second time"),
        ([{"after": "1 d", "keep": "memory", "retainer": "uniform"}], "take its retainer away"),
    ):
        with pytest.raises(UsageError, match=says):
            parse({"age": bad})
    ingest(tmp_path / "s", pictures(4), recipe="rekv", codec="raw", started_at="2025-06-01T00:00:00Z")
    (tmp_path / "age.toml").write_text('[[age]]\nafter = "1 d"\nkeep = "memory"\n')
    with connect(tmp_path / "s") as db:
        digest = db.digest("film")
        db.policy(set=tmp_path / "age.toml")
        assert db.due_now() == {}
        db.compact(age_now=True)
        assert db.digest("film") == digest
