"""Ageing: each unit takes each step once, what is kept is kept bit for bit, and a year costs what the policy says."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memdb import age, keep, page_check
from memdb.age import LATE_NS
from memdb.catalog import Catalog
from memdb.client import connect
from memdb.clock import LEAP_NS, set_policy
from memdb.codecs import codec as codec_named
from memdb.codecs.layout import affine_layout
from memdb.codecs.pack import pack_unit
from memdb.compact import CompactReport, compact
from memdb.database import CATALOG
from memdb.digest import digests_of
from memdb.files import watched
from memdb.forget import forget
from memdb.index.key_search import KeySearch
from memdb.index.key_table import KeyTable
from memdb.index.page_writer import index_recording
from memdb.keep import Keeper, Seen, keep_one
from memdb.locks import FileLock, rewrite_lock
from memdb.models.window import LayerKV
from memdb.page_check import check_pages
from memdb.policy import Age, Policy, parse
from memdb.repair import repair
from memdb.retain import THINNERS
from memdb.rewrite import Change, Changed, rewrite
from memdb.schemas.errors import Interrupted, StoreFull
from memdb.schemas.keep import KeepSet, token_ids
from memdb.schemas.rows import UnitRow
from memdb.store import Store, recording_digest
from memdb.survey import survey
from memdb.verify import verify
from tests import run_cases
from tests.age_cases import (
    BLOCKS,
    DAY_NS,
    MODEL,
    STARTED_NS,
    D,
    H,
    L,
    T,
    fill_kv,
    kv_unit,
    new_kv_store,
    restored,
    stored,
)
from tests.kill_cases import copied, deaths, quick_disk
from tests.store_cases import Steps, fill, flip, new_store, spec

__all__ = ["quick_disk"]

HALF = 500_000
NARROW = Age(7 * DAY_NS, "int4")
THIN = Age(14 * DAY_NS, retainer="uniform", keep_ppm=HALF)
CAPTIONS = Age(30 * DAY_NS, captions_only=True)
POLICY = Policy(ages=(NARROW, THIN, CAPTIONS))


def aged(path: Path, days: float, *, policy: Policy | None = POLICY, **options: object) -> CompactReport:
    """A compaction `days` after the recording's start; with a policy, as if it was set at that moment."""
    now_ns = STARTED_NS + int(days * DAY_NS)
    with Store.open(path, write=True) as store:
        if policy is not None:
            set_policy(store, policy, now_ns=now_ns)
        return compact(store, now_ns=now_ns, **options)  # type: ignore[arg-type]


def rows_of(path: Path) -> list[UnitRow]:
    with Store.open(path) as store:
        return store.units(store.recording("lobby").id)


def digest_of(path: Path, tier: str = "all") -> str:
    with Store.open(path) as store:
        return recording_digest(store, "lobby", tier)


def states(path: Path) -> str:
    """A letter a unit: r as it was, 4 int4, t thinned, . without KV."""
    return "".join(
        "." if not len(row.slices) else "t" if row.kept_ppm < 10**6 else "4" if row.codec else "r"
        for row in rows_of(path)
    )


def assert_whole(path: Path) -> None:
    with Store.open(path) as store:
        assert verify(store, checkers=[check_pages]).problems == []


# One step each


