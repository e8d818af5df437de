"""Contexts of encoding and answering against plain loops over tokens, in fp64 from the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdb.models.attention import sink_attention
from memdb.models.cache import AttentionProbe, CacheContext, RetrievalContext
from memdb.models.places import Places
from memdb.models.rotary import Rotary
from memdb.models.window import LayerKV, WindowContext

D, THETA, LAYERS = 8, 100.0, 2
SCALE = 1 / math.sqrt(D)
INV_FREQ = torch.tensor([THETA ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
FEW = settings(max_examples=40, deadline=None)


@dataclass
class Stream:
    """Queries (Hq, T, D), keys and values (H, T, D) of every layer, unturned."""

    layers: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def random(
        cls, T: int, *, heads: int = 4, kv_heads: int = 2, seed: int = 0, spread: float = 1.5
    ) -> Stream:
        random = torch.Generator().manual_seed(seed)

        def some(count: int) -> Tensor:
            return spread * torch.randn(count, T, D, generator=random)

        return cls([(some(heads), some(kv_heads), some(kv_heads)) for _ in range(LAYERS)])

    def kv(self, layer: int, start: int, stop: int) -> LayerKV:
        _, k, v = self.layers[layer]
        return LayerKV(k[:, start:stop], v[:, start:stop])

    def feed(self, context: object, start: int, stop: int) -> list[Tensor]:
        """One forward of tokens start..stop; the output of every layer (Hq, stop - start, D)."""
        context.begin(stop - start)  # type: ignore[attr-defined]
        outs = [
            context.attend(layer, q[:, start:stop], k[:, start:stop], v[:, start:stop], SCALE)  # type: ignore[attr-defined]
            for layer, (q, k, v) in enumerate(self.layers)
        ]
        context.end(stop - start)  # type: ignore[attr-defined]
        return outs

    def feed_all(self, context: object, cuts: Iterable[int]) -> list[Tensor]:
        """Forwards that end at each of `cuts`; the outputs joined, a layer each."""
        outs, at = [], 0
        for stop in cuts:
            outs.append(self.feed(context, at, stop))
            at = stop
        return [torch.cat(parts, 1) for parts in zip(*outs, strict=True)]

    def to(self, dtype: torch.dtype) -> Stream:
        return Stream([tuple(x.to(dtype) for x in layer) for layer in self.layers])  # type: ignore[misc]


def turned(x: Tensor, position: int) -> Tensor:
    """x (H, D) turned to a position, pairs (i, i + D/2)."""
    angle = position * INV_FREQ
    left, right = x.double().chunk(2, -1)
    return torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), -1)


def looked(
    q: Tensor, seen: Sequence[tuple[Tensor, Tensor, int]], scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Attention of one query q (Hq, D) over (k (H, D), v (H, D), distance) each: output (Hq, D), weights (Hq, n).

    `scaling` is the factor that a scaled rotation puts on query and key.
    """
    group = q.shape[0] // seen[0][0].shape[0]
    scores = torch.stack(
        [
            (turned(q, distance) * k.double().repeat_interleave(group, 0)).sum(-1) * SCALE * scaling**2
            for k, _, distance in seen
        ],
        -1,
    )
    weights = scores.softmax(-1)  # (Hq, n)
    values = torch.stack([v.double().repeat_interleave(group, 0) for _, v, _ in seen], 1)  # (Hq, n, D)
    return (weights[..., None] * values).sum(1), weights


def through_window(stream: Stream, n: int, W: int, T: int, scaling: float = 1.0) -> list[Tensor]:
    """Every token sees init tokens, at W - 1 at most, and what lies less than W back."""
    outs = []
    for q, k, v in stream.layers:
        rows = []
        for x in range(T):
            seen = [
                (k[:, j], v[:, j], min(x - j, W - 1) if x >= n else x - j)
                for j in range(x + 1)
                if j < n or x - j < W
            ]
            rows.append(looked(q[:, x], seen, scaling)[0])
        outs.append(torch.stack(rows, 1))
    return outs


def close(found: Sequence[Tensor], truth: Sequence[Tensor], bound: float = 2e-5) -> bool:
    return all(float((a.double() - b).abs().max()) <= bound for a, b in zip(found, truth, strict=True))


