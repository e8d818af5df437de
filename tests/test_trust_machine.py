"""A store under random hands, against an account of what must be in it.

Every rule is one thing that somebody does to a store; any of them may be killed at any of its steps. Then the
account knows the outcomes that there may be, and nothing else; what it was is held to from then on. More of it
under the marker soak, with the seed of MEMDB_SEED.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

import memdb.store
from memdb.backup import backup
from memdb.captions import CaptionIndex
from memdb.compact import compact
from memdb.database import CATALOG
from memdb.export import export
from memdb.files import watched
from memdb.policy import Age, Policy, read_policy, write_policy
from memdb.repair import repair
from memdb.store import Store
from memdb.transfer import export_recording, import_recording
from tests.kill_cases import WHENS, Death, Killed
from tests.machine_cases import Book, Grown
from tools.trust.check import differences, must_be_repaired, remains
from tools.trust.look import look, problems
from tools.trust.questions import ask_all
from tools.trust.runner import SEGMENT_BYTES_MAX, Runner
from tools.trust.script import OPEN_END, Op
from tools.trust.units import ENCODER, UNIT_NS, VECTOR_SIZE, Stream, spec

CODEC_OF = {"lobby": "int4", "door": "raw", "yard": "int8"}
STEPS = st.integers(0, 12) | st.integers(0, 60)  # of an operation, at which it may be killed
_S = 10**9
_DAY_S = 86_400
AGES = st.sampled_from(
    (
        (),
        (Age(4 * _S, codec="int4"),),
        (Age(2 * _S, codec="int8"), Age(3600 * _S, codec="int4", retainer="uniform", keep_ppm=500_000)),
        (Age(6 * _S, retainer="uniform", keep_ppm=500_000), Age(2 * _DAY_S * _S, captions_only=True)),
        (Age(8 * _S, captions_only=True),),
    )
)
names = st.sampled_from(sorted(CODEC_OF))


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memdb-machine-"))
        self.path = self.folder / "s.memdb"
        self.runner = Runner(self.path)
        _ = self.runner.store
        self.book = Book()
        self.lives = dict.fromkeys(CODEC_OF, 0)  # of each name, that which the next recording will be
        self.late: list[Op] = []  # forgettings that a kill stopped, of which a file may lie there
        self.now_ns = (spec(self._stream("lobby")).started_at_ns or 0) + _DAY_S
        self.death: Death | None = None
        self.reader: Store | None = None
        self.exported: dict[str, Grown] = {}
        self.copies = 0
        self.append("lobby", 3)
        self.append("door", 2)

    # What is written

    @rule(name=names, count=st.integers(1, 5))
    def append(self, name: str, count: int) -> None:
        kept = self.book.kept.get(name)
        self._do(Op("append", self._stream(name), kept.units if kept else 0, count))

    @rule(name=names, kind=st.sampled_from(["state", "state", "gap", "epoch", "end", "close", "pages"]))
    def event(self, name: str, kind: str) -> None:
        kept = self.book.kept.get(name)
        if kept is not None and kept.units:
            self._do(Op(kind, kept.stream, kept.units))

    @rule()
    def index_captions(self) -> None:
        self._do(Op("captions"))

    # What is forgotten, removed, aged

    @rule(name=names, start=st.integers(0, 40), length=st.integers(1, 12), is_open=st.booleans())
    def forget(self, name: str, start: int, length: int, is_open: bool) -> None:
        """Quarters of units, so that blocks are met in the middle and at their edges."""
        kept = self.book.kept.get(name)
        if kept is None or not kept.units:
            return
        start_ns = start * UNIT_NS // 4 % (kept.units * UNIT_NS)
        end_ns = OPEN_END if is_open and length > 10 else start_ns + length * UNIT_NS // 4
        self._do(Op("forget", kept.stream, kept.units, 0, start_ns, end_ns))

    @rule(name=names, really=st.sampled_from([False, False, True]))
    def forget_recording(self, name: str, really: bool) -> None:
        kept = self.book.kept.get(name)
        if kept is not None and kept.units and really:
            self._do(Op("forget_all", kept.stream, kept.units))

    @rule(passes_s=st.sampled_from([0, 5, 30, 3 * _DAY_S]), alone=st.booleans())
    def compact(self, passes_s: int, alone: bool) -> None:
        """And age by the policy, on a clock that goes on."""
        self.now_ns += passes_s * _S
        left: list[str] = []

        def act() -> None:
            if alone:
                self.runner._close_writers()
            report = compact(
                self.runner.store, now_ns=self.now_ns, age_now=True, segment_bytes_max=SEGMENT_BYTES_MAX
            )
            left.extend([*report.left, *(what for done in report.recordings for what in done.left)])

        if alone:
            self._drop_reader()
        was_killed = self._run(act, [self.book], aged=True)
        if not was_killed:
            self.late.clear()
            with Store.open(self.path) as store:
                self.book.take_ages(look(store), self.now_ns, done=alone and not left)
        if alone and not was_killed:
            assert not left, left
            found = remains(self.path, self.book)
            assert not found, found

    @rule(ages=AGES)
    def set_policy(self, ages: tuple[Age, ...]) -> None:
        policy = Policy(ages=ages)
        if not self._run(lambda: write_policy(self.path, policy), [self.book]):
            self.book.policies = (policy,)
        else:
            now = read_policy(self.path)
            assert now in (*self.book.policies, policy)
            self.book.policies = (now,)

    # Death, and what comes after it

    @rule(at=STEPS, when=st.sampled_from(WHENS))
    def kill_in_the_next(self, at: int, when: str) -> None:
        self.death = Death(at, when)

    @rule(at=st.integers(0, 6), when=st.sampled_from(WHENS))
    def kill_early_in_the_next(self, at: int, when: str) -> None:
        self.death = Death(at, when)

    @rule()
    def reopen(self) -> None:
        self.runner.close()
        _ = self.runner.store

    @rule()
    def repair(self) -> None:
        outcomes = [self.book]
        for late in self.late:
            outcomes += [book.with_late(late) for book in outcomes]

        def act() -> None:
            self.runner.close()
            report = repair(self.path)
            assert self.late or not report.spans, report.spans

        self._drop_reader()
        if not self._run(act, outcomes):
            self._settle(outcomes, aged=False)

    @rule(go_on=st.booleans())
    def back_up(self, go_on: bool) -> None:
        """The copy is the store; now and then it is the one to go on with."""
        self.copies += 1
        target = self.folder / f"copy{self.copies}"

        def act() -> None:
            report = backup(self.path, target)
            assert not report.problems, report.problems

        if self._run(act, [self.book]):
            assert not target.exists() or self._is_as_it_must_be(target)
            return
        assert self._is_as_it_must_be(target)
        if go_on:
            self._drop_reader()
            self.runner.close()
            shutil.rmtree(self.path)
            self.path = target
            self.runner = Runner(target)

    @rule(name=names)
    def export_it(self, name: str) -> None:
        kept = self.book.grown().get(name)
        out = self.folder / f"{name}.memdb-recording"
        if kept is None or not kept.units:
            return
        if self._run(lambda: export_recording(self.path, name, out), [self.book]):
            return
        self.exported[name] = deepcopy(kept)
        with Store.open(self.path) as store:
            captions = export(store, name, self.folder / "captions.jsonl", "jsonl")
        assert captions == sum(kept.unit(number).caption is not None for number in range(kept.units))

    @rule(name=names)
    def import_it(self, name: str) -> None:
        """Back under its name, where that was forgotten; what was forgotten of it before it was exported stays so."""
        if name in self.book.kept or name not in self.exported:
            return
        after = deepcopy(self.book)
        back = deepcopy(self.exported[name])
        back.states = {}
        after.kept[name] = back
        after.gone = [kept for kept in after.gone if kept.stream != back.stream]
        self._run(
            lambda: import_recording(self.runner.store, self.folder / f"{name}.memdb-recording"),
            [self.book, after],
        )

    # What is asked

    @rule()
    def look_with_a_new_reader(self) -> None:
        assert self._is_as_it_must_be(self.path)

    @rule()
    def look_with_an_old_reader(self) -> None:
        self.reader = self.reader or Store.open(self.path)
        self._hold(self.reader)

    @rule()
    def look_with_the_writer(self) -> None:
        for kept in self.book.kept.values():  # a writer first brings forward what a killed process left
            self.runner._writer(kept.stream)
        self._hold(self.runner.store)

    @rule(start=st.integers(0, 20), length=st.integers(1, 20), number=st.integers(0, 1 << 16))
    def search_in_a_span(self, start: int, length: int, number: int) -> None:
        start_ns, end_ns = start * UNIT_NS // 2, (start + length) * UNIT_NS // 2
        said = {
            (kept.stream.name, unit.number): (kept.stream.word(unit.number), unit)
            for kept in self.book.grown().values()
            for unit in map(kept.unit, range(kept.units))
            if unit.caption is not None and unit.start_ns < end_ns and unit.end_ns > start_ns
        }
        self.reader = store = self.reader or Store.open(self.path)
        captions = CaptionIndex(store.path)
        of = {row.id: row.name for row in store.recordings()}
        query = np.random.default_rng(number).normal(size=VECTOR_SIZE).astype(np.float32)
        for text, vector in (("star", None), (None, query), ("star", query)):
            hits = captions.search(
                store, ENCODER, text=text, vector=vector, start_ns=start_ns, end_ns=end_ns, limit=1000
            )
            assert not hits.warnings
            assert {(of[hit.recording_id], hit.unit) for hit in hits} == set(said)
            assert len(hits) == len(said)
        if said:
            key = sorted(said)[number % len(said)]
            hits = captions.search(
                store, ENCODER, text=said[key][0], vector=query, start_ns=start_ns, end_ns=end_ns
            )
            assert key in [(of[hit.recording_id], hit.unit) for hit in hits][:2]

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        try:
            self.death = None
            assert self._is_as_it_must_be(self.path)
            self._drop_reader()
            self.runner.close()
            assert self._is_as_it_must_be(self.path)
        finally:
            self._drop_reader()
            self.runner._graves.clear()
            gc.collect()
            shutil.rmtree(self.folder)

    # Helpers

    def _stream(self, name: str) -> Stream:
        kept = self.book.kept.get(name)
        for known in self.book.kept.values():
            self.lives[known.stream.name] = max(self.lives[known.stream.name], known.stream.life + 1)
        return kept.stream if kept is not None else Stream(5, name, self.lives[name], CODEC_OF[name])

    def _do(self, op: Op) -> None:
        outcomes = list(self.book.outcomes(op))
        was_killed = self._run(lambda: self.runner.do(op), outcomes)
        if was_killed and op.kind.startswith("forget") and self.book is outcomes[0]:
            self.late.append(op)  # a repair cannot tell it from one whose end was damaged

    def _run(self, act: Callable[[], object], outcomes: Sequence[Book], *, aged: bool = False) -> bool:
        """Do something, of which the last outcome is that it was done. Whether it was killed."""
        killer, self.death = self.death, None
        if killer is None:
            act()
        else:
            try:
                with watched(killer):
                    act()
            except Killed:
                self.runner._abandon()
                self._settle(outcomes, aged=aged)
                return True
            if killer.dead:  # swallowed: only what may fail without harm does that
                raise AssertionError("a killed process went on")
        self.book = outcomes[-1]
        return False

    def _settle(self, outcomes: Sequence[Book], *, aged: bool) -> None:
        """Find out which of the outcomes there was."""
        if not self.book.kept and not (self.path / CATALOG).exists():  # a repair with nothing to begin with
            Store.open(self.path, create=True, write=True).close()
        if must_be_repaired(self.path):
            self._drop_reader()
            repair(self.path)
        with Store.open(self.path) as store:
            seen = look(store)
            found = []
            for book in outcomes:
                if aged:
                    book.take_ages(seen, self.now_ns, done=False)
                found.append(differences(book, seen))
            assert [] in found, found
            self.book = outcomes[found.index([])]
            self._hold(store)

    def _is_as_it_must_be(self, path: Path) -> bool:
        with Store.open(path) as store:
            self._hold(store)
        return True

    def _hold(self, store: Store) -> None:
        found = differences(self.book, look(store))
        found += [f"{file}: {what}" for file, what in problems(store)]
        found += ask_all(store, self.book)
        assert not found, found

    def _drop_reader(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None


FEW = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed writer had made safe, open readers see half a second later at most: here with their next look, so
    that no outcome depends on the clock.
    """
    monkeypatch.setattr(memdb.store, "_LOOK_S", 0.0)


def test_a_store_under_random_hands() -> None:
    run_state_machine_as_test(StoreMachine, settings=FEW)


@pytest.mark.soak
def test_a_store_under_random_hands_for_long() -> None:
    many = settings(FEW, max_examples=250, stateful_step_count=50, derandomize=False, print_blob=True)
    machine = seed(int(os.environ.get("MEMDB_SEED", "1")))(StoreMachine)
    run_state_machine_as_test(machine, settings=many)