@pytest.mark.parametrize("codec", ["raw", "fp16", "bf16"])
def test_int4_by_age_is_what_an_ingest_in_int4_stores_of_the_same_values(tmp_path: Path, codec: str) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS, codec)
    report = aged(path, 100, policy=Policy(ages=(NARROW,)))
    assert sum(done.aged_units for done in report.recordings) == 6
    assert {row.codec for row in rows_of(path)} == {"int4"}
    if codec == "raw":
        other = new_kv_store(tmp_path / "int4", 6, DAY_NS, "int4")
        assert digest_of(path, "kv") == digest_of(other, "kv")
    with Store.open(path) as store:
        row = store.recording("lobby")
        dtype = {"raw": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[codec]
        for found in store.units(row.id):
            layers: list[list[LayerKV | None]] = [[None] * BLOCKS for _ in range(L)]
            for layer, block in np.ndindex(L, BLOCKS):
                made = kv_values(found.number, block, layer)
                layers[layer][block] = LayerKV(made.k.to(dtype).float(), made.v.to(dtype).float())
            expected = pack_unit(codec_named("int4"), layers, {}, torch.float32)
            kv = stored(store, found).kv
            assert kv is not None
            assert kv.raw_digest == expected.raw_digest
            assert kv.slices.tobytes() == expected.slices.tobytes()
    assert_whole(path)


def kv_values(number: int, block: int, layer: int) -> LayerKV:
    from tests.age_cases import values

    return values(number, block, layer)


@pytest.mark.parametrize("codec", ["raw", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 6])
def test_thinning_keeps_tokens_bit_for_bit_in_time_order(tmp_path: Path, codec: str, tokens: int) -> None:
    path = tmp_path / "lobby.memdb"
    with Store.open(path, create=True, write=True) as store:
        with store.writer(spec(codec=codec, model=MODEL, started_at_ns=STARTED_NS)) as writer:
            writer.append([kv_unit(number, DAY_NS, codec, tokens=tokens) for number in range(2)])
        row = store.recording("lobby")
        before = [restored(store, row, found) for found in store.units(row.id)]
        keys = [stored(store, found).keys for found in store.units(row.id)]
        positions = [found.blocks["position"].tolist() for found in store.units(row.id)]
    aged(path, 100, policy=Policy(ages=(THIN,)))
    kept = max(1, tokens // 2)
    chosen = THINNERS["uniform"]().choose(tokens, kept)
    with Store.open(path) as store:
        row = store.recording("lobby")
        for number, found in enumerate(store.units(row.id)):
            assert found.kept_ppm == HALF
            assert found.blocks["tokens"].tolist() == [kept] * BLOCKS
            assert found.blocks["position"].tolist() == positions[number]
            assert np.array_equal(stored(store, found).keys, keys[number])  # type: ignore[arg-type]
            for place, kv in restored(store, row, found).items():
                assert torch.equal(kv.k, before[number][place].k[:, chosen])
                assert torch.equal(kv.v, before[number][place].v[:, chosen])
    assert_whole(path)


def test_a_thinned_unit_tells_where_its_own_tokens_stand_and_nothing_of_others(tmp_path: Path) -> None:
    """Tokens of an earlier unit are not taken for tokens of this one, and not told by numbers of long ago."""
    path = tmp_path / "lobby.memdb"
    block, token = np.divmod(np.arange(BLOCKS * T), T)
    with (
        Store.open(path, create=True, write=True) as store,
        store.writer(spec(codec="int4", model=MODEL, started_at_ns=STARTED_NS)) as writer,
    ):
        for number in range(3):
            ids = np.concatenate([token_ids(n, block, token) for n in range(number + 1)])
            told = KeepSet((ids,) * L, (7 * np.arange(len(ids)),) * L)
            writer.append([replace(kv_unit(number, DAY_NS, "int4"), keep=told)])
    aged(path, 100, policy=Policy(ages=(THIN,)))
    kept = THINNERS["uniform"]().choose(T, T // 2)
    with Store.open(path) as store:
        for row in store.units(store.recording("lobby").id):
            found = store.read_keep(row)
            assert found is not None
            own = [token_ids(row.number, at, np.arange(len(kept))) for at in range(BLOCKS)]
            stand = [7 * ((row.number * BLOCKS + at) * T + kept) for at in range(BLOCKS)]
            told = KeepSet((np.concatenate(own),) * L, (np.concatenate(stand),) * L)
            assert found.same(told)
    assert states(path) == "ttt"
    assert_whole(path)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 50, 196])
def test_uniform_keeps_order_and_at_least_one_and_spreads_evenly(tokens: int) -> None:
    for kept in range(1, tokens + 1):
        chosen = THINNERS["uniform"]().choose(tokens, kept)
        assert len(chosen) == kept
        assert chosen[0] >= 0
        assert chosen[-1] < tokens
        assert (np.diff(chosen) > 0).all()
        assert len(set(np.diff(chosen))) <= 2  # steps differ by one at most
        assert np.array_equal(chosen, THINNERS["uniform"]().choose(tokens, kept))
    assert np.array_equal(THINNERS["uniform"]().choose(tokens, tokens), np.arange(tokens))
    assert THINNERS["uniform"]().choose(8, 2).tolist() == [2, 6]


def test_at_last_captions_and_key_frames_stay_and_nothing_else(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS)
    captions = digest_of(path, "captions")
    firsts = [row.first_digest for row in rows_of(path)]
    aged(path, 32.5)
    assert states(path) == "..tttt"
    with Store.open(path) as store:
        row = store.recording("lobby")
        assert row.kv_from_unit == 2
        assert recording_digest(store, "lobby", "captions") == captions
        for found in store.units(row.id, last=1):
            unit, made = stored(store, found), kv_unit(found.number, DAY_NS)
            assert unit.kv is unit.keys is None
            assert unit.blocks["tokens"].tolist() == [0, 0]
            assert unit.caption == made.caption
            assert unit.keyframe == made.keyframe
            assert np.array_equal(unit.caption.vector, made.caption.vector)  # type: ignore[union-attr]
    aged(path, 400)
    assert states(path) == "." * 6
    with Store.open(path) as store:
        row = store.recording("lobby")
        assert (row.kv_from_unit, row.tier_bytes.kv, row.tier_bytes.keys) == (6, 0, 0)
    assert [row.first_digest for row in rows_of(path)] == firsts
    assert_whole(path)


def test_what_is_left_has_a_digest_and_first_digests_stay(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS)
    before = rows_of(path)
    aged(path, 21)
    for was, row in zip(before, rows_of(path), strict=True):
        assert row.digest != was.digest
        assert row.first_digest == was.first_digest == was.digest
        with Store.open(path) as store:
            assert digests_of(stored(store, row)).all == row.digest


def test_damaged_kv_goes_with_all_kv_and_keeps_its_file_until_then(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 4, DAY_NS)
    row = rows_of(path)[1]
    flip(path / "segments" / row.segment, row.payload_offset + 3)
    report = aged(path, 21)
    assert any("damaged" in left for done in report.recordings for left in done.left)
    assert states(path) == "rrrr"
    aged(path, 100)
    assert states(path) == "...."
    assert_whole(path)


def test_slices_that_are_not_of_their_codec_are_left_and_told(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 4, codec="raw")  # smooth bytes of no codec
        set_policy(store, POLICY, now_ns=time.time_ns())
        before = recording_digest(store, "lobby")
        set_policy(store, Policy(ages=(NARROW,)), now_ns=time.time_ns())
        report = compact(store)
        assert any("cannot be aged" in left for done in report.recordings for left in done.left)
        assert recording_digest(store, "lobby") == before
        assert verify(store).problems == []


# Steps together


def test_the_outcome_does_not_depend_on_when_it_ran(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 30, DAY_NS)
    often, once = copied(path, "often"), copied(path, "once")
    policy = Policy(ages=(NARROW, THIN))
    for day in range(1, 48, 2):
        aged(often, day, policy=policy if day == 1 else None)
        if day % 7 == 0:
            assert_whole(often)
    aged(once, 48, policy=policy)
    assert states(often) == states(once) == 30 * "t"
    assert digest_of(often) == digest_of(once)
    for again in (often, once):
        report = aged(again, 48, policy=policy)
        assert [done.aged_units + done.segments for done in report.recordings] == [0]


def test_a_unit_is_a_day_late_at_most(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 24, DAY_NS // 2, segment_units=24)
    for half_days in range(2, 90, 3):
        now = half_days / 2
        aged(path, now, policy=POLICY if half_days == 2 else None)
        for row, state in zip(rows_of(path), states(path), strict=True):
            age_ns = int(now * DAY_NS) - row.end_ns  # it is as old as that
            late = {"r": NARROW, "4": THIN, "t": CAPTIONS}.get(state)
            assert late is None or age_ns <= late.after_ns + LATE_NS
            early = {"4": NARROW, "t": THIN, ".": CAPTIONS}.get(state)
            assert early is None or age_ns >= early.after_ns


def test_a_policy_that_is_made_stricter_thins_further(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 4, DAY_NS, "int4")
    aged(path, 100, policy=Policy(ages=(THIN,)))
    assert {row.kept_ppm for row in rows_of(path)} == {HALF}
    aged(path, 100, policy=Policy(ages=(replace(THIN, keep_ppm=200_000),)))
    assert {row.kept_ppm for row in rows_of(path)} == {200_000}
    assert {int(t) for row in rows_of(path) for t in row.blocks["tokens"]} == {1}  # a fifth of six
    aged(path, 100, policy=Policy(ages=(THIN,)))  # what is gone does not come back
    assert {row.kept_ppm for row in rows_of(path)} == {200_000}
    assert_whole(path)


def test_recordings_without_kv_and_captions_without_kv_are_left(tmp_path: Path) -> None:
    with new_store(tmp_path) as store:
        fill(store, 4, codec="none")
        set_policy(store, POLICY)
        report = compact(store)
        assert [(done.segments, done.left) for done in report.recordings] == [(0, [])]


def test_key_pages_follow(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 8, DAY_NS)
    with Store.open(path, write=True) as store:
        lobby = store.recording("lobby").id
        index_recording(store, lobby, flush=True)
    aged(path, 34.5)
    assert states(path) == "....tttt"
    with Store.open(path) as store, KeyTable.open(store, lobby) as table:
        assert sorted(set(table.blocks["unit"].tolist())) == [4, 5, 6, 7]
        assert set(table.blocks["tokens"].tolist()) == {T // 2}
        for layer in range(L):
            assert table.holds(layer).all()
            expected = np.concatenate([kv_unit(n, DAY_NS).keys[layer] for n in range(4, 8)])  # type: ignore[index]
            assert np.array_equal(table.layer_keys(layer), expected)
        assert table.captions["unit"].tolist() == list(range(8))
    assert_whole(path)


def test_what_lost_its_kv_is_found_no_more_whatever_its_place(tmp_path: Path) -> None:
    """Ageing goes by files, which hold units in any order: a kill may leave one bare between two that are not."""
    path = new_kv_store(tmp_path, 8, DAY_NS)
    with Store.open(path, write=True) as store:
        lobby = store.recording("lobby").id
        index_recording(store, lobby, flush=True)
        catalog = Catalog(path / CATALOG, write=True)
        try:
            [*_, last] = survey(store, catalog, lobby, {}).held
            assert last.first_unit == 4
            rewrite(store, catalog, lobby, [last], bytes_max=1 << 30, change=_without_kv_of(store, {5}))
        finally:
            catalog.close()
    with Store.open(path) as store, KeyTable.open(store, lobby) as table:
        assert store.recording("lobby").kv_from_unit == 0
        bare = table.blocks["unit"] == 5
        assert not table.blocks["tokens"][bare].any()
        assert table.blocks["tokens"][~bare].all()
        found = KeySearch(table, backend="exact").search(0, np.ones(H * D, np.float32), 100)
        assert set(table.blocks["unit"][found.rows].tolist()) == {0, 1, 2, 3, 4, 6, 7}


def _without_kv_of(store: Store, numbers: set[int]) -> Change:
    def change(row: UnitRow) -> Changed | None:
        if row.number not in numbers:
            return None
        return Changed(replace(stored(store, row), kv=None, keys=None), row.codec, 0)

    return change


def test_what_is_aged_can_be_forgotten_and_repaired(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 8, DAY_NS)
    aged(path, 32.5)
    with Store.open(path, write=True) as store:
        half_ns = DAY_NS // 2
        forget(store, "lobby", start_ns=3 * DAY_NS + half_ns, end_ns=6 * DAY_NS - half_ns)
        (left,) = store.units(store.recording("lobby").id, first=3, last=3)
        assert left.blocks["tokens"].tolist() == [T // 2, 0]
    assert_whole(path)
    before = [(row.codec, row.kept_ppm, row.digest, row.first_digest) for row in rows_of(path)]
    for _ in range(2):
        (path / CATALOG).unlink()
        repair(path)
        found = [(row.codec, row.kept_ppm, row.digest, row.first_digest) for row in rows_of(path)]
        assert found == before
        with Store.open(path) as store:
            assert store.recording("lobby").kv_from_unit == 2
        assert_whole(path)
        aged(path, 32.5)  # compacts what was forgotten


# What it costs


def unit_bytes(state: str, codec: str) -> int:
    """Closed form of a unit's KV in one state."""
    bits, tokens = {"8": (8, T), "4": (4, T), "t": (4, T // 2), ".": (4, 0)}[state]
    if state == ".":
        return 0
    assert codec == "int8"
    return L * BLOCKS * affine_layout(bits, 2, H, tokens, D).slice_bytes


def test_a_recording_of_a_year_costs_what_the_policy_says(tmp_path: Path) -> None:
    """A stub's unit a day for 400 days, aged every 25 days, in files of about a month."""
    policy = parse(
        {
            "age": [
                {"after": "10 d", "codec": "int4"},
                {"after": "60 d", "retainer": "uniform", "keep": 0.5},
                {"after": "365 d", "keep": "captions"},
            ]
        }
    )
    path, days, written = tmp_path / "lobby.memdb", 400, 0
    file_bytes = 30 * 8_000
    with Store.open(path, create=True, write=True) as store:
        set_policy(store, policy, now_ns=STARTED_NS)
        for day in range(25, days + 1, 25):
            fill_kv(store, day, DAY_NS, "int8", segment_units=25, first=day - 25)
            report = compact(store, now_ns=STARTED_NS + day * DAY_NS, segment_bytes_max=file_bytes)
            assert report.left == []
            written += sum(done.segments for done in report.recordings)
        row = store.recording("lobby")
        found = store.units(row.id)
        ages = [days - number - 1 for number in range(days)]
        expected = ["." if age >= 365 else "t" if age >= 60 else "4" if age >= 10 else "8" for age in ages]
        exact = sum(unit_bytes(state, "int8") for state in expected)
        late = sum(
            unit_bytes("8", "int8") for age in ages if age in (365, 60, 10)
        )  # those that may be a day late
        assert exact <= row.tier_bytes.kv <= exact + late
        kv_bytes = sum(unit.parts_bytes for unit in map(_Sizes, found))
        assert kv_bytes == row.tier_bytes.kv
        assert row.kv_from_unit in (days - 366, days - 365)
        on_disk = sum(file.stat().st_size for file in store.segments_path.iterdir())
        records = sum(unit.length for unit in found)
        assert records < on_disk < 1.05 * records + 100_000  # headers and seals
        assert verify(store).problems == []
    assert written < 6 * days / 25  # files are not written anew again and again


class _Sizes:
    def __init__(self, row: UnitRow) -> None:
        self.parts_bytes = row.payload_bytes if len(row.slices) else 0


# The clock


def test_a_clock_that_jumps_ahead_ages_nothing_until_somebody_confirms_it(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS)
    aged(path, 6)
    leap_days = LEAP_NS // DAY_NS
    report = aged(path, 6 + leap_days + 1, policy=None)
    assert "--age-now" in report.left[0]
    assert states(path) == "rrrrrr"
    aged(path, 3650, policy=None)
    assert states(path) == "rrrrrr"
    report = aged(path, 3650, policy=None, age_now=True)
    assert report.left == []
    assert states(path) == "......"


def test_a_clock_that_jumps_back_ages_nothing(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS)
    aged(path, 10)
    before = digest_of(path)
    report = aged(path, 8, policy=None)
    assert "set the clock" in report.left[0]
    assert digest_of(path) == before
    aged(path, 20, policy=None)
    assert digest_of(path) != before


def test_a_month_without_compaction_costs_no_question(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS)
    aged(path, 6)
    for day in (30, 60, 90):
        assert aged(path, day, policy=None).left == []
    assert states(path) == "......"


@pytest.mark.parametrize(("live", "aged_at_once"), [(True, False), (False, True)])
def test_a_recording_that_began_before_clocks_were_right(
    tmp_path: Path, live: bool, aged_at_once: bool
) -> None:
    """A camera whose clock says 1970 knows no age; a film of 1970 is as old as it is."""
    path = tmp_path / "lobby.memdb"
    own = spec(codec="raw", model=MODEL, started_at_ns=3600 * 10**9, live=live)
    with Store.open(path, create=True, write=True) as store, store.writer(own, now_ns=STARTED_NS) as writer:
        writer.append([kv_unit(number, DAY_NS) for number in range(4)])
    report = aged(path, 1)
    assert states(path) == ("...." if aged_at_once else "rrrr")
    told = [left for done in report.recordings for left in done.left]
    assert any("clock was wrong" in left for left in told) != aged_at_once
    aged(path, 1, age_now=True)
    assert states(path) == "...."


# Beside an ingest


def test_a_running_ingest_ages_the_files_that_it_has_closed(tmp_path: Path) -> None:
    path = tmp_path / "lobby.memdb"
    with Store.open(path, create=True, write=True) as store:
        set_policy(store, POLICY, now_ns=STARTED_NS)
        own = spec(codec="raw", model=MODEL, started_at_ns=STARTED_NS)
        with store.writer(own, now_ns=STARTED_NS) as writer:
            for number in range(12):  # a file a day, for each takes no more than that
                writer.append([kv_unit(number, DAY_NS)])
            lobby = writer.recording.id
            steps, seen = [], Seen()
            now_ns = STARTED_NS + 13 * DAY_NS
            for _ in range(20):
                done = keep_one(store, lobby, seen, now_ns=now_ns, segment_bytes_max=10_000)
                steps.append(done.aged_units)
                assert done.left == []
            assert max(steps) <= 3  # one file a step
            assert sum(steps) == 6
            assert seen.since_ns == now_ns
            # What it does not look at again it has not forgotten: what becomes due later is aged later.
            for days in (14, 15, 16, 17, 20, 25, 26):
                for _ in range(4):
                    keep_one(store, lobby, seen, now_ns=STARTED_NS + days * DAY_NS, segment_bytes_max=10_000)
            assert states(path) == "t" * 11 + "r"  # the last is in the writer's hand
            set_policy(store, Policy(ages=(replace(THIN, after_ns=DAY_NS, keep_ppm=200_000),)), now_ns=now_ns)
            for _ in range(20):  # another policy is looked at from the beginning
                keep_one(store, lobby, seen, now_ns=STARTED_NS + 26 * DAY_NS, segment_bytes_max=10_000)
            assert {row.kept_ppm for row in rows_of(path)[:11]} == {200_000}
            writer.append([kv_unit(12, DAY_NS)])
        assert verify(store).problems == []


def keeping(path: Path, **options: object) -> Keeper:
    with Store.open(path) as store:
        return Keeper(store, store.recording("lobby").id, **options)  # type: ignore[arg-type]


def until_done(keeper: Keeper) -> None:
    assert keeper._thread is not None
    keeper._thread.join()


def test_the_keeper_works_in_the_background_now_and_then(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS)
    with Store.open(path, write=True) as store:
        set_policy(store, POLICY, now_ns=STARTED_NS)
    now_ns = STARTED_NS + 20 * DAY_NS
    idle = keeping(path, clock_ns=lambda: now_ns)
    idle(False)
    assert idle._thread is None  # not yet: a minute has not passed
    keeper = keeping(path, every_s=0, clock_ns=lambda: now_ns)
    keeper(False)
    until_done(keeper)
    assert states(path) == "tttttt"
    keeper(True)
    assert keeper._thread is None


def test_what_goes_wrong_in_the_keeper_is_a_warning_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS)
    with Store.open(path, write=True) as store:
        set_policy(store, POLICY, now_ns=STARTED_NS)
    keeper = keeping(path, every_s=0, clock_ns=lambda: STARTED_NS + 300 * DAY_NS)
    for _ in range(3):
        keeper(False)
        until_done(keeper)
    assert caplog.text.count("--age-now") == 1
    assert states(path) == "rrrrrr"
    flip(path / "policy.json", 20)
    keeper(False)
    until_done(keeper)
    assert "policy.json is damaged" in caplog.text
    full = keeping(path, every_s=0, clock_ns=lambda: STARTED_NS + 20 * DAY_NS)
    with Store.open(path, write=True) as store:
        set_policy(store, POLICY, now_ns=STARTED_NS)
        lobby = store.recording("lobby").id
    with watched(Steps(lambda step: step.what == "write")):
        full(False)
        until_done(full)
    assert "No space left" in caplog.text
    with caplog.at_level(logging.WARNING), FileLock(rewrite_lock(path, lobby)):
        said = len(caplog.records)
        full(False)  # somebody compacts: another time
        until_done(full)
        assert len(caplog.records) == said
    full(False)
    until_done(full)
    assert states(path) == "tttttt"
    assert_whole(path)


def test_an_ingest_that_ends_gives_the_step_in_hand_up(tmp_path: Path) -> None:
    path = new_kv_store(tmp_path, 6, DAY_NS)
    stop = threading.Event()
    stop.set()
    with Store.open(path, write=True) as store:
        set_policy(store, POLICY, now_ns=STARTED_NS)
        lobby = store.recording("lobby").id
        before = sorted(file.name for file in store.segments_path.iterdir())
        with pytest.raises(Interrupted):
            keep_one(store, lobby, Seen(), now_ns=STARTED_NS + 20 * DAY_NS, stop=stop)
        assert sorted(file.name for file in store.segments_path.iterdir()) == before
    assert states(path) == "rrrrrr"


def test_the_real_ingest_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run_cases.small_model(run_cases.small_spec(tmp_path))
    film = run_cases.small_film(tmp_path / "film.mp4", 12)
    calls: list[bool] = []
    monkeypatch.setattr(keep.Keeper, "__call__", lambda self, flush: calls.append(flush))
    run_cases.ingested(tmp_path / "s.memdb", model, film, "rekv")
    assert calls[-1] is True
    assert len(calls) > 2


# Questions over it


def test_questions_find_in_aged_kv_what_they_find_in_an_ingest_of_that_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(age, "LATE_NS", 0)  # a film of seconds has no days
    model = run_cases.small_model(run_cases.small_spec(tmp_path))
    film = run_cases.small_film(tmp_path / "film.mp4")
    paths = {codec: tmp_path / f"{codec}.memdb" for codec in ("raw", "int4")}
    for codec, path in paths.items():
        stamps = (*run_cases.SETTINGS["rekv"], "rebuild.time_text_s=2")  # they stand between blocks
        run_cases.ingested(path, model, film, "rekv", codec=codec, settings=stamps)
    with Store.open(paths["raw"], write=True) as store:
        # By the second half of the film's time, so that both codecs stand in one recording.
        row = store.recording(run_cases.NAME)
        set_policy(store, Policy(ages=(Age(10**9, "int4"),)), now_ns=row.created_ns)
        compact(store, now_ns=row.created_ns + 13 * 10**9)
        assert {found.codec for found in store.units(row.id)} == {"", "int4"}
    with run_cases.opened(paths["raw"], model, create=False) as client:
        answer = client.ask("what is there?", mode="kv")
        assert list(answer.warnings) == []
        assert client.verify().ok
        with Store.open(paths["raw"], write=True) as store:
            compact(store, now_ns=row.created_ns + 20 * DAY_NS)
        logits = {}
        for codec, path in paths.items():
            with run_cases.opened(path, model, create=False) as other:
                other.ask("what is there?", mode="kv")
                logits[codec] = other._asking().question_logits(run_cases.NAME, "what is there?")[1]
        assert torch.equal(logits["raw"], logits["int4"])
        set_thin = Policy(ages=(Age(10**9, "int4", "uniform", HALF),))
        with Store.open(paths["raw"], write=True) as store:
            set_policy(store, set_thin, now_ns=row.created_ns + 20 * DAY_NS)
            keep_one(store, row.id, Seen(), now_ns=row.created_ns + 20 * DAY_NS)
            assert {found.kept_ppm for found in store.units(row.id)} == {HALF}
        # Its pages still say how many tokens there were; on the connection that was open all the time, and on others.
        stale = [client.ask("what is there?", mode=mode) for mode in ("kv", "recent")]
        with run_cases.opened(paths["raw"], model, create=False) as other:
            stale += [other.ask("what is there?", mode=mode) for mode in ("kv", "recent")]
        with Store.open(paths["raw"], write=True) as store:
            compact(store, now_ns=row.created_ns + 20 * DAY_NS)
            assert store.recording_by_id(row.id).generation == 1
        fresh = [client.ask("what is there?", mode=mode) for mode in ("kv", "recent")]
        for thinned, again in zip(stale, fresh * 2, strict=True):
            assert list(thinned.warnings) == list(again.warnings) == []
            assert thinned.text == again.text
    with connect(paths["raw"], create=False) as client:
        assert client.verify().ok


# Deaths and full disks


def at_day_32(path: Path) -> None:
    aged(path, 32.5, policy=None)


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A closed store with key pages, of which half is to lose its KV and the rest to be thinned in int4."""
    path = new_kv_store(tmp_path, 4, DAY_NS, segment_units=2)
    with Store.open(path, write=True) as store:
        set_policy(store, POLICY, now_ns=STARTED_NS + 32 * DAY_NS)
        index_recording(store, store.recording("lobby").id, flush=True)
    return path


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_it_can_die_at_any_step(ready: Path, every: int) -> None:
    other = copied(ready, "undisturbed")
    at_day_32(other)
    assert states(other) == "..tt"
    before, after = rows_of(ready), rows_of(other)
    final = digest_of(other)
    for copy, when in deaths(ready, at_day_32, every=every):
        for was, is_to_be, row in zip(before, after, rows_of(copy), strict=True):
            assert row.digest in (was.digest, is_to_be.digest), when
            assert row.first_digest == was.first_digest, when
        with Store.open(copy) as store:
            assert verify(store).problems == [], when
        at_day_32(copy)
        assert digest_of(copy) == final, when
        assert states(copy) == "..tt", when
        assert_whole(copy)


@pytest.mark.usefixtures("quick_disk")
def test_a_disk_that_fills_up_at_any_write_is_a_typed_error_and_costs_nothing(ready: Path) -> None:
    counted = Steps()
    other = copied(ready, "counted")
    with watched(counted):
        at_day_32(other)
    final = digest_of(other)
    kinds = ("create", "write", "sync", "sync_folder")
    steps = [at for at, step in enumerate(counted.seen) if step.what in kinds]
    typed = 0
    for number, at in enumerate(steps[::2]):
        copy = copied(ready, f"full{number}")
        place = iter(range(10_000))
        try:
            with watched(Steps(lambda step, place=place, at=at: next(place) == at)):  # type: ignore[misc]
                at_day_32(copy)
        except StoreFull:
            typed += 1
        assert_whole(copy)
        at_day_32(copy)
        assert digest_of(copy) == final
    assert typed > len(steps) // 4


def test_pages_that_a_compaction_removes_meanwhile_are_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_kv_store(tmp_path, 4, DAY_NS)
    with Store.open(path, write=True) as store:
        index_recording(store, store.recording("lobby").id, flush=True)
    real = page_check.verify_pages

    def late(pages: Path, *rest: object) -> object:
        pages.unlink()
        return real(pages, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(page_check, "verify_pages", late)
    assert page_check.check_pages(path) == []
    assert not list((path / "keys").glob("*.pages"))