def rotary(scaling: float = 1.0) -> Rotary:
    return Rotary(INV_FREQ, scaling)


def cuts_of(n: int, T: int, sizes: Sequence[int]) -> list[int]:
    """The init prompt, then forwards of these sizes over and over up to T."""
    cuts, turn = [n], 0
    while cuts[-1] < T:
        cuts.append(min(T, cuts[-1] + sizes[turn % len(sizes)]))
        turn += 1
    return cuts


# Encoding


@FEW
@given(
    n=st.integers(1, 5),
    W=st.integers(1, 24),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    walk=st.integers(1, 8),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    scaling=st.sampled_from([1.0, 1.0, 1.2]),
)
def test_the_window_is_the_plain_loop(
    n: int, W: int, sizes: list[int], walk: int, heads: tuple[int, int], scaling: float
) -> None:
    """Whatever is fed at once, whatever is attended at once, before and after the window overflows."""
    T = 36
    stream = Stream.random(T, heads=heads[0], kv_heads=heads[1])
    context = WindowContext(rotary(scaling), W, walk_tokens=walk)
    found = stream.feed_all(context, cuts_of(n, T, sizes))
    assert close(found, through_window(stream, n, W, T, scaling))
    assert [kv.tokens for kv in context.local] == [min(W, T - n)] * LAYERS
    for layer in range(LAYERS):
        assert torch.equal(context.init[layer].k, stream.kv(layer, 0, n).k)
        last = stream.kv(layer, T - context.local[layer].tokens, T)
        assert torch.equal(context.local[layer].k, last.k)
        assert torch.equal(context.local[layer].v, last.v)


def test_a_position_of_ten_million_gives_the_bits_of_any_other() -> None:
    """Once the window has overflowed, only what is in it counts: not how long the stream is."""
    n, W, T = 3, 12, 60
    stream = Stream.random(T)
    outs = []
    for seen in (None, 10**7, 10**12):
        context = WindowContext(rotary(), W)
        stream.feed_all(context, cuts_of(n, 45, [6]))
        assert context.seen <= 2 * W + n  # it does not grow with the stream
        if seen is not None:
            context.seen = seen
        outs.append(stream.feed(context, 45, T))
        assert len(context.rotary.tables(0)[0]) <= 1024  # nor do the positions that are looked up
    assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(outs[0], other, strict=True))


def test_content_that_repeats_gives_the_same_bits_ever_after() -> None:
    n, W, period = 2, 10, 5
    lap = Stream.random(period, seed=1)
    start = Stream.random(n, seed=2)
    T = n + 12 * period
    stream = Stream(
        [
            tuple(torch.cat((a, *[b] * 12), 1) for a, b in zip(head, again, strict=True))  # type: ignore[misc]
            for head, again in zip(start.layers, lap.layers, strict=True)
        ]
    )
    found = stream.feed_all(WindowContext(rotary(), W), cuts_of(n, T, [period]))
    for out in found:
        laps = out[:, n:].split(period, 1)
        assert all(torch.equal(one, laps[-1]) for one in laps[4:])
        assert not torch.equal(laps[0], laps[-1])


# ReKV's released code counts the init tokens twice in the step in which they leave the window (profile `code`)


def through_released_window(stream: Stream, n: int, W: int, N: int, T: int) -> list[Tensor]:
    """Steps of N queries. A step that ends beyond W takes as many init tokens apart as it ends beyond, at most n:
    all its queries see those at W - 1, and those of its queries that are near enough see them in their place too.
    """
    outs = []
    for q, k, v in stream.layers:
        rows = [looked(q[:, x], [(k[:, j], v[:, j], x - j) for j in range(x + 1)])[0] for x in range(n)]
        for start in range(n, T, N):
            apart = min(n, max(0, start + N - W))
            for x in range(start, start + N):
                seen = [(k[:, j], v[:, j], W - 1) for j in range(apart)]
                seen += [(k[:, j], v[:, j], x - j) for j in range(x + 1) if x - j < W]
                rows.append(looked(q[:, x], seen)[0])
        outs.append(torch.stack(rows, 1))
    return outs


