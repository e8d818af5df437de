"""Stage 6: representative keys in pages, and the ways to search them.

Every backend gives the same rows in the same order as exact search; they differ in speed and memory.
"""

from __future__ import annotations

from memdb.index.exact import ExactIndex, KeyIndex
from memdb.index.faiss_index import FaissFlatIndex, FaissGpuIndex, FaissIndex

KEY_INDEXES: dict[str, type[KeyIndex]] = {
    "exact": ExactIndex,  # NumPy over the fp16 keys
    "faiss": FaissIndex,  # FAISS scalar quantiser over the same fp16 bytes: the fast one
    "faiss-flat": FaissFlatIndex,  # FAISS over fp32: twice the memory
    "faiss-gpu": FaissGpuIndex,  # the scalar quantiser cloned to a GPU; needs another wheel, see README
}
