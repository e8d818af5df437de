"""Key search by FAISS, whose fp16 scalar quantiser stores the very bytes of the pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from memdb.index.exact import Allowed, ExactIndex, KeyIndex, Keys
from memdb.schemas.errors import MissingDependency

_SPARE = 32  # candidates beyond k at first: enough unless many keys score alike
_GPU_K_MAX = 2048  # what FAISS's GPU top-k can return
_NO_GPU = (
    "the loaded FAISS has no GPU support or sees no GPU: run `pip uninstall faiss-cpu` first (all FAISS "
    "wheels own the same module), then `pip install faiss-gpu` or `faiss-gpu-cu12` (both CUDA 12), or "
    "`faiss-gpu-cuvs` (CUDA 13)"
)


class FaissIndex(KeyIndex):
    """Exact search by IndexScalarQuantizer QT_fp16 inside an IndexIDMap2, inner product."""

    def _start(self, size: int) -> None:
        faiss = _faiss()
        self._inner = self._make(faiss, size)
        self._index = faiss.IndexIDMap2(self._inner)  # wrapped while empty, as it must be
        self._gpu: Any = None

    def _make(self, faiss: Any, size: int) -> Any:
        index = faiss.IndexScalarQuantizer(size, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True  # fp16 has nothing to learn
        return index

    def _make_room(self, rows: int) -> Keys:
        # Filled in place, the codes are the fp16 bytes: no copy, and the result of add().
        self._inner.codes.resize((self.count + rows) * len(self._largest) * 2)
        return self._codes()[self.count :]

    def _codes(self) -> Keys:
        """A view of the codes of all keys, good until there is more room."""
        codes, d = self._inner.codes, len(self._largest)
        if not codes.size():
            return np.zeros((0, d), np.float16)
        view: Keys = _faiss().rev_swig_ptr(codes.data(), codes.size()).view(np.float16).reshape(-1, d)
        return view

    def _add(self, keys: Keys) -> None:
        if not len(keys):
            return
        self._inner.ntotal = self._index.ntotal = self.count + len(keys)
        _append(self._index.id_map, np.arange(self.count, self.count + len(keys), dtype=np.int64))
        self._index.construct_rev_map()
        self._gpu = None  # a copy that is out of date

    def _keys(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        return self._stored()[rows]

    def _stored(self) -> npt.NDArray[np.floating]:
        """(n, d): a view of the index's own copy of the keys, good until keys are added."""
        return self._codes()

    def _candidates(
        self, query: npt.NDArray[np.float32], k: int, slack: float, allowed: Allowed, rows: int
    ) -> npt.NDArray[np.int64]:
        wanted = min(k + _SPARE, rows)
        while True:
            scores, found = self._nearest(query, wanted, allowed)
            if scores is None:
                return self._exactly(query, k, slack, allowed, rows)
            # The last one tells whether a row that was left out could belong to the best.
            if wanted >= rows or scores[-1] < scores[k - 1] - slack:
                return np.asarray(found[scores >= scores[k - 1] - slack], np.int64)
            wanted = min(2 * wanted, rows)

    def _nearest(
        self, query: npt.NDArray[np.float32], wanted: int, allowed: Allowed
    ) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.int64]]:
        if self._gpu is not None:
            return self._nearest_on_gpu(query, wanted, allowed)
        faiss = _faiss()
        params = None if allowed is None else faiss.SearchParameters(sel=_selector(faiss, allowed))
        scores, found = self._index.search(query[None], wanted, params=params)
        return scores[0], np.asarray(found[0], np.int64)

    def _nearest_on_gpu(
        self, query: npt.NDArray[np.float32], wanted: int, allowed: Allowed
    ) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.int64]]:
        # FAISS on a GPU takes no selectors and returns at most 2,048 rows: such questions go to the exact
        # search.
        if allowed is not None or wanted > _GPU_K_MAX:
            return None, np.zeros(0, np.int64)
        scores, found = self._gpu.search(query[None], wanted)
        return scores[0], found[0]

    def _exactly(
        self, query: npt.NDArray[np.float32], k: int, slack: float, allowed: Allowed, rows: int
    ) -> npt.NDArray[np.int64]:
        exact = ExactIndex(self._stored().astype(np.float16, copy=False))
        return exact._candidates(query, k, slack, allowed, rows)

    @property
    def on_gpu(self) -> bool:
        return self._gpu is not None


class FaissFlatIndex(FaissIndex):
    """Exact search by IndexFlatIP: keys as fp32, twice the memory of QT_fp16."""

    value_bytes = 4

    def _make(self, faiss: Any, size: int) -> Any:
        return faiss.IndexFlatIP(size)

    def _make_room(self, rows: int) -> Keys:
        return np.empty((rows, len(self._largest)), np.float16)

    def _add(self, keys: Keys) -> None:
        _append(self._inner.codes, keys.astype(np.float32).view(np.uint8).reshape(-1))
        super()._add(keys)

    def _stored(self) -> npt.NDArray[np.floating]:
        faiss, size = _faiss(), len(self._largest)
        stored: npt.NDArray[np.float32] = faiss.rev_swig_ptr(self._inner.get_xb(), self.count * size)
        return stored.reshape(self.count, size)


class FaissGpuIndex(FaissIndex):
    """FaissIndex whose searches run on the first GPU. Raises MissingDependency where there is none."""

    def _start(self, size: int) -> None:
        if not gpu_available():
            raise MissingDependency(_NO_GPU)
        super()._start(size)

    def _candidates(
        self, query: npt.NDArray[np.float32], k: int, slack: float, allowed: Allowed, rows: int
    ) -> npt.NDArray[np.int64]:
        if not self.on_gpu:
            to_gpu(self)
        return super()._candidates(query, k, slack, allowed, rows)


def to_gpu(index: KeyIndex, device: int = 0) -> FaissIndex:
    """Clone a FAISS index to a GPU; searches without a selector run there from then on, until keys are added.

    Raises MissingDependency where the loaded FAISS has no GPU support or sees no GPU.
    """
    if not isinstance(index, FaissIndex):
        raise TypeError(f"only FAISS indexes go to a GPU, not {type(index).__name__}")
    faiss = _faiss()
    if not gpu_available():
        raise MissingDependency(_NO_GPU)
    resources = faiss.StandardGpuResources()
    clone = faiss.index_cpu_to_gpu(resources, device, index._inner)
    clone._memdb_resources = resources  # the clone uses them for as long as it lives
    index._gpu = clone
    return index


def gpu_available() -> bool:
    """Whether the loaded FAISS was built for GPUs and sees one."""
    faiss = _faiss()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingDependency("key search by FAISS needs it: pip install faiss-cpu") from None
    return faiss


def _append(vector: Any, values: npt.NDArray[Any]) -> None:
    """Add values to the end of a std::vector."""
    faiss = _faiss()
    size = vector.size()
    vector.resize(size + len(values))
    kept = faiss.rev_swig_ptr(vector.data(), vector.size())
    kept[size:] = values


def _selector(faiss: Any, allowed: slice | npt.NDArray[np.bool_]) -> Any:
    if isinstance(allowed, slice):
        return faiss.IDSelectorRange(allowed.start, allowed.stop)
    rows = np.flatnonzero(allowed)
    if len(rows) * 64 < len(allowed):  # few: a list is searched faster than bits
        return faiss.IDSelectorBatch(rows)
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