@FEW
@given(n=st.integers(1, 7), N=st.integers(2, 6), W=st.integers(7, 24), frames=st.sampled_from([1, 3, 64]))
def test_the_profile_code_counts_init_tokens_as_the_released_code_does(
    n: int, N: int, W: int, frames: int
) -> None:
    T = n + 8 * N
    stream = Stream.random(T)
    context = WindowContext(rotary(), W, walk_tokens=N, counts_init_twice=True)
    found = stream.feed_all(context, cuts_of(n, T, [N * frames]))
    truth = through_released_window(stream, n, W, N, T)
    assert close(found, truth)


@pytest.mark.parametrize(
    ("n", "N", "W", "twice"),
    [
        (3, 4, 12, {11: 3, 12: 2, 13: 1}),  # the step from 11 on ends at 15 and takes all three apart
        (
            5,
            4,
            11,
            {9: 2, 10: 2, 11: 1, 13: 2, 14: 1},
        ),  # that from 9 on takes two apart, that from 13 on the rest
    ],
)
def test_which_queries_read_init_tokens_twice(n: int, N: int, W: int, twice: dict[int, int]) -> None:
    """Hand-counted: by query, how many init tokens it reads twice; and the profiles differ there alone."""
    T = n + 8 * N
    counted = {}
    for start in range(n, T, N):
        apart = min(n, max(0, start + N - W))
        for x in range(start, start + N):
            if both := sum(x - j < W for j in range(apart)):
                counted[x] = both
    assert counted == twice
    stream = Stream.random(T)
    outs = [
        stream.feed_all(WindowContext(rotary(), W, walk_tokens=N, counts_init_twice=code), cuts_of(n, T, [N]))
        for code in (True, False)
    ]
    for code, fixed in zip(*outs, strict=True):
        differs = (code - fixed).abs().amax((0, 2)) > 1e-5
        assert torch.nonzero(differs)[:, 0].tolist() == sorted(twice)


