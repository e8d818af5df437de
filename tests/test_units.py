"""Where units close (methods.md S1), and frames that become one: plain loops, K1, K2 and M5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.ingest.frames import SeenFrame, cosine, joined, mean_token
from memdb.ingest.reduce.merge_frames import MergeFrames
from memdb.ingest.units import UNITS
from memdb.ingest.units.base import UnitStage
from memdb.ingest.units.block import FixedBlock
from memdb.ingest.units.clip import Clip
from memdb.ingest.units.frame import OneFrame
from memdb.ingest.units.segment import SemanticSegment, merge_most_alike

# The contract is run by several classes on purpose.
QUICK = settings(
    deadline=None, database=None, max_examples=60, suppress_health_check=[HealthCheck.differing_executors]
)
NS = 1_000_000_000
N, E = 4, 6


def frames_of(features: Sequence[Tensor]) -> list[SeenFrame]:
    """A frame a second."""
    return [SeenFrame(i, i * NS, (i + 1) * NS, feature, b"") for i, feature in enumerate(features)]


def cut(unit: UnitStage, frames: Sequence[SeenFrame]) -> list[list[SeenFrame]]:
    closed, opened = [], []
    for frame in frames:
        done, opened = unit.extend(opened, frame)
        closed += done
    return closed + ([opened] if opened else [])


def scenes(lengths: Sequence[int]) -> list[Tensor]:
    """Constant within a scene, orthogonal across neighbouring ones."""
    return [torch.eye(E)[i % E].expand(N, E) for i, length in enumerate(lengths) for _ in range(length)]


def spans(groups: Sequence[Sequence[SeenFrame]]) -> list[tuple[int, int]]:
    return [(frame.start_ns // NS, frame.end_ns // NS) for group in groups for frame in group]


# What every unit stage keeps to


@st.composite
def walks(draw: st.DrawFn) -> list[SeenFrame]:
    """A stream with still stretches, slow drifts, cuts, and gaps in time."""
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    now, at, frames = random.normal(size=(N, E)), 0, []
    for number in range(draw(st.integers(0, 50))):
        now = now + random.choice([0.0, 0.05, 2.0]) * random.normal(size=(N, E))
        at += NS * int(random.random() < 0.1) * 5
        frames.append(SeenFrame(number, at, at + NS, torch.from_numpy(now).float(), b""))
        at += NS
    return frames


class UnitContract:
    """Inherit, and give a stage; `limit_s` is what its units may last, 0 for what they like."""

    limit_s = 0.0

    def stage(self) -> UnitStage:
        raise NotImplementedError

    @QUICK
    @given(walks())
    def test_every_frame_is_in_one_unit_and_time_goes_on(self, frames: list[SeenFrame]) -> None:
        found = [frame for group in cut(self.stage(), frames) for frame in group]
        assert sum(frame.count for frame in found) == len(frames)
        assert all(a.end_ns <= b.start_ns for a, b in pairwise(found))
        ends = {frame.end_ns for frame in found}
        assert ends <= {frame.end_ns for frame in frames}
        assert not frames or (found[0].start_ns, found[-1].end_ns) == (frames[0].start_ns, frames[-1].end_ns)

    @QUICK
    @given(walks(), st.integers(0, 50))
    def test_it_looks_neither_ahead_nor_back_behind_the_open_unit(
        self, frames: list[SeenFrame], at: int
    ) -> None:
        """Fed with the open unit alone, as a saved state has it, it goes on as if it had never stopped."""
        stage = self.stage()
        opened: list[SeenFrame] = []
        closed: list[list[SeenFrame]] = []
        for i, frame in enumerate(frames):
            if i == at:
                stage, opened = self.stage(), list(opened)
            before = list(opened)
            done, after = stage.extend(opened, frame)
            assert opened == before, "what is handed in stays as it is"
            closed, opened = closed + done, after
        whole = cut(self.stage(), frames)
        assert [spans([group]) for group in whole][: len(closed)] == [spans([group]) for group in closed]

    @QUICK
    @given(walks())
    def test_units_last_no_longer_than_they_may(self, frames: list[SeenFrame]) -> None:
        for group in cut(self.stage(), frames):
            assert len(group) == 1 or not 0 < self.limit_s < (group[-1].end_ns - group[0].start_ns) / NS


class TestOneFrame(UnitContract):
    def stage(self) -> UnitStage:
        return OneFrame()


class TestClip(UnitContract):
    limit_s = 6.0

    def stage(self) -> UnitStage:
        return Clip(frames=5, unit_s_max=self.limit_s)


class TestFixedBlock(UnitContract):
    limit_s = 9.0

    def stage(self) -> UnitStage:
        return FixedBlock(first_frames=12, frames=5, unit_s_max=self.limit_s)


class TestSemanticSegment(UnitContract):
    limit_s = 12.0

    def stage(self) -> UnitStage:
        return SemanticSegment(theta=0.9, frames_min=2, frames_max=5, unit_s_max=self.limit_s)


class TestLongSegments(UnitContract):
    def stage(self) -> UnitStage:
        return SemanticSegment(theta=-1, frames_min=1, frames_max=4, unit_s_max=0)


def test_every_unit_stage_keeps_the_contract() -> None:
    assert {type(kind().stage()) for kind in UnitContract.__subclasses__()} == set(UNITS.values())


# Segments


@dataclass
class LoopUnit:
    feature: np.ndarray  # type: ignore[type-arg]
    start: int
    end: int


def loop_cos(a: np.ndarray, b: np.ndarray) -> float:  # type: ignore[type-arg]
    a, b = a.mean(0), b.mean(0)
    lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / lengths if lengths else 0.0


def loop_segments(
    features: Sequence[Tensor], theta: float, m: int, M: int, seconds_max: float
) -> list[list[LoopUnit]]:
    """methods.md 1.2 and 1.12, frame by frame, with the list of neighbouring cosines that the formulas name."""
    raw = [feature.double().numpy() for feature in features]
    segments: list[list[LoopUnit]] = []
    cosines: list[float] = []
    for t, feature in enumerate(raw):
        last = segments[-1] if segments else []
        c = loop_cos(feature, raw[t - 1]) if t else 0.0
        late = bool(last) and 0 < seconds_max < t + 1 - last[0].start
        if not last or late or (len(last) >= m and c <= theta):
            segments.append([LoopUnit(feature, t, t + 1)])
            cosines = []
            continue
        last.append(LoopUnit(feature, t, t + 1))
        cosines.append(c)
        if len(last) > M:
            i = int(np.argmax(cosines))  # the first of equals
            merged = LoopUnit((last[i].feature + last[i + 1].feature) / 2, last[i].start, last[i + 1].end)
            last[i : i + 2] = [merged]
            del cosines[i]
            if i > 0:
                cosines[i - 1] = loop_cos(last[i - 1].feature, merged.feature)
            if i < len(cosines):
                cosines[i] = loop_cos(merged.feature, last[i + 1].feature)
    return segments


@QUICK
@given(
    st.integers(0, 9999),
    st.integers(0, 60),
    st.sampled_from([0.3, 0.9, 0.99]),
    st.integers(1, 5),
    st.integers(0, 6),
    st.sampled_from([0.0, 7.5, 20.0]),
)
def test_segments_are_those_of_the_plain_loop(
    seed: int, count: int, theta: float, m: int, more: int, seconds_max: float
) -> None:
    random = np.random.default_rng(seed)
    now, features = random.normal(size=(N, E)), []
    for _ in range(count):
        now = (
            random.normal(size=(N, E)) if random.random() < 0.15 else now + 0.05 * random.normal(size=(N, E))
        )
        features.append(torch.from_numpy(now))
    unit = SemanticSegment(theta=theta, frames_min=m, frames_max=m + more, unit_s_max=seconds_max)
    found = cut(unit, frames_of(features))
    truth = loop_segments(features, theta, m, m + more, seconds_max)
    assert [[(f.start_ns // NS, f.end_ns // NS) for f in group] for group in found] == [
        [(one.start, one.end) for one in group] for group in truth
    ]
    for group, own in zip(found, truth, strict=True):
        for frame, one in zip(group, own, strict=True):
            assert torch.allclose(frame.tokens, torch.from_numpy(one.feature), rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(4, 12), min_size=1, max_size=8))
def test_k1_boundaries_are_at_the_cuts(lengths: list[int]) -> None:
    found = cut(SemanticSegment(), frames_of(scenes(lengths)))
    assert [len(group) for group in found] == lengths


@pytest.mark.parametrize("early", [1, 2, 3])
def test_k1_a_cut_within_the_first_frames_is_passed_over(early: int) -> None:
    found = cut(SemanticSegment(), frames_of(scenes([8, early, 9])))
    # the short scene begins a segment, which goes on into the next one
    assert [len(group) for group in found] == [8, early + 9]
    assert [len(group) for group in cut(SemanticSegment(), frames_of(scenes([8, 4, 9])))] == [8, 4, 9]


def test_k1_a_long_scene_is_one_segment_of_64_that_cover_it() -> None:
    found = cut(SemanticSegment(unit_s_max=0), frames_of(scenes([200])))
    assert [len(group) for group in found] == [64]
    covered = spans(found)
    assert (covered[0][0], covered[-1][1]) == (0, 200)
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    assert sum(frame.count for frame in found[0]) == 200


def test_k1_at_the_limit_a_scene_is_cut() -> None:
    found = cut(SemanticSegment(unit_s_max=50), frames_of(scenes([120])))
    assert [group[-1].end_ns - group[0].start_ns for group in found] == [50 * NS, 50 * NS, 20 * NS]


def test_segments_shorter_than_the_minimum_end_a_stream() -> None:
    assert [len(group) for group in cut(SemanticSegment(), frames_of(scenes([6, 2])))] == [6, 2]
    assert [len(group) for group in cut(SemanticSegment(), frames_of(scenes([1])))] == [1]


@QUICK
@given(st.integers(0, 999), st.integers(1, 80), st.integers(1, 9), st.integers(0, 9))
def test_k2_units_cover_all_frames_once(seed: int, count: int, m: int, more: int) -> None:
    random = torch.Generator().manual_seed(seed)
    steps = 0.2 * torch.randn(count, N, E, generator=random)
    found = cut(SemanticSegment(0.9, m, m + more, 0.0), frames_of(list(steps.cumsum(0) + 1)))
    covered = spans(found)
    assert covered[0][0] == 0
    assert covered[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    for group in found:
        assert len(group) <= m + more
        for frame in group:
            assert frame.count == (frame.end_ns - frame.start_ns) // NS


def test_k2_two_equal_frames_merge_into_that_frame() -> None:
    a, b = frames_of([torch.randn(N, E)] * 2)
    one = joined(a, b, 0.5)
    assert torch.equal(one.tokens, a.tokens)
    assert (one.start_ns, one.end_ns, one.count, one.number) == (0, 2 * NS, 2, 0)


def test_halves_are_not_weighted_by_what_they_stand_for() -> None:
    a, b, c = frames_of([torch.zeros(N, E), torch.full((N, E), 2.0), torch.full((N, E), 5.0)])
    assert float(joined(joined(a, b, 0.5), c, 0.5).tokens[0, 0]) == 3.0


def test_the_newest_is_compared_with_the_frame_before_it_and_not_with_what_that_became() -> None:
    """The last two of three merge; the fourth is like the third as it came, and unlike their mean."""
    axes = torch.eye(E)
    shown = [axes[0], axes[1], axes[1] + 0.9 * axes[2], axes[1] + 0.9 * axes[2]]
    frames = frames_of([axis.expand(N, E) for axis in shown])
    unit = SemanticSegment(theta=0.97, frames_min=2, frames_max=2, unit_s_max=0)
    opened = [frames[0], replace(frames[1], likeness=0.0)]
    _, opened = replace(unit, theta=-1.0).extend(opened, frames[2])
    assert [frame.count for frame in opened] == [1, 2]
    assert cosine(frames[3].embedding, mean_token(opened[-1].tokens)) < 0.97
    closed, opened = unit.extend(opened, frames[3])
    assert closed == []


def test_of_equally_alike_neighbours_the_first_two_merge() -> None:
    frames = [replace(frame, likeness=0.5) for frame in frames_of([torch.ones(N, E)] * 4)]
    assert [frame.count for frame in merge_most_alike(frames)] == [2, 1, 1]


def test_saliency_merges_as_tokens_do() -> None:
    a, b = frames_of([torch.zeros(N, E), torch.ones(N, E)])
    one = joined(replace(a, saliency=torch.zeros(N)), replace(b, saliency=torch.ones(N)), 0.25)
    assert one.saliency is not None
    assert torch.equal(one.saliency, torch.full((N,), 0.25))


# Blocks


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 90))
def test_blocks_are_of_the_first_size_and_then_of_the_other(first: int, size: int, count: int) -> None:
    found = cut(FixedBlock(first, size, 0), frames_of(scenes([count])))
    lengths = [min(first, count)] if count else []
    while sum(lengths) < count:
        lengths.append(min(size, count - sum(lengths)))
    assert [len(group) for group in found] == lengths


def test_a_stream_that_goes_on_after_a_gap_has_no_first_block() -> None:
    assert [len(group) for group in cut(FixedBlock(), frames_of(scenes([60]))[40:])] == [8, 8, 4]


def test_a_first_block_whose_beginning_was_forgotten_closes_with_the_next_frame() -> None:
    frames = frames_of(scenes([30]))
    closed, opened = FixedBlock().extend(frames[5:25], frames[25])
    assert [len(group) for group in closed] == [21]
    assert opened == []


def test_a_block_closes_at_the_latest_after_its_limit() -> None:
    found = cut(FixedBlock(first_frames=30, frames=12, unit_s_max=10), frames_of(scenes([30])))
    assert [len(group) for group in found] == [10, 10, 10]


# Frames that merge


def merged(frames: Sequence[SeenFrame], **params: float) -> list[SeenFrame]:
    found: list[SeenFrame] = []
    for frame in frames:
        one = MergeFrames(**params).merge(found[-1].start_ns, found[-1], frame) if found else None
        found = [*found[:-1], one] if one is not None else [*found, frame]
    return found


def test_m5_equal_frames_are_one_with_their_count_and_span() -> None:
    [one] = merged(frames_of([torch.randn(N, E)] * 90))
    assert (one.count, one.start_ns, one.end_ns) == (90, 0, 90 * NS)


def test_m5_above_1_nothing_merges() -> None:
    assert len(merged(frames_of([torch.ones(N, E)] * 9), delta=1.01)) == 9
    assert len(merged(frames_of([torch.ones(N, E)] * 9), delta=1.0)) == 9, "above, and not at"


def test_m5_the_mean_does_not_depend_on_the_order() -> None:
    features = [torch.randn(N, E, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    truth = torch.stack(features).double().mean(0)
    for order in (range(20), reversed(range(20)), np.random.default_rng(0).permutation(20)):
        [one] = merged(frames_of([features[i] for i in order]), delta=-1)
        assert torch.allclose(one.tokens.double(), truth, atol=1e-6)


def test_the_mean_of_a_long_still_run_of_bf16_frames_is_a_mean() -> None:
    """Kept in bf16 it would stop to move after some hundred frames."""
    features = [torch.full((N, E), float(i >= 600)).to(torch.bfloat16) for i in range(1200)]
    [one] = merged(frames_of(features), delta=-1, unit_s_max=0)
    assert torch.allclose(one.tokens, torch.full((N, E), 0.5), atol=1e-4)


@QUICK
@given(st.integers(0, 999), st.integers(1, 40), st.sampled_from([0.5, 0.9]), st.sampled_from([0.0, 5.5]))
def test_merging_is_the_plain_loop(seed: int, count: int, delta: float, seconds_max: float) -> None:
    random = np.random.default_rng(seed)
    now, features = random.normal(size=(N, E)), []
    for _ in range(count):
        now = now + random.choice([0.05, 1.0]) * random.normal(size=(N, E))
        features.append(torch.from_numpy(now).float())
    found = merged(frames_of(features), delta=delta, unit_s_max=seconds_max)
    runs: list[list[int]] = []
    for t in range(count):
        alike = t and loop_cos(features[t].double().numpy(), features[t - 1].double().numpy()) > delta
        if alike and not 0 < seconds_max < t + 1 - runs[-1][0]:
            runs[-1].append(t)
        else:
            runs.append([t])
    assert spans([found]) == [(run[0], run[-1] + 1) for run in runs]
    for frame, run in zip(found, runs, strict=True):
        truth = torch.stack([features[t] for t in run]).double().mean(0)
        assert torch.allclose(frame.tokens.double(), truth, rtol=1e-5, atol=1e-5)
        assert frame.count == len(run)


def test_the_limit_holds_for_the_unit_that_a_frame_ends() -> None:
    a, b = frames_of([torch.ones(N, E)] * 2)
    assert MergeFrames(unit_s_max=2).merge(0, a, b) is not None
    assert MergeFrames(unit_s_max=2).merge(-NS, a, b) is None
    assert MergeFrames(unit_s_max=0).merge(-(10**6) * NS, a, b) is not None


def test_cosines_of_nothing_and_of_the_same() -> None:
    same = torch.randn(E)
    assert cosine(same, same) == pytest.approx(1.0, abs=1e-15)
    assert cosine(same, same) <= 1.0
    assert cosine(torch.zeros(E), same) == 0.0


@given(st.integers(1, 9), st.integers(0, 30))
def test_clips_are_of_one_size(size: int, count: int) -> None:
    lengths = [len(group) for group in cut(Clip(size, 0), frames_of(scenes([count])))]
    assert lengths == [size] * (count // size) + ([count % size] if count % size else [])
