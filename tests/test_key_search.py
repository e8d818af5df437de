"""Every backend of key search gives the rows that plain NumPy gives, in the same order."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_store import RECORDING, SECOND_NS, FakeStore
from hypothesis import given, settings
from hypothesis import strategies as st

from memdb.index import KEY_INDEXES, key_search, page_writer
from memdb.index.exact import unit_length
from memdb.index.faiss_index import FaissIndex, gpu_available, to_gpu
from memdb.index.key_search import KeySearch, search_keys
from memdb.index.key_table import KeyTable
from memdb.index.page_writer import index_recording
from memdb.schemas.errors import CorruptionError, MissingDependency, ModelError, UsageError

needs_gpu = pytest.mark.skipif(
    not gpu_available(), reason="the loaded FAISS has no GPU support or sees no GPU"
)
# Every backend obeys the same contract, the one on a GPU where there is one.
BACKENDS = [
    pytest.param(name, marks=[needs_gpu, pytest.mark.gpu] if name == "faiss-gpu" else [])
    for name in KEY_INDEXES
]


def naive(keys, query, k, *, sim="dot", mask=None):
    """Rows and fp64 scores by the definition, row by row."""
    if sim == "cos":
        keys = unit_length(keys)
        length = np.linalg.norm(query.astype(np.float64))
        query = (query / length).astype(np.float32) if length else query
    scores = [float((key.astype(np.float64) * query.astype(np.float64)).sum()) for key in keys]
    rows = [row for row in range(len(keys)) if (mask is None or mask[row]) and np.isfinite(keys[row]).all()]
    best = sorted(rows, key=lambda row: (-scores[row], row))[:k]
    return np.array(best, np.int64), np.array([scores[row] for row in best])


def random_keys(rng, n, d, *, copies=True):
    """Keys with outlier channels and, like a still scene, many rows that are equal bit for bit."""
    keys = rng.standard_normal((n, d)).astype(np.float16)
    keys[:, 0] *= 50
    if copies and n > 4:
        keys[rng.integers(0, n, n // 2)] = keys[rng.integers(0, n)]
    return keys


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 300),
    d=st.sampled_from([1, 3, 8, 64, 130]),
    k=st.integers(0, 40),
    sim=st.sampled_from(["dot", "cos"]),
    restrict=st.sampled_from(["all", "range", "mask", "sparse", "none"]),
)
def test_a_backend_gives_the_rows_of_plain_numpy(backend, seed, n, d, k, sim, restrict):
    rng = np.random.default_rng(seed)
    keys, query = random_keys(rng, n, d), rng.standard_normal(d).astype(np.float32)
    start, stop = sorted(rng.integers(0, n + 1, 2).tolist())
    allowed, mask = None, np.ones(n, bool)
    if restrict == "range":
        allowed = slice(start, stop)
        mask[:start], mask[stop:] = False, False
    elif restrict != "all":
        share = {"mask": 0.5, "sparse": 0.01, "none": 0.0}[restrict]
        allowed = mask = rng.random(n) < share
    found = search_keys(keys, query, k, sim=sim, allowed=allowed, backend=backend)
    rows, scores = naive(keys, query, k, sim=sim, mask=mask)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_come_in_the_order_of_their_rows(backend):
    keys = np.ones((500, 16), np.float16)
    found = search_keys(keys, np.ones(16, np.float32), 7, backend=backend)
    assert found.rows.tolist() == list(range(7))
    assert found.scores.tolist() == [16.0] * 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_difference_that_fp16_holds_decides(backend):
    keys = np.full((200, 64), 8, np.float16)
    keys[137, 5] = np.nextafter(np.float16(8), np.float16(9))
    assert search_keys(keys, np.ones(64, np.float32), 1, backend=backend).rows.tolist() == [137]


@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine_ignores_length_and_dot_does_not(backend):
    keys = np.array([[10, 1], [0.5, 0], [0, 0]], np.float16)
    query = np.array([3, 0], np.float32)
    assert search_keys(keys, query, 1, sim="dot", backend=backend).rows.tolist() == [0]
    found = search_keys(keys, query, 3, sim="cos", backend=backend)
    assert found.rows.tolist() == [1, 0, 2]
    np.testing.assert_allclose(
        found.scores, [1, 10 / np.sqrt(101), 0], atol=1e-3
    )  # a key of length 0 scores 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_not_finite_are_never_found(backend):
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((50, 8)).astype(np.float16)
    keys[3, 2], keys[7, 0] = np.inf, np.nan
    query = rng.standard_normal(8).astype(np.float32)
    for sim in ("dot", "cos"):
        found = search_keys(keys, query, 50, sim=sim, backend=backend)
        assert sorted(found.rows.tolist()) == [row for row in range(50) if row not in (3, 7)]
    with pytest.raises(ModelError, match="not finite"):
        search_keys(keys, np.full(8, np.nan, np.float32), 3, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sim", ["dot", "cos"])
def test_an_extended_index_is_the_index_of_all_keys(backend, sim):
    rng = np.random.default_rng(1)
    keys, query = random_keys(rng, 400, 24), rng.standard_normal(24).astype(np.float32)
    whole = KEY_INDEXES[backend].build(keys, sim=sim)
    grown = KEY_INDEXES[backend].build(keys[:0], sim=sim)
    for start, stop in ((0, 1), (1, 1), (1, 250), (250, 400)):
        grown.extend(keys[start:stop])
    assert grown.count == whole.count == 400
    for k in (1, 20, 400):
        np.testing.assert_array_equal(grown.search(query, k).rows, whole.search(query, k).rows)


def test_faiss_holds_the_bytes_of_the_keys():
    keys = np.random.default_rng(2).standard_normal((100, 32)).astype(np.float16)
    index = FaissIndex.build(keys)
    np.testing.assert_array_equal(index._stored().view(np.uint16), keys.view(np.uint16))
    assert index._index.reconstruct(42).tolist() == keys[42].astype(np.float32).tolist()


def test_nothing_heavy_is_loaded_before_it_is_used():
    script = (
        "import sys; import memdb.captions, memdb.index.key_search\n"
        "print([name for name in ('faiss', 'lancedb', 'pyarrow', 'torch') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_backend_is_named():
    with pytest.raises(UsageError, match="exact, faiss, faiss-flat"):
        search_keys(np.zeros((1, 2), np.float16), np.zeros(2, np.float32), 1, backend="annoy")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_search_keeps_to_time_and_to_the_layers_that_hold_a_block(tmp_path: Path, backend):
    store, rng = FakeStore(tmp_path), np.random.default_rng(3)
    held = []
    for number in range(40):
        holds = rng.random((3, 4)) < 0.7
        held.append(holds)
        store.add(keys=rng.standard_normal((3, 4, 16)).astype(np.float16), holds=holds)
        if number == 30:
            index_recording(store, RECORDING, flush=True)
    with KeyTable.open(store, RECORDING) as table:
        search = KeySearch(table, backend=backend)
        start_ns, end_ns = 9 * SECOND_NS, 21 * SECOND_NS
        in_time = (table.blocks["start_ns"] < end_ns) & (table.blocks["end_ns"] > start_ns)
        for layer in range(3):
            query = rng.standard_normal(16).astype(np.float32)
            mask = in_time & np.concatenate(held, axis=1)[layer]
            keys = np.concatenate([store.keys[RECORDING, number][layer] for number in range(40)])
            found = search.search(layer, query, 9, start_ns=start_ns, end_ns=end_ns)
            np.testing.assert_array_equal(found.rows, naive(keys, query, 9, mask=mask)[0])


def test_a_search_sees_units_that_came_since(tmp_path: Path):
    store, rng = FakeStore(tmp_path), np.random.default_rng(4)
    store.add(keys=rng.standard_normal((2, 5, 8)).astype(np.float16))
    table = KeyTable.open(store, RECORDING)
    search = KeySearch(table)
    query = np.ones(8, np.float32)
    search.search(0, query, 1)
    late = np.full((2, 1, 8), 9, np.float16)
    store.add(keys=late)
    table.refresh()
    assert search.search(0, query, 1).rows.tolist() == [5]
    assert search.search(1, query, 1).rows.tolist() == [5]
    table.close()


LAYER_BYTES = 300 * 16 * 2


@pytest.mark.parametrize("backend", ["exact", "faiss"])
@pytest.mark.parametrize("sim", ["dot", "cos"])
@pytest.mark.parametrize("room_bytes", [0, 2 * LAYER_BYTES, 3 * LAYER_BYTES])
def test_layers_without_room_are_searched_stretch_by_stretch(
    tmp_path: Path, monkeypatch, backend, sim, room_bytes
):
    """Whatever the room, the same rows in the same order; the layers that have room keep it."""
    monkeypatch.setattr(key_search, "STRETCH_BYTES", 1000)
    monkeypatch.setattr(page_writer, "PAGE_BLOCKS", 16)
    store, rng = FakeStore(tmp_path), np.random.default_rng(6)
    keys = np.stack([random_keys(rng, 300, 16) for _ in range(3)])  # many are equal, also between stretches
    for number in range(75):
        store.add(keys=keys[:, 4 * number : 4 * number + 4])
        if number == 60:
            index_recording(store, RECORDING)
    with KeyTable.open(store, RECORDING) as table:
        assert len(table.stretches(30)) > 5
        search = KeySearch(table, backend=backend, sim=sim, bytes_max=room_bytes)
        for _ in range(2):
            for layer in range(3):
                query, mask = rng.standard_normal(16).astype(np.float32), rng.random(300) < 0.8
                for k in (1, 9, 300):
                    found = search.search(layer, query, k, rows=mask)
                    rows, scores = naive(keys[layer], query, k, sim=sim, mask=mask)
                    np.testing.assert_array_equal(found.rows, rows)
                    np.testing.assert_allclose(found.scores, scores, rtol=1e-6, atol=1e-6)
        assert list(search._indexes) == list(range(room_bytes // LAYER_BYTES))


def test_a_recording_that_outgrows_its_room_is_searched_all_the_same(tmp_path: Path):
    store, rng = FakeStore(tmp_path), np.random.default_rng(7)
    keys = rng.standard_normal((2, 40, 8)).astype(np.float16)
    store.add(keys=keys[:, :10])
    with KeyTable.open(store, RECORDING) as table:
        search = KeySearch(table, bytes_max=2 * 12 * 8 * 2)
        query = rng.standard_normal(8).astype(np.float32)
        for start, stop in ((0, 10), (10, 12), (12, 20), (20, 40)):
            if start:
                store.add(keys=keys[:, start:stop])
                table.refresh()
            for layer in (0, 1):
                found = search.search(layer, query, 5)
                np.testing.assert_array_equal(found.rows, naive(keys[layer][:stop], query, 5)[0])
            assert sum(index.count for index in search._indexes.values()) <= 24
        assert not search._indexes


@pytest.mark.parametrize("room_bytes", [0, 1 << 20])
def test_damage_that_a_search_finds_takes_the_block_out_of_it(tmp_path: Path, monkeypatch, room_bytes):
    monkeypatch.setattr(key_search, "STRETCH_BYTES", 64)
    monkeypatch.setattr(page_writer, "PAGE_BLOCKS", 4)
    store = FakeStore(tmp_path)
    for _ in range(6):
        store.add(
            keys=np.full((1, 4, 8), -1, np.float16)
        )  # a zero key, as a lost one reads, would be the best
    index_recording(store, RECORDING)
    page = next((tmp_path / "keys").iterdir())
    data = bytearray(page.read_bytes())
    with KeyTable.open(store, RECORDING) as table:
        offset, _ = table._pages[2].layer_span(0)
    data[offset] ^= 1
    page.write_bytes(data)
    store.damaged.add((RECORDING, 2))  # its segment too: nobody holds these keys any more
    with KeyTable.open(store, RECORDING) as table:
        search = KeySearch(table, bytes_max=room_bytes)
        found = search.search(0, np.ones(8, np.float32), 24)
        assert found.rows.tolist() == [*range(8), *range(12, 24)]


@pytest.mark.parametrize("room_bytes", [0, 1 << 20])
def test_keys_that_the_disk_does_not_give_are_a_typed_error(tmp_path: Path, monkeypatch, room_bytes):
    store, release, hang = FakeStore(tmp_path), threading.Event(), [True]
    store.add(keys=np.ones((2, 5, 8), np.float16))
    with KeyTable.open(store, RECORDING) as table:
        read_rows = KeyTable.read_rows

        def hung(self, *args):
            if hang:
                release.wait()
                return None
            return read_rows(self, *args)

        monkeypatch.setattr(KeyTable, "read_rows", hung)
        search = KeySearch(table, bytes_max=room_bytes, deadline_s=0.1)
        for _ in range(2):
            with pytest.raises(CorruptionError, match="did not give it within"):
                search.search(0, np.ones(8, np.float32), 3)
        hang.clear()
        assert search.search(0, np.ones(8, np.float32), 3).rows.tolist() == [0, 1, 2]
        release.set()


@pytest.mark.skipif(gpu_available(), reason="this FAISS has a GPU")
def test_without_a_gpu_the_error_names_the_packages_and_their_cuda():
    index = FaissIndex.build(np.zeros((1, 2), np.float16))
    with pytest.raises(MissingDependency, match="uninstall faiss-cpu") as caught:
        to_gpu(index)
    for word in ("faiss-gpu", "faiss-gpu-cu12", "CUDA 12", "faiss-gpu-cuvs", "CUDA 13"):
        assert word in str(caught.value)
    with pytest.raises(MissingDependency, match="uninstall faiss-cpu"):
        KEY_INDEXES["faiss-gpu"].build(np.zeros((1, 2), np.float16))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["faiss", "faiss-flat"])
@pytest.mark.parametrize("sim", ["dot", "cos"])
def test_a_gpu_clone_gives_the_rows_of_the_cpu(backend, sim):
    rng = np.random.default_rng(5)
    keys, query = random_keys(rng, 5000, 64), rng.standard_normal(64).astype(np.float32)
    expected = {k: naive(keys, query, k, sim=sim)[0] for k in (1, 64, 3000)}
    index = to_gpu(KEY_INDEXES[backend].build(keys, sim=sim))
    assert index.on_gpu
    for k, rows in expected.items():
        np.testing.assert_array_equal(index.search(query, k).rows, rows)
    mask = rng.random(5000) < 0.3
    np.testing.assert_array_equal(
        index.search(query, 20, mask).rows, naive(keys, query, 20, sim=sim, mask=mask)[0]
    )