@pytest.mark.parametrize("code", [True, False])
def test_of_a_published_frame_91_to_103_queries_read_init_tokens_twice(code: bool) -> None:
    """W = 15,000, N = 196, n0 = 13. Keys are 0, so that every look weighs the same and outputs count looks."""
    W, N, n, width = 15_000, 196, 13, 16
    start = n + 76 * N  # the step that ends beyond W
    assert start + N - W == 105
    context = WindowContext(Rotary(torch.ones(width // 2)), W, walk_tokens=N, counts_init_twice=code)
    init_v = torch.eye(n, width)[None]  # token j shows in channel j
    other = torch.zeros(1, start - n, width)
    other[..., width - 1] = 1  # all others in the last
    context.init = [LayerKV(torch.zeros(1, n, width), init_v)]
    context.local = [LayerKV(torch.zeros(1, start - n, width), other)]
    context.seen = start
    q, v = torch.zeros(1, N, width), torch.zeros(1, N, width)
    v[..., width - 1] = 1
    out = context.attend(0, q, torch.zeros(1, N, width), v, 1.0)[0].double()  # (N, width)
    others = torch.arange(start, start + N) - n + 1  # all of them lie within the window
    looks = (out[:, :n] / out[:, -1:] * others[:, None]).round()
    assert bool((looks >= 1).all())
    assert (looks == 2).sum(0).tolist() == ([91 + j for j in range(n)] if code else [0] * n)


# Answering


def line(places: list[int], end: int) -> Places:
    return Places.line(torch.tensor(places), end)


@FEW
@given(
    n=st.integers(0, 3),
    held=st.lists(st.integers(0, 9), min_size=LAYERS, max_size=LAYERS),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    window=st.sampled_from([None, 3, 6, 11, 40]),
    scaling=st.sampled_from([1.0, 1.2]),
)
def test_a_rebuilt_cache_is_the_plain_loop(
    n: int, held: list[int], sizes: list[int], window: int | None, scaling: float
) -> None:
    """[init | blocks, another number a layer | tokens fed in pieces], with and without a window over it."""
    stream = Stream.random(40)
    init = [stream.kv(layer, 0, n) for layer in range(LAYERS)]
    blocks = [stream.kv(layer, 5, 5 + count) if count else None for layer, count in enumerate(held)]
    context = CacheContext(rotary(scaling), init, blocks, window=window)
    assert context.lengths == [n + count for count in held]
    at = 20
    for size in sizes:
        found = stream.feed(context, at, at + size)
        for layer, count in enumerate(held):
            q, k, v = stream.layers[layer]
            order = [*range(n), *range(5, 5 + count), *range(20, at + size)]
            rows = []
            for i in range(size):
                x = n + count + at - 20 + i
                seen = []
                for j, token in enumerate(order[: x + 1]):
                    distance = x - j
                    if window is not None and j < n:
                        distance = min(distance, window - 1)
                    elif window is not None and distance >= window:
                        continue
                    seen.append((k[:, token], v[:, token], distance))
                rows.append(looked(q[:, at + i], seen, scaling)[0])
            assert close([found[layer]], [torch.stack(rows, 1)])
        at += size
    assert context.lengths == [n + count + sum(sizes) for count in held]


def test_tokens_at_given_places_see_what_stands_before_them() -> None:
    """Text between blocks: layer 0 holds blocks around both texts, layer 1 only behind them."""
    stream = Stream.random(30)
    init = [stream.kv(layer, 0, 2) for layer in range(LAYERS)]
    block_tokens = [[5, 6, 7, 8], [7, 8]]
    # places: init 0 1, text A, block, text B (two tokens), block
    block_places = [[3, 4, 7, 8], [5, 6]]
    text_places = [[2, 5, 6], [2, 3, 4]]
    ends = [9, 7]
    blocks = [
        LayerKV(*(stream.layers[layer][part][:, block_tokens[layer]] for part in (1, 2)))
        for layer in range(LAYERS)
    ]
    context = CacheContext(rotary(), init, blocks, places=list(map(line, block_places, ends)))
    context.place_next(list(map(line, text_places, ends)))
    text = stream.feed(context, 20, 23)
    after = stream.feed(context, 23, 25)  # follows at the end, where nothing is said
    for layer in range(LAYERS):
        q, k, v = stream.layers[layer]
        places = dict(
            zip(
                [0, 1, *block_tokens[layer], 20, 21, 22, 23, 24],
                [0, 1, *block_places[layer], *text_places[layer], ends[layer], ends[layer] + 1],
                strict=True,
            )
        )
        rows = []
        for token in range(20, 25):
            mine = places[token]
            seen = [(k[:, j], v[:, j], mine - p) for j, p in places.items() if p <= mine]
            rows.append(looked(q[:, token], seen)[0])
        assert close([torch.cat((text[layer], after[layer]), 1)], [torch.stack(rows, 1)])


@FEW
@given(held=st.lists(st.integers(0, 6), min_size=LAYERS, max_size=LAYERS), window=st.sampled_from([None, 5]))
def test_a_question_sees_what_each_layer_fetches_and_leaves_nothing(
    held: list[int], window: int | None
) -> None:
    stream = Stream.random(30)
    n, size = 2, 3
    init = [stream.kv(layer, 0, n) for layer in range(LAYERS)]
    asked: list[tuple[int, Tensor]] = []

    def fetch(layer: int, q: Tensor) -> LayerKV | None:
        asked.append((layer, q))
        return stream.kv(layer, 5, 5 + held[layer]) if held[layer] else None

    context = RetrievalContext(rotary(), init, fetch, window=window)
    found = stream.feed(context, 20, 20 + size)
    assert [layer for layer, _ in asked] == list(range(LAYERS))
    assert all(torch.equal(q, stream.layers[layer][0][:, 20 : 20 + size]) for layer, q in asked)  # unrotated
    blocks = [stream.kv(layer, 5, 5 + count) if count else None for layer, count in enumerate(held)]
    fresh = CacheContext(rotary(), init, blocks, window=window)
    assert all(torch.equal(a, b) for a, b in zip(found, stream.feed(fresh, 20, 20 + size), strict=True))
    assert context.lengths == [n + count for count in held]  # [init | retrieved] and no question
    fresh = CacheContext(rotary(), init, blocks, window=window)
    for at in (23, 24):  # from here on an ordinary cache
        pairs = zip(stream.feed(context, at, at + 1), stream.feed(fresh, at, at + 1), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert len(asked) == LAYERS


def test_a_probe_hears_the_last_row_of_every_forward() -> None:
    """L1's ears: mean over heads, layers and forwards, of the tokens in the span alone, wherever they lie."""
    stream = Stream.random(30)
    n, count = 2, 6
    init = [stream.kv(layer, 0, n) for layer in range(LAYERS)]
    blocks: list[LayerKV | None] = [stream.kv(layer, 5, 5 + count) for layer in range(LAYERS)]
    for layers in ([0, 1], [1]):
        context = CacheContext(rotary(), init, blocks)
        context.probe = AttentionProbe(layers, n, n + count)
        stream.feed(context, 20, 23)
        stream.feed(context, 23, 24)
        heard = []
        for layer in layers:
            q, k, v = stream.layers[layer]
            for token, x in ((22, n + count + 2), (23, n + count + 3)):
                order = [*range(n), *range(5, 5 + count), *range(20, token + 1)]
                seen = [(k[:, t], v[:, t], x - j) for j, t in enumerate(order)]
                heard.append(looked(q[:, token], seen)[1].mean(0)[n : n + count])
        truth = torch.stack(heard).mean(0)
        assert float((context.probe.mean().double() - truth).abs().max()) < 1e-6
    with pytest.raises(RuntimeError):
        AttentionProbe([0], 0, 4).mean()


# Half precision: queries, keys and values are rounded; bounds are about twice what was measured.


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.055), (torch.float16, 0.007)])
def test_windowed_attention_in_half_precision_is_near_the_truth(dtype: torch.dtype, bound: float) -> None:
    n, W, T = 4, 16, 60
    stream = Stream.random(T).to(dtype)
    found = stream.feed_all(WindowContext(rotary(), W), cuts_of(n, T, [6]))
    assert all(out.dtype == dtype for out in found)
    truth = through_window(stream, n, W, T)
    worst = max(float((a.double() - b).abs().max()) for a, b in zip(found, truth, strict=True))
    assert worst < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_of_init_tokens_keep_16_bits_in_half_precision(dtype: torch.dtype) -> None:
    """One channel of bfloat16 would round scores near 60 to halves, and weights by a third."""
    scores = torch.tensor([[[60.3, 60.11, 59.67, 60.9]]])  # (1, 1, 4)
    sink_v = torch.eye(4, D)[None].to(dtype)
    q, k, v = (torch.zeros(1, 1, D, dtype=dtype) for _ in range(3))
    mask = torch.zeros(1, 1, dtype=torch.bool)
    out = sink_attention(q, k, v, 1.0, mask, scores, sink_v)[0, 0, :4]
    truth = scores[0, 0].double().softmax(-1)
    assert float((out.double() - truth).abs().max()) < 3e-3


# Positions that grow with the stream


def test_far_positions_turn_as_the_table_does_without_one() -> None:
    """Beyond the table's end angles are computed for the positions at hand: the same bits."""
    from memdb.models.rotary import TABLE_POSITIONS_MAX, Rotary

    made = torch.Generator().manual_seed(0)
    rotary, wide = (Rotary(1e6 ** -(torch.arange(0, 64, 2) / 64)) for _ in range(2))
    x = torch.randn(2, 9, 64, generator=made)
    positions = torch.randint(0, TABLE_POSITIONS_MAX + 5_000, (9,), generator=made)
    top = TABLE_POSITIONS_MAX + 5_000
    found = rotary.rotate_at(x, positions, top)
    assert len(rotary._cos) == 0, "no table was made"
    cos, sin = wide.tables(top)
    left, right = x.chunk(2, -1)
    truth = x * cos[positions] + torch.cat((-right, left), -1) * sin[positions]
    assert torch.equal(found, truth)


@pytest.mark.parametrize("shift", [1_000, 3_528_000])
def test_x1_logits_do_not_depend_on_where_the_stream_stands(shift: int) -> None:
    """Query and key turned by the same more, up to ten hours of a 7B at half a frame a second: the same product."""
    from memdb.models.rotary import Rotary

    made = torch.Generator().manual_seed(1)
    rotary = Rotary(1e6 ** -(torch.arange(0, 128, 2) / 128))
    q, k = torch.randn(1, 50, 128, generator=made), torch.randn(1, 50, 128, generator=made)
    places = torch.randint(0, 5_000, (2, 50), generator=made)
    logits = [
        rotary.rotate_at(q, places[0] + by, 5_000 + by)[0]
        @ rotary.rotate_at(k, places[1] + by, 5_000 + by)[0].T
        for by in (0, shift)
    ]
    assert float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()) < 1e-5
